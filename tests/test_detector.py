"""The API in Python: what it takes and gives, in many threads, with every runtime; a folder that is watched."""

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deploy import Detector, UserError
from deploy.backends import FILES
from deploy.watch import SETTLED, FolderWatch, read_done
from tests.converter import needs_converter

ROOT = Path(__file__).resolve().parent.parent
BAD = ROOT / "images/bottle_bad.png"
BACKENDS = [pytest.param(name, marks=() if name == "paddle" else needs_converter(name)) for name in FILES]


@pytest.fixture(scope="module")
def detector(exported):
    with Detector(exported, batch_size=2, cpu_threads=1, pixel_threshold=0.3) as detector:
        yield detector


def same(result, other):
    assert result.score == pytest.approx(other.score, abs=1e-5)
    assert [region.box for region in result.regions] == [region.box for region in other.regions]


@pytest.mark.slow
def test_it_takes_files_arrays_and_pictures_of_pillows(detector):
    result = detector(BAD)
    assert result.path == str(BAD) and result.size == Image.open(BAD).size[::-1]
    assert result.map.shape == result.mask.shape == result.size
    image = Image.open(BAD).convert("RGB")
    for picture in (str(BAD), np.asarray(image), image):
        same(detector(picture), result)
    assert "path" not in detector(image).to_dict()
    grey = np.asarray(image.convert("L"))
    same(detector(grey), detector(Image.fromarray(grey)))
    same(detector(grey), detector(grey.astype(np.uint16) * 257))  # no white level: 65535 is white
    turned = image.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6
    same(detector(turned), result)


def test_a_list_gives_a_list_in_batches(detector, monkeypatch):
    batches = []
    run = detector.run
    monkeypatch.setattr(detector, "run", lambda images: batches.append(len(images)) or run(images))
    pictures = [BAD, ROOT / "images/bottle_good.png", BAD, np.asarray(Image.open(BAD).convert("RGB")), BAD]
    results = detector(pictures)
    assert batches == [2, 2, 1]
    for picture, result in zip(pictures, results, strict=True):
        same(result, detector(picture))
    assert detector([]) == [] and len(detector(iter(pictures[:1]))) == 1


@pytest.mark.parametrize(
    ("picture", "said"),
    [
        ("absent.png", "absent.png"),
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (np.zeros((4, 4, 4), np.uint8), "[4, 4, 4]"),
        (np.zeros((0, 4), np.uint8), "[0, 4]"),
        (np.zeros(4, np.uint8), "[4]"),
        (Image.new("F", (4, 4)), "floating point"),
    ],
)
def test_what_is_no_picture_is_a_user_error(detector, picture, said):
    for given in (picture, [BAD, picture]):
        with pytest.raises(UserError) as error:
            detector(given)
        assert said in str(error.value)


def test_a_closed_detector_says_so(exported):
    detector = Detector(exported, cpu_threads=1, min_area=7)
    assert detector.thresholds.min_area == 7
    detector.close()
    with pytest.raises(RuntimeError, match="closed"):
        detector(BAD)


def test_importing_the_package_is_light():
    """Commands import what lies below it before they have set up anything."""
    code = "import deploy, sys; assert not {'numpy', 'cv2', 'paddle', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_it_can_be_made_in_any_thread(exported):
    code = "import sys; from concurrent.futures import ThreadPoolExecutor; from deploy import Detector\n"
    code += "print(ThreadPoolExecutor(1).submit(lambda: Detector(sys.argv[1])(sys.argv[2]).label).result())"
    done = subprocess.run([sys.executable, "-c", code, exported, BAD], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() in ("Anomaly", "Normal"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_eight_threads_get_equal_answers_and_it_does_not_grow(exported_all, backend):
    pictures = sorted((ROOT / "lite_data/bottle/test").glob("*/*.png"))[:8]

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    with Detector(exported_all, backend, cpu_threads=1, pixel_threshold=0.3) as detector:
        alone = [detector(picture).to_dict() for picture in pictures]
        ends = time.monotonic() + 6
        memory = []

        def work(i):
            rounds = 0
            while time.monotonic() < ends:
                for picture, expected in zip(pictures[i:] + pictures[:i], alone[i:] + alone[:i], strict=True):
                    assert detector(picture).to_dict() == expected
                rounds += 1
                memory.append(resident())
            return rounds

        with ThreadPoolExecutor(8) as pool:
            assert min(pool.map(work, range(8))) >= 1
    half = len(memory) // 2
    assert max(memory[half:]) - max(memory[:half]) < 20 * 2**20


@pytest.fixture(scope="session")
def exported_all(tmp_path_factory, exported):
    """The same model for every runtime that there is a converter for."""
    from tests import forked
    from tests.converter import CONVERTER

    if not CONVERTER:
        return exported
    common = ["-cfg", f"{ROOT}/configs/resnet18.yaml", "-o", "input_size=64", "-o", "flow_step=1"]
    common += ["-o", "pretrained=offline", "--exp_dir", "exp", "--category", "bottle", "--format", "all"]
    target = tmp_path_factory.mktemp("all")
    forked.run(
        "deploy/export_model.py", [*common, "--save_inference_dir", str(target)], exported.parent
    ).check_returncode()
    return target


@pytest.mark.slow
@needs_converter("openvino")
def test_every_runtime_finds_the_same_regions(exported_all):
    pictures = sorted((ROOT / "lite_data/bottle/test").glob("*/*.png"))
    told = {}
    for backend in FILES:
        with Detector(exported_all, backend, cpu_threads=1, batch_size=3) as detector:
            levels = np.sort([result.map.max() for result in detector(pictures)])
        with Detector(exported_all, backend, cpu_threads=1, pixel_threshold=float(levels[0]) * 0.9) as detector:
            told[backend] = [result.regions for result in detector(pictures)]
    assert sum(map(len, told["paddle"])) > len(pictures) / 2
    for regions in told.values():
        for found, expected in zip(regions, told["paddle"], strict=True):
            assert [region.box for region in found] == [region.box for region in expected]
            for key in ("highest", "mean"):
                scores = [[getattr(region, key) for region in some] for some in (found, expected)]
                np.testing.assert_allclose(*scores, rtol=0, atol=1e-4)


# ---- a folder that is watched


@contextlib.contextmanager
def start_watch(exported, *options):
    """The process, which Ctrl-C ends even where what runs the tests does not heed it; it does not outlive the test."""
    command = [sys.executable, ROOT / "deploy/infer.py", "--save_inference_dir", exported, "--watch", *options]
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(list(map(str, command)), preexec_fn=heed, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def lines_of(file, count, seconds=60):
    """The lines of JSON in a file, once there are so many."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        if len(lines) >= count and lines[-1].endswith("\n"):
            return [json.loads(line) for line in lines]
        time.sleep(0.05)
    pytest.fail(f"{lines}")


@pytest.mark.slow
def test_a_watched_folder_is_scored_once_whatever_comes(exported, tmp_path):
    folder, file, content = tmp_path / "in", tmp_path / "out/lines.jsonl", BAD.read_bytes()
    folder.mkdir()
    (folder / "first.png").write_bytes(content)
    options = (folder, "--save_json", file, "--output_dir", tmp_path / "out", "--save_masks", "--cpu_threads", 1)
    with start_watch(exported, *options) as process:
        lines_of(file, 1)
        with (folder / "slow.png").open("wb") as slow:  # whole only after more than the time of settling
            for start in range(0, len(content), len(content) // 4):
                slow.write(content[start : start + len(content) // 4])
                slow.flush()
                time.sleep(0.5 * SETTLED)
        (folder / "bad.png").write_bytes(content[:500])
        (folder / "notes.txt").write_bytes(content)
        (folder / ".hidden.png").write_bytes(content)
        lines = lines_of(file, 3)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert [Path(line["path"]).name for line in lines] == ["first.png", "slow.png", "bad.png"]
    assert lines[0]["score"] == lines[1]["score"] and lines[0]["size"] and "regions" in lines[0]
    assert "score" not in lines[2] and "bad.png" in lines[2]["error"]
    assert len(out.splitlines()) == 2 and "Traceback" not in err
    assert (tmp_path / "out/first.png.jpg").is_file() and (tmp_path / "out/masks/slow.png.png").is_file()

    with file.open("a") as lines:
        lines.write('{"path": "half a li')  # a power cut
    (folder / "second.png").write_bytes(content)
    (folder / "first.png").write_bytes(content)  # anew
    with start_watch(exported, *options) as process:
        lines = lines_of(file, 5)
        process.terminate()
        process.communicate(timeout=30)
    assert process.returncode == 0
    assert sorted(Path(line["path"]).name for line in lines[3:]) == ["first.png", "second.png"]


@pytest.mark.slow
def test_a_watched_folder_without_a_file_prints_lines_of_json_alone(exported, tmp_path):
    shutil.copy(BAD, tmp_path / "a.png")
    with start_watch(exported, tmp_path, "--cpu_threads", 1) as process:
        line = json.loads(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        assert (process.communicate(timeout=30)[0], process.returncode) == ("", 0)
    assert Path(line["path"]).name == "a.png" and line["modified"] == (tmp_path / "a.png").stat().st_mtime


def test_what_cannot_be_watched_is_said(tmp_path):
    with pytest.raises(UserError, match="absent: no such folder"):
        FolderWatch(tmp_path / "absent", None, None, None, False)
    with pytest.raises(UserError, match="is the folder that is watched"):
        FolderWatch(tmp_path, None, str(tmp_path), None, False)
    other = tmp_path / "other.jsonl"
    other.write_text('{"path": "a.png", "score": 0.5}\n')
    with pytest.raises(UserError, match="line 1"):
        read_done(other)
    assert read_done(tmp_path / "absent.jsonl") == {}
