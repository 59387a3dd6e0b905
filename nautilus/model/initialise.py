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

import torch
from torch import Tensor, nn

from nautilus.config import Config

RESIDUAL_OUTPUTS = ("o_proj.weight", "out_proj.weight", "down_proj.weight", "experts.down_proj", "linear.weight")


def seeded(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


@torch.no_grad()
def initialise(model: nn.Module, config: Config, seed: int) -> None:
    std, depth = config.std, len(config.layers)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(".conv1d.bias"):
            taps = model.get_parameter(name.removesuffix("bias") + "weight").shape[-1]
            tensor.copy_(uniform(tensor, seeded(seed, name)) / math.sqrt(taps))
        else:
            tensor.copy_(initial_value(name, tensor, std, depth, seeded(seed, name)))


def uniform(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Draws from [-1, 1) in the tensor's shape."""
    return 2 * torch.rand(tensor.shape, generator=generator) - 1


def initial_value(name: str, tensor: Tensor, std: float, depth: int, generator: torch.Generator) -> Tensor:
    if name.endswith(".A_log"):
        return (1 + 7.5 * (uniform(tensor, generator) + 1)).log()
    if name.endswith(".dt_bias"):
        place = (uniform(tensor, generator) + 1) / 2
        dt = torch.exp(math.log(1e-3) + place * math.log(0.1 / 1e-3)).clamp_min(1e-4)
        return dt + torch.log(-torch.expm1(-dt))
    if name.endswith(".conv1d.weight"):
        return uniform(tensor, generator) / math.sqrt(tensor.shape[-1])
    if name.endswith(("load_E", "e_score_correction_bias")):
        return torch.zeros(tensor.shape)
    if tensor.ndim == 1:
        return torch.ones(tensor.shape)
    scale = std / math.sqrt(depth) if name.endswith(RESIDUAL_OUTPUTS) else std
    return scale * torch.randn(tensor.shape, generator=generator)
