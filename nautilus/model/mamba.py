"""The Mamba-2 mixer. Letters: B batch, T time, D width, C conv channels, H heads, P head width, G groups, N state."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nautilus.config import Mamba
from nautilus.model.linear import Linear
from nautilus.model.state import MambaState, Span
from nautilus.ops.mamba import MambaSlots, mamba, mamba_in_slots
from nautilus.ops.ssd import wide


class MambaMixer(nn.Module):
    """z, xBC, dt = in_proj(u);  x, B, C = conv(xBC);  y = scan(x, softplus(dt + dt_bias), -exp(A_log), B, C) + D x;
    out = out_proj(norm(y silu(z))).

    dt, A and the state are float32. dt is not clamped (the released models are not either; transformers clamps it).
    """

    def __init__(self, layer: Mamba, width: int, eps: float, *, device=None, dtype=None):
        super().__init__()
        self.layer, self.eps = layer, eps
        place = {"device": device, "dtype": dtype}
        self.in_proj = Linear(width, layer.inner + layer.conv_width + layer.heads, **place)
        self.conv1d = DepthwiseWeights(layer.conv_width, layer.taps, **place)
        self.A_log = nn.Parameter(torch.empty(layer.heads, **place))
        self.D = nn.Parameter(torch.empty(layer.heads, **place))
        self.dt_bias = nn.Parameter(torch.empty(layer.heads, **place))
        self.norm = NormWeight(layer.inner, **place)
        self.out_proj = Linear(layer.inner, width, **place)

    def forward(self, hidden_BTD: Tensor, span: Span, state: MambaState | MambaSlots | None):
        tensors = (
            self.in_proj(hidden_BTD),
            self.conv1d.weight[:, 0],
            self.conv1d.bias,
            self.dt_bias,
            -torch.exp(self.A_log.to(wide(hidden_BTD.dtype))),
            self.D,
            self.norm.weight,
        )
        groups, eps = self.layer.groups, self.eps
        if isinstance(state, MambaSlots):
            lanes = span.lanes
            assert lanes is not None
            where = {"slots": state, "slot_B": lanes.slot_B, "begin": lanes.rows.begin, "tentative": lanes.tentative}
            return self.out_proj(mamba_in_slots(*tensors, **where, groups=groups, eps=eps)), state
        before = {} if state is None else {"tail_BRC": state.tail_BRC, "state_BHPN": state.ssm_BHPN}
        out, tail, ssm = mamba(*tensors, groups=groups, eps=eps, **before, reach_BT=span.reach_BT)
        return self.out_proj(out), MambaState(tail, ssm)


class DepthwiseWeights(nn.Module):
    """Parameters only, under the names of the released files."""

    def __init__(self, channels: int, taps: int, *, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))


class NormWeight(nn.Module):
    """Parameters only, under the names of the released files."""

    def __init__(self, width: int, *, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
