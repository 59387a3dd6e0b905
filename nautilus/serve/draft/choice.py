"""Which draft is tried, and how many tokens of it: what gives most tokens in a second.

An action drafts L tokens for T(L) seconds and verifies them in a pass over 1 + L tokens, for C(1 + L) seconds. Expected
are one token and those that come true, so its rate is

    R = (1 + S(1) + .. + S(L)) / (T(L) + C(1 + L))

S(i), the survival, is the probability that the first i tokens all come true. A plain step has L = 0. The rule of Hybrid
Verified Decoding (arXiv 2606.01019) is `whole_or_not`: it verifies all of a draft from which more than six tokens are
expected. That suits machines on which a pass over 64 tokens costs hardly more than one over one; on sparse models on
CPUs it costs twenty times as much. Nothing here looks at a clock: what is chosen depends on what is given.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

Cost = Callable[[int], float | None]  # seconds by tokens; None where that is not known

GRID = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # lengths at which pay-off is known, and numbers of tokens tried
GAIN = 1.03  # more than a plain step by so much, or it is not tried; so much more than the arm before, or it stays
TAU = 6.0  # expected tokens above which the paper's rule verifies


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What an arm could draft. survival[i]: the probability that its first i + 1 tokens all come true; lengths: those
    that may be tried; seconds: of drafting so many tokens, 0 for one that is drafted already."""

    arm: str
    survival: Sequence[float]
    lengths: Sequence[int] = GRID
    seconds: Cost = lambda tokens: 0.0


@dataclass(frozen=True, kw_only=True)
class Choice:
    """So many draft tokens of an arm. rate: tokens per second that are expected, 0 where costs are not known."""

    arm: str = "plain"
    tokens: int = 0
    rate: float = 0.0


PLAIN = Choice()


def on_grid(most: int) -> int:
    """The largest of GRID that is not above this one, which is at least 1."""
    return max(size for size in GRID if size <= most)


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Draft tokens of each request that have one pass together, and the tokens per second expected of it."""

    tokens: tuple[int, ...]
    rate: float = 0.0


def choose(offers: Sequence[Offer], cost: Cost, *, before: str = "plain", gain: float = GAIN) -> Choice:
    """The action of the largest rate; of equal ones that of fewer tokens, then of the earlier offer.

    cost: of a pass by its tokens. Actions whose costs are not known are not considered, those that do not have `gain`
    times the rate of a plain step neither. The arm of the cycle before is left for `gain` times its rate only.
    """
    known = cost(1)
    if not known:
        return Choice()
    plain = Choice(rate=1 / known)
    actions = [plain, *(one for offer in offers for one in actions_of(offer, cost) if one.rate > gain * plain.rate)]
    best = max(actions, key=order)
    stay = max((one for one in actions if one.arm == before), key=order, default=best)
    return best if best.rate > gain * stay.rate else stay


def order(action: Choice) -> tuple[float, int]:
    return action.rate, -action.tokens


def actions_of(offer: Offer, cost: Cost) -> Iterator[Choice]:
    expected = [*accumulate(offer.survival, initial=1.0)]
    for tokens in offer.lengths:
        if tokens >= len(expected):
            continue
        drafting, verifying = offer.seconds(tokens), cost(1 + tokens)
        if drafting is not None and verifying:
            yield Choice(arm=offer.arm, tokens=tokens, rate=expected[tokens] / (drafting + verifying))


def whole_or_not(expected: float, length: int, *, otherwise: Choice, tau: float = TAU) -> Choice:
    """The rule of the paper: all of a copied draft if more than tau of its tokens are expected to come true."""
    return Choice(arm="cache", tokens=length) if expected > tau else otherwise


def share_out(survivals: Sequence[Sequence[float]], cost: Cost, *, most: int = 1 << 30, gain: float = GAIN) -> Shares:
    """Draft tokens of several requests that share one pass, whose cost depends on all of its tokens together.

    survivals: of each request's draft, none where it has no draft; cost: of a pass, by the tokens of all requests;
    most: draft tokens together. Of so many draft tokens the most probable ones are best: each of the B requests gives
    one token and those that come true. Their number is the one that makes

        (B + sum of their survivals) / C(B + their number)

    largest, of equal ones the smaller; it is one of GRID, as a pass of each size is prepared before it is fast. None
    are tried where that is not `gain` times what plain steps give.
    """
    rows, known = len(survivals), cost(len(survivals))
    plain = Shares(tokens=(0,) * rows, rate=rows / known if known else 0.0)
    if not known:
        return plain
    ranked, expected, best, chosen = list(in_order(survivals)), float(rows), gain * plain.rate, 0
    for slots, (survival, _) in enumerate(ranked[:most], 1):
        expected += survival
        seconds = cost(rows + slots) if slots in GRID else None
        if seconds and expected / seconds > best:
            best, chosen = expected / seconds, slots
    if not chosen:
        return plain
    tokens = [0] * rows
    for _, row in ranked[:chosen]:
        tokens[row] += 1
    return Shares(tokens=tuple(tokens), rate=best)


def in_order(survivals: Sequence[Sequence[float]]) -> Iterator[tuple[float, int]]:
    """(survival, request) of every draft token, the most probable first; of one draft never the later token first."""
    falling = [[(-value, row) for value in accumulate(values, min)] for row, values in enumerate(survivals)]
    return ((-value, row) for value, row in heapq.merge(*falling))
