"""Better and worse answers to one problem, as rows for direct preference optimisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from nautilus.data.batch import Batch
from nautilus.model.language import Language
from nautilus.posttrain.rollout import Rollout
from nautilus.posttrain.stream import Group, batch_of
from nautilus.train.policy import drawn_logprob

Pair = tuple[Rollout, Rollout]


def pairs_of(groups: Sequence[Group]) -> list[Pair]:
    """Of each group its best and its worst answer, where they differ."""
    found = []
    for group in groups:
        ranked = sorted(group.rollouts, key=lambda one: one.verdict.reward)
        if len(ranked) > 1 and ranked[0].verdict.reward < ranked[-1].verdict.reward:
            found.append((ranked[-1], ranked[0]))
    return found


def pair_batches(pairs: Sequence[Pair], reference: Language, *, tokens: int, pad: int) -> list[Batch]:
    """Micro-batches of at most so many tokens, padding included (at least a pair each); see `preference`."""
    found, part = list[Batch](), list[Pair]()
    for pair in sorted(pairs, key=longest):
        if part and 2 * (len(part) + 1) * longest(pair) > tokens:
            found.append(pair_batch(part, reference, pad))
            part = []
        part.append(pair)
    return [*found, pair_batch(part, reference, pad)] if part else found


def longest(pair: Pair) -> int:
    return max(len(one.tokens) for one in pair)


@torch.no_grad()
def pair_batch(pairs: Sequence[Pair], reference: Language, pad: int) -> Batch:
    batch = batch_of([(one, sign) for pair in pairs for one, sign in zip(pair, (1.0, -1.0), strict=True)], pad)
    drawn_BT = batch.weights["policy"]
    sign_B1 = torch.tensor([1.0, -1.0] * len(pairs))[:, None]
    chosen_BT = drawn_BT * (sign_B1 > 0)
    first_BT = torch.zeros_like(drawn_BT)
    rows = torch.arange(0, len(batch), 2)
    first_BT[rows, drawn_BT[rows].argmax(1)] = 1
    scored = drawn_logprob(reference, batch, "policy")
    weights = {"preference": first_BT, "next_token": chosen_BT}
    return replace(batch, weights=weights, advantage=drawn_BT * sign_B1, teacher_logprob=scored)
