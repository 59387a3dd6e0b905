"""The Mamba-2 mixer. Letters: B batch, T time, D width, C conv channels, H heads, P head width, G groups, N state."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nautilus.config import Mamba
from nautilus.model.linear import Linear
from nautilus.model.state import MambaState, Span
from nautilus.ops.conv import causal_conv
from nautilus.ops.norm import gated_group_norm
from nautilus.ops.ssd import ssd, wide


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

    def forward(self, hidden_BTD: Tensor, span: Span, state: MambaState | None) -> tuple[Tensor, MambaState]:
        layer = self.layer
        z, xbc, dt = self.in_proj(hidden_BTD).split([layer.inner, layer.conv_width, layer.heads], dim=-1)
        xbc, tail = causal_conv(
            xbc,
            self.conv1d.weight[:, 0],
            self.conv1d.bias,
            tail_BRC=None if state is None else state.tail_BRC,
            reach_BT=span.reach_BT,
        )
        x, b, c = xbc.split([layer.inner, layer.groups * layer.state, layer.groups * layer.state], dim=-1)
        x_BTHP = x.unflatten(-1, (layer.heads, layer.head_width))
        dtype = wide(hidden_BTD.dtype)
        y_BTHP, ssm = ssd(
            x_BTHP,
            nn.functional.softplus(dt.to(dtype) + self.dt_bias.to(dtype)),
            -torch.exp(self.A_log.to(dtype)),
            b.unflatten(-1, (layer.groups, layer.state)),
            c.unflatten(-1, (layer.groups, layer.state)),
            state_BHPN=None if state is None else state.ssm_BHPN,
            start_BT=span.start_BT,
            chunk=min(layer.chunk, 64),
        )
        y = torch.addcmul(y_BTHP, x_BTHP, self.D.to(x.dtype)[:, None]).flatten(-2)
        out = self.out_proj(gated_group_norm(y, z, self.norm.weight, layer.groups, self.eps))
        return out, MambaState(tail, ssm)


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
