"""Averages of checkpoints along a run: what a decay of the learning rate would have given, without one."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from nautilus.model.shards import opened, shard_files
from nautilus.runtime import UserError

PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def merge_coefficients(
    count: int, kind: str = "minus_sqrt", *, order: str = "sequential", seed: int = 0
) -> list[float]:
    """Weights of `count` checkpoints, oldest first; they sum to 1.

    order: sequential, reversed, or random (a shuffle by `seed`), the three that were searched for Ultra's base.

    minus_sqrt imitates a minus-sqrt decay over the window: with s_i = 1 - sqrt(i/n), c_{n-1} = s_{n-1},
    c_i = s_i - s_{i+1} and c_0 = 1 - the others = sqrt(1/n) (Megatron-LM's weighted merge; arXiv 2604.12374).
    """
    if count < 1:
        raise ValueError(f"an average of {count} checkpoints was asked for; give at least one")
    if kind not in ("minus_sqrt", "uniform"):
        raise ValueError(f"kind={kind!r} of checkpoint average is unknown; have minus_sqrt, uniform")
    if order not in ("sequential", "reversed", "random"):
        raise ValueError(f"order={order!r} of checkpoint average is unknown; have sequential, reversed, random")
    found = [1 / count] * count if kind == "uniform" else minus_sqrt(count)
    if order == "random":
        random.Random(seed).shuffle(found)
    return found[::-1] if order == "reversed" else found


def minus_sqrt(count: int) -> list[float]:
    reach = [1 - math.sqrt(i / count) for i in range(count)] + [0.0]
    later = [reach[i] - reach[i + 1] for i in range(1, count)]
    return [1 - math.fsum(later), *later]


@torch.no_grad()
def average_checkpoints(
    folders: Sequence[Path], *, kind: str = "minus_sqrt", order: str = "sequential", seed: int = 0
) -> dict[str, Tensor]:
    """The weighted mean of the weights in `folders`, oldest first, in float32.

    Each folder is a snapshot or any checkpoint folder of plain, not quantised, weights. Read tensor by tensor, so that
    one float32 model is all that is in memory, whatever their number.
    """
    coefficients = merge_coefficients(len(folders), kind, order=order, seed=seed)
    with contextlib.ExitStack() as stack:
        sources = [tensors_of(folder, stack) for folder in folders]
        for folder, source in zip(folders, sources, strict=True):
            if strange := sorted(source.keys() ^ sources[0].keys()):
                raise UserError(
                    f"cannot average {folder} with {folders[0]}: only one of the two has {', '.join(strange[:4])}; "
                    f"give checkpoints of one model"
                )
        return {name: weighted_mean(name, sources, coefficients) for name in sources[0]}


def tensors_of(folder: Path, stack: contextlib.ExitStack) -> dict:
    """Tensor name → the open file that holds it."""
    shards = [stack.enter_context(opened(file)) for file in shard_files(folder)]
    return {name: shard for shard in shards for name in shard.keys()}  # noqa: SIM118


def weighted_mean(name: str, sources: list[dict], coefficients: list[float]) -> Tensor:
    total = torch.zeros(sources[0][name].get_slice(name).get_shape())
    for source, coefficient in zip(sources, coefficients, strict=True):
        value = source[name].get_tensor(name)
        if value.shape != total.shape or value.dtype not in PLAIN:
            raise UserError(
                f"cannot average {name}: one checkpoint holds it as {tuple(value.shape)} {value.dtype}, the first as "
                f"{tuple(total.shape)}; give plain checkpoints (float32, bf16 or fp16) of one model"
            )
        total.add_(value.float(), alpha=coefficient)
    return total
