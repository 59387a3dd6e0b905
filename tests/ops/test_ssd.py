from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from nautilus.ops.ssd import ssd, ssd_chunked, ssd_reference

BATCH, HEAD_WIDTH, STATE = 2, 3, 5
# T, H, G, chunk: one step, less than a chunk, exactly one, exactly several, one too many, one too few, chunks of one
SIZES = [(1, 4, 1, 8), (7, 4, 2, 8), (8, 4, 2, 8), (64, 4, 4, 16), (65, 8, 2, 16), (31, 6, 1, 16), (9, 2, 1, 1)]
STARTS = {
    "no documents": None,
    "first token": [0],
    "chunk border": [8, 16],
    "beside the border": [7, 9, 15, 17],
    "last token": [-1],
    "every token": slice(None),
    "long first document": [0, 29],
}


def starts(kind, time):
    """The marks in row 0, and no mark at all in row 1: rows must not share documents."""
    if STARTS[kind] is None:
        return None
    start_BT = torch.zeros(BATCH, time, dtype=torch.bool)
    marks = STARTS[kind]
    start_BT[0, marks if isinstance(marks, slice) else [m for m in marks if m < time]] = True
    return start_BT


def inputs(time, heads, groups, *, state=True, seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)
    tensors = {
        "x_BTHP": normal(BATCH, time, heads, HEAD_WIDTH),
        "dt_BTH": torch.nn.functional.softplus(normal(BATCH, time, heads) - 1),
        "a_H": -torch.exp(normal(heads)),
        "b_BTGN": normal(BATCH, time, groups, STATE),
        "c_BTGN": normal(BATCH, time, groups, STATE),
        "state_BHPN": normal(BATCH, heads, HEAD_WIDTH, STATE) if state else None,
    }
    narrow = ("x_BTHP", "b_BTGN", "c_BTGN")
    inner = dtype if dtype == torch.float64 else torch.float32
    return {n: t if t is None else t.to(dtype if n in narrow else inner) for n, t in tensors.items()}


def by_hand(x, dt, a, b, c, state, start):
    """One head of one row with Python numbers only: the paper's recurrence."""
    out, s = [], [[float(v) for v in row] for row in state]
    for t in range(len(x)):
        keep = 0.0 if start[t] else float(torch.exp(dt[t] * a))
        s = [[keep * s[p][n] + float(dt[t] * x[t][p] * b[t][n]) for n in range(STATE)] for p in range(HEAD_WIDTH)]
        out.append([sum(s[p][n] * float(c[t][n]) for n in range(STATE)) for p in range(HEAD_WIDTH)])
    return torch.tensor(out, dtype=torch.float64), torch.tensor(s, dtype=torch.float64)


def test_the_reference_is_the_recurrence_of_the_paper(close):
    t, start = inputs(6, 4, 2), torch.zeros(BATCH, 6, dtype=torch.bool)
    start[1, 2] = True
    y, last = ssd_reference(**t, start_BT=start)
    for row in range(BATCH):
        for head in range(4):
            b, c = (t[name][row, :, head // 2] for name in ("b_BTGN", "c_BTGN"))
            x, dt, a, state = t["x_BTHP"][row, :, head], t["dt_BTH"][row, :, head], t["a_H"][head], t["state_BHPN"]
            want_y, want_state = by_hand(x, dt, a, b, c, state[row, head], start[row])
            close("y", y[row, :, head], want_y, 1e-13)
            close("state", last[row, head], want_state, 1e-13)


@pytest.mark.parametrize("kind", STARTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_chunked_equals_recurrence_with_every_gradient(size, kind, same):
    time, heads, groups, chunk = size
    start_BT = starts(kind, time)
    for state in (False, True):
        same(
            partial(ssd_chunked, start_BT=start_BT, chunk=chunk),
            partial(ssd_reference, start_BT=start_BT),
            inputs(time, heads, groups, state=state),
        )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    time=st.integers(1, 40),
    chunk=st.integers(1, 64),
    cut=st.integers(1, 39),
    marks=st.sets(st.integers(0, 39), max_size=6),
    seed=st.integers(0, 99),
)
def test_any_chunk_and_any_cut_change_rounding_only(time, chunk, cut, marks, seed, close):
    t = inputs(time, 4, 2, seed=seed)
    start_BT = torch.zeros(BATCH, time, dtype=torch.bool)
    start_BT[0, [m for m in marks if m < time]] = True
    want_y, want_state = ssd_reference(**t, start_BT=start_BT)
    pieces, state = [], t.pop("state_BHPN")
    for lo, hi in ((0, min(cut, time)), (min(cut, time), time)):
        if lo < hi:
            part = {n: v if n == "a_H" else v[:, lo:hi] for n, v in t.items()}
            y, state = ssd_chunked(**part, state_BHPN=state, start_BT=start_BT[:, lo:hi], chunk=chunk)
            pieces.append(y)
    close("y", torch.cat(pieces, 1), want_y, 1e-12)
    close("state", state, want_state, 1e-12)


def test_no_state_is_a_state_of_zeros():
    t = inputs(11, 4, 2, state=False)
    zeros = torch.zeros(BATCH, 4, HEAD_WIDTH, STATE, dtype=torch.float64)
    for function in (ssd_reference, ssd_chunked):
        want, got = function(**t), function(**{**t, "state_BHPN": zeros})
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("function", [ssd_reference, ssd_chunked])
@pytest.mark.parametrize("begin", [1, 4, 8, 11])
def test_a_document_in_a_row_equals_the_document_alone(function, begin, pushed, close):
    """Gradients too: nothing flows back across the border, into the entering state least of all."""
    t, start_BT = inputs(19, 4, 2), torch.zeros(BATCH, 19, dtype=torch.bool)
    start_BT[:, begin] = True
    one = partial(function, start_BT=start_BT, chunk=8)
    (y, last), grads = pushed(lambda **z: (one(**z)[0][:, begin:], one(**z)[1]), t)
    alone = {n: v if n == "a_H" else v[:, begin:] for n, v in t.items() if n != "state_BHPN"} | {"state_BHPN": None}
    (want_y, want_last), want = pushed(ssd_reference, alone)
    close("y", y, want_y, 1e-12)
    close("state", last, want_last, 1e-12)
    assert not grads.pop("state_BHPN").any()
    for name, grad in grads.items():
        close(name, grad if name == "a_H" else grad[:, begin:], want[name], 1e-10)
        assert name == "a_H" or grad[:, :begin].abs().max() < 1e-12


@pytest.mark.parametrize("poisoned", ["before", "after"])
def test_nothing_in_another_document_is_felt(poisoned, pushed, close):
    """Numbers of 1e30 in one document leave the results of the other as they were. (NaN is no test here: 0 times NaN is
    NaN in every matmul.)"""
    t, start_BT = inputs(21, 4, 2), torch.zeros(BATCH, 21, dtype=torch.bool)
    start_BT[:, 10] = True
    mine, other = (slice(10, 21), slice(0, 10)) if poisoned == "before" else (slice(0, 10), slice(10, 21))
    function = lambda **z: ssd_chunked(**z, start_BT=start_BT, chunk=8)[0][:, mine]
    (want,), want_grads = pushed(function, t)
    for name in ("x_BTHP", "b_BTGN"):
        t[name][:, other] = 1e30
    t["c_BTGN"][:, other] = 1e30
    (got,), grads = pushed(function, t)
    close("y", got, want, 1e-14)
    for name in ("x_BTHP", "dt_BTH", "b_BTGN", "c_BTGN"):
        close(name, grads[name][:, mine], want_grads[name][:, mine], 1e-12)


@pytest.mark.parametrize("function", [ssd_reference, ssd_chunked])
@pytest.mark.parametrize("time", [1, 5])
def test_gradients_are_those_of_finite_differences(function, time):
    t, start_BT = inputs(time, 2, 1), torch.zeros(BATCH, time, dtype=torch.bool)
    start_BT[0, time // 2] = True
    names, leaves = list(t), [v.requires_grad_() for v in t.values()]
    call = lambda *v: function(**dict(zip(names, v, strict=True)), start_BT=start_BT, chunk=3)
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("time", [1, 7, 65])
def test_low_precision_loses_no_more_than_its_format(dtype, time, rounds_once):
    """bf16 inputs give one rounding at the end; everything before it, the state and dt's gradient are float32.

    float32: a result sums at most T or N terms of a kind, and exp turns the rounding of the summed log decay (at most
    that sum times 2^-24) into a relative error.
    """
    t = inputs(time, 4, 2, dtype=dtype)
    decay = (t["dt_BTH"] * t["a_H"]).sum(1).abs().max().item()
    single = 2.0**-24 * (time + STATE + decay)
    rounds_once(partial(ssd_chunked, chunk=16), ssd_reference, t, single=single)


@pytest.mark.parametrize("function", [ssd_reference, ssd_chunked])
def test_the_state_is_wide_and_the_output_is_as_narrow_as_its_input(function):
    y, state = function(**inputs(9, 4, 2, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32


def test_decays_that_underflow_give_zeros_and_no_nan():
    """dt * a of -500 a step: exp of a whole chunk's sum is zero and its inverse would be infinite."""
    t = inputs(33, 2, 1, dtype=torch.float32)
    t["dt_BTH"][:, 4:] = 50.0
    t["a_H"][:] = -10.0
    leaves = {n: v.requires_grad_() for n, v in t.items()}
    y, last = ssd_chunked(**leaves, chunk=16)
    want, _ = ssd_reference(**leaves)
    assert torch.allclose(y, want, rtol=1e-5, atol=1e-5)
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum() + last.sum(), list(leaves.values())))


def test_the_chosen_form_is_the_chunked_one_unless_another_is_forced(monkeypatch):
    t = inputs(9, 4, 2)
    assert torch.equal(ssd(**t, chunk=4)[0], ssd_chunked(**t, chunk=4)[0])
    monkeypatch.setenv("NAUTILUS_OPS", "reference")
    assert torch.equal(ssd(**t, chunk=4)[0], ssd_reference(**t)[0])


def test_a_long_decay_before_a_border_neither_overflows_nor_blurs_what_follows(pushed, close):
    """Sums of dt * a restart at a border; the factor from an earlier document to the chunk's end must stay zero."""
    t = inputs(16, 4, 2)
    t["dt_BTH"][:, :10] = 40.0
    start_BT = torch.zeros(BATCH, 16, dtype=torch.bool)
    start_BT[:, 10] = True
    (want, last), want_grads = pushed(partial(ssd_reference, start_BT=start_BT), t)
    narrow = {name: value.float() for name, value in t.items()}
    (got, state), grads = pushed(partial(ssd_chunked, start_BT=start_BT, chunk=16), narrow)
    close("y", got[:, 10:].double(), want[:, 10:], 1e-6)
    close("state", state.double(), last, 1e-6)
    for name in ("x_BTHP", "b_BTGN", "c_BTGN", "dt_BTH"):
        assert grads[name].isfinite().all()
        close(name, grads[name][:, 10:].double(), want_grads[name][:, 10:], 1e-5)
