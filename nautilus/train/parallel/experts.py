"""Experts dealt among ranks: tokens travel to their experts and back. Letters: R tokens of this rank, K active experts,
X the width that experts read and write, Z pairs of token and expert in the order in which they travel, E experts.

Only X-wide vectors travel, so in a LatentMoE only latent ones; the weighted sum is taken where the token came from.

`peers` are ranks with the same tokens (layout.tp). Each takes its share of them to whole experts. In few bits, where
scales are those of all rows of an expert, each takes all tokens to its share of the experts instead, and outputs are
added up; rows of different ranks are products of their own, so that numbers are those of one process that has the same
micro-batches.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nautilus.model.moe import ExpertsMixer, ExpertWeights
from nautilus.ops.experts import experts, sort_pairs
from nautilus.ops.low_precision import BLOCK, Gather, How, Spread, low_groups
from nautilus.runtime import UserError
from nautilus.train.parallel.cuts import Cut, keep_piece
from nautilus.train.parallel.travel import Collect, Deal, Enter, Exchange, Leave, exchanged

MATRICES = ("up_proj", "down_proj", "gate_proj")


class DealtExperts(ExpertWeights):
    """`ExpertWeights` of which this rank holds the experts first .. first + own - 1."""

    def __init__(self, whole: ExpertWeights, cut: Cut):
        nn.Module.__init__(self)  # its matrices are there already
        self.group, self.ranks = cut.mesh[cut.axis].get_group(), cut.parts
        self.site, self.input_scales = None, {}
        self.peers: dist.ProcessGroup | None = None
        for name in MATRICES:
            self.register_parameter(name, getattr(whole, name))
            if getattr(self, name) is not None:
                keep_piece(self, name, cut)

    def forward(self, x_RX: Tensor, index_RK: Tensor, weight_RK: Tensor) -> Tensor:
        if (how := self.how) is not None:
            return self.in_few_bits(x_RX, index_RK, weight_RK, how)
        if self.peers is None:
            return self.there_and_back(x_RX, index_RK, weight_RK)
        dealt = (Deal.apply(tensor, self.peers) for tensor in (x_RX, index_RK, weight_RK))
        return Collect.apply(self.there_and_back(*dealt), len(x_RX), self.peers)  # type: ignore[return-value]

    def there_and_back(self, x_RX: Tensor, index_RK: Tensor, weight_RK: Tensor) -> Tensor:
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

    def in_few_bits(self, x_RX: Tensor, index_RK: Tensor, weight_RK: Tensor, how: How) -> Tensor:
        """As `low_experts`, to the bit: whole groups travel, filled up to blocks already."""
        own, place = len(self.up_proj), x_RX.device
        pairs = sort_pairs(index_RK, weight_RK, own * self.ranks, BLOCK)
        x_ZX = Spread.apply(x_RX.to(torch.bfloat16), pairs.place_RK, len(pairs.token_Z))
        begin, end = self.share(pairs.counts)
        sent_E = torch.tensor(pairs.counts, device=place)
        mine_E = torch.arange(len(sent_E), device=place)
        sent_NE = torch.where((mine_E >= begin[0]) & (mine_E < end[0]), sent_E, 0).view(self.ranks, own)
        row_N1 = torch.full((self.ranks, 1), how.row, device=place)
        got_NE, from_N1 = exchanged(torch.cat([sent_NE, row_N1], 1), None, None, self.group).split([own, 1], 1)
        sent, got = sent_NE.sum(1).tolist(), got_NE.sum(1).tolist()
        x_ZX = x_ZX if self.peers is None else Enter.apply(x_ZX, self.peers)[begin[1] : end[1]]  # type: ignore[index]
        arrived = Exchange.apply(x_ZX, sent, got, self.group).split(got)  # type: ignore[union-attr]
        first = own * self.group.rank()
        hows = [dataclasses.replace(how, row=row, group=first) for row in from_N1.flatten().tolist()]
        matrices = self.up_proj, self.down_proj, self.gate_proj
        done = [low_groups(x, c, *matrices, h) for x, c, h in zip(arrived, got_NE.tolist(), hows, strict=True)]
        y_ZX = Exchange.apply(torch.cat(done), got, sent, self.group)
        if self.peers is not None:
            around = (0, 0, begin[1], len(pairs.token_Z) - end[1])
            y_ZX = Leave.apply(nn.functional.pad(y_ZX, around), self.peers)  # type: ignore[arg-type]
        return Gather.apply(y_ZX, weight_RK, pairs.place_RK).to(x_RX.dtype)  # type: ignore[union-attr]

    def share(self, counts: list[int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """(expert, row) at which the share of this one among its peers begins and ends."""
        peers, mine = (1, 0) if self.peers is None else (self.peers.size(), self.peers.rank())
        begin, end = (len(counts) * at // peers for at in (mine, mine + 1))
        return (begin, sum(counts[:begin])), (end, sum(counts[:end]))


def deal_experts(mixer: ExpertsMixer, name: str, cut: Cut) -> dict[str, Cut]:
    """Leaves this rank's experts in a mixer, and gives the cuts by parameter name."""
    if mixer.layer.experts % cut.parts:
        raise UserError(
            f"layout.ep={cut.parts} does not divide the {mixer.layer.experts} experts of {name}; choose a divisor"
        )
    mixer.experts = DealtExperts(mixer.experts, cut)  # type: ignore[assignment]
    return {f"{name}.experts.{key}": cut for key, _ in mixer.experts.named_parameters()}
