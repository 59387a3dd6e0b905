"""What could be drafted for a request, and what is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nautilus.serve.draft.chain import Foretold
from nautilus.serve.draft.choice import GRID, Offer
from nautilus.serve.draft.copies import Copied
from nautilus.serve.draft.costs import Costs

SOURCES = ("plain", "cache", "mtp", "eagle", "grammar")  # of tokens
DEEPEST = 8  # tokens of a block's draft at most


@dataclass
class Counts:
    """Passes with a draft, tokens of them, and how many came true."""

    drafts: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """Tokens to try. copied, foretold: where they come from; whole: tokens that the draft had before it was cut."""

    source: str
    tokens: tuple[int, ...]
    whole: int
    copied: Copied | None = None
    foretold: Foretold | None = None


PLAIN = Proposal(source="plain", tokens=(), whole=0)


@dataclass(kw_only=True)
class Candidate:
    """What a source offers for the next tokens of a request; tokens are not there yet where a block drafts them. late:
    seconds that a draft has to make up for, of what the block has yet to be told."""

    source: str
    survival: Sequence[float]
    tokens: tuple[int, ...] = ()
    copied: Copied | None = None
    late: float = 0.0

    def seconds(self, drafting: Costs, size: int) -> float | None:
        """Of drafting so many tokens."""
        if self.tokens:
            return 0.0
        found = drafting.of(size)
        return None if found is None else found + self.late

    def offer(self, drafting: Costs, look: float = 0.0) -> Offer:
        """look: seconds in which it was found. A draft has to pay for them too, or the next look had better wait."""

        def seconds(size: int) -> float | None:
            found = self.seconds(drafting, size)
            return None if found is None else found + look

        lengths = GRID if self.tokens else range(1, DEEPEST + 1)
        return Offer(arm=self.source, survival=self.survival, lengths=lengths, seconds=seconds)
