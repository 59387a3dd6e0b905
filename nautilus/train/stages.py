"""What layers cost, and stages of neighbouring layers that cost alike: for a pipeline, and for the plan of one."""

from __future__ import annotations

from nautilus.config import Attention, Config, Layer, Mamba
from nautilus.config.model import idle_weights, layer_weights


def layer_flops(layer: Layer, width: int, length: int) -> float:
    """Forward and backward of one token of a row of `length`: 6 per weight that it meets, and what mixes tokens."""
    flops = 6.0 * (layer_weights(layer, width) - idle_weights(layer, width))
    if isinstance(layer, Attention):
        flops += 6.0 * layer.heads * layer.head_width * length  # half of scores and of values
    if isinstance(layer, Mamba):
        flops += 6.0 * layer.inner * (2 * layer.state + layer.chunk)
    return flops


def end_flops(config: Config, length: int, depths: int) -> float:
    """The head's and the prediction block's, which follow the last layer."""
    block = sum(layer_flops(layer, config.width, length) for layer in config.mtp)
    return 6.0 * config.vocab * config.width * (1 + depths) + depths * block


def stages_of(config: Config, count: int, *, length: int, depths: int) -> list[int]:
    """The stage of each layer: neighbours together, the dearest stage as cheap as can be. A layer that does nothing
    goes with the one before it."""
    costs = {i: layer_flops(layer, config.width, length) for i, layer in enumerate(config.layers)}
    working = [i for i, cost in costs.items() if cost] or [0]
    costs[working[-1]] += end_flops(config, length, depths)
    found, stage = dict(zip(working, even_stages([costs[i] for i in working], count), strict=True)), 0
    return [stage := found.get(i, stage) for i in costs]


def stages_at_most(config: Config) -> int:
    """Layers that do anything: each stage needs one."""
    return sum(layer_weights(layer, config.width) > 0 for layer in config.layers)


def copies_embedding(config: Config, count: int, depths: int) -> bool:
    """Whether the last of `count` stages has a copy of the embedding: as its head, or to look up the tokens ahead."""
    return count > 1 and (config.tied or depths > 0)


def even_stages(costs: list[float], stages: int) -> list[int]:
    """Cuts into `stages` runs of neighbours, none empty, whose largest sum is as small as can be."""
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    count = len(costs)
    best = {(0, 0): 0.0}
    came: dict[tuple[int, int], int] = {}
    for stage in range(1, stages + 1):
        for end in range(stage, count - (stages - stage) + 1):
            options = [(max(best[stage - 1, b], sums[end] - sums[b]), b) for b in range(end) if (stage - 1, b) in best]
            best[stage, end], came[stage, end] = min(options)
    out, end = [0] * count, count
    for stage in range(stages, 0, -1):
        begin = came[stage, end]
        out[begin:end] = [stage - 1] * (end - begin)
        end = begin
    return out
