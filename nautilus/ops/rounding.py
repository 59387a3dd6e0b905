"""Random bits by address, and rounding with them.

Philox 4x32 turns a counter of four words under a key of two into four random words; each round is

    c0, c1, c2, c3  =  hi(0xCD9E8D57 c2) ^ c1 ^ k0,  lo(0xCD9E8D57 c2),  hi(0xD2511F53 c0) ^ c3 ^ k1,  lo(0xD2511F53 c0)
    k0, k1          =  k0 + 0x9E3779B9,  k1 + 0xBB67AE85                                                    mod 2^32

(Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011). 10 rounds are its default. Whoever knows the
address has the bits: nothing is drawn in turn, so nothing depends on what else is drawn. Everything is integer
arithmetic, the same on every device.

Stochastic rounding goes up with probability f, where f is how far a number is on its way from the lower neighbour in
the format to the upper one, so that the mean of many roundings is the number itself:

    round(x) = floor(x / step + u) step,    u uniform in [0, 1),    step = the distance of the neighbours of x

u has 13 bits for float16 (all that float32 has below the cut, so f is met exactly) and 16 elsewhere (f to 2^-17).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MULTIPLIERS, WEYL, WORD = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85), 0xFFFFFFFF
HALF_BITS, CODE_BITS = 13, 16
HALF_LARGEST, E4M3_LARGEST, INT8_LARGEST = 65504.0, 448.0, 127.0
# Mantissa bits, and the power of two that is the distance of the smallest numbers.
HALF_GRID, E4M3_GRID = (10, -24), (3, -9)


def philox(
    counter: Sequence[Tensor], key: tuple[Tensor | int, Tensor | int], rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words for each counter: int64 tensors that hold 32 bits each. Words of counter and key broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # int64 products wrap modulo 2^64: the low 64 bits, which are all there are, come out right.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & WORD) ^ c1 ^ k0, p1 & WORD, (p0 >> 32 & WORD) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1, c2, c3


def bits_at(position_B: Tensor, size: int, *, seed: int, stream: int, rounds: int = 5) -> Tensor:
    """16 random bits for each of `size` elements at each position: (B, size), int32.

    Those of element e depend on (seed, stream, position, e) alone, neither on the size nor on the other rows. One
    counter serves eight elements.

    `rounds` are those of the elements, 5 as in released recipes. Five rounds alone are too few: two positions or
    streams that differ in a bit or two stay correlated, by 0.3 and more. So ten rounds make a key of the address, once
    for each row, and the element stands in both words that a round multiplies; then no difference from ten is seen.
    """
    device = position_B.device
    fixed = torch.tensor((stream, 0), device=device)
    address = position_B.long()[:, None], fixed[0], fixed[1], fixed[1]
    k0_B, k1_B, c1_B, c3_B = philox(address, (seed & WORD, seed >> 32 & WORD))
    lane = torch.arange(-(-size // 8), device=device)
    words = philox((lane, c1_B, lane, c3_B), (k0_B, k1_B), rounds)
    pairs = torch.stack((words[0] | words[1] << 32, words[2] | words[3] << 32), -1)
    return pairs.view(torch.int16).flatten(1)[:, :size].int() & 0xFFFF


def spacing(size: Tensor, grid: tuple[int, int]) -> Tensor:
    """The distance of the neighbours of a float32 number >= 0 in a format of `grid`."""
    mantissa, least = grid
    power = (size.view(torch.int32) & 0x7F800000).view(torch.float32)  # the largest power of two in it
    return power.clamp_(min=2.0 ** (least + mantissa)).mul_(2.0**-mantissa)


def to_grid(x: Tensor, share: Tensor, grid: tuple[int, int]) -> Tensor:
    """x rounded stochastically to a float format, as float32. Below the normal numbers the distance stays the same, so
    that subnormals are rounded like all others."""
    size = x.abs()
    step = spacing(size, grid)
    return size.div_(step).add_(share).floor_().mul_(step).copysign_(x)


def stochastic_half(x: Tensor, bits: Tensor) -> Tensor:
    """float32 to float16; `bits` are integers from 0 to 2^13 - 1, shaped like x or broadcasting to it.

    For normal numbers this is the bit pattern plus 13 random bits, cut off below float16's last bit. What is beyond the
    largest float16 becomes the largest; NaN and infinity stay.
    """
    rounded = to_grid(x.clamp(-HALF_LARGEST, HALF_LARGEST), bits * 2.0**-HALF_BITS, HALF_GRID)
    return torch.where(x.isfinite(), rounded, x).to(torch.float16)


def stochastic_e4m3(x: Tensor, bits: Tensor) -> Tensor:
    """float32 to FP8 E4M3; `bits` are integers from 0 to 2^16 - 1. Beyond +-448: +-448; NaN and infinity: NaN."""
    rounded = to_grid(x.clamp(-E4M3_LARGEST, E4M3_LARGEST), middle(bits), E4M3_GRID)
    return torch.where(x.isfinite(), rounded, torch.nan).to(torch.float8_e4m3fn)


def stochastic_int8(x: Tensor, bits: Tensor) -> Tensor:
    """float32 to -127..127; `bits` as above. Beyond +-127: +-127. Integers have no NaN: it becomes 0."""
    rounded = x.abs().add_(middle(bits)).floor_().clamp_(max=INT8_LARGEST).copysign_(x)
    return rounded.nan_to_num_(0).to(torch.int8)


def middle(bits: Tensor) -> Tensor:
    """The middle of one of 2^16 equal parts of [0, 1): whole numbers stay what they are, and no side is preferred."""
    return (bits + 0.5) * 2.0**-CODE_BITS
