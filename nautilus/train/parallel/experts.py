"""Experts dealt among ranks: tokens travel to their experts and back. Letters: R tokens of this rank, K active experts,
X the width that experts read and write, Z pairs of token and expert in the order in which they travel, E experts.

Only X-wide vectors travel, so in a LatentMoE only latent ones; the weighted sum is taken where the token came from.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nautilus.model.moe import ExpertsMixer, ExpertWeights
from nautilus.ops.experts import experts
from nautilus.runtime import UserError
from nautilus.train.parallel.cuts import Cut, keep_piece
from nautilus.train.parallel.travel import Exchange, exchanged

MATRICES = ("up_proj", "down_proj", "gate_proj")


class DealtExperts(nn.Module):
    """`ExpertWeights` of which this rank holds the experts first .. first + own - 1."""

    up_proj: nn.Parameter
    down_proj: nn.Parameter
    gate_proj: nn.Parameter | None
    site = None  # few bits would need the scales of all ranks

    def __init__(self, whole: ExpertWeights, cut: Cut):
        super().__init__()
        self.group, self.ranks = cut.mesh[cut.axis].get_group(), cut.parts
        for name in MATRICES:
            self.register_parameter(name, getattr(whole, name))
            if getattr(self, name) is not None:
                keep_piece(self, name, cut)

    def forward(self, x_RX: Tensor, index_RK: Tensor, weight_RK: Tensor) -> Tensor:
        own, active = len(self.up_proj), index_RK.shape[1]
        order_Z = index_RK.flatten().argsort(stable=True)
        sent_NE = index_RK.flatten().bincount(minlength=own * self.ranks).view(self.ranks, own)
        got_NE = exchanged(sent_NE, None, None, self.group)
        sent, got = sent_NE.sum(1).tolist(), got_NE.sum(1).tolist()
        arrived_ZX = Exchange.apply(x_RX[order_Z // active], sent, got, self.group)
        expert_Z = torch.arange(own, device=x_RX.device).repeat(self.ranks).repeat_interleave(got_NE.flatten())
        one_Z1 = weight_RK.new_ones(len(expert_Z), 1)
        y_ZX = experts(arrived_ZX, expert_Z[:, None], one_Z1, self.up_proj, self.down_proj, self.gate_proj)
        back_ZX = Exchange.apply(y_ZX, got, sent, self.group)
        y_RKX = back_ZX[order_Z.argsort()].unflatten(0, index_RK.shape)
        return (y_RKX.to(weight_RK.dtype) * weight_RK[..., None]).sum(1).to(x_RX.dtype)


def deal_experts(mixer: ExpertsMixer, name: str, cut: Cut) -> dict[str, Cut]:
    """Leaves this rank's experts in a mixer, and gives the cuts by parameter name."""
    if mixer.layer.experts % cut.parts:
        raise UserError(
            f"layout.ep={cut.parts} does not divide the {mixer.layer.experts} experts of {name}; choose a divisor"
        )
    mixer.experts = DealtExperts(mixer.experts, cut)  # type: ignore[assignment]
    return {f"{name}.experts.{key}": cut for key, _ in mixer.experts.named_parameters()}
