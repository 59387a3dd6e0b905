"""The Mamba-2 mixer between its two projections. Letters: B batch, T time, H heads, P head width, I inner width (H P),
G groups, N state width, C channels of the convolution (I + 2 G N), W its taps, R = W - 1, E input width (I + C + H).

    z, xBC, dt = input;   x, b, c = conv(xBC);   y = scan(x, softplus(dt + dt_bias), a, b, c) + skip x
    out = group_norm(y silu(z)) norm
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn.functional import softplus

from nautilus.ops.conv import causal_conv, last_inputs
from nautilus.ops.cpu.library import UNDECIDED
from nautilus.ops.cpu.mamba import (
    MambaSlots,
    fold_native,
    fold_refuses,
    mamba_native,
    mamba_refuses,
    new_slots,
    slots_native,
    slots_refuse,
)
from nautilus.ops.dispatch import Impl, choose
from nautilus.ops.norm import gated_group_norm
from nautilus.ops.shapes import checked
from nautilus.ops.ssd import ssd, wide

__all__ = ["MambaSlots", "fold_in_slots", "mamba", "mamba_in_slots", "new_slots"]


@checked
def mamba(
    input_BTE: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor,
    dt_bias_H: Tensor,
    a_H: Tensor,
    skip_H: Tensor,
    norm_I: Tensor,
    *,
    groups: int,
    eps: float,
    tail_BRC: Tensor | None = None,
    state_BHPN: Tensor | None = None,
    reach_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out_BTI in the input's dtype, the W-1 last inputs of the convolution, and the state after the last token (wide).

    reach_BT says how many earlier tokens belong to each token's document (None: all, tail and state included); where it
    is 0 the document begins.
    """
    tensors = input_BTE, weight_CW, bias_C, dt_bias_H, a_H, skip_H, norm_I
    named = {"groups": groups, "eps": eps, "tail_BRC": tail_BRC, "state_BHPN": state_BHPN, "reach_BT": reach_BT}
    return choose("mamba", MAMBA_IMPLS, *tensors, **named)(*tensors, **named)


def mamba_in_slots(
    *tensors: Tensor, slots: MambaSlots, slot_B: Tensor, begin: Tensor, groups: int, eps: float, tentative: bool = False
) -> Tensor:
    """out_1NI of `mamba` for rows whose tails and states lie in slots and are replaced there.

    The tensors are the first seven of `mamba`, of the input all rows' tokens after one another: those of row b are
    begin[b] .. begin[b + 1] - 1, however many. begin and slot_B are int32; each row has a slot of its own. What an
    earlier call left to fold is folded first. A tentative call then leaves tails and states as they are, and keeps what
    is needed to go on from after any of its tokens; MambaSlots says how. ValueError where slots have no room for that,
    or rows do not share out the tokens; RuntimeError where tokens of an earlier call wait for a verdict.
    """
    ends, tokens = begin.tolist(), tensors[0].shape[1]
    if ends[0] != 0 or ends[-1] != tokens or ends != sorted(ends):
        raise ValueError(f"rows begin at {ends} in {tokens} tokens; let it rise from 0 to their number")
    most = max(end - first for first, end in itertools.pairwise(ends))
    if tentative and most > slots.window:
        raise ValueError(
            f"a tentative call of {most} tokens was made on slots that can keep {slots.window}; draft fewer, or make "
            "slots with a larger window"
        )
    named = {"slots": slots, "slot_B": slot_B, "begin": begin, "groups": groups, "eps": eps, "tentative": tentative}
    return choose("mamba_in_slots", SLOTS_IMPLS, *tensors, **named)(*tensors, **named)


def fold_in_slots(slots: MambaSlots, slot_B: Tensor) -> None:
    """The kept tokens that stay go into tails and states, which are then those after the last token that stays."""
    choose("fold_in_slots", FOLD_IMPLS, slots, slot_B)(slots, slot_B)


def mamba_taken_out(
    input_1NE: Tensor, *parameters: Tensor, slots: MambaSlots, slot_B: Tensor, begin: Tensor, groups: int, eps: float,
    tentative: bool = False,
) -> Tensor:  # fmt: skip
    """Taken out of the slots, and put back: neighbours with as many tokens together, tentative tokens one by one."""
    fold_taken_out(slots, slot_B)
    run, ends, out = one_by_one if tentative else together, begin.tolist(), []
    for count, same in itertools.groupby(range(len(slot_B)), lambda row: ends[row + 1] - ends[row]):
        rows = [*same]
        if count:
            input_BTE = input_1NE[0, ends[rows[0]] : ends[rows[-1] + 1]].unflatten(0, (-1, count))
            out_BTI = run(input_BTE, *parameters, slots=slots, slot_B=slot_B[rows], groups=groups, eps=eps)
            out.append(out_BTI.flatten(0, 1))
    return torch.cat(out)[None]


def together(*tensors: Tensor, slots: MambaSlots, slot_B: Tensor, groups: int, eps: float) -> Tensor:
    old, tail_SRC, state_SHNP = slots.taps - 1, slots.tail_SRC, slots.ssm_SHNP
    before = {"tail_BRC": tail_SRC[slot_B, :old], "state_BHPN": state_SHNP[slot_B].mT}
    out, tail, state = mamba(*tensors, groups=groups, eps=eps, **before)
    tail_SRC[slot_B, :old], state_SHNP[slot_B] = tail.to(tail_SRC.dtype), state.mT.to(state_SHNP.dtype)
    return out


def one_by_one(
    input_BTE: Tensor, *parameters: Tensor, slots: MambaSlots, slot_B: Tensor, groups: int, eps: float
) -> Tensor:
    """Row after row. The slots keep of each token what a fold needs."""
    assert slots.kept_SMK is not None and slots.pending_S is not None
    out, old = [], slots.taps - 1
    for row_TE, slot in zip(input_BTE, slot_B.tolist(), strict=True):
        tail_1RC, state_1HPN = slots.tail_SRC[slot, None, :old], slots.ssm_SHNP[slot, None].mT
        for t, token_E in enumerate(row_TE):
            token_11E = token_E[None, None]
            slots.kept_SMK[slot, t] = kept_numbers(token_11E, *parameters, groups=groups, tail_BRC=tail_1RC)
            y, tail_1RC, state_1HPN = mamba_composed(
                token_11E, *parameters, groups=groups, eps=eps, tail_BRC=tail_1RC, state_BHPN=state_1HPN
            )
            slots.tail_SRC[slot, old + t] = tail_1RC[0, -1]
            out.append(y[0, 0])
        slots.pending_S[slot] = -len(row_TE)
    return torch.stack(out).unflatten(0, input_BTE.shape[:2])


def kept_numbers(token_11E, weight_CW, bias_C, dt_bias_H, a_H, skip_H, norm_I, *, groups: int, tail_BRC) -> Tensor:
    """dt x, b and exp(dt a) of one token, one after the other."""
    x_BTHP, dt_BTH, b_BTGN, _ = scan_inputs(token_11E, weight_CW, bias_C, dt_bias_H, norm_I, groups, tail_BRC, None)
    return torch.cat([(dt_BTH[..., None] * x_BTHP).flatten(), b_BTGN.flatten(), torch.exp(dt_BTH * a_H).flatten()])


def fold_taken_out(slots: MambaSlots, slot_B: Tensor) -> None:
    if slots.kept_SMK is None or slots.pending_S is None:
        return
    _, heads, _, head_width = slots.ssm_SHNP.shape
    old, groups = slots.taps - 1, slots.groups
    for slot in slot_B.tolist():
        count = int(slots.pending_S[slot])
        if count < 0:
            raise RuntimeError(f"fold_in_slots: {UNDECIDED}")
        for kept_K in slots.kept_SMK[slot, :count]:
            u_I, b_GN, keep_H = kept_K.tensor_split([heads * head_width, len(kept_K) - heads])
            b_HN = b_GN.view(groups, -1).repeat_interleave(heads // groups, 0)
            write_HNP = b_HN[..., None] * u_I.view(heads, 1, head_width)
            slots.ssm_SHNP[slot] = keep_H[:, None, None] * slots.ssm_SHNP[slot] + write_HNP
        slots.tail_SRC[slot, :old] = slots.tail_SRC[slot, count : count + old].clone()
        slots.pending_S[slot] = 0


def mamba_composed(
    input_BTE, weight_CW, bias_C, dt_bias_H, a_H, skip_H, norm_I, *, groups, eps, tail_BRC=None, state_BHPN=None,
    reach_BT=None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One op after another, each in whichever form is chosen for it."""
    inner, channels = norm_I.shape[0], bias_C.shape[0]
    tail = last_inputs(input_BTE[..., inner : inner + channels], tail_BRC, weight_CW.shape[1])
    x_BTHP, dt_BTH, b_BTGN, c_BTGN = scan_inputs(
        input_BTE, weight_CW, bias_C, dt_bias_H, norm_I, groups, tail_BRC, reach_BT
    )
    start_BT = None if reach_BT is None else reach_BT == 0
    y_BTHP, last = ssd(x_BTHP, dt_BTH, a_H, b_BTGN, c_BTGN, state_BHPN=state_BHPN, start_BT=start_BT)
    y = torch.addcmul(y_BTHP, x_BTHP, skip_H.to(x_BTHP.dtype)[:, None]).flatten(-2)
    return gated_group_norm(y, input_BTE[..., :inner], norm_I, groups, eps), tail, last


def scan_inputs(input_BTE, weight_CW, bias_C, dt_bias_H, norm_I, groups, tail_BRC, reach_BT) -> tuple[Tensor, ...]:
    """x_BTHP, dt_BTH, b_BTGN and c_BTGN."""
    inner, heads, dtype = norm_I.shape[0], dt_bias_H.shape[0], wide(input_BTE.dtype)
    _, xbc, dt = input_BTE.split([inner, bias_C.shape[0], heads], dim=-1)
    xbc, _ = causal_conv(xbc, weight_CW, bias_C, tail_BRC=tail_BRC, reach_BT=reach_BT)
    x, b, c = xbc.split([inner, *[(bias_C.shape[0] - inner) // 2] * 2], dim=-1)
    dt_BTH = softplus(dt.to(dtype) + dt_bias_H.to(dtype))
    return x.unflatten(-1, (heads, -1)), dt_BTH, b.unflatten(-1, (groups, -1)), c.unflatten(-1, (groups, -1))


MAMBA_IMPLS = (
    Impl("native", mamba_native, mamba_refuses),
    Impl("torch", mamba_composed),
    Impl("reference", mamba_composed),
)
SLOTS_IMPLS = (
    Impl("native", slots_native, slots_refuse),
    Impl("torch", mamba_taken_out),
    Impl("reference", mamba_taken_out),
)
FOLD_IMPLS = (
    Impl("native", fold_native, fold_refuses),
    Impl("torch", fold_taken_out),
    Impl("reference", fold_taken_out),
)
