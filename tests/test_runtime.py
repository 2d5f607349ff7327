"""The process set-up: threads, MKL's code path, devices."""

import os
import signal
import subprocess
import sys

import paddle
import pytest

from deploy.common import runtime
from deploy.common.cli import UserError

INTEL = {"GenuineIntel", "avx2", "fma", "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
AMD_AVX512 = INTEL - {"GenuineIntel"} | {"AuthenticAMD"}


@pytest.fixture
def eight_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


def v2(folder, text):
    (folder / "cpu.max").write_text(text)


def v1(folder, quota, period="100000\n"):
    (folder / "cpu").mkdir()
    (folder / "cpu" / "cpu.cfs_quota_us").write_text(quota)
    (folder / "cpu" / "cpu.cfs_period_us").write_text(period)


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ("200000 100000\n", 2),
        ("150000 100000\n", 2),
        ("1000 100000\n", 1),
        ("max 100000\n", 8),
        ("9000000 100000\n", 8),
        ("", 8),
        ("nonsense\n", 8),
        ("x y\n", 8),
    ],
)
def test_a_cgroup_v2_quota_lowers_the_cores(tmp_path, eight_cores, text, cores):
    v2(tmp_path, text)
    assert runtime.available_cores(tmp_path) == cores


@pytest.mark.parametrize(("quota", "cores"), [("300000\n", 3), ("-1\n", 8), ("50000\n", 1)])
def test_a_cgroup_v1_quota_lowers_the_cores(tmp_path, eight_cores, quota, cores):
    v1(tmp_path, quota)
    assert runtime.available_cores(tmp_path) == cores


def test_without_cgroups_the_affinity_counts(tmp_path, eight_cores):
    assert runtime.available_cores(tmp_path / "none") == 8


def test_without_affinity_all_cores_count(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert runtime.available_cores(tmp_path) == 3
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert runtime.available_cores(tmp_path) == 1


@pytest.mark.parametrize(
    ("flags", "path"),
    [
        (INTEL, None),
        (set(), None),
        (AMD_AVX512, "7"),
        (AMD_AVX512 - {"avx512vl"}, "5"),
        ({"AuthenticAMD", "avx2", "fma"}, "5"),
        ({"AuthenticAMD", "avx2"}, None),
        ({"AuthenticAMD", "sse4_2"}, None),
    ],
)
def test_mkl_code_path(flags, path):
    assert runtime.mkl_code_path(flags) == path


def test_cpu_flags_are_those_of_the_first_core(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("vendor_id\t: AuthenticAMD\nmodel name\t: fma\nflags\t\t: fpu avx2\n\nvendor_id\t: GenuineIntel\n")
    assert runtime.cpu_flags(info) == {"AuthenticAMD", "fpu", "avx2"}
    assert runtime.cpu_flags(tmp_path / "none") == set()


def test_what_the_user_has_set_wins(monkeypatch):
    monkeypatch.setattr(runtime, "cpu_flags", lambda: AMD_AVX512)
    for name, value in {"OMP_NUM_THREADS": "3", "MKL_DEBUG_CPU_TYPE": "4", "GLOG_minloglevel": "0"}.items():
        monkeypatch.setenv(name, value)
    chosen = runtime.import_paddle()
    assert chosen == {"OMP_NUM_THREADS": "3", "MKL_DEBUG_CPU_TYPE": "4", "GLOG_minloglevel": "0"}
    assert os.environ["OMP_NUM_THREADS"] == "3"


def test_defaults_fill_what_the_user_has_not_set(monkeypatch, capsys):
    monkeypatch.setattr(runtime, "cpu_flags", lambda: AMD_AVX512)
    monkeypatch.setattr(runtime, "available_cores", lambda: 5)
    for name in ("OMP_NUM_THREADS", "MKL_DEBUG_CPU_TYPE", "GLOG_minloglevel"):
        monkeypatch.setenv(name, "")  # so that monkeypatch puts back what was there
        monkeypatch.delenv(name)
    runtime.import_paddle(verbose=True)
    assert (os.environ["OMP_NUM_THREADS"], os.environ["MKL_DEBUG_CPU_TYPE"]) == ("5", "7")
    assert "OMP_NUM_THREADS=5" in capsys.readouterr().err


SIGTERM = """
import os, signal, sys
class AtModule:
    def find_spec(self, name, *_):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGTERM)
def main():
    sys.meta_path.insert(0, AtModule())
    from deploy.common import runtime
    runtime.import_paddle()
    if not {module!r}:
        import paddle
        paddle.ones([8, 8]).sum().item()
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # as `timeout` does
            print("put away")
from deploy.common.cli import run_main
run_main(main)
"""


@pytest.mark.parametrize(
    ("module", "said"),
    [
        pytest.param("numpy.random", "", id="before paddle"),
        pytest.param("paddle.distributed", "", id="in the import of paddle"),
        pytest.param("", "put away\n", id="twice, after it"),
    ],
)
def test_sigterm_ends_without_paddles_stack(module, said):
    done = subprocess.run([sys.executable, "-c", SIGTERM.format(module=module)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (143, said, "")


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="Windows")
def test_sigterm_of_which_a_library_makes_another_error_ends_the_same():
    code = "import os, signal\nfrom deploy.common.cli import UserError, run_main\ndef main():\n    try:\n"
    code += "        os.kill(os.getpid(), signal.SIGTERM)\n    except KeyboardInterrupt as error:\n"
    for other in ("ImportError('initialization failed')", "UserError('cannot be imported')"):
        command = [sys.executable, "-c", f"{code}        raise {other} from error\nrun_main(main)"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (143, "", "")


def test_the_set_up_keeps_the_handler_of_sigterm():
    hooks, handler = list(sys.meta_path), signal.getsignal(signal.SIGTERM)
    runtime.import_paddle()
    assert (sys.meta_path, signal.getsignal(signal.SIGTERM)) == (hooks, handler)


def test_peak_memory_is_in_bytes_everywhere(monkeypatch):
    peak = runtime.peak_memory()
    assert 50e6 < peak < 50e9
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")  # whose getrusage tells bytes
        assert 0 < runtime.peak_memory() * 1000 < peak * 1.1
    monkeypatch.setitem(sys.modules, "resource", None)  # Windows
    assert runtime.peak_memory() is None


def test_importing_the_module_does_not_import_paddle():
    """Else the variables would come too late."""
    code = "import sys; from deploy.common import cli, imaging, runtime; sys.exit('paddle' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_numpy_random_is_imported_before_paddle():
    """Paddle 2.6 crashes the other way round."""
    code = (
        "import sys\n"
        "class AtPaddle:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'paddle':\n"
        "            sys.exit('numpy.random' not in sys.modules)\n"
        "sys.meta_path.insert(0, AtPaddle())\n"
        "from deploy.common import runtime\n"
        "runtime.import_paddle()\n"
        "sys.exit(2)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_cpu_is_chosen_by_name():
    device = paddle.device.get_device()
    try:
        assert runtime.select_device("cpu") == "cpu"
        assert paddle.device.get_device() == "cpu"
    finally:
        paddle.set_device(device)


@pytest.mark.parametrize("name", ["tpu", "gpu:", "gpu:x", "gpu:-1", "cpu:0", "", "gpu:99"])
def test_a_device_that_is_not_there_is_a_user_error(name):
    with pytest.raises(UserError, match="--device"):
        runtime.select_device(name)


def test_auto_takes_the_cpu_where_paddle_sees_no_gpu(monkeypatch):
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: False)
    device = paddle.device.get_device()
    try:
        assert runtime.select_device("auto") == "cpu"
    finally:
        paddle.set_device(device)
