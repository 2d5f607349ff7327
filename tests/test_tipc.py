"""The TIPC chains: the commands they make of a config's lines, their logs, their exit codes.

Most of it runs in a copy of test_tipc/ whose "python" only writes down how it was called, so
that these tests take seconds and need neither Paddle nor data. The last ones run the real programs.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.converter import needs_converter

ROOT = Path(__file__).resolve().parents[1]
DRIVER = "test_tipc/test_train_inference_python.sh"
PADDLE2ONNX = "test_tipc/test_paddle2onnx_infer_python.sh"
PTQ = "test_tipc/test_train_ptq_infer_python.sh"
SERVING = "test_tipc/test_serving_infer_python.sh"
PREPARE = "test_tipc/prepare.sh"
OUR_CONFIG = "test_tipc/configs/fastflow/train_infer_python.txt"
LITE = "lite_train_lite_infer"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("bash") is None, reason="the TIPC scripts need bash"),
]

FAKE_PYTHON = f"""#!{sys.executable} -SE
import json, os, signal, sys, time
words = sys.argv[1:]
if words == ["--version"]:
    sys.exit()
with open(os.environ["CALLS"], "a") as calls:
    print(json.dumps([os.environ.get("CUDA_VISIBLE_DEVICES"), words]), file=calls)
print("hello from", *words)
for name in os.environ.get("FAIL", "").split():
    if name in words:
        print("\\n".join(f"output line {{i}}" for i in range(30)))
        sys.exit(f"{{name}} went wrong")
if "serve.py" in words:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(int(os.environ.get("END", "0"))))
    print("warning: see http://127.0.0.1:2 on serving models at http://127.0.0.1:3", file=sys.stderr, flush=True)
    print("serving toy at http://127.0.0.1:1", flush=True)
    while True:
        time.sleep(0.05)
"""

LINES = {
    1: "=====train_params=====",
    2: "model_name:toy",
    3: "python:fakepython",
    4: "gpu_list:0",
    5: "null:null",
    6: "--epochs:lite_train_lite_infer=2|whole_train_whole_infer=500",
    7: "--save:lite_train_lite_infer=out_lite/|whole_train_whole_infer=out_whole",
    8: "--batch_size:4",
    9: "null:null",
    10: "train_model_name:null",
    11: "--data:lite_train_lite_infer=./little|whole_train_whole_infer=./all|whole_infer=./all",
    12: "##",
    13: "trainer:norm_train",
    14: "norm_train:train.py -c toy.yaml",
    15: "##",
    16: "=====eval_params=====",
    17: "eval:eval.py -c toy.yaml --data ./little --save=out_lite",
    18: "##",
    19: "=====infer_params=====",
    20: "--inference_dir:./inference/",
    21: "null:null",
    22: "norm_export:export.py --save out_lite",
    23: "##",
    24: "infer_model:old",
    25: "infer_export:export.py --save exp",
    26: "##",
    27: "inference:infer.py",
    28: "--use_gpu:True|False",
    29: "--batch_size:1",
    30: "--model_dir:null",
    31: "--image:lite_train_lite_infer=good.png|whole_infer=./all/bottle/test",
    32: "--benchmark:True",
}


MORE_LINES = {
    25: "infer_export:export.py --save old",
    27: "inference:null",
    28: "--use_gpu:False",
    32: "null:null",
    33: "##",
    34: "=====more_params=====",
    36: "inference:infer.py",
    37: "runs:--backend a|--backend b --precision c",
    38: "check:check.py --tolerance 1e-4",
}
LINES_OF = {
    PADDLE2ONNX: {**MORE_LINES, 35: "onnx_checker:checker.py"},
    PTQ: {**MORE_LINES, 35: "inference:infer.py --int8", 36: "refusal:infer.py went"},
    SERVING: {
        **MORE_LINES,
        35: "serving:serve.py --port 0",
        37: "runs:--backend a",
        39: "--normal:lite_train_lite_infer=good.png|whole_infer=./all/bottle/good.png",
        40: "--anomaly:null",
        41: "client:client.py",
        42: "--models:null",
    },
}


class Repository:
    """A folder with a copy of test_tipc/, a config, and a fake python on the PATH."""

    def __init__(self, root):
        self.root = root
        shutil.copytree(ROOT / "test_tipc", root / "test_tipc", ignore=shutil.ignore_patterns("output"))
        self.bin = root / "fake bin"
        self.bin.mkdir()
        self.python = self.bin / "fakepython"
        self.python.write_text(FAKE_PYTHON)
        self.python.chmod(0o755)
        self.calls_file = root / "calls.jsonl"
        self.config()

    def config(self, changes=None, end="\n"):
        lines = {**LINES, **(changes or {})}
        (self.root / "toy.txt").write_text("".join(lines[n] + end for n in sorted(lines)), newline="")

    def run(self, mode=LITE, config="toy.txt", script=DRIVER, cwd=None, arguments=None, **environment):
        self.calls_file.unlink(missing_ok=True)
        inherited = {k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES", "python", "data")}
        return subprocess.run(
            ["bash", str(self.root / script), *([config, mode] if arguments is None else arguments)],
            cwd=cwd or self.root,
            env={**inherited, "PATH": f"{self.bin}:{os.environ['PATH']}", "CALLS": str(self.calls_file), **environment},
            text=True,
            capture_output=True,
            timeout=60,
        )

    def calls(self):
        """[(CUDA_VISIBLE_DEVICES or None, "the words after python")...] of the last run."""
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        return [(device, " ".join(words)) for device, words in map(json.loads, lines)]

    def commands(self):
        return [command for _, command in self.calls()]

    def output(self, mode=LITE, model="toy"):
        return self.root / "test_tipc" / "output" / model / mode

    def results(self, mode=LITE, name="python"):
        return (self.output(mode) / f"results_{name}.log").read_text().splitlines()


@pytest.fixture
def repository(tmp_path):
    root = tmp_path / "a repository"  # the blank is meant
    root.mkdir()
    return Repository(root)


def states(results):
    """Of each status line: ok, failed or skipped."""
    starts = {"Run successfully with": "ok", "Run failed with": "failed", "Run skipped (": "skipped"}
    return [state for line in results for start, state in starts.items() if line.startswith(start)]


def make_category(folder, name="bottle"):
    for part in ("train/good", "test/good"):
        (folder / name / part).mkdir(parents=True)
        (folder / name / part / "000.png").write_bytes(b"")


def test_one_chain(repository):
    done = repository.run()
    assert done.returncode == 0, done.stdout + done.stderr
    infer = "--batch_size=1 --model_dir=./inference --image=good.png --benchmark=True"
    expected = [
        "train.py -c toy.yaml --epochs=2 --save=out_lite --batch_size=4 --data=./little",
        "eval.py -c toy.yaml --data ./little --save=out_lite",
        "export.py --save out_lite --inference_dir=./inference",
        f"infer.py --use_gpu=True {infer}",
        f"infer.py --use_gpu=False {infer}",
    ]
    assert repository.calls() == [("0", command) for command in expected]
    assert repository.results() == [f"Run successfully with command - fakepython {command}!" for command in expected]
    for line in repository.results():
        assert line in done.stdout
    logs = {path.name for path in repository.output().iterdir()}
    assert {"python_infer_cpu_batchsize_1.log", "python_infer_gpu_batchsize_1.log"} <= logs
    log = (repository.output() / "python_infer_cpu_batchsize_1.log").read_text()
    assert "hello from infer.py --use_gpu=False" in log and "--use_gpu=True" not in log


@pytest.mark.parametrize(
    "entry, device, start",
    [
        ("0", "0", "train.py"),
        ("3", "3", "train.py"),
        ("-1", "", "train.py"),
        ("-1,-1", "", "-m paddle.distributed.launch --nproc_per_node=2 --backend=gloo train.py"),
        ("0,1", None, "-m paddle.distributed.launch --gpus=0,1 train.py"),
        (
            "10.0.0.1,10.0.0.2;2,3",
            None,
            "-m paddle.distributed.launch --ips=10.0.0.1,10.0.0.2 --gpus=2,3 train.py",
        ),
    ],
)
def test_gpu_list_forms(repository, entry, device, start):
    repository.config({4: f"gpu_list:{entry}"})
    assert repository.run().returncode == 0
    (train_device, train), *others = repository.calls()
    assert train_device == device
    assert train == f"{start} -c toy.yaml --epochs=2 --save=out_lite --batch_size=4 --data=./little"
    # The steps after the training are one process on the entry's first card.
    first = {"10.0.0.1,10.0.0.2;2,3": "2", "0,1": "0", "-1": "", "-1,-1": ""}.get(entry, entry)
    assert len(others) == 4 and {other for other, _ in others} == {first}


def test_several_entries_keep_their_results_apart(repository):
    repository.config({4: "gpu_list:0|0,1|-1", 28: "--use_gpu:False"})
    assert repository.run().returncode == 0
    commands = repository.commands()
    assert len(commands) == 12
    suffixes = ["_run1_gpus_0", "_run2_gpus_0_1", "_run3_cpu"]
    for suffix, (train, evaluate, export, infer) in zip(
        suffixes, [commands[i : i + 4] for i in (0, 4, 8)], strict=True
    ):
        assert f"--save=out_lite{suffix} " in train
        assert evaluate.endswith(f"--save=out_lite{suffix}")
        assert export == f"export.py --save out_lite{suffix} --inference_dir=./inference{suffix}"
        assert f"--model_dir=./inference{suffix} " in infer
    assert "--gpus=0,1" in commands[4]
    # One log holds the three inferences of this run.
    log = (repository.output() / "python_infer_cpu_batchsize_1.log").read_text()
    assert log.count("hello from infer.py") == 3


@pytest.mark.parametrize(
    "gpu_list, line, expected",
    [
        ("-1", "--use_gpu:True", ["--use_gpu=False"]),
        ("-1", "--use_gpu:null", ["--use_gpu=False"]),
        ("-1", "null:null", [""]),
        ("0", "--use_gpu:True", ["--use_gpu=True"]),
        ("0", "--use_gpu:null", [""]),
        ("0|0,1", "--use_gpu:a|b", ["--use_gpu=a", "--use_gpu=b"]),
        ("0|0,1", "--use_gpu:a", ["--use_gpu=a", "--use_gpu=a"]),
    ],
)
def test_use_gpu_key(repository, gpu_list, line, expected):
    repository.config({4: f"gpu_list:{gpu_list}", 5: line})
    assert repository.run().returncode == 0
    for script in ("train.py", "eval.py"):
        found = [
            " ".join(word for word in command.split() if word.startswith("--use_gpu"))
            for command in repository.commands()
            if f"{script} " in command
        ]
        assert found == expected


def test_null_lines_are_left_out(repository):
    repository.config({
        6: "null:2", 8: "--batch_size:null", 17: "eval:null", 20: "null:null", 22: "norm_export:null",
        28: "null:null", 29: "null:null", 30: "--model_dir:ready", 31: "null:null", 32: "--benchmark:null",
    })  # fmt: skip
    assert repository.run().returncode == 0
    assert repository.commands() == [
        "train.py -c toy.yaml --save=out_lite --data=./little",
        "infer.py --model_dir=ready",
    ]


def test_lists_of_the_inference_lines(repository):
    repository.config({29: "--batch_size:1|4", 32: "--benchmark:False"})
    assert repository.run().returncode == 0
    infer = [command.split()[1:3] for command in repository.commands() if command.startswith("infer.py")]
    assert infer == [[f"--use_gpu={gpu}", f"--batch_size={n}"] for gpu in ("True", "False") for n in (1, 4)]
    for where in ("cpu", "gpu"):
        for number in (1, 4):
            log = repository.output() / f"python_infer_{where}_batchsize_{number}.log"
            assert f"--batch_size={number} " in log.read_text()


def test_pretrained_keys_and_several_trainers(repository):
    repository.config({
        9: "-o pretrained:start.pdparams", 10: "train_model_name:best", 21: "--weights:null",
        13: "trainer:norm_train|amp_train", 15: "amp_train:train.py --amp", 28: "--use_gpu:False",
    })  # fmt: skip
    assert repository.run().returncode == 0
    commands = repository.commands()
    assert len(commands) == 8
    assert "-o pretrained=start.pdparams" in commands[0]
    assert commands[1].endswith("--save=out_lite_run1_gpus_0 -o pretrained=out_lite_run1_gpus_0/best")
    assert "--weights=out_lite_run1_gpus_0/best" in commands[2]
    assert commands[4].startswith("train.py --amp") and "--save=out_lite_run2_gpus_0 " in commands[4]


def test_values_of_the_mode(repository):
    assert repository.run(mode="whole_train_whole_infer").returncode == 0
    commands = repository.commands()
    assert commands[0] == "train.py -c toy.yaml --epochs=500 --save=out_whole --batch_size=4 --data=./all"
    # Options that the config's other commands name follow the mode.
    assert commands[1] == "eval.py -c toy.yaml --data ./all --save=out_whole"
    assert commands[2] == "export.py --save out_whole --inference_dir=./inference"
    # Line 31 does not name this mode: the option is left out.
    assert commands[3] == "infer.py --use_gpu=True --batch_size=1 --model_dir=./inference --benchmark=True"
    assert len(repository.results("whole_train_whole_infer")) == 5

    assert repository.run(mode="lite_train_whole_infer").returncode == 0
    assert repository.commands()[0] == "train.py -c toy.yaml --batch_size=4"


def test_whole_infer(repository):
    assert repository.run(mode="whole_infer", data="/big disk/mvtec").returncode == 0
    assert [command for command in repository.commands() if "use_gpu=True" not in command] == [
        "eval.py -c toy.yaml --data /big disk/mvtec --save=old",
        "export.py --save old --inference_dir=./inference",
        "infer.py --use_gpu=False --batch_size=1 --model_dir=./inference"
        " --image=/big disk/mvtec/bottle/test --benchmark=True",
    ]
    assert "--data '/big disk/mvtec' " in repository.results("whole_infer")[0]

    # Two models; the second is an inference model already.
    repository.config({24: "infer_model:old|ready", 25: "infer_export:export.py|null", 28: "--use_gpu:False"})
    assert repository.run(mode="whole_infer").returncode == 0
    assert [command.split()[0] for command in repository.commands()] == ["eval.py", "export.py", "infer.py", "infer.py"]
    assert "--model_dir=./inference_run1 " in repository.commands()[2]
    assert "--model_dir=ready " in repository.commands()[3]


def test_data_variable_is_for_the_whole_modes(repository):
    assert repository.run(data="elsewhere").returncode == 0
    assert "--data=./little" in repository.commands()[0]
    assert repository.run(mode="whole_train_whole_infer", data="elsewhere").returncode == 0
    assert "--data=elsewhere" in repository.commands()[0]
    assert "--data elsewhere" in repository.commands()[1]


def test_python_variable_blanks_and_quotes(repository):
    repository.config(
        {3: "python:no-such-python", 14: 'norm_train:train.py -c "my toy.yaml"', 31: "--image:a picture.png"}
    )
    done = repository.run(python=str(repository.python))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--image=a picture.png" in repository.commands()[3]
    assert json.loads(repository.calls_file.read_text().splitlines()[0])[1][:3] == ["train.py", "-c", "my toy.yaml"]
    assert "train.py -c 'my toy.yaml' --epochs=2" in repository.results()[0]


def test_nothing_in_the_config_is_executed(repository):
    repository.config({14: "norm_train:train.py $(touch made) `touch made` ; touch made", 31: "--image:$(touch made)"})
    assert repository.run().returncode == 0
    assert not (repository.root / "made").exists()


def test_windows_line_ends_and_other_folder(repository, tmp_path):
    repository.config(end="\r\n")
    done = repository.run(config=str(repository.root / "toy.txt"), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert repository.commands()[0].endswith("--data=./little")
    assert repository.run(cwd=tmp_path).returncode == 0  # relative to the root as well


@pytest.mark.parametrize(
    "script, expected",
    [
        ("train.py", ["failed", "skipped", "skipped", "skipped", "skipped"]),
        ("eval.py", ["ok", "failed", "ok", "ok", "ok"]),
        ("export.py", ["ok", "ok", "failed", "skipped", "skipped"]),
        ("infer.py", ["ok", "ok", "ok", "failed", "failed"]),
        ("--use_gpu=True", ["ok", "ok", "ok", "failed", "ok"]),
    ],
)
def test_failures(repository, script, expected):
    done = repository.run(FAIL=script)
    assert done.returncode == 1
    scripts = ["train.py", "eval.py", "export.py", "infer.py", "infer.py"]
    results = repository.results()
    assert states(results) == expected
    for line, name in zip(results, scripts, strict=True):
        assert f"command - fakepython {name} " in line and line.endswith("!")
        assert line in done.stdout
    assert len(repository.calls()) == len(expected) - expected.count("skipped")
    # The last output lines of what failed are shown at the end.
    summary = done.stdout.split("commands did not succeed:")[1]
    assert f"{script} went wrong" in summary and "output line 29" in summary and "output line 3\n" not in summary


def test_a_failed_entry_does_not_stop_the_next(repository):
    repository.config({4: "gpu_list:0|-1", 5: "--use_gpu:True"})
    assert repository.run(FAIL="--save=out_lite_run1_gpus_0").returncode == 1
    assert [line.split()[1] for line in repository.results()] == ["failed"] + ["skipped"] * 4 + ["successfully"] * 5


def test_a_run_does_not_inherit_an_old_log(repository):
    assert repository.run(FAIL="infer.py").returncode == 1
    old = repository.output() / "python_infer_gpu_batchsize_8.log"
    old.write_text("old")
    other = repository.output("whole_infer")
    other.mkdir()
    (other / "results_python.log").write_text("another mode's")
    assert repository.run().returncode == 0
    assert len(repository.results()) == 5 and not any("failed" in line for line in repository.results())
    assert "went wrong" not in (repository.output() / "python_infer_gpu_batchsize_1.log").read_text()
    assert not old.exists()
    assert (other / "results_python.log").read_text() == "another mode's"


@pytest.mark.parametrize("script", [DRIVER, PREPARE, PADDLE2ONNX, PTQ, SERVING])
def test_wrong_arguments(repository, script):
    for changes, arguments, expected in [
        ({}, ["toy.txt", "lite"], "unknown mode 'lite'"),
        ({}, ["missing.txt", LITE], "no such config: missing.txt"),
        ({}, ["toy.txt"], "usage: "),
        ({4: "gpu:0"}, ["toy.txt", LITE], "line 4 should be 'gpu_list:...'"),
        ({12: "##\n##"}, ["toy.txt", LITE], "line 13 should be 'trainer:...'"),
    ]:
        repository.config(changes)
        done = repository.run(script=script, arguments=arguments)
        assert done.returncode == 2
        assert done.stdout == "" and expected in done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert repository.calls() == []


def test_short_config_and_unknown_trainer(repository):
    (repository.root / "toy.txt").write_text("model_name:toy\n")
    done = repository.run()
    assert done.returncode == 2 and "1 lines, 32 are expected" in done.stderr
    repository.config({13: "trainer:norm_train|ptq_train"})
    done = repository.run()
    assert done.returncode == 2 and "'ptq_train'" in done.stderr
    assert repository.calls() == []


def test_our_config_drives_our_scripts(repository):
    """The committed config, all modes: the options it gives are those the scripts take."""
    expected_data = {
        LITE: "./lite_data",
        "lite_train_whole_infer": "./lite_data",
        "whole_train_whole_infer": "./data",
    }
    for mode, data in expected_data.items():
        done = repository.run(mode=mode, config=OUR_CONFIG, python=str(repository.python))
        assert done.returncode == 0, done.stdout + done.stderr
        train, evaluate, export, *infer = repository.commands()
        assert train.startswith("train.py -cfg ./configs/resnet18.yaml -cat bottle --cuda=True --epochs=")
        assert f"--exp_dir=tipc_{mode} " in train and train.endswith(f"--data={data}")
        of_eval = f"-cat bottle --data {data} --exp_dir tipc_{mode} --cuda=True"
        assert evaluate == f"eval.py -cfg ./configs/resnet18.yaml {of_eval}"
        assert export == (
            "deploy/export_model.py -cfg configs/resnet18.yaml --category bottle"
            f" --exp_dir tipc_{mode} --save_inference_dir=./results/tipc_inference"
        )
        assert [command.split()[3] for command in infer] == ["--use_gpu=True", "--use_gpu=False"]
        assert all("--model_dir=./results/tipc_inference" in command for command in infer)
        assert (repository.output(mode, "fastflow") / "python_infer_gpu_batchsize_1.log").exists()

    done = repository.run(mode="whole_infer", config=OUR_CONFIG, python=str(repository.python))
    assert done.returncode == 0, done.stdout + done.stderr
    assert [command.split()[0] for command in repository.commands()] == [
        "eval.py", "deploy/export_model.py", "deploy/infer.py", "deploy/infer.py",
    ]  # fmt: skip
    assert "--exp_dir exp" in repository.commands()[0] and "--exp_dir exp " in repository.commands()[1]


def test_prepare_lite(repository):
    make_category(repository.root / "lite_data")
    for mode in (LITE, "lite_train_whole_infer"):
        done = repository.run(mode, OUR_CONFIG, PREPARE, python=str(repository.python), data="ignored")
        assert done.returncode == 0 and "./lite_data (bottle)" in done.stdout
        assert repository.calls() == []  # nothing had to be made


def test_prepare_makes_missing_lite_data(repository):
    done = repository.run(LITE, OUR_CONFIG, PREPARE, python=str(repository.python))
    assert repository.commands() == ["-m datasets.lite_data"]
    assert done.returncode == 2 and "./lite_data" in done.stderr  # the fake python made nothing


def test_prepare_whole(repository):
    mode = "whole_train_whole_infer"
    done = repository.run(mode, OUR_CONFIG, PREPARE)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "MVTec AD" in done.stderr and "./data" in done.stderr and "data=" in done.stderr
    make_category(repository.root / "data", "screw")
    done = repository.run(mode, OUR_CONFIG, PREPARE)
    assert done.returncode == 2 and "'bottle'" in done.stderr and "screw" in done.stderr
    make_category(repository.root / "my data")
    done = repository.run(mode, OUR_CONFIG, PREPARE, data="my data/")
    assert done.returncode == 0 and "my data (bottle)" in done.stdout


def test_prepare_whole_infer_needs_a_checkpoint(repository):
    make_category(repository.root / "data")
    done = repository.run("whole_infer", OUR_CONFIG, PREPARE)
    assert done.returncode == 2 and "results/exp/bottle/best.pdparams is missing" in done.stderr
    checkpoint = repository.root / "results/exp/bottle/best.pdparams"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"")
    done = repository.run("whole_infer", OUR_CONFIG, PREPARE)
    assert done.returncode == 0 and "results/exp/bottle/best.pdparams" in done.stdout


# ---- what a training has done


def test_a_training_that_did_not_do_what_the_config_is_about(repository):
    more = {33: "##", 34: "=====amp_params=====", 35: "tested:in 16 bits|--epochs=2 --save", 36: "reason:hello"}
    repository.config(more)
    done = repository.run()
    assert done.returncode == 0 and not any("Not tested" in line for line in repository.results())

    repository.config({**more, 35: "tested:in 16 bits|in b16"})
    done = repository.run()
    assert done.returncode == 3
    train, said, *others = repository.results()
    assert train.startswith("Run successfully") and len(others) == 4
    reason = f"hello from {repository.commands()[0]}"
    assert said == f"Not tested ({reason}) with command - fakepython {repository.commands()[0]}!"
    assert done.stdout.endswith(f"but not all was tested:\n- {reason}\n")

    # A failure outweighs it, and a training that failed was not even tried.
    assert repository.run(FAIL="infer.py").returncode == 1
    assert repository.run(FAIL="train.py").returncode == 1
    assert not any("Not tested" in line for line in repository.results())

    repository.config({**more, 35: "tested:in 16 bits", 36: "reason:absent", 4: "gpu_list:0|-1"})
    done = repository.run()
    assert done.returncode == 3 and done.stdout.count("- its output says nothing of 'absent'") == 2


# ---- chains that go on after the 32 lines


def test_paddle2onnx(repository):
    repository.config(LINES_OF[PADDLE2ONNX])
    done = repository.run(script=PADDLE2ONNX)
    assert done.returncode == 0, done.stdout + done.stderr
    to = f"test_tipc/output/toy/{LITE}/paddle2onnx"
    infer = "--use_gpu=False --batch_size=1 --model_dir=./inference --image=good.png --save_json="
    expected = [
        "checker.py ./inference/inference.onnx",
        f"infer.py --backend a {infer}{to}_1.jsonl",
        f"infer.py --backend b --precision c {infer}{to}_2.jsonl",
        f"check.py --tolerance 1e-4 {to}_1.jsonl {to}_2.jsonl",
    ]
    assert [command.split()[0] for command in repository.commands()[:3]] == ["train.py", "eval.py", "export.py"]
    assert repository.commands()[3:] == expected
    succeeded = [f"Run successfully with command - fakepython {command}!" for command in expected]
    assert repository.results(name="paddle2onnx") == succeeded
    assert len(repository.results()) == 3


def test_ptq(repository):
    command = "infer.py --int8 --use_gpu=False --batch_size=1 --model_dir=./inference --image=good.png"
    for refusal, failing, code, status in (
        ("infer.py went", "", 0, "Run successfully with"),
        ("infer.py went", "infer.py", 3, "Not tested (infer.py went wrong) with"),
        ("no such words", "infer.py", 1, "Run failed with"),
    ):
        repository.config({**LINES_OF[PTQ], 36: f"refusal:{refusal}"})
        done = repository.run(script=PTQ, FAIL=failing)
        assert done.returncode == code, done.stdout + done.stderr
        assert repository.results(name="ptq") == [f"{status} command - fakepython {command}!"]


def test_the_data_variable_and_the_folders_of_another_mode(repository, tmp_path):
    repository.config(LINES_OF[SERVING])
    done = repository.run("whole_infer", str(repository.root / "toy.txt"), SERVING, cwd=tmp_path, data="/big disk")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--image=/big disk/bottle/test" in repository.commands()[2]
    assert repository.commands()[-1].endswith("--normal=/big disk/bottle/good.png")


def test_serving(repository):
    repository.config(LINES_OF[SERVING])
    done = repository.run(script=SERVING)
    assert done.returncode == 0, done.stdout + done.stderr
    to = f"test_tipc/output/toy/{LITE}/serving"
    infer, serve, client, check = repository.commands()[3:]
    assert infer.startswith("infer.py --backend a ") and infer.endswith(f" --save_json={to}_1.jsonl")
    assert serve == "serve.py --port 0 --models=./inference"
    assert client == f"client.py http://127.0.0.1:1 {to}_1.jsonl {to}_answers.jsonl"
    assert check == f"check.py --tolerance 1e-4 {to}_1.jsonl {to}_answers.jsonl --normal=good.png"
    succeeded = [f"Run successfully with command - fakepython {words}!" for words in (infer, client, check, serve)]
    assert repository.results(name="serving") == succeeded


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({"FAIL": "train.py"}, []),
        ({"FAIL": "infer.py"}, ["failed", "skipped", "skipped", "skipped"]),
        ({"FAIL": "serve.py"}, ["ok", "skipped", "skipped", "failed"]),
        ({"FAIL": "client.py"}, ["ok", "failed", "skipped", "ok"]),
        ({"FAIL": "check.py"}, ["ok", "ok", "failed", "ok"]),
        ({"END": "5"}, ["ok", "ok", "ok", "failed"]),
    ],
)
def test_failures_of_serving(repository, environment, expected):
    repository.config(LINES_OF[SERVING])
    done = repository.run(script=SERVING, **environment)
    assert done.returncode == 1
    assert states(repository.results(name="serving")) == expected
    assert f"exit code {environment.get('END', 1)}: " in done.stdout


@pytest.mark.parametrize(
    "failing, expected",
    [
        ("checker.py", ["failed", "skipped", "skipped", "skipped"]),
        ("b", ["ok", "ok", "failed", "skipped"]),
        ("check.py", ["ok", "ok", "ok", "failed"]),
    ],
)
def test_failures_of_paddle2onnx(repository, failing, expected):
    repository.config(LINES_OF[PADDLE2ONNX])
    assert repository.run(script=PADDLE2ONNX, FAIL=failing).returncode == 1
    assert states(repository.results(name="paddle2onnx")) == expected


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({35: "inference:infer.py"}, "line 35 should be 'onnx_checker:...' but is 'inference:infer.py'"),
        ({38: ""}, "line 38 should be 'check:...'"),
        ({4: "gpu_list:0|-1"}, "lines 4, 13 and 24 must name one thing each"),
        ({20: "null:null"}, "line 20 names no folder"),
    ],
)
def test_a_chain_whose_lines_do_not_fit(repository, changes, expected):
    repository.config({**LINES_OF[PADDLE2ONNX], **changes})
    done = repository.run(script=PADDLE2ONNX)
    assert (done.returncode, done.stdout) == (2, "") and expected in done.stderr
    assert len(done.stderr.splitlines()) == 1 and repository.calls() == []


def test_a_python_of_another_machine(repository):
    """Line 3 is that of whoever wrote the config; the variable is that of whoever runs it."""
    repository.config({3: "python:python0.1"})
    (repository.bin / "python").symlink_to(repository.python)
    done = repository.run()
    assert done.returncode == 0 and "line 3 names python0.1, which is not here; using " in done.stderr
    assert repository.commands()[0].startswith("train.py ")
    assert repository.run(python="python0.1").returncode == 1


def test_data_that_are_missing_leave_nothing_of_an_earlier_run(repository):
    assert repository.run().returncode == 0 and repository.results()
    assert repository.run(script=PREPARE).returncode == 2  # there is no ./little
    assert not list((repository.root / f"test_tipc/output/toy/{LITE}").iterdir())


# ---- one command for each chain


def test_one_command_for_each_chain(repository):
    """The committed configs, each by its own driver."""
    make_category(repository.root / "lite_data")
    for chain, code, last, extra in (
        ("train_infer_python", 0, "deploy/infer.py", ""),
        ("train_amp_infer_python", 3, "deploy/infer.py", " --amp "),
        ("train_fleet_infer_python", 3, "deploy/infer.py", "--nproc_per_node=2 --backend=gloo train.py"),
        ("paddle2onnx_infer_python", 0, "test_tipc/check_results.py", "--backend onnxruntime"),
        ("train_ptq_infer_python", 0, "deploy/infer.py", "--precision int8"),
    ):
        done = repository.run(script="test_tipc/run.sh", arguments=[chain], python=str(repository.python))
        assert done.returncode == code, (chain, done.stdout + done.stderr)  # 3: the fake says nothing of 16 bits
        assert "./lite_data (bottle)" in done.stdout
        assert extra in "\n".join(repository.commands())
        assert repository.commands()[-1].split()[0] == last
        assert all("tipc_" in command for command in repository.commands() if "exp_dir" in command)


def test_one_command_and_what_is_wrong(repository):
    for arguments in ([], ["no_chain"], ["train_infer_python", LITE, "more"]):
        done = repository.run(script="test_tipc/run.sh", arguments=arguments)
        assert done.returncode == 2 and "CHAIN: paddle2onnx_infer_python serving_infer_python train_amp" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    done = repository.run(script="test_tipc/run.sh", arguments=["train_infer_python", "whole_train_whole_infer"])
    assert done.returncode == 2 and "MVTec AD" in done.stderr and repository.calls() == []
    done = repository.run(script="test_tipc/run.sh", arguments=["paddle2onnx_infer_python", "lite"])
    assert done.returncode == 2 and "unknown mode 'lite'" in done.stderr


# ---- the programs of the chains


def check(folder, reference, other, *options):
    for name, results in (("reference", reference), ("other", other)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(result) + "\n" for result in results))
    command = [sys.executable, ROOT / "test_tipc/check_results.py", "--tolerance", "1e-4", *options]
    done = subprocess.run(
        [*command, "reference.jsonl", "other.jsonl"], cwd=folder, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout + done.stderr


def test_results_are_compared(tmp_path):
    good = {"path": "images/good.png", "score": 0.3, "label": "Normal", "threshold": 0.30003}
    bad = {"path": "images/bad.png", "score": 0.9, "label": "Anomaly", "threshold": 0.30003}
    labels = ("--normal", "./images/good.png", "--anomaly", "images/bad.png")
    code, text = check(tmp_path, [good, bad], [bad, {**good, "score": 0.30005}], *labels)
    assert code == 0 and text.startswith("2 pictures agree: scores within 5e-05")
    # So close to the threshold either label is right.
    assert check(tmp_path, [good, bad], [bad, {**good, "score": 0.30005, "label": "Anomaly"}])[0] == 0
    for other, options, expected in (
        ([good, {**bad, "score": 0.9002}], (), "images/bad.png: Anomaly 0.900000 is not Anomaly 0.900200"),
        ([good, {**bad, "score": float("nan")}], (), "is not Anomaly nan"),
        ([good, {**bad, "label": "Normal"}], (), "is not Normal 0.9"),
        ([good], (), "images/bad.png: only in one of the two"),
        ([good, {"path": "images/bad.png", "error": "cut off"}], (), "cut off"),
        ([good, bad], ("--normal", "images/bad.png"), "images/bad.png: Normal is right, not Anomaly"),
        ([good, bad], ("--anomaly", "images/none.png"), "images/none.png: Anomaly is right, not None"),
    ):
        code, text = check(tmp_path, [good, bad], other, *options)
        assert code == 1 and expected in text and len(text.splitlines()) == 1, text


def test_results_that_cannot_be_compared(tmp_path):
    good = {"path": "good.png", "score": 0.3, "label": "Normal", "threshold": 0.5}
    for other, expected in (
        ([], "other.jsonl: holds no results"),
        ([{"path": "good.png"}], "not results of"),
        ([3], "not"),
    ):
        code, text = check(tmp_path, [good], other)
        assert code == 2 and text.startswith("error: other.jsonl") and expected in text
        assert len(text.splitlines()) == 1


def test_pictures_are_posted_to_no_service(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"path": "good.png"}\n')
    code = "import post_pictures as p; p.READY_SECONDS = 0; p.run_main(p.main)"
    for results, expected in (("results.jsonl", "http://127.0.0.1:9/health/ready: "), ("none.jsonl", "none.jsonl: ")):
        done = subprocess.run(
            [sys.executable, "-c", code, "http://127.0.0.1:9", results, "answers.jsonl"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT / "test_tipc")},
            text=True,
            capture_output=True,
            timeout=60,
        )
        assert done.returncode == 2 and done.stderr.startswith(f"error: {expected}")
        assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "answers.jsonl").exists()


# ---- the real programs, small


SMALL = " -o input_size=64 -o flow_step=1 -o pretrained=offline"


def run_real(root, exported, chain, mode, changes, **environment):
    """The chain on a model of conftest's size; the programs are ours, everything is written under root."""
    for name in ("train.py", "eval.py", "models", "datasets", "utils", "deploy", "configs", "images"):
        (root / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "lite_data", root / "data")
    (root / "lite_data").symlink_to(root / "data")
    shutil.copytree(exported.parent / "results", root / "results")
    shutil.copytree(ROOT / "test_tipc", root / "test_tipc", ignore=shutil.ignore_patterns("output"))
    config = root / f"test_tipc/configs/fastflow/{chain}.txt"
    lines = dict(enumerate(config.read_text().splitlines(), 1))
    for number in (14, 22, 25):
        lines[number] += SMALL
    lines |= {17: "eval:null", **changes}
    config.write_text("".join(lines[number] + "\n" for number in sorted(lines)))
    return subprocess.run(
        ["bash", root / "test_tipc/run.sh", chain, mode],
        env={**os.environ, **(environment or {"python": sys.executable})},
        text=True,
        capture_output=True,
        timeout=300,
    )


def test_the_published_lines_for_real(tmp_path, exported):
    """Line 3 names a python of another machine, line 5 is --cuda:True and line 30 --model_dir:, as published."""
    changes = {3: "python:python3.7", 6: "--epochs:1", 17: "eval:eval.py -cat bottle --data ./lite_data" + SMALL}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = run_real(tmp_path, exported, "train_infer_python", LITE, changes, PATH=path, python="")
    assert done.returncode == 0, done.stdout + done.stderr
    results = (tmp_path / f"test_tipc/output/fastflow/{LITE}/results_python.log").read_text().splitlines()
    assert len(results) == 5 and all(line.startswith("Run successfully with command - ") for line in results)
    assert "--cuda=True" in results[0] and "--cuda=True" in results[1] and "--model_dir=" in results[3]


@needs_converter("onnxruntime")
def test_paddle2onnx_for_real(tmp_path, exported):
    done = run_real(tmp_path, exported, "paddle2onnx_infer_python", "whole_infer", {})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "26 pictures agree" in done.stdout


def test_serving_for_real(tmp_path, exported):
    # One epoch of so small a model tells good from bad at no picture for sure.
    unlabelled = {39: "null:null", 40: "null:null"}
    done = run_real(tmp_path, exported, "serving_infer_python", "whole_infer", unlabelled)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "26 pictures agree" in done.stdout and "Run successfully with command - " in done.stdout


@needs_converter()
def test_ptq_for_real(tmp_path, exported):
    done = run_real(tmp_path, exported, "train_ptq_infer_python", "whole_infer", {})
    assert done.returncode == 3, done.stdout + done.stderr
    assert "but not all was tested:\n- error: --precision int8: not offered" in done.stdout


TRAINING_ONLY = {6: "--epochs:1", 22: "norm_export:null", 27: "inference:null"}


def test_amp_for_real(tmp_path, exported):
    done = run_real(tmp_path, exported, "train_amp_infer_python", LITE, TRAINING_ONLY)
    assert "mixed precision: " in done.stdout
    assert done.returncode == (3 if "compute in float32" in done.stdout else 0), done.stdout + done.stderr


def test_fleet_for_real(tmp_path, exported):
    done = run_real(tmp_path, exported, "train_fleet_infer_python", LITE, TRAINING_ONLY)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "global batch 8 over 2 process(es)" in done.stdout
