"""The Mamba-2 mixer between its two projections. Letters: B batch, T time, H heads, P head width, I inner width (H P),
G groups, N state width, C channels of the convolution (I + 2 G N), W its taps, R = W - 1, E input width (I + C + H).

    z, xBC, dt = input;   x, b, c = conv(xBC);   y = scan(x, softplus(dt + dt_bias), a, b, c) + skip x
    out = group_norm(y silu(z)) norm
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from nautilus.ops.conv import causal_conv, last_inputs
from nautilus.ops.cpu.mamba import mamba_native, mamba_refuses, slots_native, slots_refuse
from nautilus.ops.dispatch import Impl, choose
from nautilus.ops.norm import gated_group_norm
from nautilus.ops.shapes import checked
from nautilus.ops.ssd import ssd, wide


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


def mamba_in_slots(*tensors: Tensor, groups: int, eps: float) -> Tensor:
    """out_BTI of `mamba` for rows whose tails and states lie in slots of two pools and are replaced there.

    The tensors are the first seven of `mamba`, then tail_SRC, state_SHNP (a state lies as (N, P)) and slot_B, int32:
    each row has a slot of its own.
    """
    return choose("mamba_in_slots", SLOTS_IMPLS, *tensors, groups=groups, eps=eps)(*tensors, groups=groups, eps=eps)


def mamba_taken_out(*tensors: Tensor, groups: int, eps: float) -> Tensor:
    *of_mamba, tail_SRC, state_SHNP, slot_B = tensors
    before = {"tail_BRC": tail_SRC[slot_B], "state_BHPN": state_SHNP[slot_B].mT}
    out, tail, state = mamba(*of_mamba, groups=groups, eps=eps, **before)
    tail_SRC[slot_B], state_SHNP[slot_B] = tail.to(tail_SRC.dtype), state.mT.to(state_SHNP.dtype)
    return out


def mamba_composed(
    input_BTE, weight_CW, bias_C, dt_bias_H, a_H, skip_H, norm_I, *, groups, eps, tail_BRC=None, state_BHPN=None,
    reach_BT=None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One op after another, each in whichever form is chosen for it."""
    inner, heads, dtype = norm_I.shape[0], a_H.shape[0], wide(input_BTE.dtype)
    z, xbc, dt = input_BTE.split([inner, bias_C.shape[0], heads], dim=-1)
    tail = last_inputs(xbc, tail_BRC, weight_CW.shape[1])
    xbc, _ = causal_conv(xbc, weight_CW, bias_C, tail_BRC=tail_BRC, reach_BT=reach_BT)
    x, b, c = xbc.split([inner, *[(bias_C.shape[0] - inner) // 2] * 2], dim=-1)
    x_BTHP = x.unflatten(-1, (heads, -1))
    y_BTHP, last = ssd(
        x_BTHP, softplus(dt.to(dtype) + dt_bias_H.to(dtype)), a_H,
        b.unflatten(-1, (groups, -1)), c.unflatten(-1, (groups, -1)),
        state_BHPN=state_BHPN, start_BT=None if reach_BT is None else reach_BT == 0,
    )  # fmt: skip
    y = torch.addcmul(y_BTHP, x_BTHP, skip_H.to(x.dtype)[:, None]).flatten(-2)
    return gated_group_norm(y, z, norm_I, groups, eps), tail, last


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
