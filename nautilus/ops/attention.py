"""Causal grouped attention and rotary positions. Letters: B batch, T new tokens, S all positions, H heads, G groups
(heads that share keys and values), P head width.

    out_t = sum_s softmax_s(q_t . k_s / sqrt(P)) v_s     over first_t <= s <= t, and s > t - window when window > 0

Positions count from the first cached key; new token t stands at position S - T + t.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nautilus.ops.dispatch import Impl, choose
from nautilus.ops.shapes import checked
from nautilus.ops.ssd import wide


@checked
def attention(
    q_BTHP: Tensor, k_BSGP: Tensor, v_BSGP: Tensor, *, first_BT: Tensor | None = None, window: int = 0
) -> Tensor:
    """out_BTHP. first_BT is the position at which each new token's document begins (None: everything is visible)."""
    function = choose("attention", ATTENTION_IMPLS, q_BTHP)
    return function(q_BTHP, k_BSGP, v_BSGP, first_BT=first_BT, window=window)


def visible_BTS(time: int, positions: int, first_BT: Tensor | None, window: int, device) -> Tensor:
    """Which earlier positions each new token may see; batch size 1 when all rows agree."""
    key_S = torch.arange(positions, device=device)
    query_T1 = key_S[positions - time :, None]
    visible = (key_S <= query_T1)[None]
    if window:
        visible = visible & (key_S > query_T1 - window)
    return visible if first_BT is None else visible & (key_S >= first_BT[..., None])


def attention_reference(q_BTHP, k_BSGP, v_BSGP, *, first_BT=None, window=0) -> Tensor:
    """The formula, softmax in float32."""
    dtype, share = wide(q_BTHP.dtype), q_BTHP.shape[2] // k_BSGP.shape[2]
    k, v = (t.to(dtype).repeat_interleave(share, dim=2) for t in (k_BSGP, v_BSGP))
    score_BHTS = torch.einsum("bthp,bshp->bhts", q_BTHP.to(dtype), k) / math.sqrt(q_BTHP.shape[-1])
    visible = visible_BTS(q_BTHP.shape[1], k.shape[1], first_BT, window, k.device)
    weight_BHTS = score_BHTS.masked_fill(~visible[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bhts,bshp->bthp", weight_BHTS, v).to(q_BTHP.dtype)


def attention_sdpa(q_BTHP, k_BSGP, v_BSGP, *, first_BT=None, window=0) -> Tensor:
    """PyTorch's fused attention; a mask is built only where causality alone does not say everything."""
    time, positions = q_BTHP.shape[1], k_BSGP.shape[1]
    plain = first_BT is None and window == 0 and time in (1, positions)
    mask = None if plain else visible_BTS(time, positions, first_BT, window, q_BTHP.device)[:, None]
    out = torch.nn.functional.scaled_dot_product_attention(
        q_BTHP.transpose(1, 2),
        k_BSGP.transpose(1, 2),
        v_BSGP.transpose(1, 2),
        attn_mask=mask,
        is_causal=plain and time > 1,
        enable_gqa=q_BTHP.shape[2] != k_BSGP.shape[2],
    )
    return out.transpose(1, 2)


def rotary_frequencies(head_width: int, theta: float, factor: float, low: float, high: float, original: int) -> Tensor:
    """Radians per position for each pair of channels, rescaled as Llama 3 does when factor > 1. Shape (P/2,), float64.

    With wavelength l = 2 pi / f: f if l < original/high, f/factor if l > original/low, a blend linear in original/l
    between (arXiv 2407.21783).
    """
    plain = theta ** (-torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    if factor == 1:
        return plain
    turns = original * plain / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * (blend + (1 - blend) / factor)


def rotate(x_BTHP: Tensor, position_BT: Tensor, frequency: Tensor) -> Tensor:
    """Each pair (x_i, x_{i+P/2}) turned by position times frequency_i, in float32."""
    dtype = wide(x_BTHP.dtype)
    angle = (position_BT[..., None].double() * frequency.to(position_BT.device))[:, :, None]
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    left, right = x_BTHP.to(dtype).chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(x_BTHP.dtype)


ATTENTION_IMPLS = (Impl("torch", attention_sdpa), Impl("reference", attention_reference))
