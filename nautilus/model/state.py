"""What a model remembers between calls, and where documents begin.

State is passed in and handed back; the one passed in stays valid, so a prefix can be continued in several ways.
Letters: B rows, T new tokens, S cached positions, G key-value groups, P head width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from nautilus.model.lanes import Lanes
from nautilus.ops.state_format import StateFormat, Stored, decode, encode


@dataclass(frozen=True)
class Span:
    """Where the new tokens of a call stand. `before` tokens came in earlier calls.

    first_BT: position at which each token's document begins (None: all begin at 0). start_BT: the token begins one.
    text_BT: false for tokens of document 0, which is padding (None: there are none). Only statistics look at it.
    lanes: where the memory of each row lies, if the call has Lanes; `before` then says nothing.
    """

    before: int
    position_T: Tensor
    first_BT: Tensor | None = None
    start_BT: Tensor | None = None
    text_BT: Tensor | None = None
    lanes: Lanes | None = None

    @property
    def reach_BT(self) -> Tensor | None:
        """How many earlier tokens of its own document each token has (None: all tokens so far)."""
        return None if self.first_BT is None else self.position_T - self.first_BT

    @cached_property
    def rotary_BT(self) -> Tensor:
        """Position inside the document; looked up once for all layers."""
        if self.lanes is not None:
            return self.lanes.position_1N(len(self.position_T))
        return self.position_T[None] if self.first_BT is None else self.position_T - self.first_BT


class Cache:
    """Keys and values seen so far, in buffers that grow by doubling.

    Several caches may share a buffer. The one that is extended first writes in place; another that is extended from the
    same point finds the place taken and moves to a buffer of its own.
    """

    def __init__(self, k_BSGP: Tensor, v_BSGP: Tensor, length: int, taken: list[int]):
        self.k_buffer, self.v_buffer, self.length, self.taken = k_BSGP, v_BSGP, length, taken

    def append(self, k_BTGP: Tensor, v_BTGP: Tensor) -> Cache:
        length = self.length + k_BTGP.shape[1]
        if torch.is_grad_enabled():  # an earlier call's backward may still need the buffers as they are
            return start_cache(*(torch.cat(pair, 1) for pair in zip(self.keys_values, (k_BTGP, v_BTGP), strict=True)))
        roomy = self
        if self.taken[0] != self.length or length > self.k_buffer.shape[1]:
            k, v = (larger(old, self.length, 2 * length) for old in (self.k_buffer, self.v_buffer))
            roomy = Cache(k, v, self.length, [self.length])
        roomy.k_buffer[:, self.length : length] = k_BTGP
        roomy.v_buffer[:, self.length : length] = v_BTGP
        roomy.taken[0] = length
        return Cache(roomy.k_buffer, roomy.v_buffer, length, roomy.taken)

    @property
    def keys_values(self) -> tuple[Tensor, Tensor]:
        return self.k_buffer[:, : self.length], self.v_buffer[:, : self.length]

    def rows(self, index: Tensor) -> Cache:
        return start_cache(*(t.index_select(0, index) for t in self.keys_values))


def start_cache(k_BTGP: Tensor, v_BTGP: Tensor) -> Cache:
    return Cache(k_BTGP, v_BTGP, k_BTGP.shape[1], [k_BTGP.shape[1]])


def larger(old: Tensor, used: int, size: int) -> Tensor:
    new = old.new_empty(old.shape[0], size, *old.shape[2:])
    new[:, :used] = old[:, :used]
    return new


@dataclass(frozen=True)
class MambaState:
    tail_BRC: Tensor
    ssm_BHPN: Tensor

    def rows(self, index: Tensor) -> MambaState:
        return MambaState(self.tail_BRC.index_select(0, index), self.ssm_BHPN.mT.index_select(0, index).mT)

    def stored(self, format: StateFormat, *, layer: int, span: Span) -> StoredMamba:
        last_B = span.rotary_BT[:, -1]
        return StoredMamba(self.tail_BRC, encode(self.ssm_BHPN, format, layer=layer, position_B=last_B))


@dataclass(frozen=True)
class StoredMamba:
    """A MambaState at rest, its state in a StateFormat."""

    tail_BRC: Tensor
    ssm: Stored

    def rows(self, index: Tensor) -> StoredMamba:
        return StoredMamba(self.tail_BRC[index], self.ssm.rows(index))

    def opened(self, dtype: torch.dtype) -> MambaState:
        return MambaState(self.tail_BRC, decode(self.ssm).to(dtype))


@dataclass(frozen=True)
class State:
    """`layers` holds one entry per layer: a Cache, a MambaState, or None for layers that remember nothing. Where a
    StateFormat was asked for, a StoredMamba stands for each MambaState."""

    length: int
    layers: tuple[Cache | MambaState | StoredMamba | None, ...]
    first_B: Tensor | None = None
    document_B: Tensor | None = None

    def rows(self, index: Tensor) -> State:
        """The state of some rows only, in the given order; a row may be taken several times."""
        pick = lambda t: None if t is None else t[index]  # noqa: E731
        layers = tuple(None if layer is None else layer.rows(index) for layer in self.layers)
        return replace(self, layers=layers, first_B=pick(self.first_B), document_B=pick(self.document_B))


def place(state: State | Lanes | None, document_BT: Tensor | None, batch: int, time: int, device) -> Span:
    """The Span of `time` new tokens. Neighbours with equal document numbers belong together, across calls too."""
    if isinstance(state, Lanes):
        if document_BT is not None or batch != 1:
            raise ValueError(
                f"lanes were given for tokens of shape {(batch, time)}{' with document_BT' * (document_BT is not None)}"
                "; give the tokens of all rows after one another, as (1, N); each row is one document"
            )
        return Span(0, torch.arange(time, device=device), lanes=state)
    before = 0 if state is None else state.length
    position_T = torch.arange(before, before + time, device=device)
    known_B = None if state is None else state.document_B
    if document_BT is None:
        if state is None or state.first_B is None:
            return Span(before, position_T)
        return Span(before, position_T, first_BT=state.first_B[:, None].expand(batch, time))
    if document_BT.shape != (batch, time):
        raise ValueError(
            f"document_BT has shape {tuple(document_BT.shape)}, the tokens {(batch, time)}; make them equal"
        )
    if state is not None and known_B is None:
        raise ValueError("document_BT was given, but the state began without; give document_BT from the first call on")
    ahead_B = document_BT[:, 0] - 1 if known_B is None else known_B
    start_BT = document_BT != torch.cat([ahead_B[:, None], document_BT[:, :-1]], dim=1)
    text_BT = None if (document_BT != 0).all() else document_BT != 0
    if state is None and not start_BT[:, 1:].any():
        return Span(before, position_T, text_BT=text_BT)
    zero = torch.zeros_like(document_BT[:, :1]) if state is None or state.first_B is None else state.first_B[:, None]
    first_BT = torch.where(start_BT, position_T, zero).cummax(dim=1).values
    return Span(before, position_T, first_BT=first_BT, start_BT=start_BT, text_BT=text_BT)


def advance(state: State | Lanes | None, span: Span, document_BT: Tensor | None, layers: list) -> State | Lanes:
    """The state after a call that produced `layers`. Lanes stay as they are: their memory has changed."""
    if isinstance(state, Lanes):
        return state
    document_B = document_BT[:, -1] if document_BT is not None else None if state is None else state.document_B
    first_B = None if span.first_BT is None else span.first_BT[:, -1]
    return State(span.before + span.position_T.shape[0], tuple(layers), first_B, document_B)
