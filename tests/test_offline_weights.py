"""The offline start's own training: what is drawn, how it is learnt, what is shipped."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest

from deploy.cli import UserError
from models.backbone import build_backbone
from models.offline_weights.outlines import OUTLINES
from models.offline_weights.pictures import LIFETIME, Artist
from models.offline_weights.textures import SIDE, TEXTURES, canvas
from models.offline_weights.training import (
    STRIDES,
    Settings,
    Training,
    naming_loss,
    parts_of_cells,
    save_state,
    write_weights,
)
from models.pretrained import read_weights
from utils.states import set_state

SETTINGS = Settings(steps=6, batch_size=4, size=32, lr=0.003, weight_decay=0.05, seed=0)


def weights_of(training):
    return {name: value.numpy() for name, value in training.model.state_dict().items()}


# ---- pictures


def test_a_batch_depends_on_seed_and_number_only():
    later = Artist(0, 48)
    for number in (0, LIFETIME):  # canvases of other generations are in its memory then
        later.batch(number, 2)
    first, again = later.batch(3, 5), Artist(0, 48).batch(3, 5)
    for name in ("pictures", "textures", "outlines"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    for other in (Artist(1, 48).batch(3, 5), Artist(0, 48).batch(4, 5)):
        assert not np.array_equal(first.pictures, other.pictures)


def test_size_range_and_names_of_a_batch():
    batch = Artist(0, 48).batch(0, 60)
    assert batch.pictures.shape == (60, 48, 48, 3)
    assert batch.pictures.dtype == np.uint8
    assert batch.textures.shape == batch.outlines.shape == (60, 48, 48)
    assert batch.textures.max() < len(TEXTURES) <= 255
    assert set(np.unique(batch.outlines)) == set(range(len(OUTLINES) + 1))  # 60 pictures show each of them
    assert batch.pictures.min() < 30 < 225 < batch.pictures.max()
    assert min(picture.std() for picture in batch.pictures) > 1  # none is empty


def test_every_texture_draws_a_full_and_repeatable_canvas():
    for index, texture in enumerate(TEXTURES):
        drawn = canvas(texture, np.random.default_rng(index))
        assert (drawn.shape, drawn.dtype) == ((SIDE, SIDE), np.uint8), texture
        assert drawn.min() < 30 < 200 < drawn.max(), texture
        np.testing.assert_array_equal(drawn, canvas(texture, np.random.default_rng(index)))


def test_outlines_stay_close_to_the_unit_disc():
    rng = np.random.default_rng(0)
    for outline in OUTLINES:
        for _ in range(20):
            for points in outline(rng):
                assert points.shape[1] == 2, outline
                assert np.isfinite(points).all(), outline
                assert np.hypot(*points.T).max() < 1.4, outline


# ---- what is learnt


@pytest.mark.parametrize("stride", STRIDES)
def test_parts_of_cells_count_the_names_in_their_cell(stride):
    side = 64 // stride
    names = np.arange(2 * side * side).reshape(2, side, side)  # every cell has a name of its own
    parts = parts_of_cells(names.repeat(stride, axis=1).repeat(stride, axis=2), stride, names.size)
    np.testing.assert_array_equal(parts, np.eye(names.size)[names])

    halves = np.zeros((1, 64, 64), np.uint8)
    for column in range(stride // 2, stride):  # the right half of each cell
        halves[:, :, column::stride] = 1
    np.testing.assert_array_equal(parts_of_cells(halves, stride, 3), np.broadcast_to([0.5, 0.5, 0], (1, side, side, 3)))


def test_the_loss_is_the_cross_entropy_with_the_parts():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2, 5, 3, 3)).astype("float32")
    parts = rng.dirichlet(np.ones(5), (2, 3, 3)).astype("float32")
    last = logits.transpose(0, 2, 3, 1)
    log_softmax = last - np.log(np.exp(last).sum(axis=-1, keepdims=True))
    loss, right = naming_loss(paddle.to_tensor(logits), parts)
    assert loss.item() == pytest.approx(-(parts * log_softmax).sum(axis=-1).mean(), rel=1e-5)
    assert right == pytest.approx(np.take_along_axis(parts, last.argmax(axis=-1)[..., None], -1).mean())


def test_the_learning_rate_rises_then_falls_to_zero():
    settings = Settings(steps=100, batch_size=1, size=16, lr=1.0, weight_decay=0.0, seed=0)
    rates = [settings.lr_at(step) for step in range(100)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert 0 < rates[-1] < 0.001


def test_training_lowers_the_loss():
    settings = Settings(steps=30, batch_size=8, size=32, lr=0.003, weight_decay=0.05, seed=0)
    training = Training(settings)
    losses = [training.advance()[0] for _ in range(settings.steps)]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.5


def test_a_resumed_training_ends_with_the_same_weights(tmp_path):
    whole = Training(SETTINGS)
    for _ in range(3):
        whole.advance()
    save_state(whole, tmp_path / "state.pdparams")
    for _ in range(3):
        whole.advance()

    resumed = Training(SETTINGS)
    resumed.restore(tmp_path / "state.pdparams")
    assert resumed.step == 3
    for _ in range(3):
        resumed.advance()
    again = weights_of(resumed)
    for name, value in weights_of(whole).items():
        np.testing.assert_array_equal(value, again[name], err_msg=name)


def test_other_settings_and_other_files_are_not_resumed(tmp_path):
    save_state(Training(SETTINGS), tmp_path / "state.pdparams")
    other = Training(Settings(steps=6, batch_size=4, size=32, lr=0.001, weight_decay=0.05, seed=0))
    with pytest.raises(UserError, match=r"state\.pdparams: was made with lr 0\.003, not 0\.001"):
        other.restore(tmp_path / "state.pdparams")
    paddle.save({"epoch": 1}, str(tmp_path / "other.pdparams"))
    with pytest.raises(UserError, match="not the state of a training"):
        other.restore(tmp_path / "other.pdparams")


def test_the_weights_file_fits_the_backbone(tmp_path):
    training = Training(SETTINGS)
    training.advance()
    write_weights(training.model.backbone, tmp_path / "resnet18.npz")
    backbone = build_backbone("resnet18")
    set_state(backbone, read_weights(tmp_path / "resnet18.npz"), "resnet18.npz")
    trained = training.model.backbone.state_dict()
    for name, value in backbone.state_dict().items():
        np.testing.assert_allclose(value.numpy(), trained[name].numpy(), rtol=1e-3, atol=1e-6, err_msg=name)


def test_the_command_trains_resumes_and_writes(tmp_path):
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "models.offline_weights", "--steps", "2", "--batch_size", "2", "--size", "32"]

    def run(*options):
        return subprocess.run(
            [*command, "--output", str(tmp_path), "--device", "cpu", *options],
            cwd=root, capture_output=True, text=True,
        )  # fmt: skip

    assert run().returncode == 0
    assert (tmp_path / "resnet18.npz").stat().st_size < 6e6
    assert "step 2/2 - loss " in (tmp_path / "train.log").read_text()
    assert "from step 2" in run("--resume").stdout
    wrong = run("--size", "40")
    assert (wrong.returncode, wrong.stderr) == (2, "error: --size 40: must be a multiple of 16\n")
