"""The sequence-level load-balancing loss of a router. Letters: B sequences, T time, E experts, K active experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nautilus.ops.shapes import checked


@checked
def sequence_balance_loss(
    score_BTE: Tensor,
    active: int,
    valid_BT: Tensor | None = None,
    *,
    over_row: Callable[[Tensor], Tensor] = lambda counts: counts,
) -> tuple[Tensor, Tensor]:
    """(sum over sequences of E * sum_i f_i P_i, number of sequences).

    f_i: share of the T*K assignments that go to expert i, counted by top-K of the *unbiased* scores; P_i: mean over
    tokens of s_i / sum(s). Balanced routing gives 1. Gradient flows through P only (arXiv 2101.03961; the
    sequence-level form of Megatron-LM). Tokens where `valid_BT` is 0 do not exist, nor does a row of such tokens.
    over_row: adds counts up over the processes that hold one row's tokens; each then gives its share of the sum.
    """
    counts_BE, total_BE, tokens_B = balance_parts(score_BTE, active, valid_BT)
    loss, _ = balance_of(over_row(counts_BE), total_BE, over_row(tokens_B), active)
    return loss, (tokens_B > 0).sum().to(score_BTE.dtype)


def balance_parts(score_BTE: Tensor, active: int, valid_BT: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Of a piece of each sequence: assignments counts_BE, sum of s / sum(s) total_BE, tokens_B. Pieces add up."""
    batch, time, _ = score_BTE.shape
    weight_BT = score_BTE.new_ones(batch, time) if valid_BT is None else valid_BT.to(score_BTE.dtype)
    index_BTK = score_BTE.detach().topk(active, dim=-1, sorted=False).indices
    counts_BE = torch.zeros_like(score_BTE[:, 0]).detach()
    counts_BE.scatter_add_(1, index_BTK.flatten(1), weight_BT.repeat_interleave(active, dim=1))
    share_BTE = score_BTE / score_BTE.sum(-1, keepdim=True).clamp_min(1e-20)
    return counts_BE, torch.einsum("bte,bt->be", share_BTE, weight_BT), weight_BT.sum(1)


def balance_of(counts_BE: Tensor, total_BE: Tensor, tokens_B: Tensor, active: int) -> tuple[Tensor, Tensor]:
    """`sequence_balance_loss` of the added-up parts."""
    tokens_B1 = tokens_B[:, None].clamp_min(1)
    f_BE, p_BE = counts_BE / (tokens_B1 * active), total_BE / tokens_B1
    return counts_BE.shape[1] * (f_BE * p_BE).sum(), (tokens_B > 0).sum().to(total_BE.dtype)
