"""Causal depthwise convolution with SiLU, as Mamba-2 uses it. Letters: B batch, T time, C channels, W taps.

    y[t, c] = silu(bias[c] + sum_r weight[c, W-1-r] x[t-r, c]),   r = 0..W-1

The last tap multiplies the current token. x before the first token is `tail` (zeros when there is none); taps that
would reach across the start of a document read zero. Sums are float32 (float64 for float64 input).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nautilus.ops.dispatch import Impl, choose
from nautilus.ops.shapes import checked
from nautilus.ops.ssd import wide
from nautilus.ops.tiles import tiles


@checked
def causal_conv(
    x_BTC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor,
    *,
    tail_BRC: Tensor | None = None,
    reach_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y_BTC in x's dtype, and the W-1 last inputs as the tail for the next call.

    reach_BT says how many earlier tokens belong to each token's document (None: all of them, the tail included).
    """
    function = choose("causal_conv", CONV_IMPLS, x_BTC)
    return function(x_BTC, weight_CW, bias_C, tail_BRC=tail_BRC, reach_BT=reach_BT)


def last_inputs(x_BTC: Tensor, tail_BRC: Tensor | None, taps: int) -> Tensor:
    """The taps - 1 last inputs, which the next call gets as its tail."""
    padded = with_tail(x_BTC[:, -taps + 1 :], tail_BRC, taps)
    return padded[:, padded.shape[1] - taps + 1 :].clone()


def with_tail(x_BTC: Tensor, tail_BRC: Tensor | None, taps: int) -> Tensor:
    if tail_BRC is None:
        tail_BRC = x_BTC.new_zeros(x_BTC.shape[0], taps - 1, x_BTC.shape[2])
    return torch.cat([tail_BRC.to(x_BTC.dtype), x_BTC], dim=1)


def causal_conv_reference(x_BTC, weight_CW, bias_C, *, tail_BRC=None, reach_BT=None) -> tuple[Tensor, Tensor]:
    """One tap after another, every reach checked."""
    time, taps, dtype = x_BTC.shape[1], weight_CW.shape[1], wide(x_BTC.dtype)
    padded = with_tail(x_BTC, tail_BRC, taps)
    total = bias_C.to(dtype).expand(x_BTC.shape)
    for back in range(taps):
        seen = padded[:, taps - 1 - back : taps - 1 - back + time].to(dtype)
        if reach_BT is not None:
            seen = torch.where((reach_BT >= back)[..., None], seen, torch.zeros_like(seen))
        total = total + seen * weight_CW[:, taps - 1 - back].to(dtype)
    return torch.nn.functional.silu(total).to(x_BTC.dtype), padded[:, time:]


def causal_conv_shifted(x_BTC, weight_CW, bias_C, *, tail_BRC=None, reach_BT=None) -> tuple[Tensor, Tensor]:
    """Shifted multiply-adds over the whole row; the few tokens near a document's start are done again on their own."""
    padded = with_tail(x_BTC, tail_BRC, weight_CW.shape[1])
    # A clone, or the tail would keep the whole padded input alive.
    return Shifted.apply(padded, weight_CW, bias_C, reach_BT), padded[:, x_BTC.shape[1] :].clone()


class Border:
    """The tokens whose window crosses the start of their document. Letters: R such tokens."""

    def __init__(self, reach_BT: Tensor, taps: int):
        self.tokens = (reach_BT < taps - 1).nonzero(as_tuple=True)
        back_W = torch.arange(taps - 1, -1, -1, device=reach_BT.device)
        self.visible_RW = reach_BT[self.tokens][:, None] >= back_W
        self.row_R1, self.column_RW = self.tokens[0][:, None], self.tokens[1][:, None] + back_W.flip(0)

    def window_RWC(self, padded: Tensor) -> Tensor:
        return padded[self.row_R1, self.column_RW].masked_fill_(~self.visible_RW[..., None], 0)

    def add_gradient(self, dpadded: Tensor, push_RC: Tensor, weight_CW: Tensor) -> None:
        spread_RWC = (push_RC[:, None] * weight_CW.T).masked_fill_(~self.visible_RW[..., None], 0)
        dpadded.index_put_((self.row_R1.expand_as(self.column_RW), self.column_RW), spread_RWC, accumulate=True)


class Shifted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, padded, weight_CW, bias_C, reach_BT):
        dtype, taps = wide(padded.dtype), weight_CW.shape[1]
        weight, bias = weight_CW.to(dtype), bias_C.to(dtype)
        time = padded.shape[1] - taps + 1
        total = torch.empty(len(padded), time, padded.shape[2], dtype=dtype, device=padded.device)
        y = torch.empty_like(total, dtype=padded.dtype)
        for rows in tiles(total):
            x, part = padded[rows].to(dtype), total[rows]
            torch.addcmul(bias, x[:, taps - 1 :], weight[:, -1], out=part)
            for tap in range(taps - 1):
                part.addcmul_(x[:, tap : tap + time], weight[:, tap])
            if reach_BT is not None:
                border = Border(reach_BT[rows], taps)
                part[border.tokens] = (border.window_RWC(x) * weight.T).sum(1) + bias
            y[rows] = torch.nn.functional.silu(part)
        ctx.save_for_backward(padded, weight_CW, reach_BT, total)
        ctx.bias_dtype = bias_C.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTC):  # type: ignore[override]
        padded, weight_CW, reach_BT, total = ctx.saved_tensors
        dtype, weight = total.dtype, weight_CW.to(total.dtype)
        dpadded, dweight = torch.empty_like(padded), torch.zeros_like(weight)
        dbias = weight.new_zeros(len(weight))
        for rows in tiles(total):
            x = padded[rows].to(dtype)
            push = torch.ops.aten.silu_backward(dy_BTC[rows].to(dtype), total[rows])
            dbias += push.sum((0, 1))
            border = None if reach_BT is None else Border(reach_BT[rows], weight.shape[1])
            dpadded[rows] = shifted_gradients(x, push, weight, border, dweight)
        return dpadded, dweight.to(weight_CW.dtype), dbias.to(ctx.bias_dtype), None


def shifted_gradients(x, push_BTC: Tensor, weight_CW: Tensor, border: Border | None, dweight_CW: Tensor) -> Tensor:
    """Gradient of the padded rows; that of the weights is added to `dweight_CW`. Overwrites `push_BTC`."""
    time, dx = push_BTC.shape[1], torch.zeros_like(x)
    if border is not None:
        apart_RC = push_BTC[border.tokens]
        push_BTC[border.tokens] = 0
        border.add_gradient(dx, apart_RC, weight_CW)
        dweight_CW += torch.einsum("rc,rwc->cw", apart_RC, border.window_RWC(x))
    for tap in range(weight_CW.shape[1]):
        dx[:, tap : tap + time].addcmul_(push_BTC, weight_CW[:, tap])
        dweight_CW[:, tap] += (push_BTC * x[:, tap : tap + time]).sum((0, 1))
    return dx


CONV_IMPLS = (Impl("torch", causal_conv_shifted), Impl("reference", causal_conv_reference))
