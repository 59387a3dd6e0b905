import cmath
import math
from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from nautilus.ops.attention import (
    ATTENTION_IMPLS,
    Training,
    attention_reference,
    attention_sdpa,
    attention_through_pages,
    attention_training,
    rotary_frequencies,
    rotate,
    training_refuses,
)
from nautilus.ops.cpu.library import native
from nautilus.ops.dispatch import choose

BATCH, HEAD_WIDTH = 2, 6
FORMS = [attention_reference, attention_sdpa]
# T new tokens, S positions, H heads, G groups
SIZES = [(1, 1, 2, 2), (1, 7, 4, 2), (7, 7, 4, 1), (3, 8, 4, 2), (8, 8, 2, 2)]


def inputs(time, positions, heads, groups, *, seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)
    return {
        "q_BTHP": normal(BATCH, time, heads, HEAD_WIDTH),
        "k_BSGP": normal(BATCH, positions, groups, HEAD_WIDTH),
        "v_BSGP": normal(BATCH, positions, groups, HEAD_WIDTH),
    }


def firsts(marks_per_row, time, positions):
    """Position at which the document of each of the last `time` positions begins."""
    rows = []
    for marks in marks_per_row:
        begins = [max([m for m in marks if m <= position], default=0) for position in range(positions)]
        rows.append(begins[positions - time :])
    return torch.tensor(rows)


def by_hand(q, k, v, first_BT, window):
    """One query at a time over a Python list of what it may see."""
    out, share = torch.zeros_like(q), q.shape[2] // k.shape[2]
    for i in range(q.shape[0]):
        for t in range(q.shape[1]):
            position = k.shape[1] - q.shape[1] + t
            begin = 0 if first_BT is None else int(first_BT[i, t])
            seen = [s for s in range(begin, position + 1) if window == 0 or position - s < window]
            for h in range(q.shape[2]):
                scores = [math.exp(float(q[i, t, h] @ k[i, s, h // share]) / math.sqrt(q.shape[3])) for s in seen]
                parts = [score / sum(scores) * v[i, s, h // share] for score, s in zip(scores, seen, strict=True)]
                out[i, t, h] = torch.stack(parts).sum(0)
    return out


@pytest.mark.parametrize("function", FORMS)
@pytest.mark.parametrize("window", [0, 1, 3])
def test_each_form_is_the_formula(function, window, close):
    for time, positions, heads, groups in SIZES:
        t = inputs(time, positions, heads, groups)
        for first_BT in (None, firsts([{2, 5}, set()], time, positions)):
            want = by_hand(*t.values(), first_BT, window)
            close("attention", function(**t, first_BT=first_BT, window=window), want, 1e-13)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("window", [0, 1, 2, 100])
def test_fused_equals_formula_with_every_gradient(size, window, same):
    time, positions, _, _ = size
    last = positions - 1
    for marks in (None, [{0}, set()], [{last}, {1}], [set(range(positions)), {3, last - 1}]):
        first_BT = None if marks is None else firsts(marks, time, positions)
        one, two = (partial(f, first_BT=first_BT, window=window) for f in (attention_sdpa, attention_reference))
        same(one, two, inputs(*size))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    positions=st.integers(1, 12),
    cuts=st.sets(st.integers(1, 11), max_size=5),
    marks=st.lists(st.sets(st.integers(0, 11), max_size=4), min_size=BATCH, max_size=BATCH),
    window=st.sampled_from([0, 1, 4]),
    form=st.sampled_from(FORMS),
)
def test_any_cut_of_the_new_tokens_gives_the_same_rows(positions, cuts, marks, window, form, close):
    t, first_BT = inputs(positions, positions, 4, 2), firsts(marks, positions, positions)
    want = attention_reference(**t, first_BT=first_BT, window=window)
    pieces, edges = [], [0, *sorted(c for c in cuts if c < positions), positions]
    for lo, hi in zip(edges, edges[1:], strict=False):
        q, k, v = t["q_BTHP"][:, lo:hi], t["k_BSGP"][:, :hi], t["v_BSGP"][:, :hi]
        pieces.append(form(q, k, v, first_BT=first_BT[:, lo:hi], window=window))
    close("attention", torch.cat(pieces, 1), want, 1e-13)


@pytest.mark.parametrize("function", FORMS)
def test_nothing_in_another_document_is_felt(function, pushed, close):
    """Huge numbers in one document change no bit of another. (NaN is no test: a weight of 0 times NaN is NaN.)"""
    t, first_BT = inputs(9, 9, 4, 2), firsts([{4}, {4}], 9, 9)
    for mine, other in ((slice(4, 9), slice(0, 4)), (slice(0, 4), slice(4, 9))):
        call = lambda mine=mine, **z: function(**z, first_BT=first_BT)[:, mine]
        (want,), want_grads = pushed(call, t)
        poisoned = {name: v.clone() for name, v in t.items()}
        for v in poisoned.values():
            v[:, other] = 1e30
        (got,), grads = pushed(call, poisoned)
        close("attention", got, want, 1e-15)
        for name in t:
            close(name, grads[name][:, mine], want_grads[name][:, mine], 1e-15)
            assert not grads[name][:, other].any()


@pytest.mark.parametrize("function", FORMS)
def test_the_future_is_not_seen(function):
    t = inputs(6, 6, 4, 2)
    want = function(**t)[:, :3]
    for name in ("k_BSGP", "v_BSGP"):
        t[name][:, 3:] = 1e30
    assert torch.equal(function(**t)[:, :3], want)


@pytest.mark.parametrize("function", FORMS)
def test_gradients_are_those_of_finite_differences(function):
    t, first_BT = inputs(3, 4, 2, 1), firsts([{2}, set()], 3, 4)
    call = lambda *v: function(*v, first_BT=first_BT, window=2)
    assert torch.autograd.gradcheck(call, [v.requires_grad_() for v in t.values()], fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("documents", [False, True])
def test_low_precision_loses_no_more_than_its_format(dtype, documents, close):
    """Scores of size up to m are rounded once by m u and their exp with them; the weights sum to one.

    bf16 kernels also round the weights before the second matmul, and the result: three roundings in all.
    """
    t = inputs(33, 33, 4, 2, dtype=dtype)
    first_BT = firsts([{5, 20}, {0}], 33, 33) if documents else None
    want = attention_reference(*(v.double() for v in t.values()), first_BT=first_BT)
    unit = 2.0**-24 if dtype == torch.float32 else 2.0**-8
    for function, roundings in ((attention_reference, 1), (attention_sdpa, 3)):
        got = function(**t, first_BT=first_BT)
        assert got.dtype == dtype
        close(function.__name__, got, want, 2.0**-24 * (33 + HEAD_WIDTH) + roundings * unit)


def llama3_frequency(index, head_width, theta, factor, low, high, original):
    """One frequency as the Llama 3 report words it: by wavelength, three cases."""
    frequency = 1 / theta ** (2 * index / head_width)
    wavelength = 2 * math.pi / frequency
    if wavelength < original / high:
        return frequency
    if wavelength > original / low:
        return frequency / factor
    smooth = (original / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


RESCALED = [(500000.0, 8.0, 1.0, 4.0, 8192), (10000.0, 32.0, 1.0, 4.0, 128), (1e6, 1.5, 2.0, 3.0, 64)]


@pytest.mark.parametrize("head_width", [2, 64, 128])
@pytest.mark.parametrize("rescaling", RESCALED, ids=str)
def test_frequencies_are_those_of_llama_3(head_width, rescaling):
    want = [llama3_frequency(i, head_width, *rescaling) for i in range(head_width // 2)]
    got = rotary_frequencies(head_width, *rescaling)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-13, atol=0)


def test_a_factor_of_one_leaves_the_frequencies_plain():
    want = torch.tensor([1.0, 10000 ** (-1 / 4), 10000 ** (-1 / 2), 10000 ** (-3 / 4)], dtype=torch.float64)
    torch.testing.assert_close(rotary_frequencies(8, 10000.0, 1.0, 1.0, 4.0, 8192), want, rtol=1e-14, atol=0)


def test_rotation_multiplies_pairs_half_a_head_apart_by_a_complex_unit(close):
    x, position = inputs(3, 3, 2, 2)["q_BTHP"], torch.tensor([[0, 1, 7], [100, 101, 5]])
    frequency = rotary_frequencies(HEAD_WIDTH, 10000.0, 1.0, 1.0, 4.0, 8192)
    got, half = rotate(x, position, frequency), HEAD_WIDTH // 2
    for i, t, h, pair in torch.cartesian_prod(*(torch.arange(n) for n in (2, 3, 2, half))).tolist():
        turned = complex(x[i, t, h, pair], x[i, t, h, pair + half])
        turned *= cmath.exp(1j * int(position[i, t]) * float(frequency[pair]))
        assert abs(turned - complex(got[i, t, h, pair], got[i, t, h, pair + half])) < 1e-13
    assert torch.equal(got[0, 0], x[0, 0])


@settings(max_examples=20, deadline=None, derandomize=True)
@given(one=st.integers(0, 100_000), gap=st.integers(-1000, 1000), shift=st.integers(0, 1_000_000))
def test_only_the_distance_of_two_positions_matters(one, gap, shift):
    draw = torch.Generator().manual_seed(one)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=draw, dtype=torch.float64)
    frequency = rotary_frequencies(16, 500000.0, 8.0, 1.0, 4.0, 8192)
    turned = lambda x, position: rotate(x, torch.tensor([[position]]), frequency)
    near = (turned(q, one) * turned(k, one + gap)).sum()
    far = (turned(q, one + shift) * turned(k, one + gap + shift)).sum()
    torch.testing.assert_close(far, near, rtol=1e-8, atol=1e-8)


def test_angles_a_million_tokens_in_are_exact_in_float32_and_bf16(close):
    """The angle is a float64 product of position and frequency: in float32 it would be off by up to 0.03 radians."""
    x, position = inputs(4, 4, 2, 2)["q_BTHP"], torch.tensor([[1_000_003, 999_999, 7, 0]])
    frequency = rotary_frequencies(HEAD_WIDTH, 10000.0, 1.0, 1.0, 4.0, 8192)
    turn = torch.polar(torch.ones(4, 3).double(), position[0, :, None] * frequency)[:, None]
    for dtype, unit in ((torch.float32, 4 * 2.0**-24), (torch.bfloat16, 2.0**-8)):
        got = rotate(x.to(dtype), position, frequency)
        want = torch.complex(*x.to(dtype).double().chunk(2, dim=-1)) * turn
        assert got.dtype == dtype
        close("rotate", got, torch.cat([want.real, want.imag], dim=-1), unit)


@pytest.mark.parametrize("time,positions", [(1, 1), (16, 16), (17, 17), (40, 40), (1, 20), (35, 60)])
@pytest.mark.parametrize("window", [0, 1, 5, 100])
def test_the_training_form_equals_the_formula_with_every_gradient(time, positions, window, same, monkeypatch):
    """Blocks of 16 queries, so that several of them, and one that is not full, meet every mask."""
    monkeypatch.setattr(Training, "SCORES", 1)
    last = positions - 1
    for heads, groups in ((4, 2), (3, 3), (4, 1)):
        for marks in (None, [{0, 3}, {last}], [set(range(0, positions, 2)), set()]):
            first_BT = None if marks is None else firsts(marks, time, positions)
            one, two = (partial(f, first_BT=first_BT, window=window) for f in (attention_training, attention_reference))
            same(one, two, inputs(time, positions, heads, groups))


def test_the_training_form_is_chosen_for_gradients_and_for_nothing_else():
    t = inputs(4, 4, 2, 1)
    assert training_refuses(*t.values()) is not None
    t["v_BSGP"].requires_grad_()
    assert training_refuses(*t.values()) is None
    with torch.no_grad():
        assert training_refuses(*t.values()) is not None


@pytest.mark.parametrize("positions", [40, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_training_form_loses_no_more_than_its_format(dtype, positions, pushed):
    held_to_its_format(attention_training, dtype, positions, pushed)


@pytest.mark.parametrize("positions", [40, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_native_form_loses_no_more_than_its_format(level, dtype, positions, pushed):
    held_to_its_format(attention_through_pages, dtype, positions, pushed)


def held_to_its_format(function, dtype, positions, pushed):
    rounded = {name: value.to(dtype) for name, value in inputs(40, positions, 4, 2).items()}
    first_BT = firsts([{5, 20}, {0}], 40, positions)
    for named in ({}, {"window": 7}, {"first_BT": first_BT}):
        call, formula = (partial(f, **named) for f in (function, attention_reference))
        (want,), want_grads = pushed(formula, {name: value.double() for name, value in rounded.items()}, [dtype])
        (got,), grads = pushed(call, rounded)
        unit = torch.finfo(dtype).eps
        assert got.dtype == dtype and (got.double() - want).norm() <= 2 * unit * want.norm()
        for name, grad in grads.items():
            assert grad.dtype == dtype
            assert (grad.double() - want_grads[name]).norm() <= 4 * unit * want_grads[name].norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_wanted_gradient_changes_no_bit_of_the_native_form(level, dtype):
    t = inputs(9, 40, 4, 2, dtype=dtype)
    want = attention_through_pages(**t)
    assert torch.equal(attention_through_pages(**{n: v.requires_grad_() for n, v in t.items()}), want)


def test_the_native_form_comes_first_where_it_can_be(monkeypatch):
    monkeypatch.delenv("NAUTILUS_OPS", raising=False)
    t = inputs(4, 4, 2, 1, dtype=torch.float32)
    chosen = choose("attention", ATTENTION_IMPLS, *t.values(), first_BT=None, window=0)
    assert (chosen is attention_through_pages) == (native().functions is not None)
    chosen = choose("attention", ATTENTION_IMPLS, *inputs(4, 4, 2, 1).values(), first_BT=None, window=0)
    assert chosen is attention_sdpa
