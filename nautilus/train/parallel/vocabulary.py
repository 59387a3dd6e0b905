"""The words of the vocabulary dealt among the ranks of tp: each keeps its rows of embedding and head.

The embedding looks up the tokens that are a rank's own words, with zeros for the others, and the sum is taken. For the
loss every rank computes the logits of its own words, chunk by chunk; largest logit, sum of exponentials and the
target's logit are taken over all ranks (`ops/loss.py`). Logits, where somebody wants them, are every rank's, joined.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from nautilus.model.language import Embedding, Language
from nautilus.ops.linear import linear
from nautilus.ops.loss import Words, weighted_nll
from nautilus.runtime import UserError
from nautilus.train.parallel.cuts import Cut, keep_piece
from nautilus.train.parallel.travel import Collect, Enter, Leave


def deal_words(model: Language, mesh: DeviceMesh) -> dict[str, Cut]:
    """Leaves this rank's words in embedding and head, and gives the cuts by parameter name."""
    cut, group, vocab = Cut(mesh=mesh, axis="tp", dim=0), mesh["tp"].get_group(), model.config.vocab
    if over := vocab % cut.parts:
        raise UserError(
            f"layout.tp={cut.parts} does not divide vocab={vocab}; choose a divisor, or raise model.vocab to "
            f"{vocab + cut.parts - over}: words without text cost their weights only"
        )
    first, cuts = group.rank() * (vocab // cut.parts), {}
    for name, module in model.named_modules():
        if isinstance(module, Embedding) or name == "lm_head":
            keep_piece(module, "weight", cut)
            cuts[f"{name}.weight"] = cut
        if isinstance(module, Embedding):
            module.forward = partial(embed_own, module, first, group)  # type: ignore[assignment]
    model.nll = partial(nll, model, Words(first, partial(largest, group=group), partial(added, group=group)), group)
    model.head = partial(head, model, group)
    return cuts


def embed_own(embedding: Embedding, first: int, group: dist.ProcessGroup, tokens_BT: Tensor, dtype: torch.dtype):
    """As Embedding.forward; ranks go on to compute the same."""
    own_BT = tokens_BT - first
    here_BT = (own_BT >= 0) & (own_BT < embedding.weight.shape[0])
    rows_BTD = Embedding.forward(embedding, own_BT.where(here_BT, 0), dtype)
    return Leave.apply(rows_BTD * here_BT[..., None], group)


def nll(
    model: Language, words: Words, group: dist.ProcessGroup, hidden_RD: Tensor, target_R: Tensor, weight_R: Tensor
) -> Tensor:
    """As Language.nll."""
    return weighted_nll(Enter.apply(hidden_RD, group), model.head_weight, target_R, weight_R, words)


def head(model: Language, group: dist.ProcessGroup, hidden_BTD: Tensor) -> Tensor:
    """As Language.head."""
    own_VBT = linear(Enter.apply(hidden_BTD, group), model.head_weight, wide=True).movedim(-1, 0)  # type: ignore[arg-type]
    return Collect.apply(own_VBT, model.config.vocab, group).movedim(0, -1)  # type: ignore[union-attr]


def largest(tensor: Tensor, *, group: dist.ProcessGroup) -> Tensor:
    there = tensor.clone()
    dist.all_reduce(there, dist.ReduceOp.MAX, group)
    return there


def added(tensor: Tensor, *, group: dist.ProcessGroup) -> Tensor:
    return Leave.apply(tensor, group)  # type: ignore[return-value]
