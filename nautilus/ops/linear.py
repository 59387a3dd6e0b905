"""A matrix product with a weight. Letters: O outputs, I inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from nautilus.ops.cpu.linear import Packs, linear_native, linear_refuses, packed_once
from nautilus.ops.dispatch import Impl, choose
from nautilus.ops.ssd import wide as wider

__all__ = ["Packs", "linear", "packed_once"]


def linear(
    x: Tensor, weight_OI: Tensor, *, exact: bool = False, wide: bool = False, squared_relu: bool = False
) -> Tensor:
    """x W^T in x's dtype, summed in float32. W may be wider (float32 masters): it is rounded to x's dtype at use.

    exact: W is not rounded, nor is the result, which is float32: the router. wide: only the result is not rounded: the
    head. squared_relu: the square of its positive part.
    """
    named = {"exact": exact, "wide": wide, "squared_relu": squared_relu}
    return choose("linear", LINEAR_IMPLS, x, weight_OI, **named)(x, weight_OI, **named)


def linear_torch(x: Tensor, weight_OI: Tensor, *, exact=False, wide=False, squared_relu=False) -> Tensor:
    x = x.to(wider(x.dtype)) if exact else x
    y = torch.nn.functional.linear(x, weight_OI.to(x.dtype))
    y = y.to(wider(y.dtype)) if wide else y
    return y.relu().square() if squared_relu else y


LINEAR_IMPLS = (
    Impl("native", linear_native, linear_refuses),
    Impl("torch", linear_torch),
    Impl("reference", linear_torch),
)
