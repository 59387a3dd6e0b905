"""Drafters learn from the model that they draft for, on text of its own; it stays as it is. Letters: B rows, T time,
R positions, K steps.

    L = T^2 sum_k c_k mean over answer tokens of KL(softmax(z(t+k) / T) || softmax(z_k(t) / T)) / sum_k c_k

z_k(t) are the drafter's logits at step k of the chain at index t (see `unroll.py`), z(t+k) the model's own for the same
token. Whole distributions are compared; no token that was drawn is a target.

Boosting of a multi-token-prediction block (report of Nemotron 3 Ultra): T = 2, K = 7, c_k = 1, and what step k is fed
with is drawn from the outputs of all steps before it, so that the block learns from its own outputs at several depths.
How these are lined up is ours: by token, so step j of the chain that began k-1-j tokens later gives the feature of the
same token. By index, an output for an earlier token beside the embedding of a later one, a toy came to accept fewer
greedy drafts.

A draft head in the manner of EAGLE-3 (arXiv 2503.01840): T = 1, K = 7, c_k = 0.8^(k-1), each step is fed with the one
before it; both distributions are over the words of the head alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from nautilus.data.batch import Batch
from nautilus.data.mix import number_of
from nautilus.posttrain.drafter import Drafter
from nautilus.posttrain.unroll import Feed, latest
from nautilus.train.objective import Objective, Pairs, depth_weights

TERM = "divergence"


def boosting(*, steps: int = 7, temperature: float = 2.0, seed: int = 0) -> Objective:
    return distillation([1.0] * steps, temperature=temperature, seed=seed)


def unrolled(steps: int = 7) -> Objective:
    return distillation([0.8**k for k in range(steps)], temperature=1.0, seed=None)


def most_used(batch: Batch, words: int, vocabulary: int) -> Tensor:
    """The words that answers use most, rising; of words that are used alike those with the smaller number."""
    used_V = torch.bincount(batch.tokens[batch.weights["next_token"] > 0], minlength=vocabulary)
    return used_V.argsort(descending=True, stable=True)[:words].sort().values


def distillation(coefficients: Sequence[float], *, temperature: float, seed: int | None) -> Objective:
    """coefficients: c_k, one for each step. seed: of what steps are fed with; None: each with the one before it."""
    weigh = partial(answer_weights, coefficients=coefficients)
    terms = partial(divergence_terms, coefficients=coefficients, temperature=temperature, seed=seed)
    return Objective(terms, {TERM: temperature**2}, weigh)  # type: ignore[arg-type]


def answer_weights(batch: Batch, *, coefficients: Sequence[float]) -> Batch:
    """The weight of each token as a target of all steps together."""
    parts = [c * depth_weights(batch, k) for k, c in enumerate(coefficients, 1)]
    return dataclasses.replace(batch, weights=batch.weights | {TERM: torch.stack(parts).sum(0)})


def divergence_terms(
    drafter: Drafter, batch: Batch, *, coefficients: Sequence[float], temperature: float, seed: int | None
) -> tuple[Pairs, Pairs]:
    """The divergence, and for people that of each step (`step_1`, …)."""
    feed = latest if seed is None else drawn(number_of(seed, batch.fingerprint))
    feature_BTD, last_BTD = drafter.read(batch.tokens, batch.document)
    outs = drafter.steps(feature_BTD, batch.tokens, len(coefficients), batch.document, feed)
    # Row t is for token t+2, the first that a draft can be: step k predicts it from index t+1-k.
    student_KR = [delayed(out_BTD[:, : -(k + 1)], k - 1).flatten(0, 1) for k, out_BTD in enumerate(outs, 1)]
    weights = [c * depth_weights(batch, k)[:, 2:] for k, c in enumerate(coefficients, 1)]
    weight_KR = torch.stack(weights).flatten(1)
    total, total_K = drafter.divergence(
        torch.stack(student_KR), last_BTD[:, 1:-1].flatten(0, 1), weight_KR, temperature=temperature
    )
    watched = {f"step_{k}": pair for k, pair in enumerate(zip(total_K, weight_KR.sum(1), strict=True), 1)}
    return {TERM: (total, weight_KR.sum())}, watched


def delayed(out_BTD: Tensor, before: int) -> Tensor:
    return functional.pad(out_BTD, (0, 0, before, 0))


def drawn(seed: int) -> Feed:
    """For each chain one of the outputs so far for the same token, each as likely."""
    generator = torch.Generator().manual_seed(seed & (1 << 63) - 1)

    def feed(outs: list[Tensor]) -> Tensor:
        choice_BT = torch.randint(len(outs), outs[0].shape[:2], generator=generator).to(outs[0].device)
        later = [(len(outs) - step, out_BTD) for step, out_BTD in enumerate(outs, 1)]
        same = [functional.pad(out_BTD[:, by:], (0, 0, 0, min(by, out_BTD.shape[1]))) for by, out_BTD in later]
        return torch.stack(same).gather(0, choice_BT[None, ..., None].expand(1, *outs[0].shape))[0]

    return feed
