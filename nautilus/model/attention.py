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

    def forward(self, hidden_BTD: Tensor, span: Span, state: Cache | Pool | None):
        layer = self.layer
        q, k, v = (
            projection(hidden_BTD).unflatten(-1, (-1, layer.head_width))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if layer.head_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.frequency is not None:
            q, k = (rotate(t, span.rotary_BT, self.frequency) for t in (q, k))
        if isinstance(state, Pool):
            assert span.lanes is not None
            rows, (q, k, v) = span.lanes.rows, (t.flatten(0, 1) for t in (q, k, v))
            write_pages(state, rows, k, v)
            out_NHP = attention_paged(q, state, rows, window=layer.window)
            return self.o_proj(out_NHP.view(*hidden_BTD.shape[:2], -1)), state
        cache = start_cache(k, v) if state is None else state.append(k, v)
        keys, values = cache.keys_values
        out = attention(q, keys, values, first_BT=span.first_BT, window=layer.window)
        return self.o_proj(out.flatten(-2)), cache
