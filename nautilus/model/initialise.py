"""Random initial weights as the published models had them (architecture tables of arXiv 2512.20848, 2604.12374).

    matrices            N(0, std^2), std = Config.std
    residual outputs    std / sqrt(layers): attention out, Mamba out, expert, shared-expert and MLP down
    A_log               log of U(1, 16), per head            D, norms    1
    dt_bias             inverse softplus of a log-uniform draw from [1e-3, 0.1], at least 1e-4
    conv                U(-1/sqrt(taps), 1/sqrt(taps))       load-balancing bias    0

Each tensor has a generator of its own, seeded by (seed, name): the values do not depend on the order of layers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from nautilus.config import Config
from nautilus.model.layout import Shape, parameter_table

RESIDUAL_OUTPUTS = ("o_proj.weight", "out_proj.weight", "down_proj.weight", "experts.down_proj", "linear.weight")


def seeded(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


@torch.no_grad()
def initialise(model: nn.Module, config: Config, seed: int) -> None:
    places = dict([*model.named_parameters(), *model.named_buffers()])
    for name, value in initial_values(config, seed):
        places.pop(name).copy_(value)
    for counter in places.values():
        counter.zero_()


def initial_values(config: Config, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Every stored tensor of a model by its name, one at a time."""
    std, depth, table = config.std, len(config.layers), parameter_table(config)
    for name, shape in table.items():
        if name.endswith(".conv1d.bias"):
            taps = table[name.removesuffix("bias") + "weight"][-1]
            yield name, uniform(shape, seeded(seed, name)) / math.sqrt(taps)
        else:
            yield name, initial_value(name, shape, std, depth, seeded(seed, name))


def uniform(shape: Shape, generator: torch.Generator) -> Tensor:
    """Draws from [-1, 1)."""
    return 2 * torch.rand(shape, generator=generator) - 1


def initial_value(name: str, shape: Shape, std: float, depth: int, generator: torch.Generator) -> Tensor:
    if name.endswith(".A_log"):
        return (1 + 7.5 * (uniform(shape, generator) + 1)).log()
    if name.endswith(".dt_bias"):
        place = (uniform(shape, generator) + 1) / 2
        dt = torch.exp(math.log(1e-3) + place * math.log(0.1 / 1e-3)).clamp_min(1e-4)
        return dt + torch.log(-torch.expm1(-dt))
    if name.endswith(".conv1d.weight"):
        return uniform(shape, generator) / math.sqrt(shape[-1])
    if name.endswith(("load_E", "e_score_correction_bias")):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    scale = std / math.sqrt(depth) if name.endswith(RESIDUAL_OUTPUTS) else std
    return scale * torch.randn(shape, generator=generator)
