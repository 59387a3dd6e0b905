"""The mixer as one native call against the same mixer composed of ops in float64, and the laws that only it keeps."""

from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from nautilus.ops.cpu.mamba import CHUNK, mamba_native, mamba_refuses, slots_native, slots_refuse
from nautilus.ops.mamba import mamba, mamba_composed, mamba_taken_out

EPS = 1e-5
WIDE = ("weight_CW", "bias_C", "dt_bias_H", "a_H", "skip_H", "norm_I", "state_BHPN")
# rows, time, heads, head width, groups, state width, taps. Widths below, at, and beside whole vectors of every level.
SIZES = [
    (2, 1, 2, 4, 1, 1, 4),
    (1, 5, 4, 3, 4, 7, 2),
    (2, 63, 2, 16, 1, 8, 4),
    (1, CHUNK, 4, 5, 2, 5, 4),
    (2, CHUNK + 1, 2, 20, 2, 3, 2),
    (1, 2 * CHUNK + 3, 2, 64, 1, 16, 4),
    (1, CHUNK + 2, 2, 70, 1, 128, 4),
    (1, 3 * CHUNK + 8, 6, 7, 3, 64, 2),
]
SINGLE = 256 * 2.0**-24  # sums of hundreds of terms, an exp that is good to two units, norms of rows that nearly cancel
REACHES = {
    "one document": None,
    "first token": [0],
    "chunk border": [CHUNK],
    "beside the border": [CHUNK - 1, CHUNK + 1],
    "last token": [-1],
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
        # Representable in bf16: it is applied in the precision of the activations.
        "norm_I": (1 + normal(inner) / 8).bfloat16().float(),
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
    reach_BT = reach(kind, size[0], size[1])
    for remembered in (False, True):
        t = inputs(size, remembered=remembered)
        rounds_once(call(mamba_native, size, reach_BT), call(mamba_composed, size, reach_BT), t, single=SINGLE)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bf16_costs_the_roundings_of_what_is_stored(level, size, rounds_once):
    """The unit row and the output are rounded, the gradients once. Inside, and for what stays wide, all is float32."""
    for remembered, kind in ((False, "one document"), (True, "continued"), (True, "beside the border")):
        function = partial(call, size=size, reach_BT=reach(kind, size[0], size[1]))
        t = inputs(size, remembered=remembered, dtype=torch.bfloat16)
        rounds_once(function(mamba_native), function(mamba_composed), t, single=SINGLE, roundings=2)


def test_bf16_rounds_the_unit_row_and_then_the_output_and_nothing_else(level):
    """The bits of the float32 run on the same numbers, rounded where the published models round."""
    size = SIZES[5]
    narrow = inputs(size, dtype=torch.bfloat16)
    same = {n: v.float() for n, v in narrow.items()}
    unit, _, last = call(mamba_native, size)(**same | {"norm_I": torch.ones_like(same["norm_I"])})
    got = call(mamba_native, size)(**narrow)
    assert torch.equal(got[0], unit.bfloat16() * narrow["norm_I"].bfloat16()) and torch.equal(got[2], last)


def test_exp_softplus_and_silu_are_good_to_a_few_units_everywhere(level):
    """One token, and v, x and b biases: S = exp(softplus(v) a) S + softplus(v) silu(x) silu(b), S 0 or 1 before."""
    heads = 1000
    v, x = torch.linspace(-25, 25, heads), torch.linspace(-15, 15, heads)
    a = -torch.linspace(0, 80, heads) / torch.nn.functional.softplus(v.double()).clamp_min(1e-6).float()
    exact = torch.nn.functional.softplus(v.double(), threshold=100)
    write = exact * torch.nn.functional.silu(x.double()) * torch.nn.functional.silu(torch.tensor(2.0).double())
    decay = exact * a.double()
    for before, b, want in ((0.0, 2.0, write), (1.0, 0.0, decay.exp())):
        t = {
            "input_BTE": torch.zeros(1, 1, 3 * heads + 2), "weight_CW": torch.zeros(heads + 2, 2),
            "bias_C": torch.cat([x, torch.full((2,), b)]), "dt_bias_H": v, "a_H": a, "skip_H": torch.zeros(heads),
            "norm_I": torch.ones(heads), "state_BHPN": torch.full((1, heads, 1, 1), before),
        }  # fmt: skip
        *_, last = mamba_native(**t, groups=1, eps=EPS)
        units = (last.flatten().double() - want).abs() / want.abs().clamp_min(1e-30) * 2.0**24
        # The exponent is rounded too: some units for each whole number of it.
        assert (units <= 8 + (4 * decay.abs() if before else 0)).all(), units.max()


@pytest.mark.parametrize("missing", ["tail_BRC", "state_BHPN"])
def test_a_tail_without_a_state_and_a_state_without_a_tail(level, missing, rounds_once):
    t = inputs(SIZES[3]) | {missing: None}
    rounds_once(call(mamba_native, SIZES[3]), call(mamba_composed, SIZES[3]), t, single=SINGLE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_slices_and_transposes_give_the_bits_of_their_copies(level, dtype, pushed):
    """As a cache hands them over: rows of a larger batch, a state stored in another order, a slice of a projection."""
    t = inputs(SIZES[2], dtype=dtype)
    views = t | {
        "input_BTE": torch.cat([t["input_BTE"], t["input_BTE"]], -1)[..., : t["input_BTE"].shape[-1]],
        "tail_BRC": t["tail_BRC"].repeat_interleave(2, 0)[::2],
        "state_BHPN": t["state_BHPN"].permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    }
    assert not any(views[n].is_contiguous() for n in ("input_BTE", "tail_BRC", "state_BHPN"))
    bases = {n: v.transpose(0, -1).contiguous() for n, v in views.items()}  # `pushed` would make the views contiguous
    turned = lambda **z: call(mamba_native, SIZES[2])(**{n: v.transpose(0, -1) for n, v in z.items()})
    (want, want_grads), (got, grads) = pushed(call(mamba_native, SIZES[2]), t), pushed(turned, bases)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    assert all(torch.equal(grads[n].transpose(0, -1), want_grads[n]) for n in t)
    assert all(torch.equal(g, w) for g, w in zip(call(mamba_native, SIZES[2])(**views), want, strict=True))


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
def test_a_row_has_the_same_bits_alone_and_with_and_without_gradient_wanted(level, dtype):
    size = (3, CHUNK + 9, 4, 12, 2, 6, 4)
    t = inputs(size, dtype=dtype)
    want = call(mamba_native, size)(**t)
    alone = call(mamba_native, size)(**{n: v if n in WIDE[:-1] else v[1:2] for n, v in t.items()})
    assert all(torch.equal(a[0], w[1]) for a, w in zip(alone, want, strict=True))
    learning = call(mamba_native, size)(**{n: v.clone().requires_grad_() for n, v in t.items()})
    assert all(torch.equal(a, w) for a, w in zip(learning, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_document_behind_another_has_the_bits_of_the_document_alone(level, dtype):
    size = (1, CHUNK + 9, 4, 12, 2, 6, 4)
    t = inputs(size, dtype=dtype)
    for begin in (1, 2, 40, CHUNK - 1, CHUNK, CHUNK + 8):
        position = torch.arange(size[1])
        packed = call(mamba_native, size, torch.where(position < begin, position + 9, position - begin)[None])(**t)
        alone = t | {"input_BTE": t["input_BTE"][:, begin:], "tail_BRC": None, "state_BHPN": None}
        out, _, last = call(mamba_native, size)(**alone)
        assert torch.equal(packed[0][:, begin:], out) and torch.equal(packed[2], last)


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
    out, _, last = call(mamba_native, size)(**leaves)
    want, *_ = call(mamba_composed, size)(**leaves)
    assert torch.allclose(out, want, rtol=1e-4, atol=1e-5)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum() + last.sum(), list(leaves.values())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_numbers_that_are_not_finite_show_where_they_are_felt_and_nowhere_else(level, dtype):
    """Token 5 of row 0: its own output and all later ones of its groups, and nothing of the other row."""
    size = (2, 12, 4, 8, 2, 4, 4)
    t = inputs(size, dtype=dtype)
    clean, *_ = call(mamba_native, size)(**t)
    for poison in (float("nan"), float("inf")):
        t["input_BTE"][0, 5, 32 + 3] = poison  # x of the first group
        out, _, last = call(mamba_native, size)(**t)
        assert out[0, 5:, :16].isnan().any(-1).all() and last[0, 0].isnan().any()
        assert torch.equal(out[0, :5], clean[0, :5]) and torch.equal(out[1], clean[1])
        assert torch.equal(out[0, :, 16:], clean[0, :, 16:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [64, 12], ids=str)  # in place, and through scratch
def test_states_in_slots_change_where_they_lie_and_no_others(level, dtype, width):
    for time in (1, 2, CHUNK + 9):
        size = (3, time, 4, width, 2, 6, 4)
        t = inputs(size, dtype=dtype)
        want = call(mamba_native, size)(**t)
        slot_B = torch.tensor([4, 0, 2], dtype=torch.int32)
        tails, states = torch.full((6, *t["tail_BRC"].shape[1:]), 3, dtype=dtype), torch.full((6, 4, 6, width), 5.0)
        for mixer in (slots_native, mamba_taken_out):
            tails[slot_B], states[slot_B] = t["tail_BRC"], t["state_BHPN"].mT
            out = mixer(*list(t.values())[:-2], tails, states, slot_B, groups=size[4], eps=EPS)
            assert torch.equal(out, want[0])
            assert torch.equal(tails[slot_B], want[1]) and torch.equal(states[slot_B].mT, want[2])
            assert (tails[[1, 3, 5]] == 3).all() and (states[[1, 3, 5]] == 5).all()


def test_slots_that_do_not_fit_are_refused(built):
    t = inputs((2, 3, 4, 8, 2, 6, 4))
    pools = {"tail_SRC": torch.zeros(5, *t["tail_BRC"].shape[1:]), "state_SHNP": torch.zeros(5, 4, 6, 8)}
    pools["slot_B"] = torch.zeros(2, dtype=torch.int32)
    refuses = lambda **changed: slots_refuse(*list(t.values())[:-2], *(pools | changed).values(), groups=2, eps=EPS)
    assert refuses() is None
    for strange in (5, -1):
        with pytest.raises(IndexError):
            wrong = torch.tensor([0, strange], dtype=torch.int32)
            slots_native(*list(t.values())[:-2], *list(pools.values())[:2], wrong, groups=2, eps=EPS)
    assert "do not fit 2 rows" in refuses(slot_B=torch.zeros(3, dtype=torch.int32))
    assert "int64" in refuses(slot_B=torch.zeros(2, dtype=torch.int64))
    assert "tails" in refuses(tail_SRC=pools["tail_SRC"].bfloat16())
    assert "fit together" in refuses(state_SHNP=torch.zeros(5, 4, 6, 9))


def test_what_native_refuses_it_names_and_reads_no_memory_for(built):
    refuses = lambda **changed: mamba_refuses(**t | changed, groups=2, eps=EPS)
    t = inputs((2, 9, 4, 3, 2, 5, 4))
    assert refuses() is None
    for name, value in t.items():
        assert "float64" in refuses(**{name: value.double()}) and "meta" in refuses(**{name: value.to("meta")})
        assert "shapes" in refuses(**{name: torch.cat([value, value[..., :1]], -1)}), name
    alone = t | {"tail_BRC": None, "state_BHPN": None}
    for groups in (3, 5):  # the state width of three groups would be no whole number, nor the heads of one of five
        assert "shapes" in mamba_refuses(**alone, groups=groups, eps=EPS)
    assert "66 taps" in refuses(weight_CW=torch.zeros(32, CHUNK + 2), tail_BRC=None)
