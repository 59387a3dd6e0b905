"""Routing, and many small matmuls. Letters: R tokens, D width, E experts, K active experts, F hidden width, X the width
the experts read and write (the model's, or the latent one), Z token-expert pairs (R times K).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nautilus.ops.activation import activate
from nautilus.ops.cpu.experts import experts_native, experts_refuse
from nautilus.ops.cpu.quant import experts_packed, experts_packed_refuse
from nautilus.ops.cpu.route import route_native, route_refuses
from nautilus.ops.dispatch import Impl, choose
from nautilus.ops.formats import Packed, dense
from nautilus.ops.shapes import checked

# Stacked, or one matrix for each expert: in few bits every one lies where its file has it.
Matrices = Tensor | tuple[Tensor | Packed, ...]


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
    highest may be chosen from. Chosen experts come in ascending order.
    """
    named = {"scale": scale, "score": score, "normalise": normalise}
    named |= {"expert_groups": expert_groups, "active_groups": active_groups}
    return choose("route", ROUTE_IMPLS, logits_RE, bias_E, active, **named)(logits_RE, bias_E, active, **named)


def route_torch(
    logits_RE, bias_E, active, *, scale, score, normalise, expert_groups, active_groups
) -> tuple[Tensor, Tensor, Tensor]:
    score_RE = logits_RE.sigmoid() if score == "sigmoid" else logits_RE.softmax(-1)
    choice_RE = score_RE.detach() if bias_E is None else score_RE.detach() + bias_E
    if active_groups < expert_groups:
        grouped = choice_RE.unflatten(-1, (expert_groups, -1))
        best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
        closed = torch.ones_like(best, dtype=torch.bool).scatter_(-1, best.topk(active_groups, dim=-1).indices, False)
        choice_RE = grouped.masked_fill(closed[..., None], float("-inf")).flatten(-2)
    index_RK = choice_RE.topk(active, dim=-1, sorted=False).indices.sort(-1).values
    weight_RK = score_RE.gather(-1, index_RK)
    if normalise:
        weight_RK = weight_RK / (weight_RK.sum(-1, keepdim=True) + 1e-20)
    return index_RK, weight_RK * scale, score_RE


@checked
def experts(
    x_RX: Tensor,
    index_RK: Tensor,
    weight_RK: Tensor,
    up_EFX: Matrices,
    down_EXF: Matrices,
    gate_EFX: Matrices | None = None,
) -> Tensor:
    """sum over the K chosen experts of weight * down(activation(up x)); accumulated in float32, shape (R, X).

    The matrices may be wider than x (float32 masters): they are rounded to x's dtype where they are used. Those of
    chosen experts only are decoded where they are in few bits; the gradient then reaches x and the weights only.
    """
    tensors = x_RX, index_RK, weight_RK, up_EFX, down_EXF, gate_EFX
    return choose("experts", EXPERTS_IMPLS, *tensors)(*tensors)


def experts_reference(x_RX, index_RK, weight_RK, up_EFX, down_EXF, gate_EFX=None) -> Tensor:
    """One expert after another over the tokens that chose it."""
    out = weight_RK.new_zeros(x_RX.shape)
    for e in range(len(up_EFX)):
        token, slot = (index_RK == e).nonzero(as_tuple=True)
        x = x_RX[token]
        gate = None if gate_EFX is None else x @ dense(gate_EFX[e], x.dtype).T
        y = activate(x @ dense(up_EFX[e], x.dtype).T, gate) @ dense(down_EXF[e], x.dtype).T
        out = out.index_add(0, token, y.to(out.dtype) * weight_RK[token, slot, None])
    return out.to(x_RX.dtype)


@dataclass
class Pairs:
    """Token-expert pairs sorted by expert. Letters: Z pairs, expert after expert.

    In bf16 each expert's rows are rounded up to a multiple of 32 with pairs of weight zero: the CPU's matmul library
    prepares one kernel per shape, and otherwise every expert of every step would have a new one.
    """

    token_Z: Tensor
    weight_Z: Tensor
    place_RK: Tensor
    counts: list[int]


def sort_pairs(index_RK: Tensor, weight_RK: Tensor, experts: int, multiple: int) -> Pairs:
    order = index_RK.flatten().argsort(stable=True)
    chosen = torch.bincount(index_RK.flatten(), minlength=experts)
    rounded = (chosen + multiple - 1) // multiple * multiple
    begin = rounded.cumsum(0) - rounded - (chosen.cumsum(0) - chosen)
    slot = torch.arange(order.shape[0], device=order.device) + begin[index_RK.flatten()[order]]
    counts = rounded.tolist()
    token_Z = order.new_zeros(sum(counts))
    token_Z[slot] = order // index_RK.shape[1]
    weight_Z = weight_RK.new_zeros(token_Z.shape)
    weight_Z[slot] = weight_RK.detach().flatten()[order]
    place_RK = torch.empty_like(order)
    place_RK[order] = slot
    return Pairs(token_Z, weight_Z, place_RK.view_as(index_RK), counts)


def experts_sorted(x_RX, index_RK, weight_RK, up_EFX, down_EXF, gate_EFX=None) -> Tensor:
    """Pairs sorted by expert, one matmul per expert and matrix on contiguous rows."""
    multiple = 32 if x_RX.dtype == torch.bfloat16 and x_RX.device.type == "cpu" and len(x_RX) > 64 else 1
    pairs = sort_pairs(index_RK, weight_RK, len(up_EFX), multiple)
    if any(isinstance(matrices, tuple) for matrices in (up_EFX, down_EXF, gate_EFX)):
        return experts_decoded(x_RX, weight_RK, up_EFX, down_EXF, gate_EFX, pairs)
    matrices = (None if matrix is None else matrix.to(x_RX.dtype) for matrix in (up_EFX, down_EXF, gate_EFX))
    return SortedExperts.apply(x_RX, weight_RK, *matrices, pairs)


def experts_decoded(x_RX, weight_RK, up_EFX, down_EXF, gate_EFX, pairs: Pairs) -> Tensor:
    """The same products in the same order; one expert's matrix is decoded at a time."""

    def product(rows: Tensor, matrices: Matrices) -> Tensor:
        outputs = matrices[0].shape[0]
        decoded = ((span, dense(matrices[e], rows.dtype).T) for e, span in spans(pairs.counts))
        if torch.is_grad_enabled() and rows.requires_grad:
            return torch.cat([rows.new_empty(0, outputs), *(rows[span] @ matrix for span, matrix in decoded)])
        out = rows.new_empty(len(rows), outputs)
        for span, matrix in decoded:
            torch.mm(rows[span], matrix, out=out[span])
        return out

    x_ZX = x_RX[pairs.token_Z]
    gate_ZF = None if gate_EFX is None else product(x_ZX, gate_EFX)
    y_ZX = product(activate(product(x_ZX, up_EFX), gate_ZF), down_EXF)
    return combine(y_ZX, pairs.place_RK, weight_RK).to(x_RX.dtype)


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


class SortedExperts(torch.autograd.Function):
    """All experts, gated or not. The output of `down` is never kept: its inner product with the output's gradient,
    which the routing weight needs, equals that of the activation with the activation's gradient."""

    @staticmethod
    def forward(ctx, x_RX, weight_RK, up_EFX, down_EXF, gate_EFX, pairs):
        x_ZX = x_RX[pairs.token_Z]
        up_ZF = grouped_matmul(x_ZX, up_EFX.transpose(1, 2), pairs.counts)
        gate_ZF = None if gate_EFX is None else grouped_matmul(x_ZX, gate_EFX.transpose(1, 2), pairs.counts)
        y_ZX = grouped_matmul(activate(up_ZF, gate_ZF), down_EXF.transpose(1, 2), pairs.counts)
        of_pairs = pairs.token_Z, pairs.weight_Z, pairs.place_RK
        ctx.save_for_backward(x_RX, weight_RK, up_EFX, down_EXF, gate_EFX, up_ZF, gate_ZF, *of_pairs)
        ctx.counts = pairs.counts
        return combine(y_ZX, pairs.place_RK, weight_RK).to(x_RX.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_RX):  # type: ignore[override]
        x_RX, weight_RK, up_EFX, down_EXF, gate_EFX, up_ZF, gate_ZF, token_Z, weight_Z, place_RK = ctx.saved_tensors
        counts = ctx.counts
        dout_ZX, x_ZX = dout_RX[token_Z], x_RX[token_Z]
        dact_ZF = grouped_matmul(dout_ZX, down_EXF, counts)
        act_ZF = activate(up_ZF, gate_ZF)
        dweight = (act_ZF * dact_ZF).sum(-1, dtype=weight_RK.dtype)[place_RK]
        weight_Z1 = weight_Z[:, None].to(x_RX.dtype)
        ddown = grouped_outer(dout_ZX.mul_(weight_Z1), act_ZF, counts)
        dact_ZF.mul_(weight_Z1)
        if gate_ZF is None:
            dup_ZF, dgate = dact_ZF.mul_(up_ZF.relu().mul_(2)), None
            dx_ZX = grouped_matmul(dup_ZF, up_EFX, counts)
        else:
            dup_ZF = dact_ZF * torch.nn.functional.silu(gate_ZF)
            dgate_ZF = torch.ops.aten.silu_backward(dact_ZF * up_ZF, gate_ZF)
            dgate = grouped_outer(dgate_ZF, x_ZX, counts)
            dx_ZX = grouped_matmul(dup_ZF, up_EFX, counts) + grouped_matmul(dgate_ZF, gate_EFX, counts)
        dup = grouped_outer(dup_ZF, x_ZX, counts)
        dx_RX = combine(dx_ZX, place_RK, torch.ones_like(weight_RK)).to(x_RX.dtype)
        return dx_RX, dweight, dup, ddown, dgate, None


def combine(y_ZX: Tensor, place_RK: Tensor, weight_RK: Tensor) -> Tensor:
    """Each token's weighted sum over its pairs, in the weights' dtype. Gathers, so that threads never collide."""
    out = y_ZX[place_RK[:, 0]].to(weight_RK.dtype) * weight_RK[:, 0, None]
    for k in range(1, weight_RK.shape[1]):
        out.addcmul_(y_ZX[place_RK[:, k]].to(out.dtype), weight_RK[:, k, None])
    return out


def native(x_RX, index_RK, weight_RK, up_EFX, down_EXF, gate_EFX=None) -> Tensor:
    function = experts_packed if isinstance(up_EFX, tuple) else experts_native
    return function(x_RX, index_RK, weight_RK, up_EFX, down_EXF, gate_EFX)


def native_refuses(x_RX, index_RK, weight_RK, up_EFX, down_EXF, gate_EFX=None) -> str | None:
    few = any(isinstance(matrices, tuple) for matrices in (up_EFX, down_EXF, gate_EFX))
    refuse = experts_packed_refuse if few else experts_refuse
    return refuse(x_RX, index_RK, weight_RK, up_EFX, down_EXF, gate_EFX)


ROUTE_IMPLS = (
    Impl("native", route_native, route_refuses),
    Impl("torch", route_torch),
    Impl("reference", route_torch),
)
EXPERTS_IMPLS = (
    Impl("native", native, native_refuses),
    Impl("torch", experts_sorted),
    Impl("reference", experts_reference),
)
