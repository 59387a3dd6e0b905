"""Tensors that travel between ranks, with their way back for gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

Group = dist.ProcessGroup


def exchanged(rows: Tensor, sent: list[int] | None, got: list[int] | None, group: Group) -> Tensor:
    """The first sent[0] rows go to rank 0 and so on; None: all alike."""
    out = rows.new_empty(len(rows) if got is None else sum(got), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), got, sent, group=group)
    return out


def summed(tensor: Tensor, group: Group) -> Tensor:
    there = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(there, group=group)
    return there


def joined(tensor: Tensor, dim: int, group: Group) -> Tensor:
    """Every rank's tensor, one after another."""
    pieces = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(pieces, tensor.contiguous(), group=group)
    return torch.cat(pieces, dim)


class Exchange(torch.autograd.Function):
    """`exchanged`; gradients come the same way back."""

    @staticmethod
    def forward(ctx, rows: Tensor, sent: list[int] | None, got: list[int] | None, group: Group):
        ctx.sent, ctx.got, ctx.group = sent, got, group
        return exchanged(rows, sent, got, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor) -> Any:
        return exchanged(gradients[0], ctx.got, ctx.sent, ctx.group), None, None, None


class Enter(torch.autograd.Function):
    """Where every rank begins to compute its own part of something: nothing happens, gradients are added up."""

    @staticmethod
    def forward(ctx, tensor: Tensor, group: Group):
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor) -> Any:
        return summed(gradients[0], ctx.group), None


class Leave(torch.autograd.Function):
    """Where the parts are added up: gradients pass as they are."""

    @staticmethod
    def forward(ctx, tensor: Tensor, group: Group):
        return summed(tensor, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor) -> Any:
        return gradients[0], None


class Join(torch.autograd.Function):
    """`joined`, for ranks that go on to compute different things: their gradients are added up."""

    @staticmethod
    def forward(ctx, tensor: Tensor, dim: int, group: Group):
        ctx.dim, ctx.group = dim, group
        return joined(tensor, dim, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor) -> Any:
        return summed(gradients[0], ctx.group).chunk(ctx.group.size(), ctx.dim)[ctx.group.rank()], None, None


def share_of(rows: Tensor, group: Group) -> Tensor:
    """This rank's rows of rows that all have; the last ranks may get fewer, or rows of zeros."""
    each = -(-len(rows) // group.size())
    padded = torch.nn.functional.pad(rows, (0, 0) * (rows.ndim - 1) + (0, each * group.size() - len(rows)))
    return padded.narrow(0, each * group.rank(), each)


class Deal(torch.autograd.Function):
    """Rows that all ranks have are dealt among them, rounded up to equal numbers with rows of zeros."""

    @staticmethod
    def forward(ctx, rows: Tensor, group: Group):
        ctx.rows, ctx.group = len(rows), group
        return share_of(rows, group).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor) -> Any:
        return joined(gradients[0], 0, ctx.group)[: ctx.rows], None


class Collect(torch.autograd.Function):
    """The way back from `Deal`, for ranks that go on to compute the same."""

    @staticmethod
    def forward(ctx, rows: Tensor, whole: int, group: Group):
        ctx.group = group
        return joined(rows, 0, group)[:whole]

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor) -> Any:
        return share_of(gradients[0], ctx.group).clone(), None, None
