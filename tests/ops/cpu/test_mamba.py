"""The mixer as one native call against the same mixer composed of ops in float64, and the laws that only it keeps."""

from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from nautilus.ops.cpu.mamba import CHUNK, mamba_native
from nautilus.ops.mamba import mamba, mamba_composed

EPS = 1e-5
WIDE = ("weight_CW", "bias_C", "dt_bias_H", "a_H", "skip_H", "norm_I", "state_BHPN")
# rows, time, heads, head width, groups, state width, taps. Widths below, at, and beside whole vectors of every level.
SIZES = [
    (2, 1, 2, 4, 1, 1, 4),
    (1, 5, 4, 3, 4, 7, 2),
    (2, 63, 2, 16, 1, 8, 4),
    (1, CHUNK, 4, 5, 2, 5, 4),
    (2, CHUNK + 1, 2, 20, 2, 3, 4),
    (1, 2 * CHUNK + 3, 2, 64, 1, 16, 4),
]
REACHES = {
    "one document": None,
    "first token": [0],
    "chunk border": [CHUNK],
    "beside the border": [CHUNK - 1, CHUNK + 1],
    "every token": slice(None),
    "continued": [],
}


def inputs(size, *, remembered=True, dtype=torch.float32, seed=0):
    rows, time, heads, width, groups, state, taps = size
    inner, channels = heads * width, heads * width + 2 * groups * state
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw)
    tensors = {
        "input_BTE": normal(rows, time, inner + channels + heads),
        "weight_CW": normal(channels, taps) / 2,
        "bias_C": normal(channels) / 4,
        "dt_bias_H": normal(heads) - 1,
        "a_H": -torch.exp(normal(heads)),
        "skip_H": normal(heads),
        "norm_I": 1 + normal(inner) / 8,
        "tail_BRC": normal(rows, taps - 1, channels) if remembered else None,
        "state_BHPN": normal(rows, heads, width, state) if remembered else None,
    }
    return {n: t if t is None or n in WIDE else t.to(dtype) for n, t in tensors.items()}


def reach(kind, rows, time):
    """Row 0 has documents that begin at the marks; those before the first mark began before the call."""
    if REACHES[kind] is None:
        return None
    began = torch.full((rows, time), -2)
    marks = torch.zeros(time, dtype=torch.bool)
    marks[REACHES[kind] if isinstance(REACHES[kind], slice) else [m for m in REACHES[kind] if m < time]] = True
    position = torch.arange(time)
    began[0] = torch.where(marks, position, -2).cummax(0).values
    return position - began


def call(function, size, reach_BT=None):
    return partial(function, groups=size[4], eps=EPS, reach_BT=reach_BT)


@pytest.mark.parametrize("kind", REACHES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_native_equals_composed_with_every_gradient(level, size, kind, rounds_once):
    """float32: a result is a sum of at most T, N or I terms, and the kernels' exp is good to two units."""
    reach_BT = reach(kind, size[0], size[1])
    for remembered in (False, True):
        t = inputs(size, remembered=remembered)
        single = 2.0**-24 * (4 * size[1] + size[5] + size[2] * size[3] + 16)
        rounds_once(call(mamba_native, size, reach_BT), call(mamba_composed, size, reach_BT), t, single=single)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bf16_costs_a_few_roundings_of_what_is_stored(level, size, rounds_once):
    """The unit row and the output are rounded; their gradients carry the same factors. Inside, all is float32."""
    t = inputs(size, dtype=torch.bfloat16)
    rounds_once(call(mamba_native, size), call(mamba_composed, size), t, single=3 * 2.0**-8)


def cut_up(t, size, cuts, reach_BT):
    parts, tail, state = [], t["tail_BRC"], t["state_BHPN"]
    for begin, end in zip([0, *cuts], [*cuts, size[1]], strict=True):
        piece = t | {"input_BTE": t["input_BTE"][:, begin:end], "tail_BRC": tail, "state_BHPN": state}
        seen = None if reach_BT is None else reach_BT[:, begin:end]
        out, tail, state = mamba(**piece, groups=size[4], eps=EPS, reach_BT=seen)
        parts.append(out)
    return torch.cat(parts, 1), tail, state


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    kind=st.sampled_from(list(REACHES)),
    seed=st.integers(0, 99),
)
def test_any_cut_gives_the_same_bits(level, data, dtype, kind, seed):
    size = data.draw(st.sampled_from(SIZES[2:]))
    cuts = sorted(data.draw(st.sets(st.integers(1, size[1] - 1), max_size=5)))
    t, reach_BT = inputs(size, dtype=dtype, seed=seed), reach(kind, size[0], size[1])
    whole = mamba(**t, groups=size[4], eps=EPS, reach_BT=reach_BT)
    assert all(torch.equal(a, b) for a, b in zip(cut_up(t, size, cuts, reach_BT), whole, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_has_the_same_bits_alone_and_with_and_without_gradient_and_on_any_number_of_threads(level, dtype):
    size = (3, CHUNK + 9, 4, 12, 2, 6, 4)
    t = inputs(size, dtype=dtype)
    want = call(mamba_native, size)(**t)
    alone = call(mamba_native, size)(**{n: v if n in WIDE[:-1] else v[1:2] for n, v in t.items()})
    assert all(torch.equal(a[0], w[1]) for a, w in zip(alone, want, strict=True))
    learning = call(mamba_native, size)(**{n: v.clone().requires_grad_() for n, v in t.items()})
    assert all(torch.equal(a, w) for a, w in zip(learning, want, strict=True))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert all(torch.equal(a, w) for a, w in zip(call(mamba_native, size)(**t), want, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_a_document_behind_another_has_the_bits_of_the_document_alone(level):
    size = (1, CHUNK + 9, 4, 12, 2, 6, 4)
    t = inputs(size)
    for begin in (1, 2, 40, CHUNK):
        position = torch.arange(size[1])
        packed = call(mamba_native, size, torch.where(position < begin, position + 9, position - begin)[None])(**t)
        alone = t | {"input_BTE": t["input_BTE"][:, begin:], "tail_BRC": None, "state_BHPN": None}
        out, last = call(mamba_native, size)(**alone)
        assert torch.equal(packed[0][:, begin:], out) and torch.equal(packed[1], last)


def test_parameters_in_bf16_are_widened_and_their_gradients_narrowed(level):
    size = SIZES[3]
    t = {n: v.bfloat16() for n, v in inputs(size, remembered=False).items() if v is not None}
    wide = {n: v if n == "input_BTE" else v.float() for n, v in t.items()}
    assert torch.equal(call(mamba_native, size)(**t)[0], call(mamba_native, size)(**wide)[0])
    leaves = {n: v.clone().requires_grad_() for n, v in t.items()}
    call(mamba_native, size)(**leaves)[0].sum().backward()
    assert {leaf.grad.dtype for leaf in leaves.values()} == {torch.bfloat16}


def test_decays_that_underflow_and_steps_that_are_huge_stay_finite(level):
    size = (1, 40, 2, 8, 1, 4, 4)
    t = inputs(size, remembered=False)
    t["input_BTE"][..., -2:] = torch.tensor([90.0, -200.0])  # softplus: 90, and 0
    leaves = {n: v.requires_grad_() for n, v in t.items() if v is not None}
    out, last = call(mamba_native, size)(**leaves)
    want, _ = call(mamba_composed, size)(**leaves)
    assert torch.allclose(out, want, rtol=1e-4, atol=1e-5)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum() + last.sum(), list(leaves.values())))
