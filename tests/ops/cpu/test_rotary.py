import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from nautilus.ops.attention import rotary_frequencies, rotate_reference
from nautilus.ops.cpu.rotary import rotate_native, rotate_refuses

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def inputs(rows, time, heads, width, dtype=torch.float32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {
        "x_BTHP": torch.randn(rows, time, heads, width, generator=draw).to(dtype),
        "position_BT": torch.randint(1 << 20, (rows, time), generator=draw),
        "frequency": rotary_frequencies(width, 10000.0, 1.0, 1.0, 4.0, 8192),
    }


def floats(t):
    """The same call on numbers that a gradient may be asked of."""
    place = {n: t[n] for n in ("position_BT", "frequency")}
    return {"x_BTHP": t["x_BTHP"]}, (lambda f: lambda x_BTHP: f(x_BTHP, **place))


@DTYPES
@pytest.mark.parametrize("size", [(1, 1, 1, 2), (2, 35, 3, 18), (3, 5, 2, 128), (1, 2, 1, 300)], ids=str)
def test_native_equals_the_formula_with_its_gradient(level, size, dtype, rounds_once):
    """In float32: a rounded sine and cosine, two products and a sum."""
    x, of = floats(inputs(*size, dtype=dtype))
    rounds_once(of(rotate_native), of(rotate_reference), x, single=2.0**-24 * 4)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    position=st.integers(1, 1 << 30),
    turns=st.sampled_from([0.0, 1e-9, 0.125, 0.2499999999, 0.25, 0.5, 0.9999999999, 1.0]) | st.floats(0, 1),
    each=st.booleans(),
)
def test_every_angle_is_that_of_double_precision(level, position, turns, each):
    """On the axes too, where sine and cosine change places, and a billion tokens into a text."""
    frequency = torch.tensor([math.tau * turns / (1 if each else position)], dtype=torch.float64)
    got = rotate_native(torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[position]]), frequency).flatten()
    angle = position * float(frequency)
    slack = 2.0**-25 + 1e-11 + 2 * abs(angle) * 2.0**-52  # half a unit of a float, the series, the angle as a double
    assert abs(float(got[0]) - math.cos(angle)) <= slack and abs(float(got[1]) - math.sin(angle)) <= slack


@DTYPES
def test_a_token_has_the_same_bits_in_any_company(level, dtype):
    t = inputs(3, 40, 5, 34, dtype=dtype)
    x, position, frequency = t.values()
    want = rotate_native(**t)
    assert torch.equal(rotate_native(x[1:2, 7:9, 2:3], position[1:2, 7:9], frequency), want[1:2, 7:9, 2:3])
    assert torch.equal(rotate_native(**t | {"x_BTHP": x.clone().requires_grad_()}), want)
    shared = rotate_native(x, position[:1], frequency)
    assert torch.equal(shared[0], want[0]) and torch.equal(rotate_native(x[2:], position[:1], frequency), shared[2:])
    moved = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert not moved.is_contiguous() and torch.equal(rotate_native(moved, position, frequency), want)


def test_the_backward_turns_back_to_the_very_bits(level):
    """The sine of a negated angle is the negated sine: a whole turn and its gradient meet no second rounding."""
    t = inputs(1, 9, 2, 16)
    x = t["x_BTHP"].requires_grad_()
    (dx,) = torch.autograd.grad(rotate_native(**t), x, t["x_BTHP"].detach())
    assert torch.equal(dx, rotate_native(**t | {"x_BTHP": x.detach(), "frequency": -t["frequency"]}))
    assert torch.equal(rotate_native(**t | {"position_BT": 0 * t["position_BT"]}), x)


def test_what_native_refuses(built):
    t = inputs(2, 3, 2, 8)
    assert rotate_refuses(**t) is None and rotate_refuses(**t | {"position_BT": t["position_BT"][:1]}) is None
    assert "float64" in rotate_refuses(**t | {"x_BTHP": t["x_BTHP"].double()})
    for name, other, reason in (
        ("position_BT", t["position_BT"][:, :2], "positions"),
        ("position_BT", t["position_BT"].int(), "int32"),
        ("frequency", t["frequency"][:2], "frequencies"),
        ("frequency", t["frequency"].float(), "float32"),
        ("frequency", t["frequency"].to("meta"), "elsewhere"),
        ("x_BTHP", t["x_BTHP"][..., :7], "width 7"),
    ):
        assert reason in rotate_refuses(**t | {name: other}), name
