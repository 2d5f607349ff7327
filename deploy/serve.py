"""Serve exported models over HTTP: python deploy/serve.py --models ./results/inference --host 127.0.0.1 --port 8866

Needs requirements-serve.txt; no training code. A page to try it is at /, the description of the API at /docs.
"""

import argparse
import contextlib
import os
import re
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script: the folder above deploy/

from deploy.backends import Backend, Options, add_runtime, asked_for, load_exported
from deploy.common.cli import ArgumentParser, UserError, non_negative_float, positive_int, run_main
from deploy.description import read_description


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description="Serve exported models over HTTP, with a page to try them.")
    parser.add_argument(
        "--models",
        default="./results/inference",
        help="exported models, with commas between them; a model is served under its category, NAME=FOLDER gives it "
        "another name (%(default)s)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all (%(default)s)")
    parser.add_argument("--port", type=port, default=8866, help="0: any that is free (%(default)s)")
    add_runtime(parser)
    parser.add_argument("--max_batch_size", type=positive_int, default=8, help="pictures a run (%(default)s)")
    parser.add_argument(
        "--max_wait_ms",
        type=non_negative_float,
        default=5.0,
        help="how long a picture waits for others that are on their way to join its run (%(default)s)",
    )
    parser.add_argument(
        "--queue_size", type=positive_int, default=64, help="pictures in progress per model; beyond: 503 (%(default)s)"
    )
    parser.add_argument(
        "--max_upload_mb", type=positive_int, default=10, help="size of a request; beyond: 413 (%(default)s)"
    )
    parser.add_argument(
        "--max_inflight_mb",
        type=positive_int,
        default=256,
        help="size of all requests that are coming or waiting, at least that of one; beyond: 503 (%(default)s)",
    )
    parser.add_argument(
        "--max_pixels", type=positive_int, default=32_000_000, help="of a picture; beyond: 422 (%(default)s)"
    )
    parser.add_argument(
        "--upload_seconds",
        type=positive_int,
        default=30,
        help="that a request may take to come, beyond: 408; and the end, after SIGTERM (%(default)s)",
    )
    parser.add_argument(
        "--allow_origins",
        type=origins,
        default=[],
        metavar="ORIGINS",
        help="whose pages may post pictures and read the answers, beside the service's own: "
        "https://name with commas between them, or * for all (none)",
    )
    parser.add_argument("--verbose", action="store_true", help="log requests, say what the runtime set-up chose")
    return parser.parse_args()


def port(text: str) -> int:
    """Type of --port."""
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 65535, not {text!r}")
    return int(text)


def origins(text: str) -> list[str]:
    """Type of --allow_origins."""
    found = text.split(",")
    for origin in found:
        if not re.fullmatch(r"\*|https?://[^/\s]+", origin):
            raise argparse.ArgumentTypeError(f"must be like https://name or http://name:8000, or *, not {origin!r}")
    return found


@contextlib.contextmanager
def without_disk() -> Iterator[None]:
    """Within it folders that cannot be made are done without.

    Paddle makes one for data sets when it is imported, in HOME or where temporary files go, and fails where neither can
    be written to.
    """
    make, where = os.makedirs, tempfile.tempdir

    def make_or_not(*args: Any, **options: Any) -> None:
        with contextlib.suppress(OSError):
            make(*args, **options)

    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        tempfile.tempdir = "/"  # taken at its word
    os.makedirs = make_or_not
    try:
        yield
    finally:
        os.makedirs, tempfile.tempdir = make, where


def end(*_: object) -> NoReturn:
    """At SIGTERM: end with code 0, wherever the process is, and leave no moment in which a further one could kill it.

    There is nothing left to put away: before uvicorn runs nothing was taken on, after it all is answered.
    """
    os._exit(0)


def main() -> None:
    args = parse_args()
    # uvicorn answers what it has taken on, then hands the signal back; without a handler it would kill the process.
    signal.signal(signal.SIGTERM, end)
    folders = named_folders(args.models, args.backend)
    listener = listen(args.host, args.port)
    with without_disk():
        options = asked_for(args, (1, args.max_batch_size))
    from deploy.service.app import ServedModel, create_app
    from deploy.service.batching import Batcher
    from deploy.service.connections import Server
    from deploy.service.uploads import Limits

    models = {}
    for name, (folder, description) in folders.items():
        model = load(folder, description, args.backend, options)
        batcher = Batcher(model.run, args.max_batch_size, args.max_wait_ms / 1000, args.queue_size)
        models[name] = ServedModel(description, batcher)
    signal.signal(signal.SIGTERM, end)  # once more: Paddle has put its own in place, which kills the process
    limits = Limits(
        upload_bytes=args.max_upload_mb * 2**20,
        held_bytes=max(args.max_inflight_mb, args.max_upload_mb) * 2**20,
        upload_seconds=args.upload_seconds,
        pixels=args.max_pixels,
    )
    server = Server(create_app(models, limits, args.allow_origins), args.upload_seconds, args.verbose)
    host, bound = listener.getsockname()[:2]
    print(f"serving {', '.join(models)} at http://{f'[{host}]' if ':' in host else host}:{bound}", flush=True)
    server.run([listener])


def named_folders(models: str, backend: str) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Folder and description of each exported model in `--models`, by the name it is served under.

    Raises:
        UserError: no exported model there; a name twice, or one that does not fit into an address.
    """
    named: dict[str, tuple[Path, dict[str, Any]]] = {}
    for entry in models.split(","):
        name, given, folder = entry.partition("=")
        description = read_description(Path(folder if given else entry), backend)
        if not given:
            name, folder = description["category"], entry
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise UserError(f"--models {entry}: {name!r} does not fit into an address; use letters, digits and . _ -")
        if name in named:
            raise UserError(f"--models: two are called {name}; name one of them otherwise: other={folder}")
        named[name] = Path(folder), description
    return named


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address.

    Raises:
        UserError: it is taken, or not this machine's.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: cannot listen there ({error.strerror})") from error


def load(folder: Path, description: dict[str, Any], backend: str, options: Options) -> Backend:
    """The model of an exported folder, which has run few pictures and many: no client waits for a first time."""
    import numpy as np

    model = load_exported(folder, backend, options)
    for pictures in {1, min(2, options.max_batch_size), options.max_batch_size}:  # 2: for those between
        model.run(np.zeros((pictures, 3, *description["input_size"]), np.float32))
    return model


if __name__ == "__main__":
    run_main(main, "-r requirements-serve.txt")
