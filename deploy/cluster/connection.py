"""A Ray cluster: one that runs, or one of this machine alone. Ray is optional, and imported only where it is used."""

import argparse
import contextlib
import ipaddress
import os
import re
import signal
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deploy.common import runtime
from deploy.common.cli import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
INSTALL = "pip install -r requirements-cluster.txt"
# Ray's own switch for laptops: without it Ray listens on every address of a Linux machine, whatever it is told.
LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
WAIT = 5.0  # seconds for a cluster to answer
OBJECTS = 100 * 2**20  # bytes for what goes between processes: paths, rows and lines


def cluster(text: str) -> str:
    """Type of --cluster."""
    if not re.fullmatch(r"auto|local|ray://[^/]+:\d+", text):
        raise argparse.ArgumentTypeError(f"must be auto, local or ray://HOST:10001, not {text!r}")
    return text


@contextlib.contextmanager
def joined(address: str) -> Iterator[None]:
    """Within it this process drives a Ray cluster; whatever it has started there ends with the block.

    Args:
        address: `local` starts one of this machine alone, which listens on the loopback interface only and has no
            dashboard; `auto` takes the one that this machine belongs to (or RAY_ADDRESS names), `ray://HOST:10001` that
            of another machine.

    Raises:
        UserError: Ray is not installed, or there is no such cluster.
    """
    if address == "local":
        os.environ.update(LOOPBACK_ONLY)
    with importing(f"--cluster {address}"):
        import ray
    # Its handler of SIGTERM would end this process, its own processes left alone.
    ray._private.utils.set_sigterm_handler = lambda _: None
    options = {"logging_level": "error", "log_to_driver": False}
    options["runtime_env"] = {"env_vars": {"PYTHONPATH": str(ROOT)}}  # a copy of this repository on every machine
    if address == "local":
        options |= {"num_cpus": runtime.available_cores(), "include_dashboard": False, "object_store_memory": OBJECTS}
    try:
        try:
            _check_there_is_one(address)
            with _uninterrupted(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of Ray's client, which raises an error as well
                if address == "local":
                    ray._private.ray_constants.ENABLE_RAY_CLUSTER = False  # the switch, if Ray was imported before
                ray.init(address, **options)
            # A lost machine is told by the commands, in a line; Ray would print forty of its log.
            ray._private.worker.print_to_stdstream = lambda *_, **__: None
        except Exception as error:  # ConnectionError, RuntimeError and others
            advice = "start one, set RAY_AUTH_MODE as it has it (docs/en/cluster.md), or give --cluster local"
            ending = "" if address == "local" else f"; {advice}"
            raise UserError(f"--cluster {address}: no Ray cluster could be joined ({error}){ending}") from error
        if address == "local":
            _check_it_is_closed()
        yield
    finally:
        ray.shutdown()


def _check_it_is_closed() -> None:
    """Keep the token to this user, and end what listens on other addresses than the loopback interface's.

    Raises:
        UserError: Ray does, though told otherwise.
    """
    import ray

    with contextlib.suppress(OSError):  # there may be none
        (Path.home() / ".ray/auth_token").chmod(0o600)  # Ray writes it for all to read
    node = ray.util.get_node_ip_address()
    if not ipaddress.ip_address(node).is_loopback:
        raise UserError(f"--cluster local: this version of Ray listens on {node}; {INSTALL}")


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Within it SIGINT and SIGTERM wait: Ray that is interrupted while it starts leaves processes, or crashes."""
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number in came:
        signal.raise_signal(number)


def _check_there_is_one(address: str) -> None:
    """Raise an OSError if nothing listens where this cluster should be: Ray would try for half a minute and longer."""
    from ray._private.services import canonicalize_bootstrap_address

    if address == "auto":
        address = canonicalize_bootstrap_address(address) or ""
    place = re.fullmatch(r"(?:ray://)?(.+):(\d+)", address)
    if place:
        socket.create_connection((place[1].strip("[]"), int(place[2])), timeout=WAIT).close()


def check_it_is_there() -> None:
    """Raise a UserError if the cluster that this process drives is gone; of a ray:// one its client tells."""
    import ray

    if ray.util.client.ray.is_connected():
        return
    try:
        _check_there_is_one(ray.get_runtime_context().gcs_address)
    except (OSError, ray.exceptions.RayError) as error:
        raise UserError(f"the Ray cluster is gone ({error}); when it is there, the same command goes on") from error


@contextlib.contextmanager
def importing(option: str) -> Iterator[None]:
    """Within it what requirements-cluster.txt names is imported, for this option of a command.

    Raises:
        UserError: it is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise UserError(f"{option}: cannot import what it needs ({error}); {INSTALL}") from error


def answer(reference: Any) -> Any:
    """What a call of an actor returns.

    Raises:
        UserError: which it has raised.
        RuntimeError: it has raised something else, whose traceback is the message.
        ray.exceptions.RayError: the actor or its machine has ended, or cannot be reached.
    """
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, UserError) else RuntimeError(str(error))) from None


def places(cpus: int, gpus: float) -> int:
    """How many processes, each with so many cores and GPUs, the machines of the cluster hold at a time.

    Raises:
        UserError: not one.
    """
    import ray

    found = 0
    for node in ray.nodes():
        has = node["Resources"] if node["Alive"] else {}
        by_gpus = [has.get("GPU", 0) / gpus] if gpus else []
        found += int(min([has.get("CPU", 0) / cpus, *by_gpus]) + 1e-6)
    if not found:
        raise UserError(f"--cpus {cpus} --gpus {gpus:g}: no machine of the cluster has that many; ask for less")
    return found
