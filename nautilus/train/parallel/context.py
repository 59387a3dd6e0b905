"""The tokens of a row dealt among ranks, one stretch after another. Letters: B rows, T tokens of a rank, S of the whole
row, E channels into the Mamba scan, I out of it.

    attention    reads the keys and values of all ranks before
    Mamba        for its scan each rank takes all tokens of some groups of heads, instead of some tokens of all
    prediction   a rank also gets the first tokens of the next, as targets and for multi-token prediction
    balance      a row's assignments are counted over its ranks

All ranks of a row read the same batch and cut it up themselves.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nautilus.data.batch import Batch
from nautilus.model.attention import AttentionMixer
from nautilus.model.language import Language
from nautilus.model.mamba import MambaMixer
from nautilus.model.moe import ExpertsMixer
from nautilus.model.precision import whole_blocks
from nautilus.model.state import Cache, Span, State, place, start_cache
from nautilus.ops.balance import sequence_balance_loss
from nautilus.ops.mamba import mamba
from nautilus.ops.ssd import wide
from nautilus.runtime import UserError
from nautilus.train.layout import HALO
from nautilus.train.parallel.travel import Exchange, Join, joined, summed


@dataclass
class Context:
    """What the mixers of one forward share: which stretch of the rows is here, and whole rows' documents."""

    group: dist.ProcessGroup
    reach_BS: Tensor | None = field(default=None)

    @property
    def ranks(self) -> int:
        return self.group.size()

    @property
    def rank(self) -> int:
        return self.group.rank()

    def enter(self, time: int, document_BT: Tensor | None) -> State:
        """The State after the stretches before this one, but for what the mixers fetch themselves."""
        before = self.rank * time
        if document_BT is None:
            self.reach_BS = None
            return State(before, ())
        document_BS = joined(document_BT, 1, self.group)
        whole = place(None, document_BS, len(document_BS), document_BS.shape[1], document_BS.device)
        self.reach_BS = whole.reach_BT
        if before == 0:
            return State(0, (), first_B=torch.zeros_like(document_BS[:, 0]), document_B=document_BS[:, 0] - 1)
        first_B = torch.zeros_like(document_BS[:, 0]) if whole.first_BT is None else whole.first_BT[:, before - 1]
        return State(before, (), first_B=first_B, document_B=document_BS[:, before - 1])


def deal_time(model: Language, group: dist.ProcessGroup) -> None:
    """Makes the model take a rank's stretch of each row, with HALO tokens of the next, as `stretch` cuts it."""
    context = Context(group)
    for name, module in model.named_modules():
        if isinstance(module, AttentionMixer):
            module.register_forward_pre_hook(lambda _, args: (*args[:2], Earlier(context)))
        elif isinstance(module, MambaMixer):
            if module.layer.groups % context.ranks:
                raise UserError(
                    f"layout.cp={context.ranks} does not divide the {module.layer.groups} groups of {name} that a rank "
                    f"has; choose a divisor"
                )
            module.forward = partial(mamba_of_all_tokens, module, context)  # type: ignore[assignment]
        elif isinstance(module, ExpertsMixer):
            module.observe = partial(observe, module, context)
    model.hidden = partial(hidden, model, context)  # type: ignore[assignment]
    model.mtp_hidden = partial(mtp_hidden, model, context)


def stretch(batch: Batch, group: dist.ProcessGroup) -> Batch:
    """This rank's tokens of each row and HALO more, with the weights of the targets that are predicted from its own."""
    time, rest = divmod(batch.tokens.shape[1], group.size())
    if rest or time < HALO:
        raise UserError(
            f"rows of {batch.tokens.shape[1]} tokens cannot be dealt among layout.cp={group.size()} processes: each "
            f"must get the same number, and at least {HALO}; change the row length"
        )
    begin = group.rank() * time
    piece = lambda t: nn.functional.pad(t, (0, HALO))[:, begin : begin + time + HALO]
    weights = {}
    for term, weight in batch.weights.items():
        weights[term] = piece(weight).clone()
        ahead = tokens_ahead(term)
        weights[term][:, :ahead] = 0
        weights[term][:, time + ahead :] = 0
        if term == "balance" and begin:
            weights[term][:] = 0
    evidence = {name: piece(tensor) for name, tensor in batch.evidence().items()}
    return dataclasses.replace(batch, tokens=piece(batch.tokens), weights=weights, alike=None, **evidence)


def tokens_ahead(term: str) -> int:
    """How far behind its hidden state a target of this term stands."""
    number = term.removeprefix("mtp_")
    if term in ("next_token", "balance"):
        return int(term == "next_token")
    if number == term or not number.isdecimal() or int(number) + 1 > HALO:
        raise UserError(
            f"with layout.cp > 1 the targets of next_token, balance and mtp_1 to mtp_{HALO - 1} can be found, "
            f"not those of {term}; use layout.cp=1"
        )
    return int(number) + 1


# ----- the model's calls, on tokens with a halo ----------------------------------------------------------------------


def hidden(model: Language, context: Context, tokens_BT: Tensor, *, document_BT: Tensor | None = None, taps=()):
    """As Language.hidden; the halo's hidden states are zeros that nobody may read."""
    own = None if document_BT is None else document_BT[:, :-HALO]
    if model.lowered is not None:  # each stretch is a product of its own
        model.lowered.before = context.rank * whole_blocks(tokens_BT[:, HALO:].numel())
    blocks: tuple = (None,) * len(model.backbone.layers)
    state = dataclasses.replace(context.enter(tokens_BT.shape[1] - HALO, own), layers=blocks)
    x, after = Language.hidden(model, tokens_BT[:, :-HALO], state=state, document_BT=own, taps=taps)
    return nn.functional.pad(x, (0, 0, 0, HALO)), after


def mtp_hidden(
    model: Language, context: Context, hidden_BTD: Tensor, tokens_BT: Tensor, depths: int,
    document_BT: Tensor | None = None, *, apart: bool = False,
) -> list[Tensor]:  # fmt: skip
    """As Language.mtp_hidden."""
    own = None if document_BT is None else document_BT[:, :-HALO]
    batch, time = tokens_BT.shape[0], tokens_BT.shape[1] - HALO
    span = place(context.enter(time, own), own, batch, time, tokens_BT.device)
    embeds_BTD, x, out = model.embed(tokens_BT), hidden_BTD[:, :-HALO], []
    if apart:
        embeds_BTD, x = embeds_BTD.detach(), x.detach()
    if context.rank == context.ranks - 1:  # beyond the row there is nothing, not a token
        embeds_BTD = nn.functional.pad(embeds_BTD[:, :time], (0, 0, 0, HALO))
    for depth in range(1, depths + 1):
        x = model.mtp(x, embeds_BTD[:, depth : depth + time], span)
        out.append(nn.functional.pad(x, (0, 0, 0, HALO)))
    return out


# ----- mixers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Earlier:
    """Stands where an attention mixer finds earlier keys and values."""

    context: Context

    def append(self, k_BTGP: Tensor, v_BTGP: Tensor) -> Cache:
        seen = (self.context.rank + 1) * k_BTGP.shape[1]
        return start_cache(*(Join.apply(t, 1, self.context.group)[:, :seen] for t in (k_BTGP, v_BTGP)))


def mamba_of_all_tokens(mixer: MambaMixer, context: Context, hidden_BTD: Tensor, span: Span, state: None):
    """The mixer's forward; the scan runs over whole rows, for this rank's groups of heads. Its weights' gradients are
    zero elsewhere and are added up over ranks like all others."""
    layer, ranks, rank = mixer.layer, context.ranks, context.rank
    sections = [layer.inner, layer.inner, *[layer.groups * layer.state] * 2, layer.heads]
    mine = lambda t, parts: torch.cat([part.chunk(ranks)[rank] for part in t.split(parts)])
    parts = mixer.in_proj(hidden_BTD).split(sections, -1)
    input_BTE = torch.cat([part.chunk(ranks, -1)[to] for to in range(ranks) for part in parts], -1)
    out, _, _ = mamba(
        tokens_for_heads(input_BTE, context),
        mine(mixer.conv1d.weight[:, 0], sections[1:4]),
        mine(mixer.conv1d.bias, sections[1:4]),
        mine(mixer.dt_bias, layer.heads),
        mine(-torch.exp(mixer.A_log.to(wide(hidden_BTD.dtype))), layer.heads),
        mine(mixer.D, layer.heads),
        mine(mixer.norm.weight, layer.inner),
        groups=layer.groups // ranks,
        eps=mixer.eps,
        reach_BT=context.reach_BS,
    )
    return mixer.out_proj(heads_for_tokens(out, context)), None


def tokens_for_heads(x_BTE: Tensor, context: Context) -> Tensor:
    """(B, T, E) with channels in one block for each rank → (B, S, E / ranks), this rank's block."""
    blocks = x_BTE.unflatten(-1, (context.ranks, -1)).permute(2, 0, 1, 3).flatten(0, 1)
    got = Exchange.apply(blocks, None, None, context.group)
    return got.unflatten(0, (context.ranks, -1)).transpose(0, 1).flatten(1, 2)


def heads_for_tokens(x_BSI: Tensor, context: Context) -> Tensor:
    """The way back."""
    blocks = x_BSI.unflatten(1, (context.ranks, -1)).transpose(0, 1).flatten(0, 1)
    got = Exchange.apply(blocks, None, None, context.group)
    return got.unflatten(0, (context.ranks, -1)).permute(1, 2, 0, 3).flatten(2)


def observe(mixer: ExpertsMixer, context: Context, index_RK: Tensor, score_BTE: Tensor, text_BT: Tensor | None) -> None:
    """The mixer's own `observe`, with the balance loss's counts taken over whole rows."""
    balances, mixer.balances = mixer.balances, None
    ExpertsMixer.observe(mixer, index_RK, score_BTE, text_BT)
    mixer.balances = balances
    if balances is not None:
        over_row = lambda counts: summed(counts, context.group)
        balances.append(sequence_balance_loss(score_BTE, mixer.layer.active, text_BT, over_row=over_row))
