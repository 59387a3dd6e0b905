"""A token for each row of logits. Letters: B rows, V vocabulary.

    p_V   = softmax(logits_V / temperature)
    token = the first at which the cumulated p exceeds u, of [0, 1), from (seed, position) alone

The native path computes exponentials as floats and adds them up as doubles, the other one all as doubles: now and then,
where u is within rounding of a border, they differ by a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nautilus.ops.cpu.draw import draw_native, draw_refuses
from nautilus.ops.dispatch import Impl, choose


def draw(
    rows: Sequence[Tensor],
    best: Sequence[int],
    temperatures: Sequence[float],
    seeds: Sequence[int],
    positions: Sequence[int],
) -> list[int]:
    """rows: of V logits each, none of them NaN; best: where the largest are; temperatures: positive; seeds and
    positions: of [0, 2^64). A row's token does not depend on the rows beside it."""
    given = rows, best, temperatures, seeds, positions
    return choose("draw", DRAW_IMPLS, *given)(*given)


def draw_torch(
    rows: Sequence[Tensor],
    best: Sequence[int],
    temperatures: Sequence[float],
    seeds: Sequence[int],
    positions: Sequence[int],
) -> list[int]:
    each = zip(rows, temperatures, seeds, positions, strict=True)
    return [place(weights(row, heat), uniform(seed, position)) for row, heat, seed, position in each]


def weights(logits_V: Tensor, temperature: float) -> Tensor:
    """Probabilities (float64). The maximum is taken off before the division, so that no temperature overflows."""
    return ((logits_V.double() - logits_V.max()) / temperature).softmax(0)


def place(weights_K: Tensor, u: float) -> int:
    """Inverse transform sampling: the first at which the cumulated weight exceeds u times the sum of all."""
    cumulated_K = weights_K.cumsum(0)
    return int(torch.searchsorted(cumulated_K, u * cumulated_K[-1], right=True))


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on (seed, position) alone: Philox 4x64 counts positions under the seed's key.

    52 bits, not 53: u < 1 - 2^-52 keeps u times a sum of floats strictly below the sum after rounding.
    """
    return (int(np.random.Philox(key=seed, counter=position).random_raw()) >> 12) * 2.0**-52


DRAW_IMPLS = (
    Impl("native", draw_native, draw_refuses),
    Impl("torch", draw_torch),
    Impl("reference", draw_torch),
)
