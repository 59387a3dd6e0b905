"""What stands between two products of an MLP or an expert."""

from __future__ import annotations

import torch
from torch import Tensor

from nautilus.ops.cpu.activation import swiglu_native, swiglu_refuses
from nautilus.ops.dispatch import Impl, choose


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up, two tensors of one shape and dtype."""
    return choose("swiglu", SWIGLU_IMPLS, gate, up)(gate, up)


def swiglu_torch(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate) * up


def squared_relu(hidden: Tensor) -> Tensor:
    return hidden.relu().square()


def activate(up: Tensor, gate: Tensor | None) -> Tensor:
    """relu(up)^2, or silu(gate) up where there are gates; for forms that are not native."""
    return squared_relu(up) if gate is None else swiglu_torch(gate, up)


SWIGLU_IMPLS = (
    Impl("native", swiglu_native, swiglu_refuses),
    Impl("torch", swiglu_torch),
    Impl("reference", swiglu_torch),
)
