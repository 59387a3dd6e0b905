"""One token from the logits of one position. Letters: B requests, V vocabulary, K candidates that pass the filters.

    rules         those of the request, one after another; if one forces a token, that is taken and nothing drawn
    temperature   p = softmax(logits / temperature); 0 means greedy: the most probable token, always
    top-k         the k most probable tokens
    top-p         of those, the fewest most probable ones that hold at least the share p of their mass
    min-p         of those, the ones at least min_p times as probable as the most probable one
    draw          one of those, in proportion to p

in this order. Among equally probable tokens the one with the lower id comes first. The log-probs that are told are the
model's own, before all of it. The random number of a draw depends on the request's seed and on the token's position in
its context only: neither the other requests of a batch, nor where a text was cut and resumed, change what is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nautilus.ops.draw import draw as sampled
from nautilus.ops.draw import place, uniform, weights
from nautilus.ops.peak import peak
from nautilus.runtime import UserError
from nautilus.serve.rules import Rule
from nautilus.serve.sampling import Sampling

POOL = 1024  # candidates looked at first under top-p alone: sorting all of 131,072 logits takes 11 ms, of these 0.4 ms


class BrokenLogits(UserError):
    """The model's fault, and of whoever runs it: not of who asked."""


class Drawn(NamedTuple):
    """The token, its log-prob, and the most probable tokens with theirs, as many as were asked for, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def draw(
    logits_BV: Tensor,
    samplings: Sequence[Sampling],
    positions: Sequence[int],
    rules: Sequence[Sequence[Rule]] | None = None,
) -> list[Drawn]:
    """For each request the token that stands at its position, and the log-prob the model itself (before rules,
    temperature and filters) gives that token. None depends on its neighbours.

    rules: those of each request; they are asked, and not told what was drawn.
    """
    each = [()] * len(samplings) if rules is None else rules
    rows = drawn_ahead(looked_at(logits_BV), samplings, positions, each)
    return [draw_one(*row) for row in zip(rows, samplings, positions, each, strict=True)]


class Logits(NamedTuple):
    """Of one position. best: the most probable token; total: log sum exp of all logits; drawn: the token that stands
    there, where it is known already."""

    logits_V: Tensor
    best: int
    total: float
    drawn: int | None = None

    def logprob(self, token: int) -> float:
        return float(self.logits_V[token]) - self.total


def looked_at(logits_BV: Tensor) -> list[Logits]:
    logits_BV = logits_BV.detach()
    best_B, total_B = peak(logits_BV)
    return [*map(Logits, logits_BV.cpu().unbind(), best_B.tolist(), total_B.tolist())]


def drawn_ahead(
    rows: Sequence[Logits],
    samplings: Sequence[Sampling],
    positions: Sequence[int],
    rules: Sequence[Sequence[Rule]],
) -> list[Logits]:
    """With the tokens of all requests that are drawn by temperature alone, which takes one call for all."""
    found = [*rows]
    each = zip(rows, samplings, rules, strict=True)
    places = [at for at, (row, sampling, some) in enumerate(each) if plainly(sampling, some) and row.total == row.total]
    if places:
        mine = [found[at] for at in places]
        how = [samplings[at] for at in places]
        tokens = sampled(
            [row.logits_V for row in mine],
            [row.best for row in mine],
            [one.temperature for one in how],
            [one.seed for one in how],
            [positions[at] for at in places],
        )
        for at, row, token in zip(places, mine, tokens, strict=True):
            found[at] = Logits(row.logits_V, row.best, row.total, token)
    return found


def plainly(sampling: Sampling, rules: Sequence[Rule]) -> bool:
    """By temperature, without filters, and without a rule that changes a logit."""
    if not sampling.temperature or sampling.top_k or sampling.top_p != 1 or sampling.min_p:
        return False
    return not rules or all(type(rule).change is Rule.change for rule in rules)


def draw_one(logits: Logits, sampling: Sampling, position: int, rules: Sequence[Rule] = ()) -> Drawn:
    """BrokenLogits where the logits are no numbers; UserError where the rules leave no token."""
    if math.isnan(logits.total):
        raise BrokenLogits(
            f"token {position} was asked for, but the model's logits hold NaN or infinity there; its weights are "
            "broken or its number format overflows: load an earlier checkpoint or a wider format"
        )
    token = next((token for rule in reversed(rules) if (token := rule.forced()) is not None), None) if rules else None
    if token is None and not rules and not sampling.temperature:
        token = logits.best
    if token is None and logits.drawn is None and plainly(sampling, rules):
        (logits,) = drawn_ahead([logits], [sampling], [position], [rules])
    if token is None:
        token = logits.drawn
    if token is None:
        token = chosen(logits.logits_V.double(), sampling, position, rules)
    return told(logits, token, sampling.top_logprobs)


def told(logits: Logits, token: int, tops: int) -> Drawn:
    """What is told of a token where these are the logits."""
    best = [] if not tops else [logits.best] if tops == 1 else ranked(logits.logits_V, tops)[:tops].tolist()
    return Drawn(token, logits.logprob(token), tuple((id, logits.logprob(id)) for id in best))


def highest(logits_V: Tensor) -> int:
    """Of several equal ones the first; of NaN and anything, NaN. torch finds the same, six times slower."""
    return int(logits_V.numpy().argmax())


def chosen(logits_V: Tensor, sampling: Sampling, position: int, rules: Sequence[Rule]) -> int:
    """Of the candidates by id."""
    for rule in rules:
        logits_V = rule.change(logits_V)
    if rules and logits_V.max() == -math.inf:
        names = ", ".join(type(rule).__name__ for rule in rules)
        raise UserError(
            f"token {position} was asked for, but the request's rules ({names}) bar every token there; loosen one"
        )
    id_K, probs_K = candidates(logits_V, sampling)
    return int(id_K[place(probs_K, uniform(sampling.seed, position))])


def candidates(logits_V: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The ids that may be drawn, ascending, and their weights (float64, proportional to the probabilities)."""
    if sampling.temperature == 0:
        return torch.tensor([highest(logits_V)]), torch.ones(1, dtype=torch.float64)
    probs_V = weights(logits_V, sampling.temperature)
    if not sampling.top_k and sampling.top_p == 1 and not sampling.min_p:
        return torch.arange(len(probs_V)), probs_V
    id_K = kept(probs_V, sampling)
    return id_K, probs_V[id_K]


def kept(probs_V: Tensor, sampling: Sampling) -> Tensor:
    """The ids that pass the filters, ascending."""
    if not sampling.top_k and sampling.top_p == 1:
        return (probs_V >= sampling.min_p * probs_V.max()).nonzero()[:, 0]
    size = sampling.top_k or POOL
    id_K = ranked(probs_V, size)
    mass = 1.0
    if sampling.top_k:
        id_K = id_K[:size]
        mass = probs_V[id_K].sum()
    else:
        while size < len(probs_V) and probs_V[id_K].sum() < sampling.top_p:
            size *= 16
            id_K = ranked(probs_V, size)
    probs_K = probs_V[id_K]
    before_K = probs_K.cumsum(0).roll(1)
    before_K[0] = 0
    passes_K = probs_K >= sampling.min_p * probs_K[0]
    if sampling.top_p < 1:
        passes_K &= before_K < sampling.top_p * mass
    return id_K[passes_K].sort().values


def ranked(probs_V: Tensor, size: int) -> Tensor:
    """Ids of the `size` most probable tokens and of all as probable as the last: most probable first, then by id."""
    if size >= len(probs_V):
        return probs_V.sort(descending=True, stable=True).indices
    probs, place = probs_V.numpy(), len(probs_V) - size
    pool_K = torch.from_numpy((probs >= np.partition(probs, place)[place]).nonzero()[0])
    return pool_K[probs_V[pool_K].sort(descending=True, stable=True).indices]
