"""Heads and hidden units dealt among ranks: each mixer computes with its own, and the outputs are added up.

Attention is cut by groups of heads, Mamba by groups with their heads, an MLP and the shared experts by hidden unit.
Experts are not cut: each rank sends its share of the tokens to whole experts, see `experts.py`. Embedding and head are
cut by word, see `vocabulary.py`. Everything else is whole on every rank.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from nautilus.model.attention import AttentionMixer
from nautilus.model.language import Language
from nautilus.model.linear import Linear
from nautilus.model.mamba import MambaMixer
from nautilus.model.mlp import MlpMixer
from nautilus.model.moe import ExpertsMixer
from nautilus.model.norm import RmsNorm
from nautilus.ops.low_precision import Piece
from nautilus.ops.norm import rms_norm
from nautilus.runtime import UserError
from nautilus.train.parallel.cuts import Cut, keep_piece
from nautilus.train.parallel.experts import DealtExperts
from nautilus.train.parallel.mesh import device
from nautilus.train.parallel.travel import Enter, Leave, summed

Pieces = dict[str, tuple[int, tuple[int, ...]]]  # parameter: dimension, sections


def deal_units(model: Language, mesh: DeviceMesh) -> dict[str, Cut]:
    """Leaves this rank's units in every mixer, and gives the cuts by parameter name."""
    cuts, ranks, group = {}, mesh["tp"].size(), mesh["tp"].get_group()
    for name, module in list(model.named_modules()):
        pieces = deal_mixer(name, module, ranks, group)
        for path, (dim, sections) in pieces.items():
            owner, _, parameter = f"{name}.{path}".rpartition(".")
            cut = Cut(mesh=mesh, axis="tp", dim=dim, sections=sections)
            matrix = model.get_submodule(owner)
            keep_piece(matrix, parameter, cut)
            if isinstance(matrix, Linear):
                matrix.piece = piece_of(matrix, cut, group)
            cuts[f"{name}.{path}"] = cut
        if pieces:
            module.register_forward_pre_hook(lambda _, args: (Enter.apply(args[0], group), *args[1:]))
            module.register_forward_hook(lambda _, args, out: (Leave.apply(out[0], group), out[1]))
        elif isinstance(module, ExpertsMixer):
            assert isinstance(module.experts, DealtExperts)
            module.experts.peers = group
    return cuts


def deal_mixer(name: str, module: nn.Module, ranks: int, group: dist.ProcessGroup) -> Pieces:
    """What to cut in a mixer, whose settings become those of its part."""
    match module:
        case AttentionMixer():
            layer = module.layer
            divides(ranks, name, groups=layer.groups)
            module.layer = replace(layer, heads=layer.heads // ranks, groups=layer.groups // ranks)
            if layer.head_norm:
                for norm in (module.q_norm, module.k_norm):
                    norm.forward = partial(norm_of_some_heads, norm, group)
            return {f"{which}_proj.weight": (0, ()) for which in "qkv"} | {"o_proj.weight": (1, ())}
        case MambaMixer():
            layer = module.layer
            divides(ranks, name, groups=layer.groups)
            module.layer = replace(layer, heads=layer.heads // ranks, groups=layer.groups // ranks)
            conv = (layer.inner, *[layer.groups * layer.state] * 2)
            by_head: Pieces = {which: (0, ()) for which in ("A_log", "D", "dt_bias", "norm.weight")}
            by_part: Pieces = {"conv1d.weight": (0, conv), "conv1d.bias": (0, conv)}
            by_part |= {"in_proj.weight": (0, (layer.inner, *conv, layer.heads))}
            return by_head | by_part | {"out_proj.weight": (1, ())}
        case MlpMixer():
            divides(ranks, name, hidden=module.up_proj.weight.shape[0])
            gate: Pieces = {} if module.gate_proj is None else {"gate_proj.weight": (0, ())}
            return gate | {"up_proj.weight": (0, ()), "down_proj.weight": (1, ())}
    return {}


def norm_of_some_heads(norm: RmsNorm, group: dist.ProcessGroup, hidden: Tensor) -> Tensor:
    """Its weight serves the heads of all ranks."""
    return rms_norm(hidden, Enter.apply(norm.weight, group), norm.eps)  # type: ignore[arg-type]


def divides(ranks: int, name: str, **size: int) -> None:
    for what, number in size.items():
        if number % ranks:
            raise UserError(f"layout.tp={ranks} does not divide {what}={number} of {name}; choose a divisor")


def piece_of(matrix: Linear, cut: Cut, group: dist.ProcessGroup) -> Piece:
    """What products in few bits ask of the ranks that hold the rest of a matrix."""

    def largest(top_G: Tensor) -> Tensor:
        # As whole numbers, under which NaN is the largest of all; a group's max has no rule for it.
        bits_G = top_G.view(torch.int32).to(device())
        dist.all_reduce(bits_G, dist.ReduceOp.MAX, group=group)
        return bits_G.to(top_G.device).view(torch.float32)

    own = cut.lengths(matrix.weight.shape[cut.dim] * cut.parts)
    starts, lengths = [0, *itertools.accumulate(own)], tuple(length // cut.parts for length in own)
    begins = [start + length * group.rank() for start, length in zip(starts, lengths, strict=False)]
    blocks = [torch.arange(length // 16) + begin // 16 for begin, length in zip(begins, lengths, strict=True)]
    return Piece(
        axis="inputs" if cut.dim else "outputs",
        lengths=lengths,
        blocks=torch.cat(blocks),
        first=group.rank() == 0,
        largest=largest,
        total=lambda sums: summed(sums, group),
    )
