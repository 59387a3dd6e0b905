"""What a model has made of a request's latest tokens, kept for a block that drafts until it is told of them.

A step has just read all weights when its states are put away, so the caches hold nothing else: a copy by numpy touches
a fraction of the memory that one by PyTorch does, and takes a fifth of the time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

START = 64  # rows that there is memory for at first

Raw = Tensor | np.ndarray


def raw(tensor: Tensor) -> Raw:
    """The same memory as numbers of its width, for numpy, where it can be."""
    if tensor.device.type != "cpu":
        return tensor
    return tensor.detach().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]).numpy()


class Seen:
    """Rows one after the other, in memory that grows: of what was seen side by side, (N, D) for each part."""

    def __init__(self):
        self.count = 0
        self.rows_ND: Tensor | None = None
        self.raw: Raw | None = None

    def __len__(self) -> int:
        return self.count

    @property
    def rows(self) -> Tensor:
        assert self.rows_ND is not None
        return self.rows_ND[: self.count]

    def add(self, parts: Sequence[Tensor], raw_parts: Sequence[Raw], begin: int, count: int) -> None:
        """Rows begin .. begin + count of all parts; raw_parts: the same by `raw`."""
        if self.rows_ND is None or self.count + count > len(self.rows_ND):
            self.grow(parts, count)
        assert self.raw is not None
        end, column = self.count + count, 0
        for part in raw_parts:
            width = part.shape[1]
            self.raw[self.count : end, column : column + width] = part[begin : begin + count]  # type: ignore[index]
            column += width
        self.count = end

    def grow(self, parts: Sequence[Tensor], count: int) -> None:
        size, width = max(START, 2 * (self.count + count)), sum(part.shape[1] for part in parts)
        larger = torch.empty(size, width, dtype=parts[0].dtype, device=parts[0].device)
        if self.rows_ND is not None:
            larger[: self.count] = self.rows
        self.rows_ND, self.raw = larger, raw(larger)

    def keep(self, count: int) -> None:
        """The last so many of them, and no others."""
        if count:
            rows = self.rows[self.count - count :].clone()
            assert self.rows_ND is not None
            self.rows_ND[:count] = rows
        self.count = count
