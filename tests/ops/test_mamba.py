"""The whole mixer, composed of ops: fast forms against references, and any cut of the tokens."""

import itertools
from functools import partial

import pytest
import torch

from nautilus.ops.mamba import fold_in_slots, mamba, mamba_composed, mamba_in_slots, new_slots

SIZE = {"groups": 2, "eps": 1e-5}


def inputs(time, seed=0):
    rows, heads, width, groups, state, taps = 2, 4, 3, 2, 5, 4
    inner, channels = heads * width, heads * width + 2 * groups * state
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)
    return {
        "input_BTE": normal(rows, time, inner + channels + heads),
        "weight_CW": normal(channels, taps),
        "bias_C": normal(channels),
        "dt_bias_H": normal(heads) - 1,
        "a_H": -torch.exp(normal(heads)),
        "skip_H": normal(heads),
        "norm_I": normal(inner),
        "tail_BRC": normal(rows, taps - 1, channels),
        "state_BHPN": normal(rows, heads, width, state),
    }


@pytest.mark.parametrize("time", [1, 9, 70])
def test_the_composed_mixer_equals_the_one_composed_of_references(time, monkeypatch, pushed, close):
    position = torch.arange(time)
    reach_BT = torch.where(position < 4, position + 2, position - 4).expand(2, -1)
    t, function = inputs(time), partial(mamba, **SIZE, reach_BT=reach_BT)
    got, got_grads = pushed(function, t)
    monkeypatch.setenv("NAUTILUS_OPS", "reference")
    want, want_grads = pushed(function, t)
    assert len(got) == 3
    for index, (g, w) in enumerate(zip(got, want, strict=True)):
        close(f"output {index}", g, w, 1e-12)
    for name in t:
        close(f"d{name}", got_grads[name], want_grads[name], 1e-10)


def test_the_skip_the_gate_and_the_norm_stand_where_the_paper_has_them():
    """One token without memory, by hand: the scan gives dt (b . c) x."""
    t = inputs(1) | {"tail_BRC": None, "state_BHPN": None}
    out, tail, state = mamba(**t, **SIZE)
    z, x, b, c, dt = t["input_BTE"][:, 0].split([12, 12, 10, 10, 4], dim=-1)
    assert torch.equal(tail[:, -1], torch.cat([x, b, c], -1)) and not tail[:, :-1].any()
    mixed = torch.cat([x, b, c], -1) * t["weight_CW"][:, -1] + t["bias_C"]
    x, b, c = (mixed * mixed.sigmoid()).split([12, 10, 10], dim=-1)
    dt = (dt + t["dt_bias_H"]).exp().log1p()
    inner = (b * c).view(2, 2, 5).sum(-1).repeat_interleave(2, -1)
    y = x.view(2, 4, 3) * (dt * inner + t["skip_H"])[..., None]
    v = (y.flatten(1) * z * z.sigmoid()).view(2, 2, 6)
    want = (v / (v.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(1) * t["norm_I"]
    torch.testing.assert_close(out[:, 0], want)
    want_state = torch.einsum("bh,bhp,bhn->bhpn", dt, x.view(2, 4, 3), b.view(2, 2, 5).repeat_interleave(2, 1))
    torch.testing.assert_close(state, want_state)


def test_native_takes_float32_and_float64_goes_to_torch():
    t = {n: v.float() for n, v in inputs(5).items()}
    assert torch.equal(mamba(**inputs(5), **SIZE)[0], mamba_composed(**inputs(5), **SIZE)[0])
    torch.testing.assert_close(mamba(**t, **SIZE)[0], mamba_composed(**t, **SIZE)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_reference_keeps_tentative_tokens_and_folds_those_that_stay(dtype, monkeypatch):
    """Bit for bit what reading them one by one leaves, whatever stays of each call and row."""
    monkeypatch.setenv("NAUTILUS_OPS", "reference")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    slots, serial = (
        new_slots(3, heads=4, head_width=3, groups=2, state=5, taps=4, window=window, dtype=dtype, wide=wide)
        for window in (5, 0)
    )
    slot_B, named = torch.tensor([2, 0], dtype=torch.int32), {**SIZE, "slots": slots}
    for cycle in range(9):
        input_BTE, *parameters = list(inputs(5, cycle).values())[:1] + list(inputs(5).values())[1:-2]
        input_BTE, parameters = input_BTE.to(dtype), [p.to(wide) for p in parameters]
        begin, all_1NE = torch.tensor([0, 5, 10]).int(), input_BTE.flatten(0, 1)[None]
        out_1NI = mamba_in_slots(all_1NE, *parameters, **named, slot_B=slot_B, begin=begin, tentative=True)
        slots.pending_S[slot_B] = torch.tensor([cycle % 6, (cycle + 3) % 6], dtype=torch.int32)
        for row, slot in enumerate(slot_B):
            for t in range(int(slots.pending_S[slot])):
                one = {**SIZE, "slots": serial, "slot_B": slot[None], "begin": torch.tensor([0, 1]).int()}
                out = mamba_in_slots(input_BTE[row : row + 1, t : t + 1], *parameters, **one)
                assert torch.equal(out[0, 0], out_1NI[0, 5 * row + t])
    fold_in_slots(slots, slot_B)
    assert torch.equal(slots.ssm_SHNP, serial.ssm_SHNP) and torch.equal(slots.tail_SRC[:, :3], serial.tail_SRC)
    assert serial.ssm_SHNP[slot_B].any() and not slots.pending_S.any()


def test_more_tentative_tokens_than_slots_can_keep_are_an_error():
    sizes = {"heads": 4, "head_width": 3, "groups": 2, "state": 5, "taps": 4}
    slots = new_slots(2, **sizes, window=4, dtype=torch.float32, wide=torch.float32)
    tensors = [t[:1].float() if n == "input_BTE" else t.float() for n, t in inputs(7).items()][:-2]
    where = {"slots": slots, "slot_B": torch.tensor([0, 1]).int(), "begin": torch.tensor([0, 2, 7]).int()}
    with pytest.raises(ValueError, match="5 tokens was made on slots that can keep 4"):
        mamba_in_slots(*tensors, **SIZE, **where, tentative=True)


@pytest.mark.parametrize("force", ["reference", "torch"])
def test_rows_of_any_lengths_are_rows_alone(force, monkeypatch):
    """Plain calls, to the rounding of float64."""
    monkeypatch.setenv("NAUTILUS_OPS", force)
    sizes = {"heads": 4, "head_width": 3, "groups": 2, "state": 5, "taps": 4}
    shared, alone = (new_slots(5, **sizes, dtype=torch.float64, wide=torch.float64) for _ in range(2))
    slot_B = torch.tensor([3, 0, 4, 1]).int()
    for begin in ([0, 2, 4, 5, 9], [0, 0, 1, 1, 9], [0, 2, 4, 6, 8]):
        tensors = [t[:1] if n == "input_BTE" else t for n, t in inputs(begin[-1]).items()][:-2]
        out_1NI = mamba_in_slots(*tensors, **SIZE, slots=shared, slot_B=slot_B, begin=torch.tensor(begin).int())
        for row, (first, end) in enumerate(itertools.pairwise(begin)):
            if first < end:
                one = {"slots": alone, "slot_B": slot_B[row : row + 1], "begin": torch.tensor([0, end - first]).int()}
                out = mamba_in_slots(tensors[0][:, first:end], *tensors[1:], **SIZE, **one)
                torch.testing.assert_close(out_1NI[:, first:end], out)
        torch.testing.assert_close(shared.ssm_SHNP, alone.ssm_SHNP)
        assert torch.equal(shared.tail_SRC, alone.tail_SRC) and shared.ssm_SHNP[slot_B].any()
