"""The attention mixer. Letters: B batch, T time, D width, H heads, G groups (key-value heads), P head width."""

from __future__ import annotations

from torch import Tensor, nn

from nautilus.config import Attention
from nautilus.model.linear import Linear
from nautilus.model.norm import RmsNorm
from nautilus.model.state import Cache, Span, start_cache
from nautilus.ops.attention import attention, rotary_frequencies, rotate
from nautilus.ops.pages import Pool, attention_paged, write_pages


class AttentionMixer(nn.Module):
    """o_proj(attention(q_proj(u), k_proj(u), v_proj(u))), no biases.

    The Nemotron models use no positions at all; rotary positions and per-head norms of q and k serve the relatives.
    `k_scale` and `v_scale`: what a code of 1 stands for where keys and values are kept in FP8.
    """

    k_scale = v_scale = 1.0

    def __init__(self, layer: Attention, width: int, eps: float, *, device=None, dtype=None):
        super().__init__()
        self.layer = layer
        place = {"device": device, "dtype": dtype}
        self.q_proj = Linear(width, layer.heads * layer.head_width, **place)
        self.k_proj = Linear(width, layer.groups * layer.head_width, **place)
        self.v_proj = Linear(width, layer.groups * layer.head_width, **place)
        self.o_proj = Linear(layer.heads * layer.head_width, width, **place)
        if layer.head_norm:
            self.q_norm = RmsNorm(layer.head_width, eps, **place)
            self.k_norm = RmsNorm(layer.head_width, eps, **place)
        self.frequency = None
        if (r := layer.rotary) is not None:
            self.frequency = rotary_frequencies(layer.head_width, r.theta, r.factor, r.low, r.high, r.original)

    def queries(self, hidden_BTD: Tensor, span: Span) -> Tensor:
        q_BTHP = self.q_proj(hidden_BTD).unflatten(-1, (-1, self.layer.head_width))
        q_BTHP = self.q_norm(q_BTHP) if self.layer.head_norm else q_BTHP
        return q_BTHP if self.frequency is None else rotate(q_BTHP, span.rotary_BT, self.frequency)

    def keys_values(self, hidden_BTD: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        k, v = (p(hidden_BTD).unflatten(-1, (-1, self.layer.head_width)) for p in (self.k_proj, self.v_proj))
        k = self.k_norm(k) if self.layer.head_norm else k
        return k if self.frequency is None else rotate(k, span.rotary_BT, self.frequency), v

    def mix(self, q_BTHP: Tensor, k_BSGP: Tensor, v_BSGP: Tensor, span: Span) -> Tensor:
        out_BTHP = attention(q_BTHP, k_BSGP, v_BSGP, first_BT=span.first_BT, window=self.layer.window)
        return self.o_proj(out_BTHP.flatten(-2))

    def forward(self, hidden_BTD: Tensor, span: Span, state: Cache | Pool | None):
        q, (k, v), layer = self.queries(hidden_BTD, span), self.keys_values(hidden_BTD, span), self.layer
        if isinstance(state, Pool):
            assert span.lanes is not None
            rows, (q, k, v) = span.lanes.rows, (t.flatten(0, 1) for t in (q, k, v))
            write_pages(state, rows, k, v)
            out_NHP = attention_paged(q, state, rows, window=layer.window)
            return self.o_proj(out_NHP.view(*hidden_BTD.shape[:2], -1)), state
        cache = start_cache(k, v) if state is None else state.append(k, v)
        return self.mix(q, *cache.keys_values, span), cache
