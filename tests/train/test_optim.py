import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nautilus.train.optim import SHAPES, OptimConfig, adamw, clip_gradients, gradient_norm, learning_rate, schedule


def test_minus_sqrt_schedule_has_the_published_values_at_its_corners():
    optim = OptimConfig(lr=4.5e-4, min_lr=4.5e-6, warmup=8, decay=0.2)

    def at(t):
        return learning_rate(t, 1000, optim)

    assert at(0) == 0
    assert at(4) == pytest.approx(4.5e-4 / 2)
    assert at(8) == at(9) == at(800) == 4.5e-4
    assert at(850) == pytest.approx(4.5e-6 + (4.5e-4 - 4.5e-6) * 0.5)
    assert at(1000) == pytest.approx(4.5e-6)
    assert at(1234) == pytest.approx(4.5e-6)


def test_super_recipe_constants_decay_from_its_own_update():
    optim = OptimConfig(lr=4.5e-4, min_lr=4.5e-6, warmup=7949, decay=198_682 / 992_411)
    assert learning_rate(793_729, 992_411, optim) == 4.5e-4
    assert learning_rate(793_729 + 198_682 / 4, 992_411, optim) == pytest.approx((4.5e-4 + 4.5e-6) / 2, rel=1e-9)
    assert learning_rate(993_404, 992_411, optim) == pytest.approx(4.5e-6)


@pytest.mark.parametrize("shape, middle", [("minus_sqrt", 1 - math.sqrt(0.5)), ("linear", 0.5), ("cosine", 0.5)])
def test_every_shape_falls_from_peak_to_minimum(shape, middle):
    optim = OptimConfig(lr=1.0, min_lr=0.1, decay=1.0, shape=shape)
    values = [learning_rate(t, 100, optim) for t in range(101)]
    assert values[0] == 1.0 and values[100] == pytest.approx(0.1)
    assert values[50] == pytest.approx(0.1 + 0.9 * middle)
    assert values == sorted(values, reverse=True)


@given(
    st.integers(1, 500), st.floats(0, 1), st.floats(0, 1), st.sampled_from(sorted(SHAPES)), st.floats(0, 1), st.data()
)
def test_the_rate_stays_between_zero_and_peak_and_never_rises_after_warm_up(steps, part, decay, shape, low, data):
    warmup = int(part * (1 - decay) * steps)
    optim = OptimConfig(lr=2.0, min_lr=2.0 * low, warmup=warmup, decay=decay, shape=shape)
    rate = schedule(optim, steps)
    step = data.draw(st.integers(0, steps - 1))
    assert 0 < rate(step) <= 2.0 or low == 0
    if step >= warmup:
        assert rate(step + 1) <= rate(step)
        assert rate(step) >= optim.min_lr * (1 - 1e-12)


def test_no_update_is_spent_at_rate_zero_and_the_last_runs_at_the_minimum():
    rate = schedule(OptimConfig(lr=1.0, min_lr=0.1, warmup=4, decay=0.5), 20)
    assert rate(0) == 0.25 and rate(3) == 1.0
    assert rate(19) == pytest.approx(0.1)


def test_without_decay_the_peak_holds_to_the_end():
    rate = schedule(OptimConfig(lr=1e-5, min_lr=1e-6, decay=0.0), 10)
    assert {rate(step) for step in range(10)} == {1e-5}


@pytest.mark.parametrize(
    "wrong",
    [
        {"shape": "stairs"},
        {"min_lr": 2.0},
        {"decay": 1.5},
        {"warmup": -2},
        {"betas": (0.9, 1.0)},
        {"eps": -1e-8},
        {"clip": -1.0},
    ],
)
def test_contradicting_settings_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=f"optim.{next(iter(wrong))}"):
        OptimConfig(**wrong)


def test_a_warm_up_that_nobody_chose_fits_any_run():
    chosen = lambda steps, warmup: [schedule(OptimConfig(warmup=warmup), steps)(step) for step in range(steps)]  # noqa: E731
    for steps, warmup in ((5, 0), (20, 1), (560, 40), (10_000, 50)):
        assert chosen(steps, -1) == chosen(steps, warmup)


def test_warm_up_and_decay_longer_than_the_run_are_refused():
    with pytest.raises(ValueError, match="warmup=60.*steps=100"):
        schedule(OptimConfig(warmup=60, decay=0.5), 100)


def test_weight_decay_spares_one_dimensional_parameters_biases_and_frozen_ones(small_model):
    model = small_model()
    model.lm_head.weight.requires_grad_(False)
    optimizer = adamw(model, OptimConfig(lr=0.1, weight_decay=0.5))
    names = {p: name for name, p in model.named_parameters()}
    decayed, spared = ({names[p] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    assert {"backbone.layers.0.mixer.conv1d.weight", "backbone.layers.1.mixer.experts.up_proj"} <= decayed
    assert {"backbone.norm_f.weight", "backbone.layers.0.mixer.dt_bias", "backbone.layers.0.mixer.A_log"} <= spared
    assert decayed | spared == set(names.values()) - {"lm_head.weight"}
    assert all(dict(model.named_parameters())[name].ndim > 1 for name in decayed)


def test_a_two_dimensional_bias_is_not_decayed():
    module = nn.ParameterDict({"weight": nn.Parameter(torch.ones(2, 2)), "bias": nn.Parameter(torch.ones(2, 2))})
    groups = adamw(module, OptimConfig()).param_groups
    assert groups[0]["params"] == [module["weight"]] and groups[1]["params"] == [module["bias"]]


def test_training_nothing_is_an_error():
    with pytest.raises(ValueError, match="all frozen"):
        adamw(nn.Linear(2, 2).requires_grad_(False), OptimConfig())


def test_adamw_follows_the_textbook_update():
    module = nn.Linear(3, 2, bias=False)
    optim = OptimConfig(lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    optimizer = adamw(module, optim)
    want, m, v = module.weight.detach().clone(), torch.zeros(2, 3), torch.zeros(2, 3)
    for t in range(1, 4):
        module.weight.grad = g = torch.randn(2, 3, generator=torch.Generator().manual_seed(t))
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        want = want * (1 - 0.01 * 0.1) - 0.01 * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        optimizer.step()
    torch.testing.assert_close(module.weight.detach(), want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("limit, scale", [(1.0, 0.2), (10.0, 1.0), (0.0, 1.0)])
def test_clipping_bounds_the_norm_of_all_gradients_together(limit, scale):
    a, b, unused = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([-4.0])
    norm = gradient_norm([a, b, unused])
    assert norm.item() == 5
    clip_gradients([a, b, unused], limit, norm)
    torch.testing.assert_close(torch.cat([a.grad, b.grad]), scale * torch.tensor([3.0, -4.0]), rtol=1e-5, atol=0)
