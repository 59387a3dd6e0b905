"""What the micro-batches of a step add up to, and the means of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import Tensor

from nautilus.train.ranks import Ranks


@dataclass
class Sums:
    """What a step adds up: the loss of each micro-batch, and (sum, count) of every term and metric."""

    losses: list[Tensor] = field(default_factory=list)
    pairs: dict[str, Tensor] = field(default_factory=dict)

    def over_stages(self, ranks: Ranks) -> Sums:
        """With what the other stages of a pipeline found: losses and totals add up, and who counts a term counts it
        whole."""
        parts = ranks.stages((torch.stack(self.losses).cpu(), {name: pair.cpu() for name, pair in self.pairs.items()}))
        pairs: dict[str, Tensor] = {}
        for _, found in parts:
            for name, (total, count) in found.items():
                before = pairs[name][0] if name in pairs else 0.0
                pairs[name] = torch.stack([before + total, count])
        return Sums([*torch.stack([losses for losses, _ in parts]).sum(0)], pairs)

    def add(self, loss: Tensor, pairs: dict[str, tuple[Tensor, Tensor]]) -> None:
        self.losses.append(loss.detach())
        for name, pair in pairs.items():
            pair = torch.stack([value.detach().double() for value in pair])
            self.pairs[name] = self.pairs.get(name, torch.zeros_like(pair)) + pair


def means(sums: Sums, counts: dict[str, float], ranks: Ranks) -> dict[str, float]:
    """Every term and metric, divided by its count; those that counted nothing are left out.

    An objective that counts otherwise than by the weights it is named after would have trained on a wrong mean.
    """
    out = {}
    for name, pair in sorted(sums.pairs.items()):
        total, count = ranks.total(pair).tolist()
        if name in counts and abs(count - counts[name]) > 1e-5 * counts[name]:
            raise ValueError(
                f"the objective counted {count:g} for term {name} but the weights of that name sum to "
                f"{counts[name]:g}; weights of tokens that cannot be targets (the first of a row) must be 0"
            )
        if count:
            out[name] = total / count
    return out


def over_updates(found: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over those that know it; of one update alone, what it told."""
    if len(found) == 1:
        return found[0]
    return {name: fmean(one[name] for one in found if name in one) for one in found for name in one}
