"""Heads and hidden units dealt among ranks: each mixer computes with its own, and the outputs are added up.

Attention is cut by groups of heads, Mamba by groups with their heads, an MLP and the shared experts by hidden unit.
Experts are not cut: each rank sends its share of the tokens to whole experts. Embedding and head are cut by word, see
`vocabulary.py`. Everything else is whole on every rank.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from nautilus.model.attention import AttentionMixer
from nautilus.model.language import Language
from nautilus.model.mamba import MambaMixer
from nautilus.model.mlp import MlpMixer
from nautilus.model.moe import ExpertsMixer
from nautilus.model.norm import RmsNorm
from nautilus.ops.norm import rms_norm
from nautilus.runtime import UserError
from nautilus.train.parallel.cuts import Cut, keep_piece
from nautilus.train.parallel.travel import Collect, Deal, Enter, Leave

Pieces = dict[str, tuple[int, tuple[int, ...]]]  # parameter: dimension, sections


def deal_units(model: Language, mesh: DeviceMesh) -> dict[str, Cut]:
    """Leaves this rank's units in every mixer, and gives the cuts by parameter name."""
    cuts, ranks, group = {}, mesh["tp"].size(), mesh["tp"].get_group()
    for name, module in list(model.named_modules()):
        pieces = deal_mixer(name, module, ranks, group)
        for path, (dim, sections) in pieces.items():
            owner, _, parameter = f"{name}.{path}".rpartition(".")
            cut = Cut(mesh=mesh, axis="tp", dim=dim, sections=sections)
            keep_piece(model.get_submodule(owner), parameter, cut)
            cuts[f"{name}.{path}"] = cut
        if pieces:
            module.register_forward_pre_hook(lambda _, args: (Enter.apply(args[0], group), *args[1:]))
            module.register_forward_hook(lambda _, args, out: (Leave.apply(out[0], group), out[1]))
        elif isinstance(module, ExpertsMixer):
            deal_tokens(module.experts, group)
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


def deal_tokens(experts: nn.Module, group: dist.ProcessGroup) -> None:
    """Each rank takes its share of the tokens through the experts."""

    def deal(_, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(Deal.apply(tensor, group) for tensor in args)

    def collect(_, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return Collect.apply(out, rows.pop(), group)

    rows: list[int] = []
    experts.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    experts.register_forward_pre_hook(deal)
    experts.register_forward_hook(collect)
