"""The multi-token-prediction block. Letters: B batch, T time, D width.

Depth k reads depth k-1's hidden state (depth 0: the stack's, after its final norm) and the embedding of the token k
ahead, and predicts the token k+1 ahead through the shared head:

    f = eh_proj [enorm(Emb[id_{t+k}]) ; hnorm(h_t)];   f += mixer_i(norm_i(f)) for each layer;   h' = final_layernorm(f)

One block serves every depth (arXiv 2512.20856, 2604.12374).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nautilus.config import Config, Layer
from nautilus.model.linear import Linear
from nautilus.model.norm import RmsNorm
from nautilus.model.state import Span


class MtpBlock(nn.Module):
    def __init__(self, config: Config, build_mixer, *, device=None, dtype=None):
        super().__init__()
        place = {"device": device, "dtype": dtype}
        last = len(config.mtp) - 1
        self.layers = nn.ModuleList(
            MtpLayer(layer, config, build_mixer, opens=i == 0, closes=i == last, **place)
            for i, layer in enumerate(config.mtp)
        )

    def forward(self, hidden_BTD: Tensor, ahead_BTD: Tensor, span: Span) -> Tensor:
        """One depth: h' from h and the embedding of the token ahead."""
        f = hidden_BTD
        for layer in self.layers:
            f = layer(f, ahead_BTD, span)
        return f


class MtpLayer(nn.Module):
    """One layer of the block; the first also joins the two inputs, the last also norms the output."""

    def __init__(
        self, layer: Layer, config: Config, build_mixer, *, opens: bool, closes: bool, device=None, dtype=None
    ):
        super().__init__()
        place = {"device": device, "dtype": dtype}
        width, eps = config.width, config.norm_eps
        self.enorm = RmsNorm(width, eps, **place) if opens else None
        self.hnorm = RmsNorm(width, eps, **place) if opens else None
        self.eh_proj = Linear(2 * width, width, **place) if opens else None
        self.norm = RmsNorm(width, eps, **place)
        self.mixer = build_mixer(layer, config, **place)
        self.final_layernorm = RmsNorm(width, eps, **place) if closes else None

    def forward(self, hidden_BTD: Tensor, ahead_BTD: Tensor, span: Span) -> Tensor:
        f = hidden_BTD
        if self.eh_proj is not None and self.enorm is not None and self.hnorm is not None:
            f = self.eh_proj(torch.cat([self.enorm(ahead_BTD), self.hnorm(hidden_BTD)], dim=-1))
        f = f + self.mixer(self.norm(f), span, None)[0]
        return f if self.final_layernorm is None else self.final_layernorm(f)
