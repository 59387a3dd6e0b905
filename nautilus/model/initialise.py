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

RESIDUAL_OUTPUTS = ("o_proj.weight", "out_proj.weight", "down_proj.weight", "experts.down_proj", "linear.weight")


def seeded(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    std, depth = model.config.std, len(model.config.layers)  # type: ignore[union-attr]
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        tensor.copy_(initial_value(name, tensor, std, depth, seeded(seed, name)))


def initial_value(name: str, tensor: Tensor, std: float, depth: int, generator: torch.Generator) -> Tensor:
    uniform = lambda: torch.rand(tensor.shape, generator=generator)  # noqa: E731
    if name.endswith((".A_log",)):
        return (1 + 15 * uniform()).log()
    if name.endswith(".dt_bias"):
        dt = torch.exp(math.log(1e-3) + uniform() * math.log(0.1 / 1e-3)).clamp_min(1e-4)
        return dt + torch.log(-torch.expm1(-dt))
    if ".conv1d." in name:
        taps = 4 if tensor.ndim == 1 else tensor.shape[-1]
        return (2 * uniform() - 1) / math.sqrt(taps)
    if name.endswith(("load_E", "e_score_correction_bias")):
        return torch.zeros(tensor.shape)
    if tensor.ndim == 1:
        return torch.ones(tensor.shape)
    scale = std / math.sqrt(depth) if name.endswith(RESIDUAL_OUTPUTS) else std
    return scale * torch.randn(tensor.shape, generator=generator)
