"""How much of a draft will come true, where no predictor was trained: by what came true before, in the same request."""

from __future__ import annotations

from nautilus.serve.draft.suffix import Draft

PRIOR = (0.5, 0.7, 0.85, 0.9, 0.95)  # of a token after a match of 3, 6, 12 .. tokens, before any was tried
TRUST = 8.0  # tokens after which what was tried counts as much as PRIOR
BELIEF = 64.0  # tokens after which what became of a block's drafts counts as much as what it said of itself


class MatchTrust:
    """Of copied tokens after matches of each class:

        S(i) = p_i q^i

    p_i is the share of the places that go on so (`suffix.py`), q how often tokens after matches of about this length
    have come true; the fewer were tried, the nearer it is to PRIOR.
    """

    def __init__(self):
        self.tried, self.true = [0.0] * len(PRIOR), [0.0] * len(PRIOR)

    def survival(self, draft: Draft) -> list[float]:
        """The probability that its first, its first two .. tokens all come true."""
        rate, found, power = self.rate(draft.match), [], 1.0
        for prob in draft.probs:
            power *= rate
            found.append(prob * power)
        return found

    def rate(self, match: int) -> float:
        kind = kind_of(match)
        return (self.true[kind] + TRUST * PRIOR[kind]) / (self.tried[kind] + TRUST)

    def add(self, match: int, tried: int, accepted: int) -> None:
        kind = kind_of(match)
        self.tried[kind] += min(accepted + 1, tried)  # what stands behind the first wrong one says nothing
        self.true[kind] += accepted


class Belief:
    """How many of a block's drafted tokens come true for each that it expects to, by the probabilities it gives."""

    def __init__(self):
        self.expected = self.true = BELIEF

    def survival(self, probs: tuple[float, ...]) -> list[float]:
        found, power, scale = [], 1.0, min(1.0, self.true / self.expected)
        for prob in probs:
            power *= prob
            found.append(scale * power)
        return found

    def add(self, probs: tuple[float, ...], accepted: int) -> None:
        power = 1.0
        for prob in probs:
            power *= prob
            self.expected += power
        self.true += accepted


def kind_of(match: int) -> int:
    """Matches of 3 to 5, 6 to 11, 12 to 23 tokens, and so on."""
    return min(len(PRIOR) - 1, max(0, (match // 3).bit_length() - 1))
