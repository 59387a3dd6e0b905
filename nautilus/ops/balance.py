"""The sequence-level load-balancing loss of a router. Letters: B sequences, T time, E experts."""

from __future__ import annotations

import torch
from torch import Tensor

from nautilus.ops.shapes import checked


@checked
def sequence_balance_loss(score_BTE: Tensor, active: int, valid_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(sum over sequences of E * sum_i f_i P_i, number of sequences).

    f_i: share of the T*K assignments that go to expert i, counted by top-K of the *unbiased* scores; P_i: mean over
    tokens of s_i / sum(s). Balanced routing gives 1. Gradient flows through P only (arXiv 2101.03961; the
    sequence-level form of Megatron-LM).
    """
    experts = score_BTE.shape[-1]
    weight_BT1 = torch.ones_like(score_BTE[..., :1]) if valid_BT is None else valid_BT[..., None].to(score_BTE.dtype)
    tokens_B1 = weight_BT1.sum(1).clamp_min(1)
    chosen = torch.zeros_like(score_BTE).scatter_(-1, score_BTE.detach().topk(active, dim=-1).indices, 1.0)
    f_BE = (chosen * weight_BT1).sum(1) / (tokens_B1 * active)
    p_BE = (score_BTE / score_BTE.sum(-1, keepdim=True).clamp_min(1e-20) * weight_BT1).sum(1) / tokens_B1
    sequences = (weight_BT1.sum(1) > 0).sum().to(score_BTE.dtype)
    return experts * (f_BE * p_BE).sum(), sequences
