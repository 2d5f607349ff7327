"""Set up the process, import paddle, choose the device.

Only defaults are set: an environment variable that the user has set is never changed.
"""

import contextlib
import io
import math
import os
import signal
import sys
import threading
import warnings
from pathlib import Path

from deploy.common.cli import UserError


def import_paddle(verbose: bool = False) -> dict[str, str]:
    """Set thread count, MKL's code path and quiet logs in the environment, then import paddle.

    Every entry point calls it before anything else imports paddle.

    Returns:
        the variables that matter and their values, as printed on stderr when `verbose`.
    """
    threads = max(1, available_cores() // local_processes())
    defaults = {
        # Paddle's CPU build starts with one thread.
        "OMP_NUM_THREADS": str(threads),
        # Paddle's start-up notes are INFO and WARNING lines of glog.
        "GLOG_minloglevel": "2",
    }
    path = mkl_code_path(cpu_flags())
    if path:
        defaults["MKL_DEBUG_CPU_TYPE"] = path
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    # Paddle's own notes, which no user of these commands can act on
    warnings.filterwarnings("ignore", message="No ccache found")
    warnings.filterwarnings("ignore", message="When training, we now always track")
    warnings.filterwarnings("ignore", module=r"PIL\.")  # odd metadata, on which no pixel depends
    import numpy.random  # noqa: F401  numpy 2.4 does so when it is first used; after paddle 2.6 that crashes

    notes = io.StringIO()
    with contextlib.redirect_stderr(notes), _KeepSigterm():
        import paddle  # noqa: F401
    for line in notes.getvalue().splitlines():
        if "OMP_NUM_THREADS" not in line:  # Paddle warns of more than one thread; its MKL build is made for it
            print(line, file=sys.stderr)
    chosen = {name: os.environ[name] for name in defaults}
    if verbose:
        print("runtime: " + " ".join(f"{k}={v}" for k, v in chosen.items()), file=sys.stderr)
    return chosen


class _KeepSigterm:
    """An import hook that finds nothing, and puts Python's handler of SIGTERM back with every module that is imported.

    Half-way through its import Paddle puts one in place that prints a stack.
    """

    def __init__(self) -> None:
        self._handler = signal.getsignal(signal.SIGTERM)

    def find_spec(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():  # the only one that may
            signal.signal(signal.SIGTERM, self._handler)

    def __enter__(self) -> None:
        sys.meta_path.insert(0, self)

    def __exit__(self, *_: object) -> None:
        sys.meta_path.remove(self)
        self.find_spec()


def local_processes() -> int:
    """How many processes paddle.distributed.launch or train_all.py runs on this machine; 1 without them."""
    return max(1, int(os.environ.get("PADDLE_LOCAL_SIZE", "1")))


def available_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may use: its affinity, lowered by a cgroup (v2 or v1) CPU quota."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    try:
        if (cgroup / "cpu/cpu.cfs_quota_us").exists():
            quota = (cgroup / "cpu/cpu.cfs_quota_us").read_text().strip()
            limits = [(quota, (cgroup / "cpu/cpu.cfs_period_us").read_text())]
        else:
            limits = [(folder / "cpu.max").read_text().split() for folder in _cgroups(cgroup, "cpu.max")]
        for quota, period in limits:
            if quota not in ("max", "-1"):
                cores = min(cores, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):
        pass  # no cgroup limit to read: the affinity stands
    return max(cores, 1)


def _cgroups(root: Path, file: str) -> list[Path]:
    """Folders of this process's cgroup (v2) and of those above it that hold the file: a limit may be set in any."""
    own = Path("/proc/self/cgroup").read_text().partition("::")[2].strip().lstrip("/")
    return [folder for folder in (root / own, *(root / own).parents) if (folder / file).is_file()]


def available_memory(cgroup: Path = Path("/sys/fs/cgroup"), meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes of main memory that this process can still take, a cgroup (v2) limit included."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        free = 4 * 2**30  # not Linux: a careful guess
    try:
        for folder in _cgroups(cgroup, "memory.max"):
            limit = (folder / "memory.max").read_text().strip()
            if limit != "max":
                free = min(free, int(limit) - int((folder / "memory.current").read_text()))
    except (OSError, ValueError):
        pass  # no cgroup limit to read
    return max(free, 0)


def peak_memory() -> int | None:
    """The most bytes of main memory that this process has held so far; None on Windows, which has another interface."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """Vendor and instruction set names of the first core; empty where Linux does not tell."""
    flags: set[str] = set()
    try:
        text = cpuinfo.read_text()
    except OSError:
        return flags
    for line in text.partition("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("vendor_id", "flags"):
            flags.update(value.split())
    return flags


def mkl_code_path(flags: set[str]) -> str | None:
    """MKL_DEBUG_CPU_TYPE for an AMD CPU, None where MKL chooses well by itself.

    The MKL inside the Paddle wheel takes its slowest path on CPUs that are not Intel's: a 2048 x 2048
    matmul on 2 threads ran at 85 GFLOP/s without, 213 with 5 (AVX2) and 410 with 7 (AVX-512).
    """
    if "AuthenticAMD" not in flags:
        return None
    if {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= flags:
        return "7"
    if {"avx2", "fma"} <= flags:
        return "5"
    return None


def gpu_count() -> int:
    """How many GPUs Paddle can use."""
    import paddle

    return paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0


def select_device(name: str = "auto") -> str:
    """Make Paddle use a device and return its name, `cpu` or `gpu:N`.

    Args:
        name: `auto` (the first GPU if Paddle can use one, else the CPU), `cpu`, `gpu` or `gpu:N`.

    Raises:
        UserError: no such device.
    """
    import paddle

    count = gpu_count()
    if name == "auto":
        name = "gpu" if count else "cpu"
    if name == "gpu":
        # paddle.distributed.launch tells each process which card is its own
        name = f"gpu:{os.environ.get('FLAGS_selected_gpus', '0').split(',')[0]}"
    if name == "cpu":
        paddle.set_device("cpu")
        return name
    kind, _, index = name.partition(":")
    if kind != "gpu" or not index.isdigit():
        raise UserError(f"--device {name}: must be auto, cpu, gpu or gpu:N")
    if int(index) >= count:
        raise UserError(f"--device {name}: Paddle sees {count} GPU(s) here; use --device cpu or see README.md")
    paddle.set_device(name)
    return name
