"""The mixers that remember nothing and see one token at a time: MLP, linear, nothing."""

from __future__ import annotations

from torch import Tensor, nn

from nautilus.config import Mlp
from nautilus.model.linear import Linear
from nautilus.model.state import Span
from nautilus.ops.activation import swiglu


class MlpMixer(nn.Module):
    """down(relu(up u)^2); gated: down(silu(gate u) * up u)."""

    def __init__(self, layer: Mlp, width: int, *, device=None, dtype=None):
        super().__init__()
        place = {"device": device, "dtype": dtype}
        self.up_proj = Linear(width, layer.hidden, **place)
        self.down_proj = Linear(layer.hidden, width, **place)
        self.gate_proj = Linear(width, layer.hidden, **place) if layer.gated else None

    def forward(self, hidden_BTD: Tensor, span: Span | None = None, state: None = None) -> tuple[Tensor, None]:
        if self.gate_proj is None:
            return self.down_proj(self.up_proj(hidden_BTD, squared_relu=True)), None
        return self.down_proj(swiglu(self.gate_proj(hidden_BTD), self.up_proj(hidden_BTD))), None


class LinearMixer(nn.Module):
    """One square matrix, the cheapest block of an architecture search that is not nothing."""

    def __init__(self, width: int, *, device=None, dtype=None):
        super().__init__()
        self.linear = Linear(width, width, device=device, dtype=dtype)

    def forward(self, hidden_BTD: Tensor, span: Span, state: None) -> tuple[Tensor, None]:
        return self.linear(hidden_BTD), None
