"""Tiles and regions of interest: where they lie, what is put together, learnt from, scored, drawn and answered."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import paddle
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from deploy import Detector
from deploy.backends import FILES, Options
from deploy.common.cli import UserError
from deploy.common.decisions import Result, Thresholds
from deploy.common.imaging import normalise
from deploy.common.tiles import PAINT, SMOOTHING_SIGMA, Layout, Tiling, kept_part, read_roi
from deploy.description import read_description
from deploy.serve import load
from deploy.service.app import ServedModel, create_app
from deploy.service.batching import Batcher
from deploy.service.uploads import Limits
from models.backbone import build_backbone
from models.fastflow import FastFlow, image_score, negative_log_likelihood, per_location_score
from models.linear_maps import gaussian_matrix
from tests import forked
from tests.converter import CONVERTER, needs_converter
from utils.config import load_config
from utils.evaluation import mean_loss, score_images
from utils.features import CacheBudget, FeatureCache, must_draw

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "lite_data/bottle/test/broken_large"


# ---- where tiles lie


@pytest.mark.parametrize(
    ("size", "tile", "overlap", "count"),
    [
        ((100, 130), (32, 48), 0.25, 16),
        ((300, 256), (256, 256), 0.25, 2),
        ((64, 96), (32, 32), 0, 6),
        ((65, 96), (32, 32), 0, 9),
        ((513, 700), (256, 128), 0.75, 114),
        ((10, 7), (32, 32), 0.25, 1),
        ((10, 700), (32, 64), 0.5, 21),
        ((1, 1), (32, 32), 0.25, 1),
    ],
)
def test_tiles_cover_every_pixel_and_count_as_one_there(size, tile, overlap, count):
    tiling = Tiling(size, tile, overlap)
    assert len(tiling.places) == len(set(tiling.places)) == count
    ends = [max(side - part, 0) for side, part in zip(size, tile, strict=True)]
    assert (min(tiling.places), max(tiling.places)) == ((0, 0), tuple(ends))
    whole, picture = tiling.blank(), np.zeros((*size, 3), np.uint8)
    for place in tiling.places:
        assert tiling.cut(picture, place).shape == (*tile, 3)
        alone = tiling.blank()
        tiling.add(alone, place, np.ones(tile, np.float32))
        assert (tiling.part(alone, place) > 0).all()  # no pixel of a tile counts nothing
        whole += alone
    np.testing.assert_allclose(whole, 1, atol=1e-6)


def test_tiles_lie_a_fixed_step_apart_and_the_last_flush_with_the_edge():
    rows = sorted({y for y, _ in Tiling((500, 256), (256, 256), 0.25).places})
    assert rows == [0, 192, 244]


def test_a_tile_counts_less_towards_its_edges():
    tiling = Tiling((96, 64), (64, 64), 0.5)
    whole = tiling.blank()
    tiling.add(whole, (0, 0), np.ones((64, 64), np.float32))
    column = whole[32:, 20]
    assert (np.diff(column[:32]) < 0).all() and column[31] < 0.01 and column[0] > 0.98


def test_what_is_smaller_than_a_tile_is_mirrored():
    picture = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    tile = Tiling((2, 3), (4, 8), 0.25).cut(picture, (0, 0))
    assert tile.shape == (4, 8, 3)
    np.testing.assert_array_equal(tile[:, :3], picture[[0, 1, 1, 0]])
    np.testing.assert_array_equal(tile[0, :, 0], picture[0, [0, 1, 2, 2, 1, 0, 0, 1], 0])


# ---- what is put together


@pytest.fixture(scope="module")
def model():
    """Two steps at the size of a tile, not trained, which is what looks least alike at a tile's edges."""
    config = load_config("configs/resnet18.yaml", ["flow_step=2", "pretrained=offline", "tile=128", "seed=3"])
    paddle.seed(3)
    return FastFlow(config)


@pytest.mark.parametrize("pixels", [1, 300])
@pytest.mark.parametrize("size", [(128, 128), (20, 33)])
def test_a_map_put_together_is_smoothed_and_scored_as_a_whole_one(pixels, size):
    rng = np.random.default_rng(0)
    raw = cv2.GaussianBlur(rng.random(size).astype(np.float32), (0, 0), 2)
    layout = Layout(None, (64, 64), score_pixels=pixels)
    smoothed, score = layout.finish(raw.copy(), None)
    assert score == pytest.approx(image_score(paddle.to_tensor(raw[None, None]), pixels).item(), abs=1e-6)
    rows, columns = (gaussian_matrix(side, SMOOTHING_SIGMA) for side in size)
    np.testing.assert_allclose(smoothed, rows @ raw @ columns.T, atol=2e-6)


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_tiles_come_in_batches_of_a_bounded_size_whatever_they_are_the_map_is_the_same(batch):
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (100, 90, 3), np.uint8), rng.integers(0, 256, (40, 120, 3), np.uint8)]
    seen = []

    def run(tiles):
        seen.append(len(tiles))
        return tiles[..., 0] / np.float32(255)  # of one pixel alone: the same in any tile

    layout = Layout(None, (32, 32))
    raw = layout.raw_maps(pictures, run, batch)
    assert max(seen) <= batch and sum(seen) == sum(len(layout.tiling(p.shape[:2]).places) for p in pictures)
    for own, picture in zip(raw, pictures, strict=True):
        np.testing.assert_allclose(own, picture[..., 0] / 255, atol=1e-6)


def test_where_a_tile_sees_all_that_the_whole_picture_shows_they_are_the_same():
    """One scale of 4 pixels, one step: a place depends on the 38 pixels around it, 22 of ResNet18 and 4 places of 4.

    So more than that from a tile's edges its places score as those of the whole picture. The maps, which are stretched
    from corner to corner of a tile or of the picture, lie up to half a place apart.
    """
    changes = ["flow_step=1", "pretrained=offline", "scales=[4]", "channels=[64]"]
    picture = np.asarray(Image.open(sorted(PICTURE.glob("*.png"))[0]).convert("RGB"))[:224, :224]
    paddle.seed(3)
    whole = FastFlow(load_config("configs/resnet18.yaml", [*changes, "input_size=224"]))
    (features,) = whole.feature_extractor(paddle.to_tensor(normalise(picture[None])))
    whole.norms[0]._mean.set_value(features.mean(axis=[0, 2, 3]))
    whole.norms[0]._variance.set_value(features.var(axis=[0, 2, 3]))
    model = FastFlow(load_config("configs/resnet18.yaml", [*changes, "tile=128"]))
    fixed = ("resize", "smooth")
    model.set_state_dict({name: value for name, value in whole.state_dict().items() if not name.startswith(fixed)})

    def places(model, tile):
        model.eval()
        with paddle.no_grad():
            features = model.feature_extractor(paddle.to_tensor(normalise(tile[None])))
            return per_location_score(model.latents(features)[0][0]).numpy()[0, 0]

    expected, tiling = places(whole, picture), Tiling((224, 224), (128, 128), 0.25)
    assert expected.std() > 0.02 and tiling.places == [(0, 0), (0, 96), (96, 0), (96, 96)]
    middle = slice(10, 22)
    for y, x in tiling.places:
        own = expected[y // 4 : y // 4 + 32, x // 4 : x // 4 + 32]
        cut = places(model, tiling.cut(picture, (y, x)))
        np.testing.assert_allclose(cut[middle, middle], own[middle, middle], atol=1e-5)
        assert np.abs(cut - own).max() > 0.01  # at the edges they see less
    maps = [
        layout.raw_maps([picture], lambda tiles, model=model: model.raw_maps(normalise(tiles)), 8)[0]
        for layout, model in ((Layout((224, 224)), whole), (Layout(None, (128, 128)), model))
    ]
    assert np.abs(maps[0] - maps[1]).mean() < 0.2 * maps[0].std()


# ---- what is learnt from


@pytest.fixture(scope="module")
def backbone():
    paddle.seed(0)
    return build_backbone("resnet18")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Of different sizes, one smaller than a tile."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = [folder / f"{i}.png" for i in range(4)]
    for path, (height, width) in zip(paths, ((90, 70), (64, 64), (50, 130), (70, 90)), strict=True):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(path)
    return paths


TILES = Layout(None, (64, 64))
EVERYTHING = CacheBudget(1e12, 0)
PLACES = {"memory": (1e12, 0), "file": (0, 1e12), "pictures": (200_000, 0), "nothing": (0, 0)}


@pytest.mark.parametrize("place", PLACES)
def test_features_of_tiles_are_the_same_wherever_they_are_kept(backbone, pictures, place):
    cache = FeatureCache(backbone, pictures, TILES, CacheBudget(*PLACES[place]), "test")
    reference = FeatureCache(backbone, pictures, TILES, EVERYTHING, "test")
    assert cache.place == place and len(cache) == 4 + 1 + 3 + 4
    indices = np.array([11, 0, 5, 3, 1])
    for actual, expected in zip(cache.batch(indices), reference.batch(indices), strict=True):
        np.testing.assert_allclose(actual.numpy(), expected.numpy(), rtol=1e-4, atol=1e-4)
    both = zip(cache.batches(5), reference.batches(5), strict=True)
    for (items, features, kept), (same, expected, _) in both:
        assert items == same and kept == []
        np.testing.assert_allclose(features[0].numpy(), expected[0].numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("place", ["pictures", "nothing"])
def test_drawn_tiles_depend_on_the_state_alone(backbone, pictures, place):
    budget = CacheBudget(*PLACES[place])
    cache, other = (
        FeatureCache(backbone, pictures, TILES, b, "test", drawn_tiles=2) for b in (budget, CacheBudget(1e9, 1e9))
    )
    assert cache.place == place and other.place == "pictures" and len(cache) == 2 + 1 + 2 + 2

    def seen(features, state):
        features.draw(state)
        return features.batch(np.arange(len(features)))[0].numpy()

    first = seen(cache, [0, 1])
    np.testing.assert_allclose(first, seen(other, [0, 1]), rtol=1e-4, atol=1e-4)
    assert np.abs(seen(cache, [0, 2]) - first).max() > 0.1
    np.testing.assert_allclose(seen(cache, [0, 1]), first, rtol=1e-4, atol=1e-4)


def test_tiles_are_drawn_where_not_all_fit_or_not_all_are_needed(backbone, pictures):
    def drawn(memory, items):
        return must_draw(backbone, pictures, TILES, CacheBudget(memory, 0), items)

    assert drawn(1e5, 1e9) and drawn(1e12, 11) and not drawn(1e12, 12)


def test_the_loss_of_kept_places_is_that_of_a_picture_of_these_alone(model):
    """A flow of 1x1 kernels, without what lies around a place: the loss of the kept half is that of the half alone."""
    config = load_config("configs/resnet18.yaml", ["flow_step=2", "pretrained=offline"])
    flows = FastFlow(config)
    for flow in flows.nf_flows:
        for step in flow.module_list:
            for conv in (step.subnet[0], step.subnet[2]):
                weight = np.zeros(conv.weight.shape, np.float32)
                weight[:, :, 1, 1] = conv.weight.numpy()[:, :, 1, 1]
                conv.weight.set_value(weight)
    flows.train()
    features = [paddle.randn([2, c, 8, 8]) for c in (64, 128, 256)]
    kept = [paddle.concat([paddle.ones([2, 1, 8, 4]), paddle.zeros([2, 1, 8, 4])], axis=3)] * 3
    halves = [x[..., :4] for x in features]
    expected = negative_log_likelihood(flows.latents(halves)).item()
    means = [norm._mean.numpy().copy() for norm in flows.norms]
    for norm in flows.norms:
        norm._mean.set_value(paddle.zeros_like(norm._mean))
        norm._variance.set_value(paddle.ones_like(norm._variance))
    actual = negative_log_likelihood(flows.latents(features, kept=kept), kept).item()
    assert actual == pytest.approx(expected, rel=1e-5)
    for norm, mean in zip(flows.norms, means, strict=True):
        np.testing.assert_allclose(norm._mean.numpy(), mean, atol=1e-6)
    everything = [paddle.ones([2, 1, 8, 8])] * 3
    usual = negative_log_likelihood(flows.latents(features)).item()
    assert negative_log_likelihood(flows.latents(features, kept=everything), everything).item() == pytest.approx(
        usual, rel=1e-5
    )


# ---- a region of interest


LEFT = np.arange(64)[None] < np.full((64, 1), 24)  # (64, 64) bool


@pytest.fixture(scope="module")
def part(tmp_path_factory):
    """A picture, and the same with something else where the region of interest is black."""
    folder, rng = tmp_path_factory.mktemp("part"), np.random.default_rng(0)
    first = rng.integers(0, 256, (128, 128, 3), np.uint8)
    other = first.copy()
    other[:, 48:] = rng.integers(0, 256, (128, 80, 3), np.uint8)
    paths = [folder / "first.png", folder / "other.png"]
    for path, picture in zip(paths, (first, other), strict=True):
        Image.fromarray(picture).save(path)
    return paths


@pytest.mark.parametrize("layout", [Layout((128, 128), roi=LEFT), Layout(None, (64, 64), roi=LEFT)])
def test_nothing_depends_on_what_is_black(layout, part):
    whole = layout.tile is None
    config = load_config(
        "configs/resnet18.yaml", ["flow_step=1", "pretrained=offline", f"input_size={128 if whole else 64}"]
    )
    model = FastFlow(config)
    caches = [FeatureCache(model.feature_extractor, [path], layout, EVERYTHING, "test") for path in part]
    assert len(caches[0]) == (1 if whole else 3)  # tiles that are all black are left out
    losses, scores = [mean_loss(model, c) for c in caches], [score_images(model, c) for c in caches]
    assert losses[0] == losses[1]
    np.testing.assert_array_equal(scores[0].image, scores[1].image)
    np.testing.assert_array_equal(scores[0].pixel, scores[1].pixel)
    assert (scores[0].pixel[0][:, 48:] == 0).all() and (scores[0].pixel[0][:, :48] > 0).all()


def test_what_is_black_lies_in_no_region():
    scores = np.zeros((64, 64), np.float32)
    scores[:, :24] = 0.9
    result = Result(0.9, scores, (640, 320), Thresholds(0.5, 0.05, "", ""), roi=LEFT)
    assert [region.box for region in result.regions] == [(0, 0, 120, 640)]
    assert (result.map[:, 120:] == 0).all() and not result.mask[:, 120:].any()


def test_a_constant_map_stays_constant_up_to_the_edge_of_a_region_of_interest():
    raw, kept = np.full((64, 64), 0.5, np.float32), LEFT
    smoothed, score = Layout((64, 64), roi=LEFT, score_pixels=4000).finish(raw, kept)
    np.testing.assert_allclose(smoothed, 0.5 * LEFT, atol=1e-6)
    assert score == pytest.approx(0.5)


def test_what_is_no_region_of_interest_is_one_line(tmp_path):
    path = tmp_path / "roi.png"
    Image.new("L", (40, 30)).save(path)
    with pytest.raises(UserError, match=re.escape(str(path)) + ".*nothing in this region of interest is white"):
        read_roi(path)
    layout = Layout((32, 32), roi=np.ones((30, 40), bool))
    assert layout.prepare(np.zeros((60, 80, 3), np.uint8)).shape == (32, 32, 3)
    with pytest.raises(UserError, match=r"a\.png: 80x80 is another aspect ratio"):
        layout.prepare(np.zeros((80, 80, 3), np.uint8), "a.png")
    thin = np.zeros((400, 400), bool)
    thin[5, 5] = True
    with pytest.raises(UserError, match="nothing of this region of interest is left"):
        kept_part(thin, (32, 32))


def test_what_is_black_is_painted_over():
    picture = np.full((64, 64, 3), 200, np.uint8)
    painted = Layout((64, 64), roi=LEFT).prepare(picture)
    assert (painted[LEFT] == 200).all() and (painted[~LEFT] == PAINT).all() and (picture == 200).all()
    assert np.abs(normalise(PAINT[None, None, None])).max() < 0.01


# ---- the commands


SIZE = (300, 400)
SPOT = (231, 97)  # its centre, x and y; of 12 pixels
TRAINING = ["backbone_name=efficientnet_lite0", "scales=[4,8]", "channels=null", "flow_step=2", "tile=64"]
TRAINING += ["input_size=original", "tiles_per_epoch=20", "steps=40", "batch_size=8", "lr_schedule=cosine", "lr=0.002"]
TRAINING += ["selection=last", "eval_interval=-1"]


def cloth(rng, size=SIZE):
    """A picture of a regular weave with noise."""
    y, x = np.indices(size)
    grey = 120 + 30 * np.sin(x / 3) * np.sin(y / 3) + rng.normal(0, 4, size)
    return np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[..., None], 3, axis=2)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with pictures of a cloth, data/cloth, and a model trained on their tiles, which is exported."""
    folder, rng = tmp_path_factory.mktemp("work"), np.random.default_rng(0)
    data = folder / "data/cloth"
    for name in ("train/good", "test/good", "test/spot", "ground_truth/spot"):
        (data / name).mkdir(parents=True)
    for i in range(8):
        Image.fromarray(cloth(rng)).save(data / f"train/good/{i}.png")
    for i in range(2):
        Image.fromarray(cloth(rng)).save(data / f"test/good/{i}.png")
        picture, mask = cloth(rng), np.zeros(SIZE, np.uint8)
        for array, grey in ((picture, (60, 60, 60)), (mask, 255)):
            cv2.circle(array, SPOT, 6, grey, -1)
        Image.fromarray(picture).save(data / f"test/spot/{i}.png")
        Image.fromarray(mask).save(data / f"ground_truth/spot/{i}_mask.png")
    (folder / "configs").symlink_to(ROOT / "configs")  # where a command without -cfg looks
    train(folder)
    export(folder, "exp")
    return folder


def train(folder, *options, exp="exp"):
    overrides = [word for override in TRAINING for word in ("-o", override)]
    common = ["-cfg", f"{ROOT}/configs/resnet18.yaml", *overrides, "--data", "data", "-cat", "cloth", "--exp_dir", exp]
    alone = {"FASTFLOW_BACKBONE_WEIGHTS": ""}  # it is of ResNet18
    done = forked.run("train.py", [*common, *options], folder, alone)
    assert done.returncode == 0, done.stderr
    return done


def export(folder, exp):
    options = ["--category", "cloth", "--exp_dir", exp, "--save_inference_dir", f"model_{exp}"]
    done = forked.run("deploy/export_model.py", [*options, "--format", "all" if CONVERTER else "paddle"], folder)
    assert done.returncode == 0, done.stderr


def losses(folder, exp="exp"):
    rows = (folder / f"results/{exp}/cloth/history.csv").read_text().splitlines()[1:]
    return [float(row.split(",")[1]) for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("backend", [pytest.param(n, marks=() if n == "paddle" else needs_converter(n)) for n in FILES])
def test_a_small_spot_is_found_by_every_runtime_as_by_predict(work, backend):
    spot = work / "data/cloth/test/spot/0.png"
    options = ["-cat", "cloth", "--exp_dir", "exp", "--save_json", "told.jsonl", "--pixel_threshold", "0.5"]
    options += ["--image_path", str(spot)]
    done = forked.run("predict.py", options, work)
    assert done.returncode == 0, done.stderr
    expected = json.loads((work / "told.jsonl").read_text())
    with Detector(work / "model_exp", backend, batch_size=7, cpu_threads=1, pixel_threshold=0.5) as detector:
        result, good = detector([spot, work / "data/cloth/test/good/0.png"])
    assert result.score == pytest.approx(expected["score"], abs=1e-4)
    assert [region.box for region in result.regions] == [tuple(region["box"]) for region in expected["regions"]]
    assert good.score < result.score
    options = ["--save_inference_dir", "model_exp", "--backend", backend, "--batch_size", "5", "--warmup", "1"]
    options += ["--image_path", str(spot), "--save_json", "infer.jsonl"]
    done = forked.run("deploy/infer.py", options, work)
    assert done.returncode == 0, done.stderr
    assert json.loads((work / "infer.jsonl").read_text())["score"] == pytest.approx(expected["score"], abs=1e-4)
    centre = np.array(np.unravel_index(result.map.argmax(), SIZE))[::-1]
    assert np.abs(centre - SPOT).max() <= 12


@pytest.mark.slow
def test_losses_are_the_same_with_and_without_a_cache(work):
    few = ["-o", "tiles_per_epoch=null", "-o", "steps=6"]
    train(work, *few, exp="cached")
    train(work, *few, "--cache_memory", "0", "--cache_disk", "0", exp="not")
    assert "384 an epoch, all there are" in (work / "results/not/cloth/train.log").read_text()
    np.testing.assert_allclose(losses(work, "cached"), losses(work, "not"), rtol=1e-3)


@pytest.mark.slow
def test_drawn_tiles_go_on_as_they_began(work):
    drawn = ["-o", "steps=null", "-o", "lr_schedule=constant", "-o", "tiles_per_epoch=2"]
    nothing = ["--cache_memory", "0", "--cache_disk", "0"]
    train(work, *drawn, *nothing, "-o", "epochs=2", exp="once")
    train(work, *drawn, *nothing, "-o", "epochs=1", exp="twice")
    train(work, *drawn, "-o", "epochs=2", "--resume", exp="twice")
    log = (work / "results/twice/cloth/train.log").read_text()
    assert log.count("16 an epoch, at random places") == 2
    np.testing.assert_allclose(losses(work, "once"), losses(work, "twice"), rtol=1e-3)


@pytest.mark.slow
def test_eval_measures_pictures_of_different_sizes(work):
    data = work / "data/mixed"
    shutil.copytree(work / "data/cloth", data)
    for kind in ("test/spot/1.png", "ground_truth/spot/1_mask.png", "test/good/1.png"):
        with Image.open(data / kind) as image:
            image.crop((0, 0, 320, 200)).save(data / kind)
    (work / "results/exp").joinpath("mixed").symlink_to("cloth")
    done = forked.run("eval.py", ["--data", "data", "-cat", "mixed", "--exp_dir", "exp", "--all_metrics"], work)
    assert done.returncode == 0, done.stderr
    row = json.loads((work / "results/exp/eval.json").read_text())["categories"]["mixed"]
    assert row["image_auroc"] == 1 and row["pixel_auroc"] > 0.95 and row["regions"]["true"] == 2
    (work / "results/exp/mixed").unlink()


@pytest.fixture(scope="module")
def left(work):
    """The same folder with a model of the left part alone, which is exported too."""
    roi = np.full(SIZE, 255, np.uint8)
    roi[:, 180:] = 0
    Image.fromarray(roi).resize((200, 150)).save(work / "left.png")
    train(work, "--roi", "left.png", "-o", "steps=20", exp="left")
    export(work, "left")
    return work


@pytest.mark.slow
def test_a_region_of_interest_goes_from_training_to_every_answer(left):
    work = left
    assert "region of interest: 45% of a picture" in (work / "results/left/cloth/train.log").read_text()
    assert (work / "model_left/roi.png").is_file() and not (work / "model_exp/roi.png").exists()
    picture = np.asarray(Image.open(work / "data/cloth/test/spot/0.png")).copy()
    with Detector(work / "model_left", cpu_threads=1, pixel_threshold=0.0) as detector:
        result = detector(picture)
        picture[:, 185:] = 0
        assert detector(picture).score == result.score  # whatever is in the black
        assert (result.map[:, 182:] == 0).all() and not result.mask[:, 182:].any() and result.map[:, :178].min() > 0
        assert max(region.box[0] + region.box[2] for region in result.regions) <= 182
        with pytest.raises(UserError, match="aspect ratio"):
            detector(picture[:, :200])
    predicted = work / "left.jsonl"
    spot = str(work / "data/cloth/test/spot/0.png")
    options = ["-cat", "cloth", "--exp_dir", "left", "--image_path", spot, "--save_json", str(predicted)]
    assert forked.run("predict.py", [*options], work).returncode == 0
    assert json.loads(predicted.read_text())["score"] == pytest.approx(result.score, abs=1e-4)
    done = forked.run("eval.py", ["--data", "data", "-cat", "cloth", "--exp_dir", "left"], work)
    assert done.returncode == 0, done.stderr
    assert "no pixel of the mask is left" in done.stderr  # the spot lies in the black
    changed = [
        "-cfg",
        f"{ROOT}/configs/resnet18.yaml",
        "--data",
        "data",
        "-cat",
        "cloth",
        "--exp_dir",
        "left",
        "--resume",
    ]
    changed += [word for override in TRAINING for word in ("-o", override)]
    done = forked.run("train.py", changed, work, {"FASTFLOW_BACKBONE_WEIGHTS": ""})
    assert done.returncode == 2 and "region of interest" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("model", ["exp", "left"])
def test_the_service_answers_what_the_detector_says(left, model):
    folder = left / f"model_{model}"
    spot = left / "data/cloth/test/spot/0.png"
    with Detector(folder, cpu_threads=1, pixel_threshold=0.5) as detector:
        expected = detector(spot)
    description = read_description(folder)
    backend = load(folder, description, "paddle", Options(max_batch_size=8))
    served = ServedModel(description, Batcher(backend.run, 8, 0.005, 4), Layout.of(description, folder))
    with TestClient(create_app({"cloth": served}, Limits())) as client:
        form = {"pixel_threshold": "0.5", "map": "true", "map_size": "original"}
        said = client.post("/v1/models/cloth:predict", files={"image": ("a.png", spot.read_bytes())}, data=form).json()
        listed = client.get("/v1/models").json()["models"][0]
        small = client.post("/v1/models/cloth:predict", files={"image": ("a.png", png_of((80, 300)))})
    assert said["score"] == pytest.approx(expected.score, abs=1e-4)
    assert [tuple(region["box"]) for region in said["regions"]] == [region.box for region in expected.regions]
    grey = cv2.imdecode(np.frombuffer(base64.b64decode(said["map"]), np.uint8), cv2.IMREAD_UNCHANGED)
    np.testing.assert_allclose(grey / 255, expected.map, atol=0.003)
    assert listed["input_size"] == "original" and listed["tile"] == [64, 64]
    assert small.status_code == (200 if model == "exp" else 422), small.text


def png_of(size):
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "PNG")
    return file.getvalue()


def test_memory_does_not_grow_with_the_number_of_tiles(tmp_path):
    """Of a picture of 4096 x 4096 its map alone is kept: 64 MB; smoothing takes as much again for a moment."""
    code = (
        "import numpy as np, resource\n"
        "from deploy.common.tiles import Layout\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "picture = np.zeros((4096, 4096, 3), np.uint8) + 1\n"
        "before = peak()\n"
        "Layout(None, (256, 256)).look([picture], lambda tiles: tiles[..., 0] / np.float32(255), 8)\n"
        "print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 180


@pytest.mark.slow
def test_no_seam_shows(work):
    """Neighbouring pixels of the raw map differ no more where a tile ends than elsewhere; without overlap they do."""
    from utils.checkpoint import load_model

    model, _ = load_model(load_config(work / "results/exp/cloth/config.yaml"), work / "results/exp/cloth/best.pdparams")
    picture = np.asarray(Image.open(work / "data/cloth/test/good/0.png"))

    def jump(overlap):
        layout = Layout(None, (64, 64), overlap)
        (raw,) = layout.raw_maps([picture], lambda tiles: model.raw_maps(normalise(tiles)), 8)
        ends = sorted({x for _, x in layout.tiling(SIZE).places} - {0})
        steps = np.abs(np.diff(raw, axis=1)).mean(axis=0)
        return steps[np.array(ends) - 1].mean() / np.median(steps)

    assert jump(0.25) < 1.3 and jump(0) > 2
