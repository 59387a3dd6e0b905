"""What a service is doing now and what its drafts have come to, for monitors and for those who choose among several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

from nautilus.serve.draft.proposal import Counts
from nautilus.serve.engine import Engine


@dataclass(frozen=True, kw_only=True)
class Load:
    """pages: share of the pages of keys and values that are held. arms: what drafts of each source have come to; None
    where the engine makes none."""

    running: int
    waiting: int
    waiting_tokens: int
    slots: int
    pages: float
    preempted: int
    steps: int
    arms: Mapping[str, Counts] | None = None

    @property
    def drafts(self) -> int | None:
        return self.over_arms("drafts")

    @property
    def draft_tokens(self) -> int | None:
        return self.over_arms("drafted")

    @property
    def accepted_tokens(self) -> int | None:
        return self.over_arms("accepted")

    def over_arms(self, name: str) -> int | None:
        return None if self.arms is None else sum(getattr(counts, name) for counts in self.arms.values())


def together(loads: Sequence[Load]) -> Load:
    """Of several engines as one; pages: the mean of theirs."""
    names = [one.name for one in fields(Load) if one.name != "arms"]
    total = {name: sum(getattr(load, name) for load in loads) for name in names}
    arms: dict[str, Counts] = {}
    for told in filter(None, (load.arms for load in loads)):
        for source, counts in told.items():
            sums = arms.setdefault(source, Counts())
            for name, value in vars(counts).items():
                setattr(sums, name, getattr(sums, name) + value)
    drafting = any(load.arms is not None for load in loads)
    return Load(**{**total, "pages": total["pages"] / max(1, len(loads)), "arms": arms if drafting else None})


def arms_of(engine: Engine) -> dict[str, Counts] | None:
    """Copies, which may be read while the engine goes on."""
    if engine.speculation is None:
        return None
    return {source: replace(one) for source, one in engine.speculation.counts.items()}
