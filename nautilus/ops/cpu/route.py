"""The choice of experts as one native call; ties and the order of the chosen are the same everywhere."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nautilus.ops.cpu.library import call, pointer, refuses

COUNTS = ("tokens", "experts", "active", "groups", "active_groups", "softmax", "normalise")


class Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in COUNTS),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("logits", "bias", "score", "index", "weight")),
    ]


def route_native(
    logits_RE, bias_E, active, *, scale, score, normalise, expert_groups, active_groups
) -> tuple[Tensor, Tensor, Tensor]:
    """See `ops/experts.py`."""
    settings = active, scale, score == "softmax", normalise, expert_groups, active_groups
    if torch.is_grad_enabled() and logits_RE.requires_grad:
        return Native.apply(logits_RE, bias_E, *settings)  # type: ignore[return-value]
    return run(logits_RE, bias_E, *settings)


def route_refuses(logits_RE, bias_E, active, *, scale, score, normalise, expert_groups, active_groups) -> str | None:
    experts = logits_RE.shape[1]
    if logits_RE.dtype != torch.float32 or (bias_E is not None and bias_E.dtype != torch.float32):
        return f"logits are {logits_RE.dtype} and the bias is {bias_E if bias_E is None else bias_E.dtype}"
    open_experts = experts // expert_groups * active_groups
    if experts % expert_groups or active > open_experts or active_groups > expert_groups:
        return f"{active} of {experts} experts cannot be chosen from {active_groups} of {expert_groups} groups"
    return refuses(logits_RE, bias_E)


def run(
    logits_RE, bias_E, active: int, scale: float, softmax: bool, normalise: bool, groups: int, active_groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    logits_RE = logits_RE.detach().contiguous()
    tokens, experts = logits_RE.shape
    score_RE = torch.empty_like(logits_RE)
    weight_RK = logits_RE.new_empty(tokens, active)
    index_RK = torch.empty(tokens, active, dtype=torch.int64)
    bias = None if bias_E is None else bias_E.contiguous()
    sizes = tokens, experts, active, groups, active_groups, softmax, normalise, scale
    call("nautilus_route", Arguments(*sizes, *map(pointer, (logits_RE, bias, score_RE, index_RK, weight_RK))))
    return index_RK, weight_RK, score_RE


class Native(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_RE, bias_E, active, scale, softmax, normalise, groups, active_groups):
        index_RK, weight_RK, score_RE = run(logits_RE, bias_E, active, scale, softmax, normalise, groups, active_groups)
        ctx.save_for_backward(index_RK, score_RE)
        ctx.scale, ctx.softmax, ctx.normalise = scale, softmax, normalise
        ctx.mark_non_differentiable(index_RK)
        return index_RK, weight_RK, score_RE

    @staticmethod
    @once_differentiable
    def backward(ctx, _, dweight_RK, dscore_RE):  # type: ignore[override]
        index_RK, score_RE = ctx.saved_tensors
        chosen_RK, dchosen_RK = score_RE.gather(-1, index_RK), dweight_RK * ctx.scale
        if ctx.normalise:  # w = s / sum: dw to ds
            total_R1 = chosen_RK.sum(-1, keepdim=True) + 1e-20
            inner_R1 = (dchosen_RK * chosen_RK).sum(-1, keepdim=True) / total_R1
            dchosen_RK = (dchosen_RK - inner_R1) / total_R1
        ds_RE = dscore_RE.scatter_add(-1, index_RK, dchosen_RK)
        if ctx.softmax:
            dlogits = score_RE * (ds_RE - (ds_RE * score_RE).sum(-1, keepdim=True))
        else:
            dlogits = ds_RE * score_RE * (1 - score_RE)
        return dlogits, None, None, None, None, None, None, None
