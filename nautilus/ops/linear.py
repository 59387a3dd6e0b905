"""A matrix product with a weight. Letters: O outputs, I inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from nautilus.ops.cpu.linear import linear_native, linear_refuses
from nautilus.ops.cpu.packs import Packs, packed_once
from nautilus.ops.cpu.quant import linear_packed, linear_packed_refuses
from nautilus.ops.dispatch import Impl, choose
from nautilus.ops.formats import Packed, dense
from nautilus.ops.ssd import wide as wider

__all__ = ["Packs", "linear", "packed_once"]


def linear(
    x: Tensor, weight_OI: Tensor | Packed, *, exact: bool = False, wide: bool = False, squared_relu: bool = False
) -> Tensor:
    """x W^T in x's dtype, summed in float32. W may be wider (float32 masters): it is rounded to x's dtype at use.
    It may be in few bits: it is then used as it is stored, and the gradient reaches x only.

    exact: W is not rounded, nor is the result, which is float32: the router. wide: only the result is not rounded: the
    head. squared_relu: the square of its positive part.
    """
    named = {"exact": exact, "wide": wide, "squared_relu": squared_relu}
    return choose("linear", LINEAR_IMPLS, x, weight_OI, **named)(x, weight_OI, **named)


def native(x: Tensor, weight_OI: Tensor | Packed, **named) -> Tensor:
    if isinstance(weight_OI, Packed):
        return linear_packed(x, weight_OI, **named)
    return linear_native(x, weight_OI, **named)


def native_refuses(x: Tensor, weight_OI: Tensor | Packed, **named) -> str | None:
    if isinstance(weight_OI, Packed):
        return linear_packed_refuses(x, weight_OI, **named)
    return linear_refuses(x, weight_OI, **named)


def linear_torch(x: Tensor, weight_OI: Tensor | Packed, *, exact=False, wide=False, squared_relu=False) -> Tensor:
    x = x.to(wider(x.dtype)) if exact else x
    y = torch.nn.functional.linear(x, dense(weight_OI, x.dtype))
    y = y.to(wider(y.dtype)) if wide else y
    return y.relu().square() if squared_relu else y


LINEAR_IMPLS = (
    Impl("native", native, native_refuses),
    Impl("torch", linear_torch),
    Impl("reference", linear_torch),
)
