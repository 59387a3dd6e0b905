"""A matrix product with a weight. Letters: O outputs, I inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from nautilus.ops.cpu.linear import Packs, linear_native, linear_refuses, packed_once
from nautilus.ops.dispatch import Impl, choose

__all__ = ["Packs", "linear", "packed_once"]


def linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """x W^T in x's dtype, summed in float32. W may be wider (float32 masters): it is rounded to x's dtype at use."""
    return choose("linear", LINEAR_IMPLS, x, weight_OI)(x, weight_OI)


def linear_torch(x: Tensor, weight_OI: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, weight_OI.to(x.dtype))


LINEAR_IMPLS = (
    Impl("native", linear_native, linear_refuses),
    Impl("torch", linear_torch),
    Impl("reference", linear_torch),
)
