"""Train every category over all devices, then evaluate them: what train.sh calls.

A pool with a thread per job takes the categories in turn; each trains in a process of its own, on a device of its own.
The pool is Python's: what schedulers such as GNU parallel add to it we do not need, and an epoch and a loss a category,
or going on where it stopped, they do not know.
"""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from datasets.mvtec import MVTEC_CATEGORIES, list_categories
from deploy.cluster.connection import cluster, joined
from deploy.common import runtime
from deploy.common.cli import UserError, non_negative_float, positive_int, run_main
from deploy.common.files import make_folder
from utils.config import Config
from utils.grid import Job, grid_table, make_grid
from utils.history import EpochRow, best_row, finished
from utils.log import fitted
from utils.options import PUBLISHED_CONFIG, add_data, experiment_parser
from utils.results import experiment_folder, figure
from utils.runs import LocalRuns, Runs, on_device, tied

OUTPUT = "output.log"  # in a category's folder: all that its training printed


def parse_args() -> argparse.Namespace:
    parser = experiment_parser("Train every category under --data over all devices, then evaluate them.", several=True)
    add_data(parser)
    parser.add_argument("--epochs", type=positive_int, help="at most; instead of the config's, and of its steps")
    parser.add_argument(
        "--seeds", type=seeds, metavar="N,N", help="train with each; with them, or several -cfg, a table ends it"
    )
    parser.add_argument(
        "--gpus", metavar="N,N", help="cards to train on (all that there are); with --cluster a category's share, 0.25"
    )
    parser.add_argument("--jobs", type=positive_int, metavar="N", help="categories at a time (one a card, or one)")
    parser.add_argument(
        "--cluster", type=cluster, help="train on a Ray cluster: auto, local or ray://HOST:10001 (docs/en/cluster.md)"
    )
    parser.add_argument("--cpus", type=positive_int, help="with --cluster: a category's cores (1)")
    args = parser.parse_args()
    if args.cpus and not args.cluster:
        parser.error("argument --cpus: means nothing without --cluster; OMP_NUM_THREADS sets the threads")
    try:
        args.gpus = non_negative_float(args.gpus or "0") if args.cluster else args.gpus and cards(args.gpus)
    except argparse.ArgumentTypeError as error:
        parser.error(f"argument --gpus: {error}")
    return args


def cards(text: str) -> list[str]:
    """The names of cards in an option, as CUDA_VISIBLE_DEVICES has them."""
    names = [name.strip() for name in text.split(",")]
    if not all(re.fullmatch(r"\d+|(GPU|MIG)-.+", name) for name in names):
        raise argparse.ArgumentTypeError(f"without --cluster must be the numbers of cards, such as 0,1, not {text!r}")
    return names


def seeds(text: str) -> list[int]:
    """Type of --seeds."""
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"must be whole numbers with commas between them, not {text!r}")
    return sorted({int(seed) for seed in text.split(",")})


def main() -> int:
    args = parse_args()
    if not hasattr(signal, "SIGHUP"):  # Windows, which can neither tie processes nor interrupt them like this
        raise UserError("train_all.py: needs Linux or macOS; elsewhere train.py trains one category at a time")
    overrides = [*args.override, *([f"epochs={args.epochs}"] if args.epochs else [])]
    cells = make_grid(args.config or [PUBLISHED_CONFIG], args.seeds, overrides, args.data, args.exp_dir)
    categories = find_categories(Path(args.data))
    jobs = [Job(category, cell) for cell in cells for category in categories]
    folder = experiment_folder(args.exp_dir)
    environ = dict(os.environ)  # before import_paddle() adds what is meant for one process alone
    with contextlib.ExitStack() as stack:
        if args.cluster:
            stack.enter_context(joined(args.cluster))
            from utils.cluster_runs import ClusterRuns  # which imports Ray

            devices: list[str | None] = [None]
            runs: Runs = ClusterRuns(args.cpus or 1, args.gpus, args.jobs)
        runtime.import_paddle()  # before anything imports paddle
        if not args.cluster:
            devices = choose_devices(args.gpus, args.jobs)[: len(jobs)]
            runs = LocalRuns(devices, environ)

        sys.stdout.reconfigure(line_buffering=True)  # a log shows each line at once
        for number in (signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
                signal.signal(number, signal.default_int_handler)
        with Board([job.name for job in jobs], alone=runs.places == 1) as board:
            failures = Trainings(folder, runs, board).run(jobs)
    for name, reason in failures.items():
        print(f"train.sh: {name} failed: {reason}; see {folder / name}", file=sys.stderr)
    arguments, environ = on_device(devices[0], environ)
    codes = [
        subprocess.run(tied([script("eval.py"), *cell.options, "-cat", "all", *arguments]), env=environ).returncode
        for cell in cells
    ]
    if cells[0].folder:
        print(grid_table(folder, cells))
    return 1 if failures else max(codes)


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


def script(name: str) -> str:
    """The file of a script of this repository."""
    return str(Path(__file__).with_name(name))


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
        category = Path(name).name
        if self._terminal:
            self.show(name, f"running  {line.removeprefix(category).strip()}")
        if self._alone or not self._terminal:
            line = name + (line.removeprefix(category) if line.startswith(category) else f"  {line}")
            self._write(fitted(line) if self._terminal else line)


class Trainings:
    """The scripts that train."""

    def __init__(self, folder: Path, runs: Runs, board: Board) -> None:
        """
        Args:
            folder: of the experiment.
            runs: where they run.
            board: where they are shown.
        """
        self._folder, self._runs, self._board = folder, runs, board
        self._stopped = False

    def run(self, jobs: Sequence[Job]) -> dict[str, str]:
        """Do the jobs; if this is interrupted, so are they.

        Returns:
            by the names of those that failed, why.
        """
        with ThreadPoolExecutor(self._runs.places) as pool:
            try:
                reasons = pool.map(self._train, jobs)
                return {job.name: reason for job, reason in zip(jobs, reasons, strict=True) if reason}
            except KeyboardInterrupt:
                self._stopped = True
                self._runs.stop()
                raise

    def _train(self, job: Job) -> str | None:
        """Train a category, unless it is finished; return why it failed if it did."""
        try:
            reason = self._train_unless_done(job)
        except (UserError, OSError) as error:
            reason = str(error)
        except Exception as error:  # one that nobody has thought of; it would end the other categories too
            reason = f"unexpected {error!r}"
        if reason:
            self._board.show(job.name, "stopped" if self._stopped else f"failed: {reason}")
        return reason

    def _train_unless_done(self, job: Job) -> str | None:
        folder = make_folder(self._folder / job.name)
        history = trained_so_far(folder, job.cell.config)
        if not finished(history, job.cell.config):
            reason = self._run(job, bool(history), folder)
            if reason:
                return reason
            history = trained_so_far(folder, job.cell.config)
        best = best_row(history)
        self._board.show(
            job.name,
            f"done  image AUROC {figure(best.image_auroc)}, pixel AUROC {figure(best.pixel_auroc)} "
            f"(epoch {best.epoch} of {len(history)})",
        )
        return None

    def _run(self, job: Job, resume: bool, folder: Path) -> str | None:
        words = [script("train.py"), *job.cell.options, "-cat", job.category, *["--resume"] * resume]
        last = ""
        with self._runs.start(words, folder) as run:
            self._board.show(job.name, ("going on" if resume else "started") + run.where)
            for line in run:
                # Opened anew each time: a training that starts puts the folder of an earlier one aside.
                with open(make_folder(folder) / OUTPUT, "a", encoding="utf-8") as output:
                    output.write(line)
                if line.strip():
                    last = line.strip()
                    if not self._stopped:  # then it says how that one training goes on
                        self._board.printed(job.name, line.rstrip())
        if run.code < 0:
            return f"ended by {signal.Signals(-run.code).name} after: {last}"
        if run.code:
            return last or f"exit code {run.code}, nothing printed"
        return None


if __name__ == "__main__":
    run_main(main)
