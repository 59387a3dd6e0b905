"""Many requests' memory in one place, changed where it lies. Letters: S slots, B rows of a call, L pages of a row, and
those of `state.py`.

A `State` is handed back anew by every call and never changes. An engine instead has one pool of Mamba states and one of
pages of keys and values for each layer, and tells with every call which slot and which pages belong to each row: Lanes,
which `Language.hidden` takes in the place of a State.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nautilus.config import Attention, Config, Mamba
from nautilus.ops.pages import Pool, Rows, new_pool
from nautilus.ops.ssd import wide


@dataclass(frozen=True, kw_only=True, eq=False)
class MambaSlots:
    """States of one layer: the last inputs of the convolution, and the scan's state as (N, P)."""

    tail_SRC: Tensor
    ssm_SHNP: Tensor

    def clear(self, slot: int) -> None:
        self.tail_SRC[slot].zero_()
        self.ssm_SHNP[slot].zero_()


Memory = tuple[MambaSlots | Pool | None, ...]  # an entry for each layer; None for layers that remember nothing


@dataclass(frozen=True, kw_only=True, eq=False)
class Lanes:
    """Row b of a call has its states in slot_B[b] (int32), its keys and values in the pages of `rows`.

    All rows of a call have as many new tokens. Each row is one document.
    """

    layers: Memory
    slot_B: Tensor
    rows: Rows

    def position_BT(self, time: int) -> Tensor:
        """Where the new tokens stand."""
        return self.rows.length[:, None] - time + torch.arange(time, device=self.slot_B.device)


def new_memory(
    config: Config, *, slots: int, pages: int, dtype: torch.dtype, cache: str = "", device=None,
    scales: dict[int, tuple[float, float]] | None = None,
) -> Memory:  # fmt: skip
    """Room for so many states and pages of every layer. `cache` is the format of keys and values: bf16, fp8, int8, f32,
    or as the activations when empty; `scales` the k and v scale of a layer, for fp8."""
    cache = cache or {torch.bfloat16: "bf16", torch.float64: "f64"}.get(dtype, "f32")

    def room(index: int, layer) -> MambaSlots | Pool | None:
        if isinstance(layer, Mamba):
            state = torch.zeros(slots, layer.heads, layer.state, layer.head_width, dtype=wide(dtype), device=device)
            tail = torch.zeros(slots, layer.taps - 1, layer.conv_width, dtype=dtype, device=device)
            return MambaSlots(tail_SRC=tail, ssm_SHNP=state)
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
