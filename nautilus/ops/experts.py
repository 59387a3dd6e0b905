"""Routing, and many small matmuls. Letters: R tokens, D width, E experts, K active experts, F hidden width, X the width
the experts read and write (the model's, or the latent one), Z token-expert pairs (R times K).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nautilus.ops.dispatch import Impl, choose
from nautilus.ops.shapes import checked


@checked
def route(
    logits_RE: Tensor,
    bias_E: Tensor | None,
    active: int,
    *,
    scale: float = 1.0,
    score: str = "sigmoid",
    normalise: bool = True,
    expert_groups: int = 1,
    active_groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Chosen experts index_RK, their weights weight_RK, and all scores score_RE. float32 in, float32 out.

    s = sigmoid(logits) or softmax(logits); the K largest s + bias are chosen (the bias selects, it never weighs);
    w = scale * s / (sum of chosen s + 1e-20). With groups, only the `active_groups` whose two best biased scores add up
    highest may be chosen from. Ties have no defined order.
    """
    score_RE = logits_RE.sigmoid() if score == "sigmoid" else logits_RE.softmax(-1)
    choice_RE = score_RE.detach() if bias_E is None else score_RE.detach() + bias_E
    if active_groups < expert_groups:
        grouped = choice_RE.unflatten(-1, (expert_groups, -1))
        best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
        closed = torch.ones_like(best, dtype=torch.bool).scatter_(-1, best.topk(active_groups, dim=-1).indices, False)
        choice_RE = grouped.masked_fill(closed[..., None], float("-inf")).flatten(-2)
    index_RK = choice_RE.topk(active, dim=-1, sorted=False).indices
    weight_RK = score_RE.gather(-1, index_RK)
    if normalise:
        weight_RK = weight_RK / (weight_RK.sum(-1, keepdim=True) + 1e-20)
    return index_RK, weight_RK * scale, score_RE


def squared_relu(hidden: Tensor) -> Tensor:
    return hidden.relu().square()


def activate(up: Tensor, gate: Tensor | None) -> Tensor:
    """relu(up)^2, or silu(gate) * up for gated experts."""
    return squared_relu(up) if gate is None else torch.nn.functional.silu(gate) * up


@checked
def experts(
    x_RX: Tensor,
    index_RK: Tensor,
    weight_RK: Tensor,
    up_EFX: Tensor,
    down_EXF: Tensor,
    gate_EFX: Tensor | None = None,
) -> Tensor:
    """sum over the K chosen experts of weight * down(activation(up x)); accumulated in float32, shape (R, X)."""
    function = choose("experts", EXPERTS_IMPLS, x_RX)
    return function(x_RX, index_RK, weight_RK, up_EFX, down_EXF, gate_EFX)


def experts_reference(x_RX, index_RK, weight_RK, up_EFX, down_EXF, gate_EFX=None) -> Tensor:
    """One expert after another over the tokens that chose it."""
    out = weight_RK.new_zeros(x_RX.shape)
    for e in range(up_EFX.shape[0]):
        token, slot = (index_RK == e).nonzero(as_tuple=True)
        x = x_RX[token]
        gate = None if gate_EFX is None else x @ gate_EFX[e].T
        y = activate(x @ up_EFX[e].T, gate) @ down_EXF[e].T
        out = out.index_add(0, token, y.to(out.dtype) * weight_RK[token, slot, None])
    return out.to(x_RX.dtype)


def experts_sorted(x_RX, index_RK, weight_RK, up_EFX, down_EXF, gate_EFX=None) -> Tensor:
    """Pairs sorted by expert, one matmul per expert and matrix on contiguous rows."""
    order_Z = index_RK.flatten().argsort(stable=True)
    counts = torch.bincount(index_RK.flatten(), minlength=up_EFX.shape[0]).tolist()
    if gate_EFX is None:
        return SortedExperts.apply(x_RX, weight_RK, up_EFX, down_EXF, order_Z, counts)
    token_Z = order_Z // index_RK.shape[1]
    x_ZX = x_RX[token_Z]
    hidden = activate(GroupedLinear.apply(x_ZX, up_EFX, counts), GroupedLinear.apply(x_ZX, gate_EFX, counts))
    y_ZX = GroupedLinear.apply(hidden, down_EXF, counts)
    weighted = y_ZX.to(weight_RK.dtype) * weight_RK.flatten()[order_Z, None]
    return torch.zeros_like(x_RX, dtype=weight_RK.dtype).index_add(0, token_Z, weighted).to(x_RX.dtype)


def spans(counts: list[int]):
    """(expert, slice of its pairs) for every expert that was chosen at all."""
    begin = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(begin, begin + count)
        begin += count


def grouped_matmul(rows: Tensor, matrices: Tensor, counts: list[int]) -> Tensor:
    """rows[span of e] @ matrices[e] for every expert e."""
    out = rows.new_empty(rows.shape[0], matrices.shape[2])
    for e, span in spans(counts):
        torch.mm(rows[span], matrices[e], out=out[span])
    return out


def grouped_outer(left: Tensor, right: Tensor, counts: list[int]) -> Tensor:
    """left[span of e]^T @ right[span of e] for every expert e, zero for experts without pairs."""
    out = left.new_zeros(len(counts), left.shape[1], right.shape[1])
    for e, span in spans(counts):
        torch.mm(left[span].T, right[span], out=out[e])
    return out


class GroupedLinear(torch.autograd.Function):
    """y[span of e] = x[span of e] @ weight[e]^T."""

    @staticmethod
    def forward(ctx, x_ZX, weight_EFX, counts):
        ctx.save_for_backward(x_ZX, weight_EFX)
        ctx.counts = counts
        return grouped_matmul(x_ZX, weight_EFX.transpose(1, 2), counts)

    @staticmethod
    def backward(ctx, dy_ZF):  # type: ignore[override]
        x_ZX, weight_EFX = ctx.saved_tensors
        dy_ZF = dy_ZF.contiguous()
        return grouped_matmul(dy_ZF, weight_EFX, ctx.counts), grouped_outer(dy_ZF, x_ZX, ctx.counts), None


class SortedExperts(torch.autograd.Function):
    """Squared-ReLU experts. The output of `down` is never kept: its inner product with the output's gradient, which the
    routing weight needs, equals that of the activation with the activation's gradient."""

    @staticmethod
    def forward(ctx, x_RX, weight_RK, up_EFX, down_EXF, order_Z, counts):
        active = weight_RK.shape[1]
        x_ZX = x_RX[order_Z // active]
        relu_ZF = grouped_matmul(x_ZX, up_EFX.transpose(1, 2), counts).relu_()
        y_ZX = grouped_matmul(relu_ZF.square(), down_EXF.transpose(1, 2), counts)
        ctx.save_for_backward(x_RX, weight_RK, up_EFX, down_EXF, order_Z, relu_ZF)
        ctx.counts = counts
        return combine(y_ZX, weight_RK, order_Z).to(x_RX.dtype)

    @staticmethod
    def backward(ctx, dout_RX):  # type: ignore[override]
        x_RX, weight_RK, up_EFX, down_EXF, order_Z, relu_ZF = ctx.saved_tensors
        token_Z = order_Z // weight_RK.shape[1]
        dout_ZX = dout_RX[token_Z]
        dact_ZF = grouped_matmul(dout_ZX, down_EXF, ctx.counts)
        act_ZF = relu_ZF.square()
        dweight = torch.empty_like(weight_RK).flatten()
        dweight[order_Z] = torch.linalg.vecdot(act_ZF, dact_ZF).to(weight_RK.dtype)
        weight_Z1 = weight_RK.flatten()[order_Z, None].to(dact_ZF.dtype)
        ddown = grouped_outer(dout_ZX * weight_Z1, act_ZF, ctx.counts)
        dup_ZF = dact_ZF.mul_(relu_ZF).mul_(weight_Z1 * 2)
        dup = grouped_outer(dup_ZF, x_RX[token_Z], ctx.counts)
        dx_ZX = grouped_matmul(dup_ZF, up_EFX, ctx.counts)
        ones_RK = torch.ones_like(weight_RK)
        return combine(dx_ZX, ones_RK, order_Z).to(x_RX.dtype), dweight.view_as(weight_RK), dup, ddown, None, None


def combine(y_ZX: Tensor, weight_RK: Tensor, order_Z: Tensor) -> Tensor:
    """Each token's weighted sum over its pairs, in the weights' dtype. Gathers, so that threads never collide."""
    place_Z = torch.empty_like(order_Z)
    place_Z[order_Z] = torch.arange(order_Z.shape[0], device=order_Z.device)
    y_RKX = y_ZX[place_Z].view(*weight_RK.shape, -1)
    out = y_RKX[:, 0].to(weight_RK.dtype) * weight_RK[:, 0, None]
    for k in range(1, weight_RK.shape[1]):
        out.addcmul_(y_RKX[:, k].to(out.dtype), weight_RK[:, k, None])
    return out


EXPERTS_IMPLS = (Impl("torch", experts_sorted), Impl("reference", experts_reference))
