"""The mixer as one native call against the same mixer composed of ops in float64, and the laws that only it keeps."""

import itertools
from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from nautilus.ops.cpu.mamba import (
    CHUNK,
    MambaSlots,
    fold_native,
    mamba_native,
    mamba_refuses,
    new_slots,
    slots_native,
    slots_refuse,
)
from nautilus.ops.mamba import mamba, mamba_composed, mamba_in_slots, mamba_taken_out

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


def slots_for(size, *, count=6, window=0, dtype=torch.float32):
    _, _, heads, width, groups, state, taps = size
    sizes = {"heads": heads, "head_width": width, "groups": groups, "state": state, "taps": taps}
    return new_slots(count, **sizes, window=window, dtype=dtype, wide=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [64, 12], ids=str)  # in place, and through scratch
def test_states_in_slots_change_where_they_lie_and_no_others(level, dtype, width):
    for time in (1, 2, CHUNK + 9):
        size = (3, time, 4, width, 2, 6, 4)
        t = inputs(size, dtype=dtype)
        want = call(mamba_native, size)(**t)
        slot_B, slots = torch.tensor([4, 0, 2], dtype=torch.int32), slots_for(size, dtype=dtype)
        slots.tail_SRC.fill_(3), slots.ssm_SHNP.fill_(5)
        for mixer in (slots_native, mamba_taken_out):
            slots.tail_SRC[slot_B], slots.ssm_SHNP[slot_B] = t["tail_BRC"], t["state_BHPN"].mT
            out = step(mixer, list(t.values())[:-2], t["input_BTE"], slots, slot_B)
            assert torch.equal(out, want[0])
            assert torch.equal(slots.tail_SRC[slot_B], want[1]) and torch.equal(slots.ssm_SHNP[slot_B].mT, want[2])
            assert (slots.tail_SRC[[1, 3, 5]] == 3).all() and (slots.ssm_SHNP[[1, 3, 5]] == 5).all()


def step(mixer, tensors, input_BTE, slots, slot_B, **named):
    rows, time = input_BTE.shape[:2]
    where = {"slots": slots, "slot_B": slot_B, "begin": torch.arange(rows + 1).int() * time}
    return mixer(input_BTE.flatten(0, 1)[None], *tensors[1:], **where, groups=slots.groups, eps=EPS, **named).view(
        rows, time, -1
    )


# Widths of heads that are whole vectors of every level, of some, of none; one tap; as many tokens as one call may have.
WINDOWS = [
    ((4, 16, 4, 64, 2, 6, 4), 16),
    ((3, 5, 4, 12, 2, 7, 4), 5),
    ((2, 3, 2, 24, 1, 9, 2), 8),
    ((2, 4, 3, 5, 3, 1, 1), 4),
    ((2, CHUNK, 2, 16, 1, 4, 4), CHUNK),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("size", "window"), WINDOWS, ids=str)
def test_tokens_that_stay_leave_the_bits_of_tokens_read_one_by_one(level, size, window, dtype):
    """Cycles of a tentative call and a verdict, a different one for each row, all of them met; now and then a fold or a
    plain call comes between."""
    rows, time = size[:2]
    slot_B = torch.arange(rows, dtype=torch.int32).flip(0) + 1
    slots, serial = slots_for(size, window=window, dtype=dtype), slots_for(size, dtype=dtype)
    for cycle in range(time // rows + 3):
        tensors = list(inputs(size, dtype=dtype, seed=cycle).values())[:-2]
        tensors[1:] = list(inputs(size, seed=0).values())[1:-2]
        ssm, tail = slots.ssm_SHNP.clone(), slots.tail_SRC[:, : slots.taps - 1].clone()
        out_BTI = step(slots_native, tensors, tensors[0], slots, slot_B, tentative=True)
        if cycle == 0:
            assert torch.equal(slots.ssm_SHNP, ssm) and torch.equal(slots.tail_SRC[:, : slots.taps - 1], tail)
        assert (slots.pending_S[slot_B] == -time).all() and not slots.pending_S[[0, *range(rows + 1, 6)]].any()
        count_B = (torch.arange(rows) + cycle * rows) % (time + 1)
        slots.pending_S[slot_B] = count_B.int()
        for row, count in enumerate(count_B.tolist()):
            for t in range(count):
                token, slot = tensors[0][row : row + 1, t : t + 1], slot_B[row : row + 1]
                assert torch.equal(step(slots_native, tensors, token, serial, slot)[0, 0], out_BTI[row, t])
        if cycle % 3 == 1:
            fold_native(slots, slot_B)
            assert torch.equal(slots.ssm_SHNP, serial.ssm_SHNP)
        if cycle % 3 == 2:
            plain = [step(slots_native, tensors, tensors[0], each, slot_B) for each in (slots, serial)]
            assert torch.equal(*plain)
    fold_native(slots, slot_B)
    assert torch.equal(slots.ssm_SHNP, serial.ssm_SHNP) and slots.ssm_SHNP[slot_B].any()
    assert torch.equal(slots.tail_SRC[:, : slots.taps - 1], serial.tail_SRC) and not slots.pending_S.any()


def states(slots):
    """What is read again: kept tokens that nobody waits for, and their inputs of the convolution, may be whatever."""
    yield from (slots.ssm_SHNP, slots.tail_SRC[:, : slots.taps - 1], slots.pending_S)
    for slot, count in enumerate(slots.pending_S.abs().tolist()):
        yield from (slots.kept_SMK[slot, :count], slots.tail_SRC[slot, : slots.taps - 1 + count])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 99))
def test_rows_of_any_lengths_leave_the_bits_that_they_leave_alone(level, data, dtype, seed):
    """Plain calls and tentative ones, rows without tokens among them, verdicts, and folds in between."""
    (_, _, *sizes), window = data.draw(st.sampled_from(WINDOWS))
    rows, draw = data.draw(st.integers(1, 8)), torch.Generator().manual_seed(seed)
    slot_B = torch.randperm(9, generator=draw)[:rows].int()
    tensors = list(inputs((1, 1, *sizes)).values())[:-2]
    shared, alone = (slots_for((1, 1, *sizes), count=9, window=window, dtype=dtype) for _ in range(2))
    where = {"groups": shared.groups, "eps": EPS}
    for cycle in range(5):
        tentative = data.draw(st.booleans())
        count_B = torch.randint(0, (window if tentative else CHUNK + 9) + 1, (rows,), generator=draw)
        count_B[cycle % rows] = max(1, count_B[cycle % rows])
        begin = torch.cat([torch.zeros(1), count_B.cumsum(0)]).int()
        input_1NE = torch.randn(1, int(begin[-1]), tensors[0].shape[-1], generator=draw).to(dtype)
        here = {**where, "slot_B": slot_B, "begin": begin, "tentative": tentative}
        out_1NI = mamba_in_slots(input_1NE, *tensors[1:], **here, slots=shared)
        for row, (first, end) in enumerate(itertools.pairwise(begin.tolist())):
            one = {**here, "slot_B": slot_B[row : row + 1], "begin": torch.tensor([0, end - first]).int()}
            assert torch.equal(
                slots_native(input_1NE[:, first:end], *tensors[1:], **one, slots=alone)[0], out_1NI[0, first:end]
            )
        assert torch.equal(shared.pending_S[slot_B], -count_B.int() * tentative)
        assert all(torch.equal(*pair) for pair in zip(states(shared), states(alone), strict=True))
        for slots in (shared, alone):
            slots.pending_S[slot_B] = (3 * cycle + slot_B) % (1 - slots.pending_S[slot_B])  # from none to all
        if cycle % 2:
            fold_native(shared, slot_B), [fold_native(alone, slot_B[row : row + 1]) for row in range(rows)]
            assert all(torch.equal(*pair) for pair in zip(states(shared), states(alone), strict=True))


@pytest.mark.parametrize("tentative", [False, True])
def test_native_and_torch_agree_on_rows_of_any_lengths(level, tentative):
    size, named = (1, 22, 4, 12, 2, 6, 4), {"groups": 2, "eps": EPS, "tentative": tentative}
    begin, slot_B = torch.tensor([0, 9, 13, 17, 22]).int(), torch.tensor([4, 0, 2, 5]).int()
    tensors = list(inputs(size).values())[:-2]
    both = [slots_for(size, window=9) for _ in range(2)]
    for cycle in range(4):
        got = slots_native(*tensors, slots=both[0], slot_B=slot_B, begin=begin, **named)
        want = mamba_taken_out(*tensors, slots=both[1], slot_B=slot_B, begin=begin, **named)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(both[0].ssm_SHNP, both[1].ssm_SHNP, rtol=1e-4, atol=1e-5)
        assert torch.equal(both[0].pending_S, both[1].pending_S)
        for slots in both:
            slots.pending_S[slot_B] = -slots.pending_S[slot_B] // (cycle + 1)


def test_rows_that_do_not_share_out_the_tokens_are_errors(built):
    size, slot_B = (1, 5, 4, 8, 2, 6, 4), torch.tensor([1, 3]).int()
    tensors, slots = list(inputs(size).values())[:-2], slots_for(size, window=3)
    before = [tensor.clone() for tensor in vars(slots).values()]
    run = lambda mixer, *begin, **named: mixer(
        *tensors, slots=slots, slot_B=slot_B, begin=torch.tensor(begin).int(), groups=2, eps=EPS, **named
    )
    for begin in ((1, 3, 5), (0, 3, 4), (0, 3, 6), (0, 6, 5), (0, -1, 5)):
        with pytest.raises(IndexError):
            run(slots_native, *begin)
        with pytest.raises(ValueError, match="let it rise from 0 to their number"):
            run(mamba_in_slots, *begin)
    with pytest.raises(ValueError, match="more tokens of a row than slots can keep"):  # as a replay says it
        run(slots_native, 0, 1, 5, tentative=True)
    with pytest.raises(ValueError, match="4 tokens was made on slots that can keep 3"):
        run(mamba_in_slots, 0, 1, 5, tentative=True)
    assert all(torch.equal(*pair) for pair in zip(before, vars(slots).values(), strict=True))
    run(slots_native, 0, 2, 5, tentative=True)
    assert slots.pending_S.tolist() == [0, -2, 0, -3, 0, 0]


def test_tokens_without_a_verdict_hold_up_the_next_call(built):
    size = (2, 3, 4, 8, 2, 6, 4)
    tensors, slots, slot_B = list(inputs(size).values())[:-2], slots_for(size, window=3), torch.tensor([1, 3]).int()
    for mixer in (slots_native, mamba_taken_out):
        step(mixer, tensors, tensors[0], slots, slot_B, tentative=True)
        for tentative in (True, False):
            with pytest.raises(RuntimeError, match="how many of them stay"):
                step(mixer, tensors, tensors[0], slots, slot_B, tentative=tentative)
        slots.pending_S[1] = 0
        with pytest.raises(RuntimeError, match="how many of them stay"):
            fold_native(slots, slot_B)
        slots.clear(3)
        fold_native(slots, slot_B)
    slots.pending_S[3] = 4  # more than it can keep
    with pytest.raises(IndexError):
        fold_native(slots, slot_B)


def test_slots_that_do_not_fit_together_cannot_be_made():
    size = (2, 3, 4, 8, 2, 6, 4)
    whole = vars(slots_for(size, window=3))
    for name, tensor in whole.items():
        for strange in (tensor[:-1], tensor.repeat_interleave(2, -1)[..., ::2]):
            with pytest.raises(ValueError, match="contiguous"):
                MambaSlots(**whole | {name: strange})
    for name in ("kept_SMK", "pending_S"):
        with pytest.raises(ValueError, match="contiguous"):
            MambaSlots(**whole | {name: None})
    with pytest.raises(ValueError, match="keep 65 tokens"):
        slots_for(size, window=CHUNK + 1)


def test_slots_that_do_not_fit_are_refused(built):
    size = (1, 6, 4, 8, 2, 6, 4)
    tensors, slots, slot_B = list(inputs(size).values())[:-2], slots_for(size, window=2), torch.zeros(2).int()
    named = {"slots": slots, "slot_B": slot_B, "begin": torch.tensor([0, 2, 6]).int(), "groups": 2, "eps": EPS}
    refuses = lambda **changed: slots_refuse(*tensors, **named | changed)
    assert refuses() is None
    for strange in (6, -1):
        with pytest.raises(IndexError):
            slots_native(*tensors, **named | {"slot_B": torch.tensor([0, strange], dtype=torch.int32)})
    for strange in (named["begin"][1:], named["begin"].long(), named["begin"].repeat_interleave(2)[::2]):
        assert "not contiguous int32" in refuses(begin=strange)
    assert "for 3" in refuses(slot_B=torch.zeros(3, dtype=torch.int32))
    assert "int64" in refuses(slot_B=torch.zeros(2, dtype=torch.int64))
    assert "tails" in refuses(slots=slots_for(size, dtype=torch.bfloat16))
    assert "fit together" in refuses(slots=slots_for((1, 6, 4, 9, 2, 6, 4)))
    assert "fit together" in refuses(slots=slots_for((1, 6, 4, 8, 2, 6, 3)))
    kept = vars(slots_for(size, window=2))
    assert "int64" in refuses(slots=MambaSlots(**kept | {"pending_S": kept["pending_S"].long()}))
    wide = {name: tensor.double() for name, tensor in vars(slots_for(size)).items() if tensor is not None}
    assert "float64" in refuses(slots=MambaSlots(**wide | {"tail_SRC": wide["tail_SRC"].float()}))


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
