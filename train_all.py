"""Train every category over all devices, then evaluate them: what train.sh calls.

A pool with a thread per job takes the categories in turn; each trains in a process of its own, on a device of its own.
The pool is Python's: what schedulers such as GNU parallel add to it we do not need, and an epoch and a loss a category,
or going on where it stopped, they do not know.
"""

import argparse
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from datasets.mvtec import MVTEC_CATEGORIES, list_categories
from deploy.common import runtime
from deploy.common.cli import UserError, positive_int, run_main
from deploy.common.files import make_folder
from utils.config import Config, load_config
from utils.history import EpochRow, best_row, finished
from utils.log import fitted
from utils.options import add_data, experiment_parser
from utils.results import experiment_folder, figure

OUTPUT = "output.log"  # in a category's folder: all that its training printed
GRACE = 10  # seconds that a training has to end by itself when it is interrupted
# Becomes the script argv[2:], which Linux kills when its starter, process argv[1], ends, be it by kill -9: a training
# that was left alone would keep its folder from the next train.sh. Code between fork and exec is no way to ask for it
# where there are threads. 1 is PR_SET_PDEATHSIG; the starter may have ended before.
TIED = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def parse_args() -> argparse.Namespace:
    parser = experiment_parser("Train every category under --data over all devices, then evaluate them.")
    add_data(parser)
    parser.add_argument("--epochs", type=positive_int, help="at most; instead of the config's, and of its steps")
    parser.add_argument("--gpus", type=cards, metavar="N,N", help="cards to train on (all that there are)")
    parser.add_argument("--jobs", type=positive_int, metavar="N", help="categories at a time (one a card, or one)")
    return parser.parse_args()


def cards(text: str) -> list[str]:
    """Type of an option that names cards as CUDA_VISIBLE_DEVICES does."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"must be the numbers of cards, such as 0,1, not {text!r}")
    return names


def main() -> int:
    args = parse_args()
    if not hasattr(signal, "SIGHUP"):  # Windows, which can neither tie processes nor interrupt them like this
        raise UserError("train_all.py: needs Linux or macOS; elsewhere train.py trains one category at a time")
    config = load_config(args.config, args.override, epochs=args.epochs)
    names = find_categories(Path(args.data))
    folder = experiment_folder(args.exp_dir)
    environ = dict(os.environ)  # before import_paddle() adds what is meant for one process alone
    runtime.import_paddle()  # before anything imports paddle
    devices = choose_devices(args.gpus, args.jobs)[: len(names)]
    overrides = [*args.override, *([f"epochs={args.epochs}"] if args.epochs else [])]
    options = ["-cfg", args.config, "--data", args.data, "--exp_dir", args.exp_dir]
    options += [word for override in overrides for word in ("-o", override)]

    sys.stdout.reconfigure(line_buffering=True)  # a log shows each line at once
    for number in (signal.SIGINT, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, signal.default_int_handler)
    with Board(names, alone=len(devices) == 1) as board:
        failures = Trainings(config, folder, options, devices, environ, board).run(names)
    for name, reason in failures.items():
        print(f"train.sh: {name} failed: {reason}; see {folder / name}", file=sys.stderr)
    arguments, environ = on_device(devices[0], environ)
    evaluation = subprocess.run([*script("eval.py"), *options, "-cat", "all", *arguments], env=environ)
    return 1 if failures else evaluation.returncode


def find_categories(data: Path) -> list[str]:
    """The published fifteen that have a folder, then the others; those that are not there are named on stderr.

    Raises:
        UserError: no such folder, or no category in it.
    """
    own = [name for name in list_categories(data) if name not in MVTEC_CATEGORIES]
    missing = [name for name in MVTEC_CATEGORIES if not (data / name).is_dir()]
    if missing:
        print(f"train.sh: skipped, no folder under {data}: {', '.join(missing)}", file=sys.stderr)
    return [name for name in MVTEC_CATEGORIES if name not in missing] + own


def choose_devices(gpus: list[str] | None, jobs: int | None) -> list[str | None]:
    """A device for each job: a card as in CUDA_VISIBLE_DEVICES, or None for Paddle's choice.

    Args:
        gpus: the cards to use; None: all that Paddle sees.
        jobs: how many jobs; None: one a card, or one. More jobs than cards share them.
    """
    devices = gpus or visible_gpus() or [None]
    return [devices[i % len(devices)] for i in range(jobs or len(devices))]


def visible_gpus() -> list[str]:
    """The cards that Paddle can use, named as in CUDA_VISIBLE_DEVICES."""
    count = runtime.gpu_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else [str(number) for number in range(count)]


def on_device(gpu: str | None, environ: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """Options and environment of a script that is to use the device."""
    if gpu is None:
        return [], environ
    # Without the option a wrong number would train on the CPU.
    return ["--device", "gpu"], {**environ, "CUDA_VISIBLE_DEVICES": gpu}


def script(name: str) -> list[str]:
    """The command that runs a script of this repository until this process ends."""
    return [sys.executable, "-c", TIED, str(os.getpid()), str(Path(__file__).with_name(name))]


def trained_so_far(folder: Path, config: Config) -> list[EpochRow]:
    """The epochs of the training in a category's folder; none if there is nothing to go on from.

    Raises:
        UserError: they were trained under another configuration, or the checkpoint is damaged.
    """
    from utils.checkpoint import history_of, load_checkpoint  # they import paddle, which main() sets up first

    path = folder / "last.pdparams"
    if not path.exists():
        return []
    checkpoint = load_checkpoint(path)
    history = history_of(checkpoint, path)
    trained = checkpoint.get("config", {})
    wanted = {key: value for key, value in config.as_dict().items() if value is not None}  # None: training finds it
    changed = [key for key, value in wanted.items() if trained.get(key, value) != value]
    if changed:
        was, now = (", ".join(f"{key} {values[key]}" for key in changed) for values in (trained, config.as_dict()))
        raise UserError(
            f"{path}: was trained with {was}, the config says {now}; "
            "choose another dir_name, or move this folder away to train it anew"
        )
    return history


class Board:
    """What the categories do: on a terminal a line each that is rewritten; elsewhere plain lines, one after another."""

    def __init__(self, names: Sequence[str], alone: bool) -> None:
        """`alone`: one category trains at a time, whose lines a terminal shows too."""
        from tqdm import tqdm  # here, so that main() can say where packages are missing

        self._write = tqdm.write
        self._terminal = sys.stdout.isatty()
        self._alone = alone
        self._width = max(map(len, names))
        self._bars = {
            name: tqdm(bar_format="{desc}", position=i, file=sys.stdout, disable=not self._terminal)
            for i, name in enumerate(names)
        }
        for name in names:
            self.show(name, "queued")

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, *_: object) -> None:
        for bar in self._bars.values():
            bar.close()

    def show(self, name: str, state: str) -> None:
        """The category is in another state."""
        line = f"{name:{self._width}}  {state}"
        if self._terminal:
            self._bars[name].set_description_str(line)
        else:
            self._write(line)

    def printed(self, name: str, line: str) -> None:
        """The category's training printed a line."""
        if self._terminal:
            self.show(name, f"running  {line.removeprefix(name).strip()}")
        if self._alone or not self._terminal:
            line = line if line.startswith(name) else f"{name}  {line}"
            self._write(fitted(line) if self._terminal else line)


class Trainings:
    """The processes that train."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        options: list[str],
        devices: list[str | None],
        environ: dict[str, str],
        board: Board,
    ) -> None:
        """
        Args:
            config: what `options` make train.py read.
            folder: of the experiment.
            options: of train.py, without the category.
            devices: of each job, see `choose_devices`.
            environ: of the processes.
            board: where they are shown.
        """
        self._config, self._folder, self._options, self._board = config, folder, options, board
        # The processes share the cores and the memory for features as those of paddle.distributed.launch do.
        self._environ = {**environ, "PADDLE_LOCAL_SIZE": str(len(devices))}
        self._jobs = len(devices)
        self._free: SimpleQueue[str | None] = SimpleQueue()
        for device in devices:
            self._free.put(device)
        self._lock = threading.Lock()  # of the two below
        self._processes: list[subprocess.Popen] = []
        self._stopped = False

    def run(self, names: Sequence[str]) -> dict[str, str]:
        """Train the categories; if this is interrupted, so are they.

        Returns:
            why those failed that did.
        """
        with ThreadPoolExecutor(self._jobs) as pool:
            try:
                reasons = pool.map(self._train, names)
                return {name: reason for name, reason in zip(names, reasons, strict=True) if reason}
            except KeyboardInterrupt:
                self._stop()
                raise

    def _stop(self) -> None:
        """End all processes: they are asked, and killed if they take too long or the user asks again."""
        with self._lock:
            self._stopped = True
        for process in self._processes:
            process.send_signal(signal.SIGINT)
        try:
            for process in self._processes:
                process.wait(GRACE)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            for process in self._processes:
                process.kill()

    def _train(self, name: str) -> str | None:
        """Train a category, unless it is finished; return why it failed if it did."""
        gpu = self._free.get()
        try:
            reason = self._train_on(gpu, name)
        except (UserError, OSError) as error:
            reason = str(error)
        except Exception as error:  # one that nobody has thought of; it would end the other categories too
            reason = f"unexpected {error!r}"
        finally:
            self._free.put(gpu)
        if reason:
            self._board.show(name, "stopped" if self._stopped else f"failed: {reason}")
        return reason

    def _train_on(self, gpu: str | None, name: str) -> str | None:
        folder = make_folder(self._folder / name)
        history = trained_so_far(folder, self._config)
        if not finished(history, self._config):
            reason = self._run_process(gpu, name, bool(history), folder)
            if reason:
                return reason
            history = trained_so_far(folder, self._config)
        best = best_row(history)
        self._board.show(
            name,
            f"done  image AUROC {figure(best.image_auroc)}, pixel AUROC {figure(best.pixel_auroc)} "
            f"(epoch {best.epoch} of {len(history)})",
        )
        return None

    def _run_process(self, gpu: str | None, name: str, resume: bool, folder: Path) -> str | None:
        arguments, environ = on_device(gpu, self._environ)
        command = [*script("train.py"), *self._options, "-cat", name, *arguments]
        with self._lock:
            if self._stopped:
                return "not started"
            process = subprocess.Popen(
                command + ["--resume"] * resume,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,  # Ctrl-C of the terminal comes from _stop() alone, once
            )
            self._processes.append(process)
        self._board.show(name, ("going on" if resume else "started") + (f" on GPU {gpu}" if gpu else ""))
        last = ""
        with process:
            for line in process.stdout:
                # Opened anew each time: a training that starts puts the folder of an earlier one aside.
                with open(make_folder(folder) / OUTPUT, "a", encoding="utf-8") as output:
                    output.write(line)
                if line.strip():
                    last = line.strip()
                    if not self._stopped:  # then it says how that one training goes on
                        self._board.printed(name, line.rstrip())
        if process.returncode < 0:
            return f"ended by {signal.Signals(-process.returncode).name} after: {last}"
        if process.returncode:
            return last or f"exit code {process.returncode}, nothing printed"
        return None


if __name__ == "__main__":
    run_main(main)
