"""Layers for rows too long to keep what their backward needs: computed again there, and in pieces of a row.

Of each layer stays what enters it, and where it is cut, the recurrent state between the pieces (Chen et al., arXiv
1604.06174). A Mamba layer hands its state from piece to piece, with gradients; attention computes keys and values of
all pieces first, then asks with the queries of one after the other; the other layers see one token at a time. So the
numbers are those of the whole row, up to the order in which gradients of weights are added. Letters: B batch, T time,
D width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nautilus.model.attention import AttentionMixer
from nautilus.model.moe import ExpertsMixer
from nautilus.model.state import Span
from nautilus.ops.balance import balance_of
from nautilus.ops.residual import add


def thrifty(block, hidden_BTD: Tensor, span: Span, chunk: int) -> Tensor:
    """What the block makes of a row that begins here; chunk: tokens of a piece, 0: the whole row."""
    size = chunk or hidden_BTD.shape[1]
    pieces = [*zip(hidden_BTD.split(size, 1), spans(span, size, hidden_BTD.shape[1]), strict=True)]
    if isinstance(block.mixer, AttentionMixer):
        return attend(block, pieces)
    out, state = [], None
    with one_pass(block.mixer):
        for piece_BTD, part in pieces:
            piece_BTD, state = again(block, block.mixer, piece_BTD, part, state)
            out.append(piece_BTD)
    return out[0] if len(out) == 1 else torch.cat(out, 1)


def attend(block, pieces: list[tuple[Tensor, Span]]) -> Tensor:
    """Queries of each piece against the keys and values up to its end."""
    mixer: AttentionMixer = block.mixer
    keys_values = lambda piece_BTD, part: mixer.keys_values(block.norm(piece_BTD), part)
    found = [again(keys_values, mixer, piece_BTD, part) for piece_BTD, part in pieces]
    k_BSGP, v_BSGP = (torch.cat(parts, 1) for parts in zip(*found, strict=True))

    def ask(piece_BTD: Tensor, part: Span, k_BSGP: Tensor, v_BSGP: Tensor) -> Tensor:
        q_BTHP = mixer.queries(block.norm(piece_BTD), part)
        return add(piece_BTD, mixer.mix(q_BTHP, k_BSGP, v_BSGP, part))

    out = []
    for piece_BTD, part in pieces:
        end = part.before + len(part.position_T)
        out.append(again(ask, mixer, piece_BTD, part, k_BSGP[:, :end], v_BSGP[:, :end]))
    return torch.cat(out, 1)


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
def one_pass(mixer) -> Iterator[None]:
    """The balance loss is of whole rows: the pieces' shares are added up before it is taken."""
    if not isinstance(mixer, ExpertsMixer) or mixer.balances is None:
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
