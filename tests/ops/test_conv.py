from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from nautilus.ops.conv import causal_conv, causal_conv_reference, causal_conv_shifted

BATCH, CHANNELS = 2, 3
FORMS = [causal_conv_reference, causal_conv_shifted]


def inputs(time, taps=4, *, tail=True, seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)
    return {
        "x_BTC": normal(BATCH, time, CHANNELS),
        "weight_CW": normal(CHANNELS, taps),
        "bias_C": normal(CHANNELS),
        "tail_BRC": normal(BATCH, taps - 1, CHANNELS) if tail else None,
    }


def reaches(starts_per_row, time, before=0):
    """How many earlier tokens each token's document has, `before` tokens having come in earlier calls."""
    reach_BT = torch.zeros(len(starts_per_row), time, dtype=torch.int64)
    for row, marks in enumerate(starts_per_row):
        length = before
        for t in range(time):
            length = 0 if t in marks else length
            reach_BT[row, t] = length
            length += 1
    return reach_BT


def by_hand(x_BTC, weight_CW, bias_C, tail_BRC, reach_BT):
    """The formula at the top of the file, number by number."""
    out, taps = torch.zeros_like(x_BTC), weight_CW.shape[1]
    for i in range(x_BTC.shape[0]):
        seen = [*tail_BRC[i], *x_BTC[i]]
        for t in range(x_BTC.shape[1]):
            total = bias_C.clone()
            for r in range(min(taps, int(reach_BT[i, t]) + 1)):
                total += weight_CW[:, taps - 1 - r] * seen[t + taps - 1 - r]
            out[i, t] = total / (1 + torch.exp(-total))
    return out


@pytest.mark.parametrize("function", FORMS)
def test_each_form_is_the_formula(function, close):
    t, reach_BT = inputs(9), reaches([{2, 5, 6}, set()], 9, before=1)
    y, tail = function(**t, reach_BT=reach_BT)
    close("y", y, by_hand(**t, reach_BT=reach_BT), 1e-14)
    assert torch.equal(tail, t["x_BTC"][:, -3:])


@pytest.mark.parametrize("taps", [1, 2, 4, 5])
@pytest.mark.parametrize("time", [1, 2, 3, 4, 9])
def test_shifted_equals_tap_by_tap_with_every_gradient(time, taps, same):
    marks = [set(), {0}, {1}, {time - 1}, {0, 1, 2, 3}, {3}, set(range(time))]
    for tail in (False, True):
        t = inputs(time, taps, tail=tail)
        same(causal_conv_shifted, causal_conv_reference, t)
        for first, second in zip(marks, marks[1:], strict=False):
            reach_BT = reaches([first, second], time, before=2)
            one, two = (partial(f, reach_BT=reach_BT) for f in (causal_conv_shifted, causal_conv_reference))
            same(one, two, t)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    time=st.integers(1, 14),
    cuts=st.sets(st.integers(1, 13), max_size=5),
    marks=st.lists(st.sets(st.integers(0, 13), max_size=4), min_size=BATCH, max_size=BATCH),
    form=st.sampled_from(FORMS),
)
def test_any_cut_gives_the_same_outputs_and_the_same_tail(time, cuts, marks, form, close):
    t, reach_BT = inputs(time), reaches(marks, time)
    want, want_tail = causal_conv_reference(**t, reach_BT=reach_BT)
    pieces, tail, edges = [], t.pop("tail_BRC"), [0, *sorted(c for c in cuts if c < time), time]
    for lo, hi in zip(edges, edges[1:], strict=False):
        part = {**t, "x_BTC": t["x_BTC"][:, lo:hi], "tail_BRC": tail}
        y, tail = form(**part, reach_BT=reach_BT[:, lo:hi])
        pieces.append(y)
    close("y", torch.cat(pieces, 1), want, 1e-14)
    assert torch.equal(tail, want_tail)


@pytest.mark.parametrize("function", FORMS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_in_another_document_or_in_its_tail_is_not_felt(function, poison, pushed, close):
    t, reach_BT = inputs(9), reaches([{4}, {4}], 9, before=2)
    mine = lambda **z: function(**z, reach_BT=reach_BT)[0][:, 4:]
    (want,), want_grads = pushed(mine, t)
    t["x_BTC"][:, :4] = poison
    t["tail_BRC"][:] = poison
    (got,), grads = pushed(mine, t)
    close("y", got, want, 1e-15)
    close("dx", grads["x_BTC"][:, 4:], want_grads["x_BTC"][:, 4:], 1e-15)


@pytest.mark.parametrize("function", FORMS)
def test_nan_flowing_back_into_one_document_does_not_reach_the_one_before(function):
    t, reach_BT = inputs(9), reaches([{4}, {4}], 9)
    x = t.pop("x_BTC").requires_grad_()
    y, _ = function(x, **t, reach_BT=reach_BT)
    push = torch.ones_like(y)
    (want,) = torch.autograd.grad(y, x, push, retain_graph=True)
    push[:, 4:] = float("nan")
    (got,) = torch.autograd.grad(y, x, push)
    assert torch.equal(got[:, :4], want[:, :4])


@pytest.mark.parametrize("function", FORMS)
def test_gradients_are_those_of_finite_differences(function):
    t, reach_BT = inputs(5), reaches([{2}, {0, 4}], 5, before=1)
    leaves = [v.requires_grad_() for v in t.values()]
    call = lambda *v: function(**dict(zip(t, v, strict=True)), reach_BT=reach_BT)
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("time", [1, 40])
def test_low_precision_loses_no_more_than_its_format(dtype, time, rounds_once):
    """A sum of taps + 1 products in float32 (of B*T for the weights' gradients); bf16 results are rounded once."""
    t, reach_BT = inputs(time, dtype=dtype), reaches([{0, 7}, {3}], time)
    one, two = (partial(f, reach_BT=reach_BT) for f in (causal_conv_shifted, causal_conv_reference))
    rounds_once(one, two, t, single=2.0**-24 * (5 + BATCH * time))


def test_mixed_dtypes_keep_float32_masters_and_their_gradients_float32(pushed):
    t = inputs(6)
    t = {n: v.float() if n in ("weight_CW", "bias_C") else v.bfloat16() for n, v in t.items()}
    (y, tail), grads = pushed(causal_conv, t)
    assert y.dtype == tail.dtype == torch.bfloat16
    assert {n: g.dtype for n, g in grads.items()} == {n: v.dtype for n, v in t.items()}
