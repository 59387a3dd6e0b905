"""The multi-token-prediction block. Letters: B batch, T time, D width.

Depth k reads depth k-1's hidden state (depth 0: the stack's, after its final norm) and the embedding of the token k
ahead, and predicts the token k+1 ahead through the shared head:

    f = eh_proj [enorm(Emb[id_{t+k}]) ; hnorm(h_t)];   f += mixer_i(norm_i(f)) for each layer;   h' = final_layernorm(f)

One block serves every depth (arXiv 2512.20856, 2604.12374).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from nautilus.config import Config, Layer
from nautilus.model.linear import Linear
from nautilus.model.norm import RmsNorm
from nautilus.model.state import Span
from nautilus.ops.norm import joined_norms
from nautilus.ops.pages import Pool
from nautilus.ops.residual import add


class MtpBlock(nn.Module):
    def __init__(self, config: Config, build_mixer, *, device=None, dtype=None):
        super().__init__()
        place = {"device": device, "dtype": dtype}
        last = len(config.mtp) - 1
        self.layers = nn.ModuleList(
            MtpLayer(layer, config, build_mixer, opens=i == 0, closes=i == last, **place)
            for i, layer in enumerate(config.mtp)
        )

    def forward(self, hidden_BTD: Tensor, ahead_BTD: Tensor, span: Span, memory: Sequence[Pool | None] = ()) -> Tensor:
        """One depth: h' from h and the embedding of the token ahead. memory: of each layer, where the call has Lanes,
        in which keys and values go on from those of earlier calls."""
        f = hidden_BTD
        for index, layer in enumerate(self.layers):
            f = layer(f, ahead_BTD, span, memory[index] if memory else None)
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

    def forward(self, hidden_BTD: Tensor, ahead_BTD: Tensor, span: Span, past: Pool | None = None) -> Tensor:
        f = hidden_BTD
        if self.eh_proj is not None and self.enorm is not None and self.hnorm is not None:
            f = self.eh_proj(joined_norms(ahead_BTD, self.enorm.weight, f, self.hnorm.weight, self.hnorm.eps))
        f = add(f, self.mixer(self.norm(f), span, past)[0])
        return f if self.final_layernorm is None else self.final_layernorm(f)
