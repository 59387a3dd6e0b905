import math
from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from nautilus.ops.norm import (
    gated_group_norm_fused,
    gated_group_norm_reference,
    rms_norm_fused,
    rms_norm_reference,
)

EPS = 1e-5
SHAPES = [(1, 4), (5, 12), (2, 3, 12)]


def inputs(shape, dtype=torch.float64, names=("hidden",)):
    draw = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for n in names}
    return tensors | {"weight_D": (1 + torch.randn(shape[-1:], generator=draw, dtype=torch.float64)).to(dtype)}


def gated(function, groups):
    return partial(function, groups=groups, eps=EPS)


def x_over(root, values):
    return torch.tensor([value / root for value in values], dtype=torch.float64)


@pytest.mark.parametrize("function", [rms_norm_reference, rms_norm_fused])
def test_rms_norm_is_its_formula(function, close):
    t = inputs((2, 7))
    want = torch.empty(2, 7, dtype=torch.float64)
    for row in range(2):
        x = t["hidden"][row].tolist()
        root = math.sqrt(sum(v * v for v in x) / 7 + EPS)
        want[row] = x_over(root, x) * t["weight_D"]
    close("rms_norm", function(**t, eps=EPS), want, 1e-14)


@pytest.mark.parametrize("function", [gated_group_norm_reference, gated_group_norm_fused])
def test_the_gated_norm_gates_first_and_norms_each_group_on_its_own(function, close):
    t = inputs((2, 6), names=("y", "z"))
    want = torch.empty(2, 6, dtype=torch.float64)
    for row in range(2):
        v = [y * z / (1 + math.exp(-z)) for y, z in zip(t["y"][row].tolist(), t["z"][row].tolist(), strict=True)]
        for group in (slice(0, 2), slice(2, 4), slice(4, 6)):
            root = math.sqrt(sum(value * value for value in v[group]) / 2 + EPS)
            want[row, group] = x_over(root, v[group]) * t["weight_D"][group]
    close("gated norm", function(**t, groups=3, eps=EPS), want, 1e-14)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fused_norms_equal_their_references_with_every_gradient(shape, same):
    one, two = (partial(f, eps=EPS) for f in (rms_norm_fused, rms_norm_reference))
    same(one, two, inputs(shape))
    for groups in (1, 2, 4):
        t = inputs(shape, names=("y", "z"))
        same(gated(gated_group_norm_fused, groups), gated(gated_group_norm_reference, groups), t)


def test_a_single_row_without_other_axes_is_taken_too(same):
    one, two = (partial(f, eps=EPS) for f in (rms_norm_fused, rms_norm_reference))
    same(one, two, inputs((12,)))
    t = inputs((12,), names=("y", "z"))
    same(gated(gated_group_norm_fused, 2), gated(gated_group_norm_reference, 2), t)


def test_rows_of_zeros_give_zeros_and_finite_gradients(pushed):
    t = inputs((3, 8))
    t["hidden"][1] = 0
    (out,), grads = pushed(partial(rms_norm_fused, eps=EPS), t)
    assert not out[1].any() and all(g.isfinite().all() for g in grads.values())
    t = inputs((3, 8), names=("y", "z"))
    t["y"][1] = 0
    (out,), grads = pushed(gated(gated_group_norm_fused, 2), t)
    assert not out[1].any() and all(g.isfinite().all() for g in grads.values())


def test_a_row_of_nan_leaves_the_other_rows_alone(pushed):
    t = inputs((3, 8))
    (want,), want_grads = pushed(partial(rms_norm_fused, eps=EPS), t)
    t["hidden"][1] = float("nan")
    (got,), grads = pushed(partial(rms_norm_fused, eps=EPS), t)
    assert torch.equal(got[[0, 2]], want[[0, 2]])
    assert torch.equal(grads["hidden"][[0, 2]], want_grads["hidden"][[0, 2]])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(power=st.integers(-30, 30), seed=st.integers(0, 99), groups=st.sampled_from([1, 2, 3, 6]))
def test_scaling_a_row_changes_nothing_but_through_eps(power, seed, groups):
    draw = torch.Generator().manual_seed(seed)
    x, z = torch.randn(2, 4, 12, generator=draw, dtype=torch.float64)
    one = torch.ones(12, dtype=torch.float64)
    torch.testing.assert_close(rms_norm_fused(x * 2.0**power, one, 1e-30), rms_norm_fused(x, one, 1e-30))
    torch.testing.assert_close(rms_norm_fused(x, one, 0.0).square().mean(-1), torch.ones(4, dtype=torch.float64))
    scaled, plain = (gated_group_norm_fused(y, z, one, groups, 1e-30) for y in (x * 2.0**power, x))
    torch.testing.assert_close(scaled, plain)
    squares = plain.unflatten(-1, (groups, -1)).square().mean(-1)
    torch.testing.assert_close(squares, torch.ones_like(squares))


@pytest.mark.parametrize("function", [rms_norm_reference, rms_norm_fused, gated_group_norm_fused])
def test_gradients_are_those_of_finite_differences(function):
    names = ("hidden",) if function in (rms_norm_reference, rms_norm_fused) else ("y", "z")
    t = inputs((2, 6), names=names)
    options = {"eps": EPS} if names == ("hidden",) else {"groups": 2, "eps": EPS}
    call = lambda *v: function(**dict(zip(t, v, strict=True)), **options)
    assert torch.autograd.gradcheck(call, [v.requires_grad_() for v in t.values()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_loses_no_more_than_its_format(dtype, rounds_once):
    """float32 sums over a row (over all rows for the weight's gradient). The block norm rounds once; the gated norm
    rounds the unit row, its weight being as narrow already, and then the product."""
    one, two = (partial(f, eps=EPS) for f in (rms_norm_fused, rms_norm_reference))
    single = 2.0**-24 * (64 + 5)
    rounds_once(one, two, inputs((5, 64), dtype), single=single)
    t = inputs((5, 64), dtype, ("y", "z"))
    one, two = gated(gated_group_norm_fused, 2), gated(gated_group_norm_reference, 2)
    rounds_once(one, two, t, single=single, roundings=2)


def test_the_block_norm_rounds_once_and_the_gated_norm_before_its_weight():
    """Bit for bit what the published models compute: where the cast stands is part of the model."""
    t = inputs((64, 48), torch.bfloat16)
    x, w = t["hidden"].double(), t["weight_D"].double()
    want = (x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * w).bfloat16()
    for function in (rms_norm_fused, rms_norm_reference):
        assert (function(**t, eps=EPS) != want).double().mean() < 0.001  # double rounding through float32, now and then
    t = inputs((64, 48), torch.bfloat16, ("y", "z"))
    y, z, w = (v.double() for v in t.values())
    v = (y * z / (1 + torch.exp(-z))).unflatten(-1, (2, -1))
    unit = (v / (v.square().mean(-1, keepdim=True) + EPS).sqrt()).flatten(-2).bfloat16()
    want = (unit.double() * w).bfloat16()
    for function in (gated_group_norm_fused, gated_group_norm_reference):
        assert (function(**t, groups=2, eps=EPS) != want).double().mean() < 0.001
