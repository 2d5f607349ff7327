"""What is said of a data set before anything is trained, and which layouts are understood."""

import json
import sys

import cv2
import numpy as np
import pytest
from PIL import Image

from datasets.check import check, find_white, main
from datasets.mvtec import list_categories, load_category, load_ground_truth
from deploy.common.cli import UserError

RANDOM = np.random.default_rng(0)


def save(path, array=None):
    """A picture, a random one by default: no two of them are the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = RANDOM.integers(0, 256, (6, 8, 3), dtype=np.uint8) if array is None else array
    Image.fromarray(array).save(path)
    return path


def mask(*values):
    """A mask with these values in its upper left corner."""
    array = np.zeros((6, 8), np.uint8)
    array[0, : len(values)] = values
    return array


@pytest.fixture
def make(tmp_path):
    """`make(file, ...)` makes a category `part` of such pictures, masks where they lie, and returns the data folder."""

    def make(*files):
        for file in files:
            is_mask = file.lower().startswith(("ground", "gt", "mask", "test_public/ground"))
            save(tmp_path / "part" / file, mask(255) if is_mask else None)
        return tmp_path

    return make


USUAL = ("train/good/0.png", "train/good/1.png", "test/good/0.png", "test/dent/0.png", "test/dent/1.png")


def checked(data, **options):
    return check(load_category(data, "part"), **options)


def found(data):
    """How the pictures of `part` were understood: their names to learn from, and each test picture's defect."""
    category = load_category(data, "part")
    return [category.name_of(path) for path in category.train], [image.defect for image in category.test]


# ---- layouts


@pytest.mark.parametrize("word", ["good", "Good", "OK", "ok", "normal", "Defect-Free", "no_defect", "正常"])
def test_good_pictures_are_known_by_many_words(make, word):
    data = make(f"train/{word}/0.png", f"test/{word}/0.png", "test/dent/0.png")
    assert list_categories(data) == ["part"]
    assert sorted(found(data)[1], key=str) == [None, "dent"]
    assert found(data)[0] == ["0.png"]
    assert not checked(data).warnings


@pytest.mark.parametrize("name", ["good_2", "not good", "Normal pictures"])
def test_a_defect_that_looks_good_is_named(make, name):
    (warning,) = checked(make(*USUAL, f"test/{name}/0.png")).warnings
    assert warning.startswith(f"test/{name} was taken for a defect")


@pytest.mark.parametrize("train", ["train/good", "Train/Good"])
@pytest.mark.parametrize("test", ["test", "Test", "test_public"])
def test_folders_are_found_in_any_case_and_in_mvtec_ad_2(make, train, test):
    data = make(f"{train}/0.png", f"{test}/good/0.png", f"{test}/bad/0.png", f"{test}/ground_truth/bad/0_mask.png")
    category = load_category(data, "part")
    assert [image.defect for image in category.test] == ["bad", None]
    assert [len(image.masks) for image in category.test] == [1, 0]


def test_pictures_in_subfolders_are_taken_and_keep_their_names(make):
    data = make("train/good/day1/0.png", "train/good/day2/0.png", "train/ok/0.png", *USUAL[2:])
    assert found(data)[0] == ["good/day1/0.png", "good/day2/0.png", "ok/0.png"]
    (data / "part/train/ok/0.png").unlink()
    (data / "part/train/ok").rmdir()
    assert found(data)[0] == ["day1/0.png", "day2/0.png"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["train/images/0.png"], r"train/good: no such folder; .* images \(1\): rename"),
        (["train/0.png"], "train/good: no such folder; 1 pictures lie in train itself"),
        (["learn/0.png", "test/good/0.png"], "part/train: no such folder;.* has: learn, test"),
        ([USUAL[0], "test/0.png", "test/1.png"], "sort its 2 pictures"),
    ],
)
def test_what_is_not_understood_is_one_line_that_names_it(make, files, message):
    with pytest.raises(UserError, match=message):
        load_category(make(*files), "part")


def test_a_category_given_for_its_parent_is_told(make):
    data = make(*USUAL)
    with pytest.raises(UserError, match=rf"give --data {data} -cat part"):
        list_categories(data / "part")


def test_categories_one_folder_deeper_are_told(tmp_path, make):
    make(*USUAL)
    (tmp_path / "mvtec").mkdir()
    (tmp_path / "part").rename(tmp_path / "mvtec/part")
    with pytest.raises(UserError, match=rf"some in mvtec: give --data {tmp_path / 'mvtec'}"):
        list_categories(tmp_path)
    with pytest.raises(UserError, match=r"elsewhere: no such folder"):
        load_category(tmp_path / "elsewhere", "part")


@pytest.mark.parametrize(
    "names",
    [
        ("ground_truth/dent/0_mask.png", "ground_truth/dent/1_mask.png"),
        ("Ground-Truth/Dent/0_MASK.PNG", "Ground-Truth/Dent/1.bmp"),
        ("ground_truth/0_mask.png", "ground_truth/1_mask.png"),  # flat
        ("ground_truth/dent/0/000.png", "ground_truth/dent/1/000.png"),  # MVTec LOCO
        ("masks/dent/0_gt.png", "masks/dent/1-mask.tif"),
    ],
)
def test_masks_are_found(make, names):
    data = make(*USUAL, *names)
    dents = [image for image in load_category(data, "part").test if image.defect]
    assert [[str(m.relative_to(data / "part")) for m in image.masks] for image in dents] == [[name] for name in names]
    assert not checked(data).warnings


def test_several_masks_of_a_picture_are_one(make, tmp_path):
    data = make(*USUAL[:4])
    save(tmp_path / "part/ground_truth/dent/0/000.png", mask(255, 0, 0))
    save(tmp_path / "part/ground_truth/dent/0/001.png", mask(0, 0, 255))
    truth = load_ground_truth(load_category(data, "part").test, (6, 8), "published")
    assert np.argwhere(truth.masks).tolist() == [[0, 0, 0], [0, 0, 2]]


def test_a_mask_that_two_pictures_would_have_is_an_error(make):
    data = make(*USUAL, "test/scratch/0.png", "ground_truth/0_mask.png", "ground_truth/1_mask.png")
    with pytest.raises(UserError, match=r"0_mask\.png: would be the mask of .*dent/0\.png and of .*scratch/0\.png"):
        load_category(data, "part")


def test_masks_that_belong_to_nothing_are_told(make):
    (warning,) = checked(make(*USUAL, "ground_truth/dent/a.png", "ground_truth/dent/b.png")).warnings
    assert "ground_truth is there, but none of its masks belongs to" in warning
    assert "wanted: ground_truth/dent/0_mask.png" in warning
    good = make("ground_truth/good/0.png", "ground_truth/dent/0.png", "ground_truth/dent/1.png")
    (warning,) = checked(good).warnings  # masks of good pictures are nothing to tell
    assert warning == "masks that belong to no test picture: ground_truth/dent/a.png, ground_truth/dent/b.png"


@pytest.mark.parametrize(
    ("values", "rule", "kept"),
    [((0, 1, 3), "published", [1, 2]), ((0, 1, 3), "half", [1, 2]), ((0, 128, 128), "nonzero", [1, 2])],
)
def test_masks_of_other_values(make, tmp_path, capsys, values, rule, kept):
    data = make(*USUAL)
    for i in range(2):
        save(tmp_path / f"part/ground_truth/dent/{i}_mask.png", mask(*values))
    test = load_category(data, "part").test
    truth = load_ground_truth(test, (6, 8), rule)
    assert [np.flatnonzero(one[0]).tolist() for one in truth.masks] == [kept, kept, []]
    assert truth.labels.tolist() == [True, True, False]
    assert len(capsys.readouterr().err.splitlines()) == (rule != "nonzero")


def test_masks_that_a_rule_drops_are_one_line(make, tmp_path, capsys):
    data = make(*USUAL)
    for i in range(2):
        save(tmp_path / f"part/ground_truth/dent/{i}_mask.png", mask(128, 128))
    load_ground_truth(load_category(data, "part").test, (6, 8), "published")
    (line,) = capsys.readouterr().err.splitlines()
    assert "0_mask.png and 1 more" in line
    assert "-o mask_rule=nonzero" in line


@pytest.mark.parametrize(
    ("pixels", "mode", "words"),
    [
        (mask(200), "L", "no mask has a value above 200: mask_rule: published counts none of their pixels"),
        (mask(), "L", "masks that mark nothing: "),
        (mask(), "LA", "masks that mark nothing (alpha does not count: save them grey): "),
        (255 - mask(255), "L", "every mask marks more than half of its picture"),
    ],
)
def test_masks_that_are_not_what_they_should_be_are_told(make, tmp_path, pixels, mode, words):
    data = make(*USUAL)
    for i in range(2):
        path = save(tmp_path / f"part/ground_truth/dent/{i}_mask.png", pixels)
        with Image.open(path) as image:
            image.convert(mode).save(path)
    (warning,) = checked(data).warnings
    assert words in warning


@pytest.mark.parametrize("values", [(1, 3), (255,), (257, 65535)])
def test_a_mask_of_16_bit_may_hold_values_of_8(make, tmp_path, values):
    data = make(*USUAL)
    for i in range(2):
        save(tmp_path / f"part/ground_truth/dent/{i}_mask.png", mask().astype(np.uint16) + np.uint16(values[-1]))
    assert load_ground_truth(load_category(data, "part").test, (6, 8), "half").masks[:2].all()


def test_masks_among_the_pictures_are_told(make):
    names = ("test/dent/0_mask.png", "test/dent/1_GT.png", "train/good/0_label.bmp", "test/good/face_mask.png")
    warnings = checked(make(*USUAL, *names)).warnings
    assert [warning.partition(";")[0] for warning in warnings] == [
        "train/good has masks among its pictures (train/good/0_label.bmp)",
        "test/dent has masks among its pictures (test/dent/0_mask.png, test/dent/1_GT.png)",
    ]


@pytest.mark.parametrize(("word", "lacking"), [("good", "picture with a defect"), ("dent", "good picture")])
def test_a_test_of_one_kind_is_told(make, word, lacking):
    (warning,) = checked(make("train/good/0.png", "train/good/1.png", f"test/{word}/0.png")).warnings
    assert f"test has no {lacking}" in warning
    assert "-o selection=last" in warning


# ---- the report


def test_what_is_left_out_is_counted_and_named(make, tmp_path):
    data = make(*USUAL, "train/bad/0.png", "validation/good/0.png", "0.png")
    for name in ("train/good/a.txt", "train/good/b.heic", "test/dent/c.heic", "test/dent/.hidden"):
        (tmp_path / "part" / name).write_text("x")
    report = checked(data)
    assert report.warnings == [
        "left out: 1 pictures that lie in part itself (0.png)",
        "left out: validation, 1 pictures",
        "left out: train/bad, 1 pictures",
    ]
    (note,) = (note for note in report.notes if note.startswith("left out"))
    assert ".heic (2), .txt (1)" in note
    assert "train/good/a.txt" in note


def test_all_unreadable_files_are_named_at_once(make, tmp_path):
    data = make(*USUAL, "ground_truth/dent/0.png", "ground_truth/dent/1.png")
    broken = ["train/good/1.png", "test/dent/0.png", "ground_truth/dent/1.png"]
    for name in broken:
        (tmp_path / "part" / name).write_text("not a picture")
    report = checked(data)
    assert [name for name, error in zip(broken, report.errors, strict=True) if name in error] == broken
    with pytest.raises(UserError, match=r"category part: .*1\.png: .*0\.png: .*dent/1\.png"):
        report.stop_at_errors()


@pytest.mark.parametrize(
    ("one", "other", "text"),
    [
        ("train/good/0.png", "test/good/0.png", "learnt from and tested on"),
        ("train/good/0.png", "test/dent/0.bmp", "learnt from as good, tested as a defect"),
        ("test/good/0.png", "test/dent/0.png", "tested as good and as a defect"),
    ],
)
def test_the_same_picture_twice_is_told_whatever_the_files_are(make, tmp_path, one, other, text):
    data = make(*USUAL)
    Image.open(tmp_path / "part" / one).save(tmp_path / "part" / other)
    assert f"the same picture {text}: {one} is {other}" in checked(data).warnings


def test_what_can_be_promised_is_said_before_the_training(make):
    data = make(*USUAL, *(f"train/good/{i}.png" for i in range(10, 18)))
    report = checked(data, holdout=0.2)
    assert (report.held_out, report.lowest_false_alarm_rate) == (2, pytest.approx(1 / 3))
    assert "held out: 2; false alarms they can promise: 0.33 (0.05 takes 95 good pictures)" in report.notes
    assert checked(data, holdout=0).lowest_false_alarm_rate is None


def test_the_check_may_hold_out_none_as_published(make, monkeypatch, capsys):
    words = ["check", "--data", str(make("train/good/0.png")), "--holdout"]
    for share, code in (("0", 0), ("0.1", 2)):
        monkeypatch.setattr(sys, "argv", [*words, share])
        assert main() == code
        assert ("leaves none to learn from" in capsys.readouterr().out) == bool(code)


def test_sizes_modes_and_masks_are_counted(make, tmp_path):
    data = make(*USUAL)
    save(tmp_path / "part/train/good/2.png", np.zeros((4, 4), np.uint8))
    for i in range(2):
        save(tmp_path / f"part/ground_truth/dent/{i}_mask.png", np.full((8, 6), 255, np.uint8))
    report = checked(data)
    assert report.lines()[:4] == [
        "train/good: 3 good, to learn from; 8x6 (2), 4x4 (1); RGB 8 bit (2), L 8 bit (1)",
        "test/dent: 2 with a defect, 2 with a mask; 8x6; RGB 8 bit",
        "test/good: 1 good; 8x6; RGB 8 bit",
        "ground_truth: 2 masks; 6x8; L 8 bit; values 255",
    ]
    assert any("another shape" in warning for warning in report.warnings)


def test_the_command(make, tmp_path, monkeypatch, capsys):
    data = make(*USUAL)
    monkeypatch.setattr(sys, "argv", ["check", "--data", str(data)])
    assert main() == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("part  train/good: 2 good")
    (tmp_path / "part/train/good/1.png").write_text("x")
    monkeypatch.setattr(sys, "argv", ["check", "--data", str(data), "-cat", "part", "--json"])
    assert main() == 2
    out, err = capsys.readouterr()
    assert len(json.loads(out)["part"]["errors"]) == 1
    assert "not fit for training: part" in err


# ---- 16 bit


@pytest.mark.parametrize(
    ("highest", "step", "white"),
    [
        (200, 1, 255),
        (1000, 1, 1023),
        (1024, 1, 4095),
        (4095, 1, 4095),
        (4080, 16, 4095),  # 8 bit in 12
        (4096, 1, 16383),
        (16384, 1, 65535),
        (65520, 16, 65520),  # 12 bit at the upper end
        (9600, 16, 65520),  # the same, dark
        (65472, 64, 65472),  # 10 bit
        (65532, 4, 65532),  # 14 bit
        (65535, 257, 65535),  # 8 bit repeated
        (65280, 256, 65535),
        (0, 0, 255),
    ],
)
def test_the_largest_value_tells_the_camera(highest, step, white):
    assert find_white(highest, step) == white


@pytest.mark.parametrize(("shift", "white"), [(0, 4095), (4, 65520)])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_white_of_training_pictures_is_found_and_brighter_ones_are_told(make, tmp_path, shift, white, channels):
    data = make(*USUAL[2:])
    for i in range(3):
        values = RANDOM.integers(0, 4000, (6, 8, channels), dtype=np.uint16)
        values[0, 0] = 4001
        path = tmp_path / f"part/train/good/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), values << shift)
    report = checked(data)
    assert report.white_level == white
    assert any(f"{white} is white" in note for note in report.notes)
    assert checked(data, white_level=5000).white_level == 5000
    assert cv2.imwrite(str(tmp_path / "part/test/good/0.png"), np.full((6, 8), 65535, np.uint16))
    assert any("brighter than white" in warning for warning in checked(data).warnings)


def test_pictures_of_8_bit_have_no_white_level(make):
    assert checked(make(*USUAL)).white_level is None
