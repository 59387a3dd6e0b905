"""How many tokens of a draft a model would accept, over texts that it has written. Letters: T positions, K steps.

Greedy verification accepts drafts as long as they are the tokens that the model writes itself. So its recorded answers
tell everything: from the last committed token on, count how many of the K drafts are the next tokens, and go on behind
them and the one token more that verification gives. A pass over the whole text has the chains of all places at once,
since a chain is looked at only up to its first wrong draft; see `unroll.py`.

    length = tokens gone over / places visited,   from 1 to K + 1: one token a pass is free
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from nautilus.posttrain.drafter import Drafter, NoDrafts
from nautilus.posttrain.own_text import Answer

RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Walk:
    """Through one text. `accepted` has for each visit how many drafts were right."""

    accepted: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.accepted) + len(self.accepted)


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """Of `drafts` drafts at a time. Intervals are 95 % bootstrap intervals over texts."""

    walks: tuple[Walk, ...]
    drafts: int

    @property
    def visits(self) -> int:
        return sum(len(walk.accepted) for walk in self.walks)

    @property
    def length(self) -> float:
        return sum(walk.tokens for walk in self.walks) / self.visits

    @property
    def interval(self) -> tuple[float, float]:
        return middle_95(resampled(self.walks))

    @property
    def reached(self) -> list[int]:
        """How many visits had all drafts up to depth 0, 1, 2, … right."""
        runs = np.concatenate([walk.accepted for walk in self.walks])
        return [int((runs >= depth).sum()) for depth in range(self.drafts + 1)]

    @property
    def by_depth(self) -> list[float]:
        """Of the drafts at depth 1, 2, … whose predecessors were all right, the share that was right; nan for none."""
        return [now / before if before else float("nan") for before, now in pairwise(self.reached)]


def middle_95(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def resampled(walks: Sequence[Walk]) -> np.ndarray:
    """The length for many draws of as many texts, with replacement; the same draws for as many texts."""
    index = np.random.default_rng(0).integers(len(walks), size=(RESAMPLES, len(walks)))
    counts = np.array([[each.tokens, len(each.accepted)] for each in walks])
    tokens, visits = counts[index].sum(1).T
    return tokens / np.maximum(visits, 1)


def gain(before: Acceptance, after: Acceptance) -> tuple[float, tuple[float, float]]:
    """after - before over the same texts, and its interval, text by text: narrower than the two apart would say."""
    return after.length - before.length, middle_95(resampled(after.walks) - resampled(before.walks))


def accepted(drafter: Drafter, answers: Sequence[Answer], drafts: int) -> Acceptance:
    """Over greedy answers of the drafter's model. NoDrafts where all are shorter than a draft."""
    walks = tuple(Walk(accepted=walk(right(drafter, answer, drafts), len(answer.prompt))) for answer in answers)
    if not any(found.accepted for found in walks):
        raise NoDrafts(
            f"{len(answers)} answers were given to measure drafts of {drafts} tokens on, none of them longer than "
            f"{drafts + 1}; give longer ones, or fewer drafts"
        )
    return Acceptance(walks=walks, drafts=drafts)


@torch.no_grad()
def right(drafter: Drafter, answer: Answer, drafts: int) -> Tensor:
    """right_TK: whether draft k from index t on is token t+k+1, for every t that has all of these and one more."""
    tokens_BT = torch.tensor([[*answer.prompt, *answer.tokens]])
    chains = max(0, tokens_BT.shape[1] - drafts - 2)
    feature_BTD, _ = drafter.read(tokens_BT)
    found = []
    for step, out_BTD in enumerate(drafter.steps(feature_BTD, tokens_BT, drafts), 1):
        found.append(drafter.guess(out_BTD[0, :chains]) == tokens_BT[0, step + 1 : step + 1 + chains])
    return torch.stack(found, dim=-1)


def walk(right_TK: Tensor, prompt: int) -> tuple[int, ...]:
    """From the first token after the prompt on, which reading gave: what each visit accepts. Chain t begins behind
    token t+1."""
    runs, found, at = right_TK.long().cumprod(-1).sum(-1).tolist(), [], prompt - 1
    while at < len(runs):
        found.append(runs[at])
        at += runs[at] + 1
    return tuple(found)
