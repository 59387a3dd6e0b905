"""Working in pieces that stay in the cache.

A chain of elementwise operations over a large tensor reads and writes main memory once per operation; the same chain
over one piece after another does so once per piece. On devices other than the CPU everything is one piece.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

ELEMENTS = 1 << 18  # of one tensor of a chain: 1 MiB in float32


def tiles(tensor: Tensor, elements: int = ELEMENTS) -> Iterator[slice]:
    """Slices of the first axis with about `elements` numbers each."""
    count = len(tensor)
    if tensor.device.type != "cpu" or count == 0:
        yield slice(0, count)
        return
    step = max(1, elements * count // tensor.numel())
    for begin in range(0, count, step):
        yield slice(begin, begin + step)
