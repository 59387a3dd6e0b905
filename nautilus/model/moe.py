"""The mixture-of-experts mixer, at full or latent width. Letters: B batch, T time, D width, R tokens, E experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nautilus.config import Experts, Mlp
from nautilus.model.linear import Linear
from nautilus.model.mlp import MlpMixer
from nautilus.model.precision import Site
from nautilus.model.state import Span
from nautilus.ops.balance import balance_parts, sequence_balance_loss
from nautilus.ops.experts import experts, route
from nautilus.ops.formats import Packed, dense
from nautilus.ops.linear import linear
from nautilus.ops.low_precision import How, low_experts
from nautilus.ops.residual import add


class ExpertsMixer(nn.Module):
    """fc2_latent(sum_k w_k expert_k(fc1_latent u)) + shared(u); the latent projections are absent at full width.

    The router reads the full-width u in float32. `load_E` counts the tokens sent to each expert in training since it
    was last set to zero; while `balances` is a list, every training forward adds its sequence balance loss to it.
    While `chosen` is a list every forward adds the experts that it chose; `given_RK` are those that take the place of
    the router's choice, -1 where it is left to it (router replay, arXiv 2510.11370).
    """

    load_E: Tensor

    def __init__(self, layer: Experts, width: int, *, device=None, dtype=None):
        super().__init__()
        self.layer = layer
        place = {"device": device, "dtype": dtype}
        self.gate = Router(width, layer.experts, biased=layer.score == "sigmoid", **place)
        self.experts = ExpertWeights(layer, layer.latent or width, **place)
        if layer.latent:
            self.fc1_latent_proj = Linear(width, layer.latent, **place)
            self.fc2_latent_proj = Linear(layer.latent, width, **place)
        if layer.shared:
            self.shared_experts = MlpMixer(Mlp(hidden=layer.shared, gated=layer.gated), width, **place)
        self.register_buffer("load_E", torch.zeros(layer.experts, device=device), persistent=False)
        self.balances: list[tuple[Tensor, Tensor]] | None = None
        self.parts: list[tuple[Tensor, Tensor, Tensor]] | None = None  # of a row that comes in pieces
        self.chosen: list[Tensor] | None = None
        self.given_RK: Tensor | None = None

    def choose(self, hidden_RD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each token's experts index_RK, their weights weight_RK, and all scores score_RE."""
        layer = self.layer
        return route(
            self.gate(hidden_RD),
            self.gate.bias,
            layer.active,
            scale=layer.scale,
            score=layer.score,
            normalise=layer.normalise,
            expert_groups=layer.expert_groups,
            active_groups=layer.active_groups,
        )

    def replay(self, given_RK: Tensor, index_RK: Tensor, weight_RK: Tensor, score_RE: Tensor) -> tuple[Tensor, Tensor]:
        """The given experts, weighed by their scores now; where they are the router's own the numbers are its own."""
        other_R1 = (given_RK >= 0).all(-1, keepdim=True) & (given_RK != index_RK).any(-1, keepdim=True)
        index_RK = given_RK.where(other_R1, index_RK)
        own_RK = score_RE.gather(-1, index_RK)
        if self.layer.normalise:
            own_RK = own_RK / (own_RK.sum(-1, keepdim=True) + 1e-20)
        return index_RK, (own_RK * self.layer.scale).where(other_R1, weight_RK)

    def forward(self, hidden_BTD: Tensor, span: Span, state: None) -> tuple[Tensor, None]:
        layer, hidden_RD = self.layer, hidden_BTD.flatten(0, 1)
        index_RK, weight_RK, score_RE = self.choose(hidden_RD)
        if self.given_RK is not None:
            index_RK, weight_RK = self.replay(self.given_RK, index_RK, weight_RK, score_RE)
        if self.chosen is not None:
            self.chosen.append(index_RK)
        if self.training:
            self.observe(index_RK, score_RE.unflatten(0, hidden_BTD.shape[:2]), span.text_BT)
        inner_RX = self.fc1_latent_proj(hidden_RD) if layer.latent else hidden_RD
        routed = self.experts(inner_RX, index_RK, weight_RK)
        out = self.fc2_latent_proj(routed) if layer.latent else routed
        if layer.shared:
            out = add(out, self.shared_experts(hidden_RD)[0])
        return out.view_as(hidden_BTD), None

    def observe(self, index_RK: Tensor, score_BTE: Tensor, text_BT: Tensor | None) -> None:
        counted = index_RK if text_BT is None else index_RK[text_BT.flatten()]
        with torch.no_grad():
            self.load_E += torch.bincount(counted.flatten(), minlength=self.layer.experts).to(self.load_E.dtype)
        if self.parts is not None:
            self.parts.append(balance_parts(score_BTE, self.layer.active, text_BT))
        elif self.balances is not None:
            self.balances.append(sequence_balance_loss(score_BTE, self.layer.active, text_BT))


class Router(nn.Module):
    """Scores in float32. `e_score_correction_bias`, the load-balancing bias, is a buffer: no gradient, no decay."""

    def __init__(self, width: int, experts: int, *, biased: bool, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, width, device=device, dtype=dtype))
        bias = torch.zeros(experts, device=device, dtype=torch.float32) if biased else None
        self.register_buffer("e_score_correction_bias", bias)

    @property
    def bias(self) -> Tensor | None:
        return self.e_score_correction_bias  # type: ignore[return-value]

    def forward(self, hidden_RD: Tensor) -> Tensor:
        return linear(hidden_RD, self.weight, exact=True)


class ExpertWeights(nn.Module):
    """All experts' matrices: stacked parameters, or after `hold` one matrix each, in the few bits it is stored in."""

    def __init__(self, layer: Experts, width: int, *, device=None, dtype=None):
        super().__init__()
        place = {"device": device, "dtype": dtype}
        self.up_proj = nn.Parameter(torch.empty(layer.experts, layer.hidden, width, **place))
        self.down_proj = nn.Parameter(torch.empty(layer.experts, width, layer.hidden, **place))
        gate = nn.Parameter(torch.empty(layer.experts, layer.hidden, width, **place)) if layer.gated else None
        self.register_parameter("gate_proj", gate)
        self.input_scales: dict[str, tuple[Tensor | None, ...]] = {}
        self.site: Site | None = None  # with one they train in few bits; see `lower.py`

    @property
    def how(self) -> How | None:
        return None if self.site is None else self.site.how(self.training)

    def forward(self, x_RX: Tensor, index_RK: Tensor, weight_RK: Tensor) -> Tensor:
        given = x_RX, index_RK, weight_RK, self.up_proj, self.down_proj, self.gate_proj
        return experts(*given) if (how := self.how) is None else low_experts(*given, how)

    def hold(
        self, name: str, matrices: tuple[Packed | Tensor, ...], input_scales: tuple[Tensor | None, ...] = ()
    ) -> None:
        """name: up_proj, down_proj or gate_proj. An expert's matrix that was left as numbers may be among them."""
        delattr(self, name)
        setattr(self, name, matrices)
        self.input_scales[name] = input_scales or (None,) * len(matrices)

    def release(self, name: str, dtype: torch.dtype) -> None:
        """Undo `hold`: a parameter with the numbers that the matrices stand for."""
        numbers = torch.stack([dense(matrix, dtype) for matrix in getattr(self, name)])
        delattr(self, name)
        self.register_parameter(name, nn.Parameter(numbers))
        del self.input_scales[name]
