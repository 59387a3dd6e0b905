"""What each technique of NVFP4 training is for, shown on tensors: no training, the same numbers on every machine.

rotation             error of dW = dy^T x where activations have outliers along the tokens
stochastic rounding  mean of many roundings of one number, less that number
square blocks        whether forward and backward multiply with the same weight
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nautilus.ops.cpu.lowbit import Trip
from nautilus.ops.low_precision import How, engine_for, low_linear

FULL = How(format="nvfp4")
SIZES = (1.0, 8.0, 32.0, 64.0)  # of the outliers, in standard deviations of the others
STEP = 0.5  # between the codes from 1 to 2


class Demonstration(NamedTuple):
    title: str
    says: str
    head: list[str]
    rows: Sequence[Sequence[object]]


def demonstrations() -> list[Demonstration]:
    errors = [[size, gradient_error(size, rotate=True), gradient_error(size, rotate=False)] for size in SIZES]
    words = ("stochastic", True), ("nearest", False)
    biases = [[name, *bias(stochastic=which)] for name, which in words]
    copies = [[name, *copies_apart(square=which)] for name, which in (("16x16", True), ("1x16", False))]
    return [
        Demonstration(
            "Rotation",
            "Relative error of a weight gradient over 65,536 tokens; one in 16 is an outlier, so many times as large.",
            ["outliers", "with rotation", "without"],
            errors,
        ),
        Demonstration(
            "Stochastic rounding",
            "Mean of 262,144 roundings of each of 15 numbers between two codes, less the number, in steps.",
            ["rounding", "largest bias", "mean bias"],
            biases,
        ),
        Demonstration(
            "Square blocks",
            "The weight as the forward and as the backward multiplies with it.",
            ["blocks", "share that differs", "relative difference"],
            copies,
        ),
    ]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradient_error(size: float, *, rotate: bool, tokens: int = 1 << 16, width: int = 32) -> float:
    """|dW - dy^T x| / |dy^T x|, where gradients follow the activations, dy = x B, so that dW adds up over the tokens.

    One token in 16 has activations of `size` and no gradient, like the first token of a text, on which attention rests.
    Beside it small activations become zero, which no number of tokens makes up for. The rotation turns that into noise,
    which is even larger in a single block, but has mean zero.
    """
    x, random = normal(0, tokens, width), torch.Generator().manual_seed(2)
    outlier_T1 = torch.rand(tokens, 1, generator=random) < 1 / 16
    dy = torch.where(outlier_T1, 0.0, x @ normal(1, width, width) / width**0.5).bfloat16()
    x = torch.where(outlier_T1, size * x, x).bfloat16()
    true, weight = dy.float().mT @ x.float(), torch.zeros(width, width, requires_grad=True)
    low_linear(x, weight, dataclasses.replace(FULL, rotate=rotate)).backward(dy)
    return ((weight.grad - true).norm() / true.norm()).item()  # type: ignore[operator]


def bias(*, stochastic: bool, draws: int = 1 << 18) -> tuple[float, float]:
    """(largest magnitude, mean magnitude) of mean(rounded) - number in steps, over 15 numbers in a block whose largest
    is 6, so that the codes are the numbers 1, 1.5, 2 and so on."""
    numbers = torch.tensor([*(1 + STEP * k / 16 for k in range(1, 16)), 6.0]).bfloat16()
    x, first = numbers.expand(draws, 16).contiguous(), torch.tensor([0, draws])
    trip = Trip(format="nvfp4", axis="rows", address=(0, 0, 0, 0) if stochastic else None)
    values, top, _ = engine_for(x, x[None]).quantise(x, first, trip)
    off = (values.double().mean(0) * top.double() / 2688 - numbers.double()).abs()[:15] / STEP
    return off.max().item(), off.mean().item()


def copies_apart(*, square: bool, width: int = 128) -> tuple[float, float]:
    """(share of the numbers that differ, relative difference) between a weight quantised as it lies, for the forward,
    and turned over, for the backward."""
    weight = (normal(3, width, width) * normal(4, width, 1).exp()).bfloat16()
    engine, trip = engine_for(weight, weight[None]), Trip(format="nvfp4", axis="tiles" if square else "rows")
    one, other = (engine.quantise(w, torch.tensor([0, width]), trip)[0].float() for w in (weight, weight.mT))
    apart = one - other.mT
    return (apart != 0).float().mean().item(), (apart.norm() / one.norm()).item()
