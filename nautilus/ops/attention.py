"""Causal grouped attention and rotary positions. Letters: B batch, T new tokens, S all positions, H heads, G groups
(heads that share keys and values), P head width.

    out_t = sum_s softmax_s(q_t . k_s / sqrt(P)) v_s     over first_t <= s <= t, and s > t - window when window > 0

Positions count from the first cached key; new token t stands at position S - T + t.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nautilus.ops.cpu.attention import attention_native, attention_refuses
from nautilus.ops.cpu.attention_backward import Native
from nautilus.ops.cpu.rotary import rotate_native, rotate_refuses
from nautilus.ops.dispatch import Impl, choose
from nautilus.ops.shapes import checked
from nautilus.ops.ssd import wide


@checked
def attention(
    q_BTHP: Tensor, k_BSGP: Tensor, v_BSGP: Tensor, *, first_BT: Tensor | None = None, window: int = 0
) -> Tensor:
    """out_BTHP. first_BT is the position at which each new token's document begins (None: everything is visible)."""
    function = choose("attention", ATTENTION_IMPLS, q_BTHP, k_BSGP, v_BSGP, first_BT=first_BT, window=window)
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


def wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def attention_through_pages(q_BTHP, k_BSGP, v_BSGP, *, first_BT=None, window=0) -> Tensor:
    """The native forward, the same whether or not a gradient is asked for."""
    if wants_gradient(q_BTHP, k_BSGP, v_BSGP):
        return Native.apply(q_BTHP, k_BSGP, v_BSGP, first_BT, window)  # type: ignore[return-value]
    return attention_native(q_BTHP, k_BSGP, v_BSGP, first_BT=first_BT, window=window)


def training_refuses(q_BTHP, k_BSGP, v_BSGP, *, first_BT=None, window=0) -> str | None:
    if q_BTHP.device.type != "cpu":
        return "it is made for the CPU"
    if not wants_gradient(q_BTHP, k_BSGP, v_BSGP):
        return "no gradient is asked for, and only with its backward it is the faster one"
    return None


def attention_training(q_BTHP, k_BSGP, v_BSGP, *, first_BT=None, window=0) -> Tensor:
    """For training on the CPU without native kernels."""
    return Training.apply(q_BTHP, k_BSGP, v_BSGP, first_BT, window)


def attention_blocks(q_BTHP, k_BSGP, v_BSGP, *, first_BT=None, window=0) -> Tensor:
    """A block of queries of all rows at a time, against the keys the block can reach."""
    out_BTHP, (k, v) = torch.empty_like(q_BTHP), (by_group(t) for t in (k_BSGP, v_BSGP))
    for queries, keys in blocks(q_BTHP, k.shape[1], first_BT, window):
        q = by_group(q_BTHP[:, queries], k_BSGP.shape[2])
        weight = weights(q, k[:, keys], queries, keys, first_BT, window)
        put(out_BTHP[:, queries], torch.bmm(weight.to(v.dtype), v[:, keys]))
    return out_BTHP


class Training(torch.autograd.Function):
    """The forward and backward in blocks; the backward rebuilds the probabilities block by block from the inputs.

    Z: queries times heads of a group.
    """

    SCORES = 1 << 22  # held at a time in float32: 16 MiB

    @staticmethod
    def forward(ctx, q_BTHP, k_BSGP, v_BSGP, first_BT, window):
        ctx.save_for_backward(q_BTHP, k_BSGP, v_BSGP, first_BT)
        ctx.window = window
        return attention_blocks(q_BTHP, k_BSGP, v_BSGP, first_BT=first_BT, window=window)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_BTHP):  # type: ignore[override]
        q_BTHP, k_BSGP, v_BSGP, first_BT = ctx.saved_tensors
        groups, scale, dq_BTHP = k_BSGP.shape[2], q_BTHP.shape[-1] ** -0.5, torch.empty_like(q_BTHP)
        k, v = (by_group(t) for t in (k_BSGP, v_BSGP))
        dk, dv = (torch.zeros_like(t, dtype=wide(t.dtype)) for t in (k, v))
        for queries, keys in blocks(q_BTHP, k.shape[1], first_BT, ctx.window):
            q, dout = (by_group(t[:, queries], groups) for t in (q_BTHP, dout_BTHP))
            weight = weights(q, k[:, keys], queries, keys, first_BT, ctx.window)
            dv[:, keys] += torch.bmm(weight.to(v.dtype).transpose(1, 2), dout)
            dweight = torch.bmm(dout, v[:, keys].transpose(1, 2)).to(weight.dtype)
            dscore = torch.ops.aten._softmax_backward_data(dweight, weight, -1, weight.dtype).to(q.dtype)
            put(dq_BTHP[:, queries], torch.bmm(dscore, k[:, keys] * scale))
            dk[:, keys] += torch.bmm(dscore.transpose(1, 2), q * scale)
        dk_BSGP, dv_BSGP = torch.empty_like(k_BSGP), torch.empty_like(v_BSGP)
        put(dk_BSGP, dk)
        put(dv_BSGP, dv)
        return dq_BTHP, dk_BSGP, dv_BSGP, None, None


def blocks(q_BTHP: Tensor, positions: int, first_BT: Tensor | None, window: int):
    """(queries, the keys in reach of one of them) from the first block to the last; the last ones end together."""
    batch, time, heads, _ = q_BTHP.shape
    step, before = max(16, min(128, Training.SCORES // (batch * heads * positions))), positions - time
    for begin in range(0, time, step):
        end = min(begin + step, time)
        low = max(0, before + begin - window + 1) if window else 0
        if first_BT is not None:
            low = max(low, int(first_BT[:, begin:end].min()))
        yield slice(begin, end), slice(low, before + end)


def by_group(tensor_BTHP: Tensor, groups: int = 0) -> Tensor:
    """(B*G, heads of a group times T, P), contiguous; groups=0: every head is a group."""
    split = tensor_BTHP.unflatten(2, (groups or tensor_BTHP.shape[2], -1))
    return split.permute(0, 2, 3, 1, 4).flatten(2, 3).flatten(0, 1)


def put(into_BTHP: Tensor, values: Tensor) -> None:
    """The inverse of `by_group`."""
    batch, time = into_BTHP.shape[:2]
    split = values.unflatten(0, (batch, -1)).unflatten(2, (-1, time))
    into_BTHP.unflatten(2, split.shape[1:3]).copy_(split.permute(0, 3, 1, 2, 4))


def weights(q: Tensor, k: Tensor, queries: slice, keys: slice, first_BT: Tensor | None, window: int) -> Tensor:
    """Softmax of the scores of one block, wide, (B*G, Z, S)."""
    dtype, time = wide(q.dtype), queries.stop - queries.start
    score = torch.bmm(q.to(dtype) * q.shape[-1] ** -0.5, k.to(dtype).transpose(1, 2))
    key_S = torch.arange(keys.start, keys.stop)
    query_T1 = key_S[-time:, None]
    by_head = score.unflatten(1, (-1, time))
    if first_BT is None and window == 0:
        # Only the last columns hold keys that some query of the block comes before.
        by_head[..., -time:].masked_fill_(key_S[-time:] > query_T1, float("-inf"))
        return score.softmax(-1)
    unseen = key_S > query_T1
    if window:
        unseen = unseen | (key_S <= query_T1 - window)
    if first_BT is None:
        by_head.masked_fill_(unseen, float("-inf"))
    else:
        unseen_BTS = unseen | (key_S < first_BT[:, queries, None])
        by_head.unflatten(0, (len(first_BT), -1)).masked_fill_(unseen_BTS[:, None, None], float("-inf"))
    return score.softmax(-1)


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
    """Each pair (x_i, x_{i+P/2}) turned by position times frequency_i, in float32. One row of positions serves all."""
    return choose("rotate", ROTATE_IMPLS, x_BTHP, position_BT, frequency)(x_BTHP, position_BT, frequency)


def rotate_reference(x_BTHP: Tensor, position_BT: Tensor, frequency: Tensor) -> Tensor:
    dtype = wide(x_BTHP.dtype)
    angle = (position_BT[..., None].double() * frequency.to(position_BT.device))[:, :, None]
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    left, right = x_BTHP.to(dtype).chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(x_BTHP.dtype)


ATTENTION_IMPLS = (
    Impl("native", attention_through_pages, attention_refuses),
    Impl("training", attention_training, training_refuses),
    Impl("torch", attention_sdpa),
    Impl("reference", attention_reference),
)
ROTATE_IMPLS = (
    Impl("native", rotate_native, rotate_refuses),
    Impl("torch", rotate_reference),
    Impl("reference", rotate_reference),
)
