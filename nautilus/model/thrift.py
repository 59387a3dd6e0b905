"""Layers for rows too long to keep what their backward needs: computed again there, and in pieces of a row.

Of each layer stays what enters it, and where it is cut, the recurrent state between the pieces (Chen et al., arXiv
1604.06174). A Mamba layer hands its state from piece to piece, with gradients, and attention its keys and values; the
other layers see one token at a time. So the numbers are those of the whole row, up to the order in which gradients of
weights are added. Products in few bits are of one piece: their scales are the piece's. Letters: B batch, T time, S
earlier positions, G key-value groups, P head width, D width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nautilus.model.attention import AttentionMixer
from nautilus.model.moe import ExpertsMixer
from nautilus.model.precision import Lowered, whole_blocks
from nautilus.model.state import Span
from nautilus.ops.balance import balance_of


def thrifty(block, hidden_BTD: Tensor, span: Span, chunk: int, lowered: Lowered | None = None) -> Tensor:
    """What the block makes of a row that begins here; chunk: tokens of a piece, 0: the whole row. In few bits (lowered)
    each piece is a product of its own, with addresses behind those of the pieces before it."""
    size = chunk or hidden_BTD.shape[1]
    pieces = [*zip(hidden_BTD.split(size, 1), spans(span, size, hidden_BTD.shape[1]), strict=True)]
    out, state, row = [], KeysValues() if isinstance(block.mixer, AttentionMixer) else None, 0
    with one_pass(block.mixer, len(pieces)):
        for piece_BTD, part in pieces:
            after = block if lowered is None else behind(block, lowered, row)
            row += whole_blocks(piece_BTD[..., 0].numel())
            piece_BTD, state = again(after, block.mixer, piece_BTD, part, state)
            out.append(piece_BTD)
    return out[0] if len(out) == 1 else torch.cat(out, 1)


def behind(block, lowered: Lowered, rows: int) -> Callable:
    """The block's call, now and when it is computed again, behind so many rows."""

    def call(*given):
        with lowered.behind(rows):
            return block(*given)

    return call


@dataclass(frozen=True)
class KeysValues:
    """Stands where an attention mixer finds earlier keys and values: those of each piece so far, joined at use, so that
    what is kept for the backward is each of them once."""

    pieces: tuple[tuple[Tensor, Tensor], ...] = ()

    def append(self, k_BTGP: Tensor, v_BTGP: Tensor) -> KeysValues:
        return KeysValues((*self.pieces, (k_BTGP, v_BTGP)))

    @property
    def keys_values(self) -> tuple[Tensor, Tensor]:
        k_BSGP, v_BSGP = (torch.cat(parts, 1) for parts in zip(*self.pieces, strict=True))
        return k_BSGP, v_BSGP


def again(function: Callable, mixer, *given):
    """function(*given), of which nothing is kept but what was given: its backward computes it a second time."""
    contexts = lambda: (contextlib.nullcontext(), unseen(mixer, mixer.balances is not None, mixer.parts is not None))
    if not isinstance(mixer, ExpertsMixer):
        contexts = lambda: (contextlib.nullcontext(), contextlib.nullcontext())
    return checkpoint(function, *given, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


@contextlib.contextmanager
def unseen(mixer: ExpertsMixer, watched: bool, in_parts: bool) -> Iterator[None]:
    """A second computation counts no tokens and leaves no balance loss, but computes all that the first one did."""
    loads_E, balances, parts = mixer.load_E.clone(), mixer.balances, mixer.parts
    mixer.balances, mixer.parts = [] if watched else None, [] if in_parts else None
    try:
        yield
    finally:
        mixer.load_E.copy_(loads_E)
        mixer.balances, mixer.parts = balances, parts


@contextlib.contextmanager
def one_pass(mixer, pieces: int) -> Iterator[None]:
    """The balance loss is of whole rows: the pieces' shares are added up before it is taken."""
    if pieces == 1 or not isinstance(mixer, ExpertsMixer) or mixer.balances is None:
        yield
        return
    mixer.parts = []
    try:
        yield
        counts_BE, total_BE, tokens_B = (torch.stack(parts).sum(0) for parts in zip(*mixer.parts, strict=True))
        mixer.balances.append(balance_of(counts_BE, total_BE, tokens_B, mixer.layer.active))
    finally:
        mixer.parts = None


def spans(span: Span, size: int, time: int) -> Iterator[Span]:
    """The Span of each piece."""
    for begin in range(0, time, size):
        here = slice(begin, begin + size)
        cut = {
            name: None if (whole := getattr(span, name)) is None else whole[:, here]
            for name in ("first_BT", "start_BT", "text_BT")
        }
        yield replace(span, before=span.before + begin, position_T=span.position_T[here], **cut)
