"""A drafter's block over whole rows as an engine runs it, all chains of a row at once. Letters: B rows, T time,
D width, H heads, G groups, P head width, S keys.

An engine drafts from the last token that it has committed. Index t stands for the chain whose last committed token is
x_{t+1}; h_t is the trunk's feature, out^k_t what the block gives at step k, which predicts token t+k+1:

    out^1_t = block(h_t, Emb[x_{t+1}]),        out^k_t = block(f_t, Emb[x_{t+k}]),  f_t = out^{k-1}_t

and attention at step k sees what it sees there: the keys of step 1 at indices up to t, of tokens that are committed and
made from the trunk, and those of steps 2 to k at index t alone, the chain's own. That x_{t+k} is the row's, not the
draft's, changes nothing as long as the drafts are right, and what comes after a wrong one does not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nautilus.model.attention import AttentionMixer
from nautilus.model.eagle import Eagle, EagleLayer
from nautilus.model.mtp import MtpBlock, MtpLayer
from nautilus.model.norm import RmsNorm
from nautilus.model.state import Span, place
from nautilus.ops.attention import visible_BTS
from nautilus.ops.ssd import wide
from nautilus.runtime import UserError

QUERIES = 128  # of a row that are scored at a time
Feed = Callable[[list[Tensor]], Tensor]  # the outputs of the steps so far to the feature of the next one


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A block taken apart: what joins feature and embedding, the layers, and what closes it."""

    join: Callable[[Tensor, Tensor], Tensor]
    layers: Sequence[tuple[RmsNorm, nn.Module]]
    close: Callable[[Tensor], Tensor]


def parts_of(block: MtpBlock | Eagle) -> Parts:
    if isinstance(block, Eagle):
        own = [layer for layer in block.layers if isinstance(layer, EagleLayer)]
        return Parts(join=block.join, layers=[(layer.norm, layer.mixer) for layer in own], close=nn.Identity())
    layers = [layer for layer in block.layers if isinstance(layer, MtpLayer)]
    first, last = layers[0], layers[-1]
    enorm, hnorm, project, close = first.enorm, first.hnorm, first.eh_proj, last.final_layernorm
    assert enorm is not None and hnorm is not None and project is not None and close is not None

    def join(feature_BTD: Tensor, ahead_BTD: Tensor) -> Tensor:
        return project(torch.cat([enorm(ahead_BTD), hnorm(feature_BTD)], dim=-1))

    return Parts(join=join, layers=[(layer.norm, layer.mixer) for layer in layers], close=close)


def latest(outs: list[Tensor]) -> Tensor:
    """What an engine feeds."""
    return outs[-1]


def unroll(
    parts: Parts,
    feature_BTD: Tensor,
    embeds_BTD: Tensor,
    steps: int,
    *,
    document_BT: Tensor | None = None,
    feed: Feed = latest,
) -> Iterator[Tensor]:
    """out^1, out^2, …, each (B, T, D). The last k + 1 indices of a row, and of a document, have no target at step k.

    embeds_BTD: of the row's tokens, x_t at index t.
    """
    refuse_positions(parts)
    batch, time = feature_BTD.shape[:2]
    span, outs = place(None, document_BT, batch, time, feature_BTD.device), []
    kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in parts.layers]
    for step in range(1, steps + 1):
        ahead_BTD = nn.functional.pad(embeds_BTD[:, step:], (0, 0, 0, min(step, time)))
        f = parts.join(feed(outs) if outs else feature_BTD, ahead_BTD)
        for (norm, mixer), own in zip(parts.layers, kept, strict=True):
            attends = isinstance(mixer, AttentionMixer)
            f = f + (attend(mixer, norm(f), span, own) if attends else mixer(norm(f), span, None)[0])
        outs.append(parts.close(f))
        yield outs[-1]


def refuse_positions(parts: Parts) -> None:
    for _, mixer in parts.layers:
        if isinstance(mixer, AttentionMixer) and (mixer.layer.rotary is not None or mixer.layer.window):
            raise UserError(
                f"the drafter's attention has rotary={mixer.layer.rotary} and window={mixer.layer.window}; chains of "
                "drafts are made for a block without positions and window, as the published ones are"
            )


def attend(mixer: AttentionMixer, hidden_BTD: Tensor, span: Span, kept: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The mixer's output at the next step; its keys and values join those of the steps before."""
    q_BTHP = mixer.queries(hidden_BTD, span)
    kept.append(mixer.keys_values(hidden_BTD, span))
    if len(kept) == 1:
        return mixer.mix(q_BTHP, *kept[0], span)
    # A block's probabilities are computed again in the backward: all of them would be steps x T^2 numbers.
    whole, out, time = wide(q_BTHP.dtype), [], q_BTHP.shape[1]
    for begin in range(0, time, QUERIES):
        part = slice(begin, min(begin + QUERIES, time))
        first_BT = None if span.first_BT is None else span.first_BT[:, part]
        tensors = [t[:, : part.stop] for t in kept[0]] + [t[:, part] for pair in kept[1:] for t in pair]
        out.append(checkpoint(chain_attention, q_BTHP[:, part].to(whole), first_BT, *tensors, use_reentrant=False))
    return mixer.o_proj(torch.cat(out, dim=1).to(q_BTHP.dtype).flatten(-2))


def chain_attention(q_BTHP: Tensor, first_BT: Tensor | None, *keys_values: Tensor) -> Tensor:
    """Attention of the last T of S indices, one softmax over the committed keys and the chain's own."""
    share, scale = q_BTHP.shape[2] // keys_values[0].shape[2], 1 / math.sqrt(q_BTHP.shape[-1])
    k, v, *later = (t.to(q_BTHP.dtype).repeat_interleave(share, dim=2) for t in keys_values)
    seen = visible_BTS(q_BTHP.shape[1], k.shape[1], first_BT, 0, k.device)[:, None]
    score_BHTS = torch.einsum("bthp,bshp->bhts", q_BTHP, k).masked_fill(~seen, float("-inf"))
    own_BHTS = torch.stack([(q_BTHP * key).sum(-1).transpose(1, 2) for key in later[::2]], dim=-1)
    weight = (torch.cat([score_BHTS, own_BHTS], dim=-1) * scale).softmax(-1)
    out_BTHP = torch.einsum("bhts,bshp->bthp", weight[..., : k.shape[1]], v)
    for place_, value in enumerate(later[1::2], k.shape[1]):
        out_BTHP = out_BTHP + weight[..., place_].transpose(1, 2)[..., None] * value
    return out_BTHP
