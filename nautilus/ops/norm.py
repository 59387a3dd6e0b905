"""RMSNorm and Mamba-2's gated group norm. Letters: R rows, D width, G groups of a row.

Both are computed in float32 (float64 for float64 input) and cast once at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nautilus.ops.cpu.norm import joined_norms_native, joined_norms_refuse, rms_norm_native, rms_norm_refuses
from nautilus.ops.dispatch import Impl, choose
from nautilus.ops.ssd import wide
from nautilus.ops.tiles import tiles


def rms_norm(hidden: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; the weight is applied before the cast back."""
    return choose("rms_norm", RMS_NORM_IMPLS, hidden, weight_D, eps)(hidden, weight_D, eps)


def rms_norm_reference(hidden: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    x = hidden.to(wide(hidden.dtype))
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight_D.to(x.dtype)).to(hidden.dtype)


def rms_norm_fused(hidden: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return RmsNorm.apply(hidden, weight_D, eps)


class RmsNorm(torch.autograd.Function):
    """Keeps the input and one number per row; the normalised row is rebuilt in the backward."""

    @staticmethod
    def forward(ctx, hidden, weight_D, eps):
        x = hidden.to(wide(hidden.dtype))
        scale = torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze_(-1)
        ctx.save_for_backward(hidden, weight_D, scale)
        return (x * scale).mul_(weight_D).to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[override]
        hidden, weight_D, scale = ctx.saved_tensors
        unit = hidden.to(scale.dtype) * scale
        dy = dy.to(scale.dtype)
        dweight = (dy * unit).view(-1, unit.shape[-1]).sum(0).to(weight_D.dtype)
        dunit = dy * weight_D
        dot = torch.linalg.vecdot(dunit, unit).unsqueeze_(-1).div_(-unit.shape[-1])
        return dunit.addcmul_(unit, dot).mul_(scale).to(hidden.dtype), dweight, None


def joined_norms(a: Tensor, weight_a: Tensor, b: Tensor, weight_b: Tensor, eps: float) -> Tensor:
    """[rms_norm(a) ; rms_norm(b)] over the last axis, of two tensors of one shape."""
    return choose("joined_norms", JOINED_IMPLS, a, weight_a, b, weight_b, eps)(a, weight_a, b, weight_b, eps)


def joined_norms_torch(a: Tensor, weight_a: Tensor, b: Tensor, weight_b: Tensor, eps: float) -> Tensor:
    return torch.cat([rms_norm(a, weight_a, eps), rms_norm(b, weight_b, eps)], dim=-1)


def gated_group_norm(y: Tensor, z: Tensor, weight_D: Tensor, groups: int, eps: float) -> Tensor:
    """v = y silu(z); each of `groups` equal parts of v is divided by its root mean square; times weight.

    Gate first, then norm. The cast to z's dtype comes before the multiplication by the weight, unlike `rms_norm`.
    """
    return choose("gated_group_norm", GATED_NORM_IMPLS, y)(y, z, weight_D, groups, eps)


def gated_group_norm_reference(y: Tensor, z: Tensor, weight_D: Tensor, groups: int, eps: float) -> Tensor:
    dtype = wide(y.dtype)
    v = (y.to(dtype) * torch.nn.functional.silu(z.to(dtype))).unflatten(-1, (groups, -1))
    unit = (v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)).flatten(-2)
    return unit.to(z.dtype) * weight_D.to(z.dtype)


def gated_group_norm_fused(y: Tensor, z: Tensor, weight_D: Tensor, groups: int, eps: float) -> Tensor:
    return GatedGroupNorm.apply(y, z, weight_D, groups, eps)


class GatedGroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, z, weight_D, groups, eps):
        out, weight = torch.empty_like(y, dtype=z.dtype), weight_D.to(z.dtype)
        scale = torch.empty(*y.shape[:-1], groups, 1, dtype=wide(y.dtype), device=y.device)
        for rows in tiles(y):
            v = torch.nn.functional.silu(z[rows].to(scale.dtype)).mul_(y[rows]).unflatten(-1, (groups, -1))
            scale[rows] = torch.linalg.vecdot(v, v).div_(v.shape[-1]).add_(eps).rsqrt_().unsqueeze_(-1)
            torch.mul(v.mul_(scale[rows]).flatten(-2).to(z.dtype), weight, out=out[rows])
        ctx.save_for_backward(y, z, weight_D, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):  # type: ignore[override]
        y, z, weight_D, scale = ctx.saved_tensors
        dtype, groups = scale.dtype, scale.shape[-2]
        dy, dz, dweight = torch.empty_like(y), torch.empty_like(z), torch.zeros_like(weight_D, dtype=dtype)
        for rows in tiles(y):
            wide_z, dwide = z[rows].to(dtype), dout[rows].to(dtype)
            gate = torch.nn.functional.silu(wide_z)
            unit = (gate * y[rows]).unflatten(-1, (groups, -1)).mul_(scale[rows])
            dweight += (dwide * unit.flatten(-2)).view(-1, len(weight_D)).sum(0)
            dunit = (dwide * weight_D).unflatten(-1, (groups, -1))
            dot = torch.linalg.vecdot(dunit, unit).unsqueeze_(-1).div_(-unit.shape[-1])
            dv = dunit.addcmul_(unit, dot).mul_(scale[rows]).flatten(-2)
            dz[rows] = torch.ops.aten.silu_backward(dv * y[rows], wide_z)
            dy[rows] = dv.mul_(gate)
        return dy, dz, dweight.to(weight_D.dtype), None, None


RMS_NORM_IMPLS = (
    Impl("native", rms_norm_native, rms_norm_refuses),
    Impl("torch", rms_norm_fused),
    Impl("reference", rms_norm_reference),
)
JOINED_IMPLS = (
    Impl("native", joined_norms_native, joined_norms_refuse),
    Impl("torch", joined_norms_torch),
    Impl("reference", joined_norms_torch),
)
GATED_NORM_IMPLS = (Impl("torch", gated_group_norm_fused), Impl("reference", gated_group_norm_reference))
