"""Many requests' memory in one place, changed where it lies. Letters: S slots, B rows of a call, N new tokens of all of
them, L pages of a row, and those of `state.py`.

A `State` is handed back anew by every call and never changes. An engine instead has one pool of Mamba states and one of
pages of keys and values for each layer, and tells with every call which slot and which pages belong to each row: Lanes,
which `Language.hidden` takes in the place of a State.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nautilus.config import Attention, Config, Mamba
from nautilus.ops.mamba import MambaSlots, fold_in_slots, new_slots
from nautilus.ops.pages import Pool, Rows, new_pool, positions
from nautilus.ops.ssd import wide
from nautilus.ops.state_format import EXACT, StateFormat, Stored, decode, encode


@dataclass(frozen=True, kw_only=True, eq=False)
class RestingSlots:
    """As MambaSlots, with the states in a format of fewer bits while they rest."""

    tail_SRC: Tensor
    ssm: Stored
    format: StateFormat
    layer: int

    def clear(self, slot: int) -> None:
        self.tail_SRC[slot].zero_()
        for part in self.ssm.tensors:
            part[slot].zero_()

    def wake(self, slot_B: Tensor) -> MambaSlots:
        """The states of some slots in full precision, numbered anew."""
        ssm = decode(self.ssm.rows(slot_B)).mT.contiguous()
        return MambaSlots(tail_SRC=self.tail_SRC[slot_B], ssm_SHNP=ssm)

    def rest(self, slot_B: Tensor, awake: MambaSlots, position_B: Tensor) -> None:
        """Put them back after the token at `position_B`."""
        stored = encode(awake.ssm_SHNP.mT, self.format, layer=self.layer, position_B=position_B)
        for mine, part in zip((self.tail_SRC, *self.ssm.tensors), (awake.tail_SRC, *stored.tensors), strict=True):
            mine[slot_B] = part


def plain(tensor: Tensor) -> Tensor | np.ndarray:
    """The same memory for numpy, where it can be: it writes a few numbers in half the time, which every step feels."""
    return tensor.numpy() if tensor.device.type == "cpu" else tensor


Memory = tuple[
    MambaSlots | RestingSlots | Pool | None, ...
]  # an entry for each layer; None for layers that remember nothing


@dataclass(frozen=True, kw_only=True, eq=False)
class Lanes:
    """Row b of a call has its states in slot_B[b] (int32), its keys and values in the pages of `rows`.

    A call takes the new tokens of all rows after one another, as (1, N); `rows.begin` says whose they are. A row may
    have any number of them, and gets what a call of it alone would give. Each row is one document.

    A `tentative` call may be taken back in part: after it `accept` says how many of its tokens stay in each row, and
    `rows.length` grows from call to call by as many. It takes at least one token of each row, and memory with a window
    for them; see `new_memory`.
    """

    layers: Memory
    slot_B: Tensor
    rows: Rows
    tentative: bool = False

    def position_1N(self, tokens: int) -> Tensor:
        """Where each of so many new tokens stands in its row."""
        return positions(self.rows, tokens)[None]

    def accept(self, counts: Sequence[int]) -> None:
        """Of the tokens of the tentative call before, the first so many of each row stay; the others never were.

        ValueError for more than the row had, and where none wait. Keys and values need nothing but `rows.length`: those
        of the others are written over.
        """
        slots, pending = self.slot_B.tolist(), self.pending
        waiting = [-int(pending[0][slot]) for slot in slots] if pending else self.rows.begin.diff().tolist()
        if len(counts) != len(slots) or not all(0 <= a <= b and b for a, b in zip(counts, waiting, strict=True)):
            raise ValueError(
                f"{[*counts]} tokens were accepted where {[max(0, one) for one in waiting]} wait; after each tentative"
                " call accept once, 0 to that many of each row"
            )
        for pending_S in pending:
            for slot, count in zip(slots, counts, strict=True):
                pending_S[slot] = count

    @functools.cached_property
    def pending(self) -> list[Tensor | np.ndarray]:
        """Of each layer with states, how many tokens of a slot wait (below 0), or are to be folded."""
        found = [layer.pending_S for layer in self.layers if isinstance(layer, MambaSlots)]
        return [plain(pending_S) for pending_S in found if pending_S is not None]

    def fold(self) -> None:
        """Bring the states to after the last accepted token: before they are copied or handed on."""
        for layer in self.layers:
            if isinstance(layer, MambaSlots):
                fold_in_slots(layer, self.slot_B)


def new_memory(
    config: Config, *, slots: int, pages: int, dtype: torch.dtype, cache: str = "", device=None,
    scales: dict[int, tuple[float, float]] | None = None, state: StateFormat = EXACT, window: int = 0,
) -> Memory:  # fmt: skip
    """Room for so many states and pages of every layer. `cache` is the format of keys and values: bf16, fp8, int8, f32,
    or as the activations when empty; `scales` the k and v scale of a layer, for fp8; `state` how states rest; `window`
    the most tokens of a tentative call, which takes states that rest in fp32 (ValueError)."""
    if window and not state.lossless:  # they are rounded after every token, folded ones would have to be
        asked = f"a window of {window} tokens was asked for with states in {state.name}"
        raise ValueError(f"{asked}; take states in fp32, or no window")
    cache = cache or {torch.bfloat16: "bf16", torch.float64: "f64"}.get(dtype, "f32")

    def room(index: int, layer) -> MambaSlots | RestingSlots | Pool | None:
        if isinstance(layer, Mamba):
            sizes = {name: getattr(layer, name) for name in ("heads", "head_width", "groups", "state", "taps")}
            awake = new_slots(slots, **sizes, window=window, dtype=dtype, wide=wide(dtype), device=device)
            if state.lossless:
                return awake
            none_B = torch.zeros(1, dtype=torch.int64, device=device)
            resting = encode(awake.ssm_SHNP.mT, state, layer=index, position_B=none_B)
            return RestingSlots(tail_SRC=awake.tail_SRC, ssm=resting, format=state, layer=index)
        if isinstance(layer, Attention):
            k_scale, v_scale = (scales or {}).get(index, (1.0, 1.0))
            return new_pool(
                pages, layer.groups, layer.head_width, cache, k_scale=k_scale, v_scale=v_scale, device=device
            )
        return None

    return tuple(room(index, layer) for index, layer in enumerate(config.layers))


def bytes_per_token(config: Config, cache_bytes: float) -> float:
    """Of keys and values of all layers."""
    return sum(
        2 * layer.groups * layer.head_width * cache_bytes for layer in config.layers if isinstance(layer, Attention)
    )
