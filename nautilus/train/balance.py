"""Balancing the experts without a loss: after each update a bias moves towards the experts that were chosen too rarely.

    b_i <- b_i + gamma * sign(mean(c) - c_i)

c_i counts the tokens that went to expert i during the step, over micro-batches and ranks. The bias selects experts and
never weighs them; it has no gradient and no optimiser (arXiv 2408.15664). The sequence-level auxiliary loss that goes
with it is in `nautilus.ops.balance`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nautilus.model.moe import ExpertsMixer


def experts_mixers(model: nn.Module) -> dict[str, ExpertsMixer]:
    """Every mixer that routes, by its name; the multi-token-prediction block's included."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ExpertsMixer)}


@torch.no_grad()
def take_loads(model: nn.Module, over_ranks: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Tokens per expert of each mixer since the last call, over all ranks; the mixers start again from zero."""
    loads = {}
    for name, mixer in experts_mixers(model).items():
        loads[name] = over_ranks(mixer.load_E.clone())
        mixer.load_E.zero_()
    return loads


@torch.no_grad()
def update_biases(model: nn.Module, loads: dict[str, Tensor], gamma: float) -> None:
    """One move of every load-balancing bias. Frozen weights do not stop it; gamma = 0 does.

    Softmax routers have no bias and are left alone.
    """
    for name, mixer in experts_mixers(model).items():
        if gamma and mixer.gate.bias is not None:
            gap_E = loads[name].mean() - loads[name]
            mixer.gate.bias.add_(gap_E.sign().to(mixer.gate.bias.dtype), alpha=gamma)


def max_violation(load_E: Tensor) -> float:
    """MaxVio, max(c) / mean(c): from 1, perfect balance, to experts / active. Some papers subtract 1."""
    return (load_E.max() / load_E.mean()).item()
