"""What became of the drafts of a request so far: by cycle, and by depth of a model's drafts."""

from __future__ import annotations

from collections import deque

NEWEST = (1 << 64) - 1  # cycles of which it is known whether a copied draft was tried
USES = 8  # of copied drafts, whose shares that came true are known
LATELY = 0.1  # weight of a new draft of the model in the average of those before
TRUST = 8.0  # drafts of a request after which its own depths count half, beside those of all requests
PRIOR = 0.7  # share of a model's draft tokens that come true, before any is known
FADE = 0.995  # of counts, with every draft


class History:
    """The latest cycles of one request. Arms: "plain", "cache" for a copied draft, any other name for a model's."""

    def __init__(self):
        self.chosen = 0  # a bit for each cycle, the latest lowest: whether a copied draft was tried
        self.accepted = (0, 0, 0, 0)  # draft tokens that came true in the latest cycles, the latest first
        self.shares: deque[float] = deque(maxlen=USES)
        self.since = 0  # tokens since one of a copied draft was wrong, or since the beginning
        self.first = PRIOR  # how often the first token of a model's draft comes true, lately
        self.trimmed = False

    def add(self, arm: str, drafted: int, accepted: int, *, trimmed: bool = False) -> None:
        """A cycle has ended. drafted: tokens that were tried; trimmed: the draft had more of them."""
        self.chosen = (self.chosen << 1 | (arm == "cache")) & NEWEST
        self.accepted = (accepted, *self.accepted[:3])
        self.since += accepted + 1
        if arm == "cache":
            self.shares.append(accepted / drafted)
            self.since = self.since if accepted == drafted else 0
        elif drafted:
            self.first += LATELY * ((accepted > 0) - self.first)
        self.trimmed = trimmed


class Depths:
    """How often the token at each depth of a model's drafts comes true, where those before it did.

    The counts of one request are added to TRUST drafts of `above`, those of all requests; old ones fade."""

    def __init__(self, most: int, above: Depths | None = None):
        self.above = above
        self.reached, self.true = [0.0] * most, [0.0] * most

    def add(self, drafted: int, accepted: int) -> None:
        for depth in range(len(self.reached)):
            self.reached[depth] = FADE * self.reached[depth] + (depth <= accepted and depth < drafted)
            self.true[depth] = FADE * self.true[depth] + (depth < accepted)
        if self.above is not None:
            self.above.add(drafted, accepted)

    def shares(self) -> list[float]:
        before = [PRIOR] * len(self.reached) if self.above is None else self.above.shares()
        return [
            (true + TRUST * share) / (reached + TRUST)
            for true, reached, share in zip(self.true, self.reached, before, strict=True)
        ]

    def survival(self) -> list[float]:
        """The probability that the first, the first two .. tokens of the next draft all come true."""
        found, all_true = [], 1.0
        for share in self.shares():
            all_true *= share
            found.append(all_true)
        return found
