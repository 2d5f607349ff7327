"""Public data sets and drawn defects in MVTec's layout: each form as a small made-up tree, and what may be wrong."""

import base64
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets import convert as room
from datasets.annotations import _counts
from datasets.convert import FORMS, READERS, convert
from datasets.mvtec import list_categories, load_category
from deploy.common.cli import UserError
from deploy.common.imaging import read_rgb

ROOT = Path(__file__).resolve().parent.parent
SERIAL = itertools.count()


def picture(path, size=(8, 10), **options):
    """A picture that no other one equals; size is height, width."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((*size, 3), 90, np.uint8)
    pixels[0, :3, 0] = [next(SERIAL) % 256, next(SERIAL) // 256 % 256, 7]
    Image.fromarray(pixels).save(path, **options)
    return path


def mask(path, *values, size=(8, 10)):
    """A mask with a row of 2 pixels of each value from the second row on; none at all without values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros(size, np.uint8)
    for row, value in enumerate(values, start=1):
        pixels[row, 2:4] = value
    Image.fromarray(pixels).save(path)
    return path


def tree(folder):
    """Every file below the folder and its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def layout(folder):
    return sorted(name for name in tree(folder))


def pixels(path):
    with Image.open(path) as image:
        assert image.mode == "L" and image.format == "PNG"
        array = np.asarray(image)
    assert set(np.unique(array)) <= {0, 255}
    return array == 255


def marked(path):
    """Rows and columns of a mask's pixels."""
    return sorted(map(tuple, np.argwhere(pixels(path)).tolist()))


ROWS = [(1, 2), (1, 3), (2, 2), (2, 3)]  # of mask(path, any, any)

# ---- the public sets


def make_visa(top, csv=True):
    for number in range(6):
        picture(top / f"candle/Data/Images/Normal/{number:04d}.JPG")
        picture(top / f"pcb1/Data/Images/Normal/{number:04d}.JPG")
    for category in ("candle", "pcb1"):
        picture(top / f"{category}/Data/Images/Anomaly/000.JPG")
        mask(top / f"{category}/Data/Masks/Anomaly/000.png", 1, 3)
        (top / category / "image_anno.csv").write_text("image,label,mask\n")
    rows = ["object,split,label,image,mask"]
    for category, number in itertools.product(("candle", "pcb1"), range(6)):
        side = "test" if number in (1, 4) else "train"
        rows.append(f"{category},{side},normal,{category}/Data/Images/Normal/{number:04d}.JPG,")
    for category in ("candle", "pcb1"):
        images = f"{category}/Data/Images/Anomaly/000.JPG,{category}/Data/Masks/Anomaly/000.png"
        rows.append(f"{category},test,anomaly,{images}")
    if csv:
        (top / "split_csv").mkdir()
        (top / "split_csv/1cls.csv").write_text("\n".join(rows) + "\n")
    return top


VISA = [
    "ground_truth/bad/000_mask.png",
    "test/bad/000.JPG",
    "test/good/0001.JPG",
    "test/good/0004.JPG",
    *(f"train/good/000{number}.JPG" for number in (0, 2, 3, 5)),
]


def test_visa_takes_train_and_test_from_its_table(tmp_path):
    convert("visa", make_visa(tmp_path / "VisA_20220922"), tmp_path / "data")
    assert list_categories(tmp_path / "data") == ["candle", "pcb1"]
    for category in ("candle", "pcb1"):
        assert layout(tmp_path / "data" / category) == VISA
        assert marked(tmp_path / "data" / category / "ground_truth/bad/000_mask.png") == ROWS
    loaded = load_category(tmp_path / "data", "candle")
    assert [len(image.masks) for image in loaded.test] == [1, 0, 0]


def test_one_category_of_visa(tmp_path):
    make_visa(tmp_path / "VisA")
    convert("visa", tmp_path / "VisA/candle", tmp_path / "data")
    assert layout(tmp_path / "data") == [f"candle/{name}" for name in VISA]


def test_visa_without_its_table_is_split_by_chance_but_always_alike(tmp_path):
    top = make_visa(tmp_path / "VisA", csv=False)
    [category, _] = convert("visa", top, tmp_path / "first", 0.4)
    convert("visa", top, tmp_path / "again", 0.4)
    assert layout(tmp_path / "first") == layout(tmp_path / "again")
    assert len(list((tmp_path / "first/candle/test/good").iterdir())) == 2
    assert any("2 of 6 good pictures" in note for note in category.notes)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("candle,train,normal,../../secret.JPG,", "secret.JPG"),
        ("candle,train,normal,/etc/secret.JPG,", "secret.JPG"),
        ("candle,val,normal,candle/Data/Images/Normal/0001.JPG,", "'val'"),
    ],
)
def test_a_table_of_visa_that_leads_out_or_is_of_another_kind_is_refused(tmp_path, row, said):
    top = make_visa(tmp_path / "VisA")
    with (top / "split_csv/1cls.csv").open("a") as file:
        file.write(row + "\n")
    with pytest.raises(UserError, match=said) as error:
        convert("visa", top, tmp_path / "data")
    assert "1cls.csv" in str(error.value)
    assert not (tmp_path / "data").exists()


def test_paths_in_tables_and_json_are_relative_to_wherever_the_command_runs(tmp_path, monkeypatch):
    top = make_visa(tmp_path / "VisA")
    for folder, src in ((tmp_path, "VisA"), (top, "."), (top / "candle", "."), (top, "candle/../candle")):
        monkeypatch.chdir(folder)
        [category, *_] = convert("visa", Path(src), tmp_path / f"data{next(SERIAL)}")
        assert category.name == "candle" and len(category.items) == 7
        assert sum(item.side == "train" for item in category.items) == 4
    some_good(tmp_path / "part")
    monkeypatch.chdir(tmp_path / "part")
    for names in (["../secret.png"], ["sub/../../secret.png"], ["/etc/secret.png"]):
        write_coco(Path("all.json"), [{"id": 0, "file_name": name} for name in names], [])
        with pytest.raises(UserError, match="not in"):
            convert("coco", Path(), tmp_path / "never")
    with (top / "split_csv/1cls.csv").open("w") as file:
        file.write("image,split\ncandle/Data/Images/Normal/0000.png,train\n")
    with pytest.raises(UserError, match="names none of the pictures"):
        convert("visa", top, tmp_path / "never")


def test_visa_as_its_own_script_lays_it_out(tmp_path):
    folder = tmp_path / "VisA_pytorch/1cls/candle"
    picture(folder / "train/good/0000.JPG")
    picture(folder / "test/good/0001.JPG")
    picture(folder / "test/bad/000.JPG")
    mask(folder / "ground_truth/bad/000.png", 255, 255)
    convert("visa", tmp_path / "VisA_pytorch", tmp_path / "data")
    assert layout(tmp_path / "data/candle") == [
        "ground_truth/bad/000_mask.png",
        "test/bad/000.JPG",
        "test/good/0001.JPG",
        "train/good/0000.JPG",
    ]


def test_btad(tmp_path):
    for category, suffix in (("01", "bmp"), ("02", "png")):
        picture(tmp_path / f"btad/BTech/{category}/train/ok/0000.{suffix}")
        picture(tmp_path / f"btad/BTech/{category}/test/ok/0001.{suffix}")
        picture(tmp_path / f"btad/BTech/{category}/test/ko/0000.{suffix}")
        mask(tmp_path / f"btad/BTech/{category}/ground_truth/ko/0000.png", 255, 255)
    convert("btad", tmp_path / "btad", tmp_path / "data")
    assert list_categories(tmp_path / "data") == ["01", "02"]
    assert layout(tmp_path / "data/01") == [
        "ground_truth/ko/0000_mask.png",
        "test/good/0001.bmp",
        "test/ko/0000.bmp",
        "train/good/0000.bmp",
    ]
    assert marked(tmp_path / "data/02/ground_truth/ko/0000_mask.png") == ROWS


def make_mpdd(top, defects=("scratches", "hole")):
    picture(top / "tubes/train/good/000.png")
    picture(top / "tubes/test/good/000.png")
    for defect in defects:
        for name in ("000", "001"):
            picture(top / f"tubes/test/{defect}/{name}.png")
            mask(top / f"tubes/ground_truth/{defect}/{name}_mask.png", 255, 255)
    return top


def test_mpdd(tmp_path):
    top = make_mpdd(tmp_path / "MPDD")
    convert("mpdd", top, tmp_path / "data")
    assert layout(tmp_path / "data") == layout(top)


def make_loco(top):
    folder = top / "juice_bottle"
    picture(folder / "train/good/000.png")
    picture(folder / "validation/good/000.png")
    picture(folder / "test/good/000.png")
    for defect, values in (("logical_anomalies", [255, 254]), ("structural_anomalies", [230])):
        picture(folder / f"test/{defect}/000.png")
        for number, value in enumerate(values):
            mask(folder / f"ground_truth/{defect}/000/{number:03d}.png", *[0] * number, value)
    (folder / "defects_config.json").write_text("[]")
    return top


def test_loco_joins_masks_and_learns_from_what_is_to_validate_on(tmp_path):
    [category] = convert("loco", make_loco(tmp_path / "loco"), tmp_path / "data")
    folder = tmp_path / "data/juice_bottle"
    assert layout(folder) == [
        "ground_truth/logical_anomalies/000_mask.png",
        "ground_truth/structural_anomalies/000_mask.png",
        "test/good/000.png",
        "test/logical_anomalies/000.png",
        "test/structural_anomalies/000.png",
        "train/good/train_good_000.png",
        "train/good/validation_good_000.png",
    ]
    assert marked(folder / "ground_truth/logical_anomalies/000_mask.png") == ROWS
    assert marked(folder / "ground_truth/structural_anomalies/000_mask.png") == ROWS[:2]
    assert "1 pictures of validation/good are taken to learn from" in category.notes


def test_ad2_says_what_has_no_labels(tmp_path):
    folder = tmp_path / "mvtec_ad_2/can"
    for name in ("train/good/000_regular", "validation/good/001_regular", "test_public/good/000_regular"):
        picture(folder / f"{name}.png")
    picture(folder / "test_public/bad/000_overexposed.png")
    mask(folder / "test_public/ground_truth/bad/000_overexposed_mask.png", 255, 255)
    picture(folder / "test_private/000_regular.png")
    picture(folder / "test_private_mixed/000_mixed.png")
    [category] = convert("ad2", tmp_path / "mvtec_ad_2", tmp_path / "data")
    assert layout(tmp_path / "data/can") == [
        "ground_truth/bad/000_overexposed_mask.png",
        "test/bad/000_overexposed.png",
        "test/good/000_regular.png",
        "train/good/000_regular.png",
        "train/good/001_regular.png",
    ]
    for place in ("test_private", "test_private_mixed"):
        assert f"1 files in {place}: left out" in category.notes


def make_kolektor(top):
    for item, part in itertools.product(range(1, 11), range(3)):
        picture(top / f"kos{item:02d}/Part{part}.jpg")
        mask(top / f"kos{item:02d}/Part{part}_label.bmp", *[255, 255] * (part == 2))
    return top


def test_kolektor_is_split_by_item(tmp_path):
    convert("kolektor", make_kolektor(tmp_path / "KolektorSDD"), tmp_path / "data")
    folder = tmp_path / "data/kolektor"
    items = {side: {name.split("_")[0] for name in os.listdir(folder / side)} for side in ("train/good", "test/good")}
    assert len(items["test/good"]) == 2 and not items["test/good"] & items["train/good"]
    assert len(os.listdir(folder / "train/good")) == 16
    assert sorted(os.listdir(folder / "test/defect")) == [f"kos{item:02d}_Part2.jpg" for item in range(1, 11)]
    assert marked(folder / "ground_truth/defect/kos07_Part2_mask.png") == ROWS


def test_kolektor2_leaves_out_defects_to_learn_from_and_stray_copies(tmp_path):
    for name, values in (("train/10000", []), ("train/10001", [255]), ("test/20000", []), ("test/20001", [9, 9])):
        picture(tmp_path / f"ksdd2/{name}.png")
        mask(tmp_path / f"ksdd2/{name}_GT.png", *values)
    picture(tmp_path / "ksdd2/train/10000 (copy).png")
    mask(tmp_path / "ksdd2/train/10000_GT (copy).png")
    [category] = convert("kolektor2", tmp_path / "ksdd2", tmp_path / "data")
    assert layout(tmp_path / "data/kolektor2") == [
        "ground_truth/defect/20001_mask.png",
        "test/defect/20001.png",
        "test/good/20000.png",
        "train/good/10000.png",
    ]
    assert marked(tmp_path / "data/kolektor2/ground_truth/defect/20001_mask.png") == ROWS
    notes = "\n".join(category.notes)
    assert "1 pictures to learn from have a defect" in notes
    assert "10000 (copy).png: left out" in notes and "10000_GT (copy).png: left out" in notes


def test_magnetic_tile(tmp_path):
    top = tmp_path / "Magnetic-tile-defect-datasets.-master"
    for number in range(10):
        picture(top / f"MT_Free/Imgs/exp1_num_{number}.jpg")
        mask(top / f"MT_Free/Imgs/exp1_num_{number}.png")
    picture(top / "MT_Free/Imgs/exp2_num_3.jpg")
    for name in ("Blowhole", "Uneven"):
        picture(top / f"MT_{name}/Imgs/exp1_num_7.jpg")
        mask(top / f"MT_{name}/Imgs/exp1_num_7.png", 255, 255)
    [category] = convert("magnetic-tile", tmp_path, tmp_path.parent / f"{tmp_path.name}-data")
    folder = tmp_path.parent / f"{tmp_path.name}-data/magnetic_tile"
    assert sorted(os.listdir(folder / "test")) == ["blowhole", "good", "uneven"]
    assert marked(folder / "ground_truth/blowhole/exp1_num_7_mask.png") == ROWS
    places = {path.name: path.parent for path in folder.glob("*/good/*")}
    assert len(places) == 11 and places["exp1_num_3.jpg"] == places["exp2_num_3.jpg"]
    assert not any("left out" in note for note in category.notes)


# ---- drawn defects


def labelme(path, *shapes, size=(8, 10), **more):
    """A LabelMe file; a shape is a label, a type and points."""
    content = {
        "version": "5.5.0",
        "shapes": [{"label": label, "shape_type": kind, "points": points} for label, kind, points in shapes],
        "imagePath": f"{path.stem}.png",
        "imageData": None,
        "imageHeight": size[0],
        "imageWidth": size[1],
    }
    path.write_text(json.dumps(content | more))


def write_coco(path, images, annotations, categories=("scratch", "dent")):
    content = {
        "images": images,
        "annotations": [{"id": i, "iscrowd": 0} | a for i, a in enumerate(annotations)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(categories)],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


SQUARE = [[3, 2], [6, 2], [6, 5], [3, 5]]  # x, y
INSIDE = {(y, x) for y in range(2, 5) for x in range(3, 6)}  # pixels; the outline may add those that it touches
AROUND = {(y, x) for y in range(2, 6) for x in range(3, 7)}


def some_good(folder, count=4):
    for number in range(count):
        picture(folder / f"good{number}.png")


def test_labelme(tmp_path):
    src = tmp_path / "part"
    some_good(src)
    labelme(src / "good0.json")
    labelme(src / "good1.json", ("OK", "polygon", SQUARE))
    for name, shapes in {
        "a": [("scratch", "polygon", SQUARE)],
        "b": [("scratch", "polygon", SQUARE), ("scratch", "rectangle", [[9, 7], [8, 6]])],
        "c": [("scratch", "polygon", SQUARE), ("dent", "rectangle", [[8, 6], [9, 7]])],
        "d": [("a/b: 划痕", "polygon", SQUARE)],
    }.items():
        picture(src / f"sub/{name}.png")
        labelme(src / f"sub/{name}.json", *shapes)
    before = tree(src)
    [category] = convert("labelme", src, tmp_path / "data", 0.5)
    assert tree(src) == before
    folder = tmp_path / "data/part"
    assert layout(folder / "ground_truth") == [
        "a_b_ 划痕/d_mask.png",
        "combined/c_mask.png",
        "scratch/a_mask.png",
        "scratch/b_mask.png",
    ]
    assert len(os.listdir(folder / "test/good")) == len(os.listdir(folder / "train/good")) == 2
    assert INSIDE <= set(marked(folder / "ground_truth/scratch/a_mask.png")) <= AROUND
    for name in ("scratch/b", "combined/c"):
        both = set(marked(folder / f"ground_truth/{name}_mask.png"))
        assert both >= INSIDE | {(6, 8)} and both <= AROUND | {(6, 8), (6, 9), (7, 8), (7, 9)}
    notes = "\n".join(category.notes)
    assert "2 of 8 pictures have no LabelMe file" in notes and "1 shapes are labelled OK" in notes
    assert load_category(tmp_path / "data", "part").test


@pytest.mark.parametrize(
    ("kind", "points", "inside", "outside"),
    [
        ("circle", [[20, 20], [26, 20]], [(20, 20), (15, 20), (24, 23)], [(20, 28), (12, 20), (25, 25)]),
        ("line", [[10, 20], [30, 20]], [(20, 10), (17, 20), (22, 29)], [(12, 20), (28, 20), (20, 37)]),
        ("linestrip", [[10, 10], [30, 10], [30, 30]], [(10, 20), (20, 30)], [(20, 20), (30, 10)]),
        ("point", [[20, 20]], [(20, 20), (17, 20)], [(20, 27)]),
        ("rectangle", [[10, 10], [20, 10], [20, 20], [10, 20]], [(15, 15)], [(15, 23)]),
        (None, [[10, 10], [20, 10], [20, 20], [10, 20]], [(15, 15)], [(15, 23)]),
        ("polygon", [[-50, -50], [500, -50], [500, 20], [-50, 20]], [(0, 0), (15, 39)], [(25, 20)]),
    ],
)
def test_shapes_of_labelme(tmp_path, kind, points, inside, outside):
    picture(tmp_path / "part/a.png", (40, 40))
    some_good(tmp_path / "part")
    labelme(tmp_path / "part/a.json", ("x", kind, points), size=(40, 40))
    convert("labelme", tmp_path / "part", tmp_path / "data")
    drawn = pixels(tmp_path / "data/part/ground_truth/x/a_mask.png")
    assert all(drawn[place] for place in inside) and not any(drawn[place] for place in outside)


def test_a_mask_within_labelme(tmp_path):
    picture(tmp_path / "part/a.png")
    some_good(tmp_path / "part")
    patch = io.BytesIO()
    Image.fromarray(np.eye(3, dtype=np.uint8) * 255).save(patch, "PNG")
    shape = {"label": "x", "shape_type": "mask", "points": [[4, 2], [6, 4]]}
    shape["mask"] = base64.b64encode(patch.getvalue()).decode()
    labelme(tmp_path / "part/a.json", shapes=[shape])
    convert("labelme", tmp_path / "part", tmp_path / "data")
    assert marked(tmp_path / "data/part/ground_truth/x/a_mask.png") == [(2, 4), (3, 5), (4, 6)]


@pytest.mark.parametrize("named", ["..\\img\\a.png", "a.png", "C:\\pictures\\a.png"])
def test_the_picture_that_a_labelme_file_names_is_found_in_another_folder(tmp_path, named):
    picture(tmp_path / "part/img/a.png")
    some_good(tmp_path / "part/img")
    (tmp_path / "part/ann").mkdir()
    labelme(tmp_path / "part/ann/1.json", ("x", "polygon", SQUARE), imagePath=named)
    convert("labelme", tmp_path / "part", tmp_path / "data")
    assert (tmp_path / "data/part/ground_truth/x/a_mask.png").is_file()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"imagePath": "../../secret.png"}, "not in"),
        ({"imagePath": "/etc/secret.png"}, "not in"),
        ({"imagePath": "no.png"}, "no.png"),
        ({"imageHeight": 80, "imageWidth": 100, "imagePath": "good0.png"}, "100x80"),
        ({"imageHeight": "many", "imagePath": "good0.png"}, "numbers"),
    ],
)
def test_labelme_files_that_are_refused(tmp_path, change, said):
    picture(tmp_path / "secret.png")
    some_good(tmp_path / "part")
    labelme(tmp_path / "part/x.json", ("x", "polygon", SQUARE), **change)
    with pytest.raises(UserError, match=said) as error:
        convert("labelme", tmp_path / "part", tmp_path / "data")
    assert "x.json" in str(error.value) and not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "shape",
    [
        {"label": "x", "shape_type": "polygon", "points": [[1, 2, 3]]},
        {"label": "x", "shape_type": "polygon", "points": [["a", "b"]]},
        {"label": "x", "shape_type": "polygon", "points": [[1, 2], [float("nan"), 3], [4, 5]]},
        {"label": "x", "shape_type": "polygon", "points": []},
        {"label": "x", "shape_type": "circle", "points": [[1, 2]]},
        {"label": "x", "shape_type": "cube", "points": [[1, 2]]},
        {"label": "x", "shape_type": "mask", "points": [[1, 2], [3, 4]], "mask": "no PNG"},
        {"label": "x"},
        "x",
    ],
)
def test_shapes_that_cannot_be_drawn_are_named(tmp_path, shape):
    some_good(tmp_path / "part")
    labelme(tmp_path / "part/good0.json", shapes=[shape])
    with pytest.raises(UserError, match=r"good0\.json: a shape on good0\.png cannot be drawn"):
        convert("labelme", tmp_path / "part", tmp_path / "data")
    assert not (tmp_path / "data").exists()


TURNED = {1: lambda a: a, 3: lambda a: a[::-1, ::-1], 6: lambda a: np.rot90(a, -1), 8: np.rot90}


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("stored", [True, False])
def test_shapes_fit_a_photograph_as_it_is_read(tmp_path, orientation, stored):
    """Tools say in which of its two sizes they have seen it; where both are the same, they have turned it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    some_good(tmp_path / "part")
    path = picture(tmp_path / "part/a.jpg", (20, 30), exif=exif)
    size = (20, 30) if stored else read_rgb(path).shape[:2]
    labelme(tmp_path / "part/a.json", ("x", "rectangle", [[2, 3], [9, 8]]), size=size)
    [category] = convert("labelme", tmp_path / "part", tmp_path / "data")
    drawn = pixels(tmp_path / "data/part/ground_truth/x/a_mask.png")
    expected = np.zeros(size, bool)
    expected[4:7, 3:8] = True  # surely inside
    if stored and orientation != 3:
        expected = TURNED[orientation](expected)
    assert drawn.shape == read_rgb(path).shape[:2]
    assert drawn[expected].all() and drawn.sum() <= 8 * 6
    assert any("turned by EXIF" in note for note in category.notes) == (orientation == 3)


def test_masks_of_any_mode_count_where_they_are_not_zero(tmp_path):
    top = make_mpdd(tmp_path / "MPDD")
    drawn = np.zeros((8, 10), np.uint8)
    drawn[2, 5] = 1
    colour = np.stack([drawn * 0, drawn * 128, drawn * 0], axis=2)
    palette = Image.fromarray(drawn, "P")
    palette.putpalette([0, 0, 0, 128, 0, 0])
    images = {"000": Image.fromarray(drawn.astype(np.uint16)), "001": Image.fromarray(colour), "002": palette}
    for name, image in images.items():
        picture(top / f"tubes/test/hole/{name}.png")
        image.save(top / f"tubes/ground_truth/hole/{name}_mask.png")
    picture(top / "tubes/test/hole/003.png")
    lossy = np.zeros((8, 10), np.uint8)
    lossy[:, 5:] = 255
    Image.fromarray(lossy).save(top / "tubes/ground_truth/hole/003_mask.jpg", quality=50)
    convert("mpdd", top, tmp_path / "data")
    for name in images:
        assert marked(tmp_path / f"data/tubes/ground_truth/hole/{name}_mask.png") == [(2, 5)]
    assert pixels(tmp_path / "data/tubes/ground_truth/hole/003_mask.png").sum() == 40


def test_mask_files_are_turned_and_resized_like_their_pictures(tmp_path):
    top = make_mpdd(tmp_path / "MPDD")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(top / "tubes/test/hole/002.jpg", (8, 10), exif=exif)
    mask(top / "tubes/ground_truth/hole/002_mask.png", 255)
    picture(top / "tubes/test/hole/003.png", (16, 20))
    mask(top / "tubes/ground_truth/hole/003_mask.png", 255)
    convert("mpdd", top, tmp_path / "data")
    assert marked(tmp_path / "data/tubes/ground_truth/hole/002_mask.png") == [(2, 6), (3, 6)]
    assert marked(tmp_path / "data/tubes/ground_truth/hole/003_mask.png") == [
        (y, x) for y in (2, 3) for x in (4, 5, 6, 7)
    ]
    mask(top / "tubes/ground_truth/hole/003_mask.png", 255, size=(8, 8))
    with pytest.raises(UserError, match=r"003\.png: has 20x16 pixels, but its mask 8x8"):
        convert("mpdd", top, tmp_path / "other")


def test_coco(tmp_path):
    src = tmp_path / "part"
    some_good(src / "images")
    names = ["polygons", "runs", "compressed", "box", "both"]
    for name in names:
        picture(src / f"images/{name}.png")
    images = [{"id": i, "file_name": f"{n}.png", "height": 8, "width": 10} for i, n in enumerate([*names, "good0"])]
    flat = [value for point in SQUARE for value in point]
    annotations = [
        {"image_id": 0, "category_id": 0, "segmentation": [flat, [8, 6, 9, 6, 9, 7, 8, 7]]},
        {"image_id": 1, "category_id": 0, "segmentation": {"size": [8, 10], "counts": [26, 3, 5, 3, 5, 3, 35]}},
        {"image_id": 2, "category_id": 0, "segmentation": {"size": [8, 10], "counts": "j035000n0"}},  # by pycocotools
        {"image_id": 3, "category_id": 1, "segmentation": [], "bbox": [3, 2, 3, 3]},
        {"image_id": 4, "category_id": 0, "segmentation": [flat]},
        {"image_id": 4, "category_id": 1, "segmentation": [flat]},
    ]
    write_coco(src / "annotations/instances.json", images, annotations)
    [category] = convert("coco", src, tmp_path / "data")
    folder = tmp_path / "data/part/ground_truth"
    assert layout(folder) == [
        "combined/both_mask.png",
        "dent/box_mask.png",
        "scratch/compressed_mask.png",
        "scratch/polygons_mask.png",
        "scratch/runs_mask.png",
    ]
    assert INSIDE | {(6, 8)} <= set(marked(folder / "scratch/polygons_mask.png"))
    assert set(marked(folder / "scratch/runs_mask.png")) == INSIDE
    assert set(marked(folder / "scratch/compressed_mask.png")) == INSIDE
    assert INSIDE <= set(marked(folder / "dent/box_mask.png")) <= AROUND
    assert "3 of 9 pictures are in no .json file: taken as good" in category.notes


def compress(counts):
    """COCO's compressed run lengths, written from the description of its format."""
    text = ""
    for place, count in enumerate(counts):
        value = count - counts[place - 2] if place > 2 else count
        more = True
        while more:
            code, value = value & 31, value >> 5
            more = value != (-1 if code & 16 else 0)
            text += chr(48 + code + 32 * more)
    return text


def test_compressed_run_lengths():
    rng = np.random.default_rng(0)
    for _ in range(50):
        counts = rng.integers(0, 10 ** rng.integers(1, 8), 9).tolist()
        assert _counts(compress(counts)) == counts


@pytest.mark.parametrize(
    ("images", "annotation", "said"),
    [
        ([{"file_name": "../../secret.png"}], {}, "not in"),
        ([{"file_name": "no.png"}], {}, "none of the 1 pictures"),
        ([{"file_name": "good0.png"}], {"image_id": 7}, "image 7"),
        ([{"file_name": "good0.png"}], {"category_id": 7}, "category 7"),
        ([{"file_name": "good0.png"}], {"segmentation": {"size": [9, 9], "counts": [81]}}, "good0.png"),
        ([{"file_name": "good0.png"}], {"segmentation": {"size": [8, 10], "counts": [90, -10]}}, "good0.png"),
        ([{"file_name": "good0.png"}], {"segmentation": [[1, 2, 3]]}, "good0.png"),
        ([{"file_name": "good0.png"}], {"segmentation": None}, "good0.png"),
        ([{"file_name": "good0.png", "height": 3, "width": 4}], {"segmentation": [[1, 1, 2, 2, 1, 2]]}, "4x3"),
    ],
)
def test_coco_files_that_are_refused(tmp_path, images, annotation, said):
    picture(tmp_path / "secret.png")
    some_good(tmp_path / "part")
    images = [{"id": i} | image for i, image in enumerate(images)]
    write_coco(tmp_path / "part/all.json", images, [{"image_id": 0, "category_id": 0} | annotation])
    with pytest.raises(UserError, match=said) as error:
        convert("coco", tmp_path / "part", tmp_path / "data")
    assert "all.json" in str(error.value) and not (tmp_path / "data").exists()


def test_pictures_of_coco_with_the_same_name_are_told_apart_by_their_folder(tmp_path):
    for place in ("train", "val"):
        picture(tmp_path / f"part/{place}/1.png")
    some_good(tmp_path / "part")
    image = {"id": 0, "file_name": "elsewhere/val/1.png"}
    annotation = {"image_id": 0, "category_id": 0, "bbox": [3, 2, 3, 3]}
    write_coco(tmp_path / "part/all.json", [image], [annotation])
    convert("coco", tmp_path / "part", tmp_path / "data")
    [drawn] = (tmp_path / "data/part/test/scratch").iterdir()
    assert drawn.read_bytes() == (tmp_path / "part/val/1.png").read_bytes()
    write_coco(tmp_path / "part/all.json", [image | {"file_name": "1.png"}], [annotation])
    with pytest.raises(UserError, match="may be"):
        convert("coco", tmp_path / "part", tmp_path / "other")


JUNK = (None, True, -1, 1e400, "x", "../..", [], [[]], {}, [None], [{}], [[1, 2], [3]])


@pytest.mark.parametrize("reader", READERS)
def test_junk_anywhere_in_the_json_is_one_line(tmp_path, reader):
    """Each value in turn, of every depth, is replaced by things of other types."""
    some_good(tmp_path / "part", 2)
    path = tmp_path / "part/good0.json"
    flat = [value for point in SQUARE for value in point]
    if reader == "labelme":
        labelme(path, ("x", "polygon", SQUARE))
    else:
        images = [{"id": 0, "file_name": "good0.png", "height": 8, "width": 10}]
        runs = {"size": [8, 10], "counts": "j035000n0"}
        annotations = [{"image_id": 0, "category_id": 0, "segmentation": shape} for shape in ([flat], runs)]
        write_coco(path, images, annotations, categories=["x"])
    content = json.loads(path.read_text())

    def places(value, *keys):
        if keys:
            yield keys
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            yield from places(value[key], *keys, key)

    refused = 0
    for *keys, last in places(content):
        for junk in JUNK:
            changed = json.loads(json.dumps(content))
            holder = changed
            for key in keys:
                holder = holder[key]
            holder[last] = junk
            path.write_text(json.dumps(changed))
            try:
                [category] = room.find(reader, tmp_path / "part")
                for item in category.items:
                    if item.mask:
                        item.mask(room.measure(item.path))
            except UserError:
                refused += 1
    assert refused > 50


def test_labels_as_names_of_folders(tmp_path):
    labels = {"a": "..", "b": "mask", "c": "big scratch", "d": "Big_Scratch", "e": None, "f": 7, "g": "CON/\x1b[2J"}
    some_good(tmp_path / "part")
    for name, label in labels.items():
        picture(tmp_path / f"part/{name}.png")
        labelme(tmp_path / f"part/{name}.json", (label, "polygon", SQUARE))
    convert("labelme", tmp_path / "part", tmp_path / "data")
    test = load_category(tmp_path / "data", "part").test
    assert [(image.path.stem, image.defect) for image in test if image.masks] == [
        ("f", "7"),
        ("g", "CON__[2J"),
        ("c", "big scratch"),
        ("d", "big scratch"),
        ("a", "defect"),
        ("e", "defect"),
        ("b", "mask defect"),
    ]


# ---- what all have in common


@pytest.mark.parametrize("kind", [*FORMS, *READERS])
def test_a_folder_of_another_kind_is_one_line_that_says_what_was_looked_for(tmp_path, kind):
    picture(tmp_path / "src/some/where/a.png")
    (tmp_path / "src/some/other.json").write_text("[]")
    with pytest.raises(UserError, match=f"nothing of {kind} in it.*looked for"):
        convert(kind, tmp_path / "src", tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_the_right_kind_is_guessed(tmp_path):
    with pytest.raises(UserError, match="it looks like loco"):
        convert("btad", make_loco(tmp_path / "loco"), tmp_path / "data")


def test_a_missing_folder_and_a_packed_archive(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        convert("visa", tmp_path / "no", tmp_path / "data")
    (tmp_path / "VisA.tar").write_bytes(b"")
    with pytest.raises(UserError, match="unpack"):
        convert("visa", tmp_path / "VisA.tar", tmp_path / "data")


def test_pictures_are_links_or_else_copies_and_the_source_stays(tmp_path, monkeypatch):
    src = make_mpdd(tmp_path / "MPDD")
    before = tree(src)
    convert("mpdd", src, tmp_path / "linked")
    name = "tubes/test/hole/000.png"
    assert (tmp_path / "linked" / name).samefile(src / name)

    def no_links(*_):
        raise OSError("no links here")

    monkeypatch.setattr(room.os, "link", no_links)
    convert("mpdd", src, tmp_path / "copied")
    assert not (tmp_path / "copied" / name).samefile(src / name)
    assert (tmp_path / "copied" / name).read_bytes() == before[name]
    assert tree(src) == before


def test_a_link_is_followed_to_its_picture(tmp_path):
    src = make_mpdd(tmp_path / "MPDD")
    path = src / "tubes/test/hole/000.png"
    path.rename(tmp_path / "store.png")
    path.symlink_to(tmp_path / "store.png")
    convert("mpdd", src, tmp_path / "data")
    made = tmp_path / "data/tubes/test/hole/000.png"
    assert not made.is_symlink() and made.samefile(tmp_path / "store.png")


def test_a_category_that_is_there_is_not_touched(tmp_path):
    src = make_visa(tmp_path / "VisA")
    picture(tmp_path / "data/pcb1/train/good/mine.png")
    before = tree(tmp_path / "data")
    with pytest.raises(UserError, match="pcb1: is there already"):
        convert("visa", src, tmp_path / "data")
    assert tree(tmp_path / "data") == before
    with pytest.raises(UserError, match="lies in"):
        convert("visa", src, src / "data")


def test_all_damaged_files_are_named_and_nothing_is_written(tmp_path, capsys):
    src = make_mpdd(tmp_path / "MPDD")
    for name in ("train/good/000.png", "test/hole/001.png"):
        (src / "tubes" / name).write_text("no picture")
    (src / "tubes/ground_truth/hole/000_mask.png").write_text("no mask")
    with pytest.raises(UserError, match="3 files"):
        convert("mpdd", src, tmp_path / "data")
    said = capsys.readouterr().err
    assert said.count("\n") == 3
    assert all(name in said for name in ("train/good/000.png", "hole/001.png", "hole/000_mask.png"))
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("reader", READERS)
def test_all_damaged_json_is_named(tmp_path, reader, capsys):
    some_good(tmp_path / "part")
    (tmp_path / "part/a.json").write_text('{"shapes": [')
    (tmp_path / "part/b.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "part/c.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="3 files"):
        convert(reader, tmp_path / "part", tmp_path / "data")
    said = capsys.readouterr().err
    assert said.count("\n") == 3 and all(f"{name}.json" in said for name in "abc")


def test_a_picture_without_its_mask_is_left_out_but_not_a_defect_without_any(tmp_path):
    src = make_mpdd(tmp_path / "MPDD", ["scratches", "hole", "rust"])
    (src / "tubes/ground_truth/hole/001_mask.png").unlink()
    mask(src / "tubes/ground_truth/scratches/000_mask.png")  # empty
    for name in ("000", "001"):
        (src / f"tubes/ground_truth/rust/{name}_mask.png").unlink()
    [category] = convert("mpdd", src, tmp_path / "data")
    notes = "\n".join(category.notes)
    assert "hole/001.png: left out: its mask is missing" in notes
    assert "scratches/000.png: left out: its mask is empty" in notes
    test = load_category(tmp_path / "data", "tubes").test
    assert [(image.defect, image.path.stem) for image in test] == [
        (None, "000"),
        ("hole", "000"),
        ("rust", "000"),
        ("rust", "001"),
        ("scratches", "001"),
    ]


def test_equal_names_are_made_unique(tmp_path):
    for name in ("day1/a.png", "day2/a.png", "day2/A.PNG", "b.png", "b.jpg"):
        picture(tmp_path / f"part/{name}", format="JPEG" if name.endswith("jpg") else "PNG")
        content = {"imagePath": name.split("/")[-1]}
        labelme(tmp_path / f"part/{name}.json", ("x", "polygon", SQUARE), **content)
    some_good(tmp_path / "part")
    [category] = convert("labelme", tmp_path / "part", tmp_path / "data")
    names = {"b.jpg", "b_2.png", "day1_a.png", "day2_A.PNG", "day2_a_2.png"}
    assert set(os.listdir(tmp_path / "data/part/test/x")) == names
    test = load_category(tmp_path / "data", "part").test
    masks = {image.path.name: image.masks[0].name for image in test if image.defect}
    assert masks == {name: f"{Path(name).stem}_mask.png" for name in names}
    assert any(note.startswith("equal names: 5 pictures") for note in category.notes)


def test_no_good_picture_is_said(tmp_path):
    labelme(tmp_path / "part.json")
    picture(tmp_path / "part/a.png")
    labelme(tmp_path / "part/a.json", ("x", "polygon", SQUARE))
    with pytest.raises(UserError, match="no good picture to learn from"):
        convert("labelme", tmp_path / "part", tmp_path / "data")


# ---- the command


def run(*arguments):
    command = [sys.executable, "-m", "datasets.convert", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_command_prints_what_was_decided_and_what_the_check_says(tmp_path):
    done = run("loco", make_loco(tmp_path / "loco"), tmp_path / "data")
    assert done.stdout.startswith("juice_bottle  1 pictures of validation/good")
    assert done.stdout.count("juice_bottle  ") == done.stdout.count("\n") > 2
    assert done.returncode == 0, done.stderr
    again = run("loco", tmp_path / "loco", tmp_path / "data", "--test_share", "0.3")
    assert again.returncode == 2 and again.stderr.count("\n") == 2
    assert "has no effect" in again.stderr and "is there already" in again.stderr


def test_wrong_options_are_one_line(tmp_path):
    for arguments in (["mvtec", tmp_path, "data"], ["visa", tmp_path, "data", "--test_share", "1"], ["visa"]):
        done = run(*arguments)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_nothing_that_hinders_the_next(tmp_path, sign):
    src = make_mpdd(tmp_path / "MPDD")
    for number in range(100):
        picture(src / f"tubes/test/hole/{number:04d}.png", (400, 400))
        mask(src / f"tubes/ground_truth/hole/{number:04d}_mask.png", 255, size=(400, 400))
    command = [sys.executable, "-m", "datasets.convert", "mpdd", str(src), str(tmp_path / "data")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("data/.convert/new/tubes/test/hole/*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(sign)
    _, said = process.communicate()
    assert process.returncode in (130, 143, -signal.SIGKILL)
    assert said == ("error: interrupted\n" if sign == signal.SIGINT else "")
    assert not (tmp_path / "data/tubes").exists()
    assert (tmp_path / "data").exists() == (sign == signal.SIGKILL)
    convert("mpdd", src, tmp_path / "data")
    assert sorted(os.listdir(tmp_path / "data")) == ["tubes"]
    assert len(load_category(tmp_path / "data", "tubes").test) == 105
