"""The learning rate, the moving average of the weights, and pictures held out."""

import dataclasses
from pathlib import Path

import numpy as np
import paddle
import pytest

import utils.training
from datasets.mvtec import hold_out
from deploy.common.cli import UserError
from models.fastflow import FastFlow
from utils.averaging import WeightAverage
from utils.config import load_config
from utils.training import Training, backward, draw_noise, learning_rate

AUTO = "configs/auto.yaml"


def test_the_published_learning_rate_is_constant(config):
    assert {learning_rate(config, done) for done in (0.0, 0.01, 0.5, 0.999)} == {config.lr}


def test_the_cosine_rises_first_and_ends_near_zero():
    config = load_config(AUTO)
    rates = [learning_rate(config, done) / config.lr for done in (0.0, 0.0125, 0.025, 0.5, 1.0)]
    np.testing.assert_allclose(rates, [0, 0.5, 1, 0.5, 0], atol=2e-3)
    falling = [learning_rate(config, done) for done in np.linspace(0.025, 1, 50)]
    assert falling == sorted(falling, reverse=True)


class NoFeatures:
    """Stands for the features of 22 pictures, of which nothing is looked at."""

    def __len__(self):
        return 22

    def draw(self, state):
        pass

    def batch(self, indices):
        return list(indices)

    def kept(self, indices):
        return []


@pytest.mark.parametrize(
    ("changes", "steps", "total"),
    [
        ({"epochs": 3}, [3, 6, 9], 9),
        ({"steps": 7}, [3, 6, 7], 7),
        ({"steps": 6}, [3, 6], 6),
        ({"steps": 2}, [2], 2),
        ({"steps": 2, "batch_size": 32}, [1, 2], 2),
    ],
)
def test_a_budget_in_steps_cuts_the_last_epoch_short_and_is_what_the_schedule_goes_by(
    config, monkeypatch, changes, steps, total
):
    rates, sizes = [], []

    def step(model, optimizer, batch, *_):
        rates.append(optimizer.get_lr())
        sizes.append(len(batch))
        return paddle.ones([])

    monkeypatch.setattr(utils.training, "training_step", step)
    small = {"input_size": 32, "flow_step": 1, "batch_size": 8, "lr_schedule": "cosine", "log_interval": 1}
    config = dataclasses.replace(config, **small | changes)
    model, history = FastFlow(config), []
    for _ in steps:
        training = Training(model, config)  # another one for each epoch, as after --resume
        training.history = history
        assert training.last_epoch(22) == len(steps)
        assert training.steps(22) == (len(rates), total)
        loss = training.epoch(NoFeatures(), lambda line: None)
        training.record(loss, None, None, None, 1.0)
    assert training.last_epoch(22) == len(steps)
    assert [row.steps for row in history] == steps
    assert training.steps(22) == (total, total)
    np.testing.assert_allclose(rates, [learning_rate(config, (step + 0.5) / total) for step in range(total)], rtol=1e-6)
    epoch = [22] if "batch_size" in changes else [8, 7, 7] if "steps" in changes else [8, 8, 6]
    assert sizes == (len(steps) * epoch)[:total]


def test_noise_is_that_of_the_global_batch_whoever_draws_it():
    features = [paddle.zeros([5, 2, 8, 8]), paddle.zeros([5, 4, 4, 4])]
    whole = draw_noise(features, np.arange(5), 5, [0, 1, 2])
    parts = [
        draw_noise([x[rows[0] :][: len(rows)] for x in features], rows, 5, [0, 1, 2]) for rows in ([0, 1, 2], [3, 4])
    ]
    for scale, noise in enumerate(whole):
        np.testing.assert_array_equal(np.concatenate([part[scale].numpy() for part in parts]), noise.numpy())
        assert noise.shape == features[scale].shape
    assert abs(whole[0].mean().item()) < 0.2
    assert whole[0].std().item() == pytest.approx(1, abs=0.15)
    other = draw_noise(features, np.arange(5), 5, [0, 1, 3])
    assert (other[0] - whole[0]).abs().max().item() > 1


def test_noise_moves_what_the_flows_see(model):
    features = model.feature_extractor(paddle.ones([2, 3, 64, 64]))
    model.train()
    noise = [0.1 * n for n in draw_noise(features, np.arange(2), 2, [0])]
    for (noisy, _), (plain, _) in zip(model.latents(features, noise), model.latents(features), strict=True):
        assert (noisy - plain).abs().max().item() > 0.01


@pytest.fixture
def model(config):
    return FastFlow(dataclasses.replace(config, input_size=64, flow_step=1))


def trained(model):
    return {name: p for name, p in model.named_parameters() if not p.stop_gradient}


def shift(model, value):
    for parameter in trained(model).values():
        parameter.set_value(parameter + value)


def test_the_average_is_the_formula(model):
    start = {name: p.numpy() for name, p in trained(model).items()}
    average = WeightAverage(model, 0.5)
    factor = 0.0  # the average is start + factor, as every parameter is start + t
    for t in range(1, 30):
        shift(model, 1.0)
        average.update()
        d = min(0.5, (1 + t) / (10 + t))
        factor = d * factor + (1 - d) * t
    with average.applied():
        for name, parameter in trained(model).items():
            np.testing.assert_allclose(parameter.numpy(), start[name] + factor, rtol=1e-4)
    for name, parameter in trained(model).items():
        np.testing.assert_allclose(parameter.numpy(), start[name] + 29, rtol=1e-5)


def test_without_decay_there_is_no_average(model):
    average = WeightAverage(model, 0)
    shift(model, 1.0)
    average.update()
    now = {name: p.numpy() for name, p in trained(model).items()}
    with average.applied():
        for name, parameter in trained(model).items():
            np.testing.assert_array_equal(parameter.numpy(), now[name])


def test_the_backbone_and_statistics_are_not_averaged(model):
    average = WeightAverage(model, 0.9)
    for value in model.state_dict().values():
        value.set_value(value + 1)
    kept = {n: v.numpy() for n, v in model.state_dict().items() if n not in trained(model)}
    average.update()
    with average.applied():
        for name, value in kept.items():
            np.testing.assert_array_equal(model.state_dict()[name].numpy(), value)


def test_a_resumed_average_goes_on_like_an_uninterrupted_one(config, model):
    average = WeightAverage(model, 0.9)
    shift(model, 1.0)
    average.update()
    other = FastFlow(dataclasses.replace(config, input_size=64, flow_step=1, seed=1))
    resumed = WeightAverage(other, 0.9)
    with average.applied():
        other.set_state_dict(model.state_dict())
        resumed.resume(average.state(), "a test")
    for one, two in zip(trained(model).values(), trained(other).values(), strict=True):
        np.testing.assert_array_equal(one.numpy(), two.numpy())
    for each, its in ((model, average), (other, resumed)):
        shift(each, 1.0)
        its.update()
    with average.applied(), resumed.applied():
        for one, two in zip(trained(model).values(), trained(other).values(), strict=True):
            np.testing.assert_array_equal(one.numpy(), two.numpy())


@pytest.mark.parametrize(
    "change",
    [
        {"steps": "x"},
        {"steps": float("inf")},
        {"steps": -11},
        {"steps": None},
        {"parameters": {}},
        {"parameters": 3},
        {"parameters": np.float64},
    ],
)
def test_a_damaged_average_is_refused(model, change):
    state = WeightAverage(model, 0.9).state()
    if change.get("parameters") is np.float64:
        change = {"parameters": {name: value.astype(np.float64) for name, value in state["parameters"].items()}}
    with pytest.raises(UserError, match=r"last\.pdparams: its moving average"):
        WeightAverage(model, 0.9).resume(state | change, "last.pdparams")


@pytest.mark.parametrize("state", [None, {}, 3])
def test_what_is_no_average_is_refused(model, state):
    with pytest.raises(UserError, match=r"last\.pdparams: its moving average"):
        WeightAverage(model, 0.9).resume(state, "last.pdparams")


def test_held_out_pictures_are_never_learned_from():
    pictures = [Path(f"{i:03}.png") for i in range(50)]
    train, held_out = hold_out(pictures, 0.1, seed=0)
    assert len(held_out) == 5
    assert sorted(train + held_out) == pictures
    assert train == sorted(train)
    assert hold_out(pictures, 0.1, seed=0) == (train, held_out)
    assert hold_out(pictures, 0.1, seed=1)[1] != held_out


def test_nothing_is_held_out_as_published_and_one_at_least_otherwise():
    pictures = [Path("a.png"), Path("b.png"), Path("c.png")]
    assert hold_out(pictures, 0, seed=0) == (pictures, [])
    assert len(hold_out(pictures, 0.01, seed=0)[1]) == 1
    with pytest.raises(UserError, match="none to learn from"):
        hold_out(pictures[:1], 0.1, seed=0)


def test_val_likelihood_needs_pictures_held_out():
    with pytest.raises(UserError, match="set holdout"):
        load_config(AUTO, ["selection=val_likelihood", "holdout=0"])


def test_an_average_follows_a_real_step(model):
    average = WeightAverage(model, 0.9)
    before = {name: p.numpy() for name, p in trained(model).items()}
    model.train()
    features = model.feature_extractor(paddle.ones([2, 3, 64, 64]))
    sum(z.square().mean() for z, _ in model.latents(features)).backward()
    paddle.optimizer.Adam(0.01, parameters=list(trained(model).values())).step()
    average.update()
    with average.applied():
        moved = {name: np.abs(p.numpy() - before[name]).max() for name, p in trained(model).items()}
    after = {name: np.abs(p.numpy() - before[name]).max() for name, p in trained(model).items()}
    some = [name for name in after if after[name] > 0]
    assert some
    for name in some:
        assert 0 < moved[name] <= after[name]


@pytest.mark.parametrize(("raised", "expected"), [(KeyboardInterrupt, KeyboardInterrupt), (ValueError, OSError)])
def test_ctrl_c_in_a_backward_pass_stays_one(raised, expected):
    class Interrupted(paddle.autograd.PyLayer):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, gradient):
            raise raised

    x = paddle.ones([2])
    x.stop_gradient = False
    with pytest.raises(expected):
        backward(Interrupted.apply(x).sum())
