"""A matrix that computes in the dtype of what it is given; trained, or held in the few bits it is stored in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nautilus.model.precision import Site
from nautilus.ops.formats import Packed, dense
from nautilus.ops.linear import linear
from nautilus.ops.low_precision import Piece, low_linear


class Matrix(nn.Module):
    """A weight, left unset: a parameter, or after `hold` a plain attribute that no optimiser sees and nothing casts.

    `input_scale` is what the quantiser found for the activations, kept as it was stored; nothing here computes with it.
    """

    weight: nn.Parameter | Packed

    def __init__(self, rows: int, columns: int, *, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, device=device, dtype=dtype))
        self.input_scale: Tensor | None = None

    def hold(self, matrix: Packed, input_scale: Tensor | None = None) -> None:
        del self.weight
        self.weight, self.input_scale = matrix, input_scale

    def release(self, dtype: torch.dtype) -> None:
        """Undo `hold`: a parameter with the numbers that the matrix stands for."""
        numbers = dense(self.weight, dtype)
        del self.weight
        self.weight, self.input_scale = nn.Parameter(numbers), None


class Linear(Matrix):
    """y = x W^T, no bias. W may be stored wider than x (float32 masters, bf16 compute): it is cast at use.

    With a `site` (see `lower.py`) it trains in few bits.
    """

    def __init__(self, inputs: int, outputs: int, *, device=None, dtype=None):
        super().__init__(outputs, inputs, device=device, dtype=dtype)
        self.site: Site | None = None
        self.piece: Piece | None = None  # of a weight that several processes hold

    def forward(self, x: Tensor, *, squared_relu: bool = False) -> Tensor:
        how = None if self.site is None else self.site.how(self.training)
        if how is None or isinstance(self.weight, Packed):
            return linear(x, self.weight, squared_relu=squared_relu)
        y = low_linear(x, self.weight, how)
        return y.relu().square() if squared_relu else y
