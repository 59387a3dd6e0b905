"""How processes share a model out.

    world = dp x cp x tp                the rows of a step, the tokens of a row, the heads, hidden units and words
    dense weights                       sharded over dp x cp (FSDP), cut over tp
    experts' weights                    cut over ep, which divides dp x cp x tp, and sharded over what is left of it
    replicas                            so many whole copies among dp; weights are sharded inside a copy only (HSDP)

Neighbouring ranks differ in tp first, then in cp, then in ep and dp.
"""

from __future__ import annotations

from dataclasses import dataclass

from nautilus.train.optim import setting


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Over how many processes each thing is shared out."""

    dp: int = setting(1, "processes, or groups of cp x tp of them, among which the rows of a step are dealt")
    ep: int = setting(1, "processes among which the experts are dealt; divides dp x cp x tp / replicas")
    tp: int = setting(1, "processes among which heads, hidden units and words are dealt")
    cp: int = setting(1, "processes among which the tokens of a row are dealt")
    replicas: int = setting(1, "whole copies of the weights; divides dp")

    def __post_init__(self):
        sizes = {"dp": self.dp, "ep": self.ep, "tp": self.tp, "cp": self.cp, "replicas": self.replicas}
        if bad := [f"layout.{name}={size}" for name, size in sizes.items() if size < 1]:
            raise ValueError(f"{', '.join(bad)}: every part of a layout is at least 1")
        if self.dp % self.replicas:
            raise ValueError(f"layout.replicas={self.replicas} does not divide layout.dp={self.dp}; make it a divisor")
        if self.shards * self.tp % self.ep:
            raise ValueError(
                f"layout.ep={self.ep} does not divide dp x cp x tp / replicas = {self.shards * self.tp}: experts are "
                f"dealt among the processes that share one copy; raise layout.dp or lower layout.ep"
            )

    @property
    def size(self) -> int:
        return self.dp * self.cp * self.tp

    @property
    def shards(self) -> int:
        """Among how many processes one copy of a dense weight is sharded."""
        return self.dp * self.cp // self.replicas
