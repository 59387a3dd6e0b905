"""Layers dealt among ranks, neighbours together: a pipeline of stages. Letters: B rows, T tokens of a rank, D width.

What leaves a stage's last layer goes on to the next one, and its gradient comes back. Everything else a stage knows by
itself: all stages of a row of ranks read the same batches. Micro-batches pass by 1F1B (`turns`).

torch.distributed.pipelining runs the same order, but it knows of losses in the last stage only, where here the routers
of every stage have one; it needs micro-batches of one shape, at least as many as stages and always the same number;
where shapes are not given it finds them by a forward of its own, which the routers would count; and it leaves a stage's
sharded weights gathered from one micro-batch to the next. Two messages and their order are all that is needed of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from nautilus.config import Nothing
from nautilus.model.language import Block, Language
from nautilus.train.layout import Work
from nautilus.train.parallel.travel import Group
from nautilus.train.stages import copies_embedding, stages_of


@dataclass(kw_only=True, eq=False)
class Pipe:
    """The stages that a micro-batch of this rank passes. line: their ranks.

    Each direction has a group of its own: what goes on must not wait for what comes back. ends: first and last stage.
    layers: the stage of each. shares_embedding: whether this stage and another one have the embedding.
    """

    stage: int
    line: list[int]
    onward: Group
    back: Group
    ends: Group
    layers: list[int] = field(default_factory=list)
    shares_embedding: bool = False
    sent: dict[Group, tuple[dist.Work, Tensor]] = field(default_factory=dict)
    left: deque[Tensor] = field(default_factory=deque)  # what `hidden` gave and has not gone backward

    @property
    def first(self) -> bool:
        return self.stage == 0

    @property
    def last(self) -> bool:
        return self.stage == len(self.line) - 1

    def send(self, tensor: Tensor, to: int, group: Group) -> None:
        """Returns at once; the one before must have arrived, so that only one is kept for it."""
        if group in self.sent:
            self.sent[group][0].wait()
        tensor = tensor.contiguous()
        work = dist.isend(tensor, self.line[to], group=group)
        assert work is not None
        self.sent[group] = work, tensor

    def settle(self) -> None:
        """Waits until everything has arrived."""
        for work, _ in self.sent.values():
            work.wait()
        self.sent.clear()

    def receive(self, like: Tensor, of: int, group: Group) -> Tensor:
        got = torch.empty_like(like, memory_format=torch.contiguous_format)
        dist.recv(got, self.line[of], group=group)
        return got


def pipe_of(rows: DeviceMesh) -> Pipe:
    """rows: the mesh that has the stages along its axis pp."""
    line, mine = rows["pp"].mesh.tolist(), dist.get_rank()
    ends = [line[0], line[-1]] if mine in (line[0], line[-1]) else [mine]  # a stage within has nobody to share with
    return Pipe(stage=line.index(mine), line=line, onward=among(line), back=among(line), ends=among(ends))


def among(ranks: list[int]) -> Group:
    """A group that only its members make."""
    group = dist.new_group(ranks, use_local_synchronization=True)
    assert isinstance(group, Group)
    return group


def turns(count: int, ahead: int) -> Iterator[str]:
    """1F1B of a stage that `ahead` others follow: at most ahead + 1 micro-batches are under way in it at a time."""
    ahead = min(ahead, count)
    yield from ["forward"] * ahead
    yield from ["forward", "backward"] * (count - ahead)
    yield from ["backward"] * ahead


# ----- the model of a stage ------------------------------------------------------------------------------------------


def leave_stage(model: Language, pipe: Pipe, work: Work) -> None:
    """Takes out of the model what other stages have; what a step is decides which layers cost alike.

    Layers keep their numbers and parameters their names; in the place of other stages' layers is nothing.
    """
    config, count = model.config, len(pipe.line)
    pipe.layers = stages_of(config, count, length=work.length, depths=work.mtp_depths)
    pipe.shares_embedding = copies_embedding(config, count, work.mtp_depths) and (pipe.first or pipe.last)
    model.ends = pipe.last
    for index, stage in enumerate(pipe.layers):
        if stage != pipe.stage:
            model.backbone.layers[index] = Block(Nothing(), config)
    if not pipe.first:
        model.entering = partial(arriving, model, pipe)  # type: ignore[assignment]
        if not pipe.shares_embedding:
            model.backbone.embeddings = None  # type: ignore[assignment]
    if not pipe.last:
        model.backbone.norm_f = Leaving(pipe)  # type: ignore[assignment]
        for name in ("lm_head", "mtp"):
            if hasattr(model, name):
                delattr(model, name)


def arriving(model: Language, pipe: Pipe, tokens_BT: Tensor, embeds_BTD: None) -> Tensor:
    """As Language.entering: what the stage before makes of these tokens."""
    like = torch.empty((), dtype=model.compute, device=tokens_BT.device)
    like_BTD = like.expand(*tokens_BT.shape, model.config.width)
    return Arrive.apply(torch.zeros((), requires_grad=True), like_BTD, pipe)  # type: ignore[return-value]


class Leaving(nn.Module):
    """In the place of the final norm."""

    def __init__(self, pipe: Pipe):
        super().__init__()
        self.pipe = pipe

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return Leave.apply(hidden_BTD, self.pipe)  # type: ignore[return-value]


class Arrive(torch.autograd.Function):
    """The hidden states of the stage before; their gradient goes back there. anchor: something to differentiate."""

    @staticmethod
    def forward(ctx, anchor: Tensor, like_BTD: Tensor, pipe: Pipe):
        ctx.pipe = pipe
        return pipe.receive(like_BTD, pipe.stage - 1, pipe.onward)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor) -> Any:
        ctx.pipe.send(gradients[0], ctx.pipe.stage - 1, ctx.pipe.back)
        return None, None, None


class Leave(torch.autograd.Function):
    """Sends hidden states to the next stage and waits for their gradient in the backward. Gives zeros of their shape,
    whose gradient says nothing."""

    @staticmethod
    def forward(ctx, hidden_BTD: Tensor, pipe: Pipe):
        ctx.pipe, ctx.like_BTD = pipe, hidden_BTD.new_empty(()).expand_as(hidden_BTD)
        pipe.send(hidden_BTD, pipe.stage + 1, pipe.onward)
        return hidden_BTD.new_zeros(()).expand_as(hidden_BTD)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor) -> Any:
        return ctx.pipe.receive(ctx.like_BTD, ctx.pipe.stage + 1, ctx.pipe.back), None


def remember(model: Language, pipe: Pipe) -> None:
    """What `hidden` gives is kept for the backward, and taps hear of this stage's layers only. To be called last: the
    outermost `hidden` is meant."""

    def own(tap: Callable) -> Callable:
        return lambda index, residual_BTD: tap(index, residual_BTD) if pipe.layers[index] == pipe.stage else None

    def hidden(*given, taps=(), **named):
        out_BTD, state = whole(*given, taps=[*map(own, taps)], **named)
        if not pipe.last and out_BTD.requires_grad:
            pipe.left.append(out_BTD)
        return out_BTD, state

    whole, model.hidden = model.hidden, hidden


# ----- what the ranks do with it -------------------------------------------------------------------------------------


def backward(loss: Tensor, pipe: Pipe) -> None:
    """Of the oldest micro-batch: of its own loss here, and of what the later stages made of it."""
    roots = [root for root in (loss, *([pipe.left.popleft()] if pipe.left else ())) if root.requires_grad]
    torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])


@torch.no_grad()
def join_copies(model: Language, pipe: Pipe) -> None:
    """The embedding's gradient in the first stage and that of its copy in the last become their sum in both. Two
    numbers have one sum, whoever adds them, so that the two stay the same to the bit."""
    weight = model.backbone.embeddings.weight
    assert isinstance(weight, nn.Parameter)
    if weight.requires_grad:
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        own = weight.grad.to_local() if isinstance(weight.grad, DTensor) else weight.grad
        dist.all_reduce(own, group=pipe.ends)


def collect(own: dict[str, Tensor], pipe: Pipe, device: torch.device) -> dict[str, Tensor]:
    """The tensors of all stages, on the first one; to be called by its line of ranks only."""
    listed: list[Any] = [None] * len(pipe.line)
    shapes = {name: tensor.to("meta") for name, tensor in own.items()}
    dist.all_gather_object(listed, shapes, group=pipe.back)
    found = dict(own)
    for stage, tensors in enumerate(listed):
        for name in [name for name in tensors if stage and name not in listed[0]]:
            if pipe.first:
                found[name] = pipe.receive(torch.empty_like(tensors[name], device=device), stage, pipe.back).cpu()
            elif pipe.stage == stage:
                pipe.send(own[name].to(device), 0, pipe.back)
    pipe.settle()
    return found if pipe.first else {}
