"""A model shared out over ranks: pieces first (experts), then what is left of each weight sharded by FSDP2.

Gradients are sums over ranks, never means: the loop divides every term by its count over all ranks beforehand. So the
experts, whose gradient already holds the tokens of all ranks of their group, need no other scale than the rest.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard

from nautilus.model.language import Block, Language
from nautilus.model.moe import ExpertsMixer
from nautilus.model.mtp import MtpLayer
from nautilus.train.layout import Layout
from nautilus.train.parallel.context import deal_time
from nautilus.train.parallel.cuts import Cut
from nautilus.train.parallel.experts import DealtExperts, deal_experts
from nautilus.train.parallel.mesh import Meshes, device
from nautilus.train.parallel.tensor import deal_units
from nautilus.train.parallel.vocabulary import deal_words
from nautilus.train.ranks import with_memory


def distribute(model: Language, layout: Layout, meshes: Meshes) -> tuple[dict[str, Cut], dict[Tensor, float]]:
    """Leaves in the model what this rank holds. Gives the cuts by parameter name, and for each parameter one over the
    number of ranks of a stage that hold the same part of it.

    The model must be the same on every rank before, or without memory (on meta): its parts then get some, unset. Make
    the optimiser afterwards: the parameters are others. UserError where a size does not divide.
    """
    if not next(model.parameters()).is_meta:
        model.to(device())
    cuts: dict[str, Cut] = {}
    if layout.ep > 1 or layout.tp > 1:
        for name, mixer in model.experts_mixers().items():
            cuts |= deal_experts(mixer, name, Cut(mesh=meshes.expert, axis="ep", dim=0))
    if layout.tp > 1:
        cuts |= deal_units(model, meshes.dense) | deal_words(model, meshes.dense)
    if layout.cp > 1:
        deal_time(model, meshes.rows["cp"].get_group())
    shard(model, layout, meshes, cuts)
    with_memory(model, device())
    share = {}
    for name, parameter in model.named_parameters():
        cut = cuts.get(name)
        shards = meshes.expert["edp"] if cut is not None and cut.axis == "ep" else meshes.dense["fsdp"]
        share[parameter] = shards.size() * (cut.parts if cut else 1) * layout.pp / layout.size
    return cuts, share


def over(mesh: DeviceMesh, axis: str) -> DeviceMesh:
    """The axis that weights are sharded over, with the one over which they are copied if there is any."""
    return mesh[axis] if mesh["replica"].size() == 1 else mesh["replica", axis]


def shard(model: Language, layout: Layout, meshes: Meshes, cuts: dict[str, Cut]) -> None:
    """A layer's weights are gathered when it runs; embedding, final norm and head stay gathered from the forward to the
    end of the backward, because the objective reads the head by itself."""
    # Nothing here changes a layer's output in place, which is what torch warns of at every view.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)
    cut_of: dict[Tensor, Cut] = {parameter: cuts[name] for name, parameter in model.named_parameters() if name in cuts}
    for module in layers(model):
        mixer = module.mixer
        if isinstance(mixer, ExpertsMixer) and isinstance(mixer.experts, DealtExperts):
            place = place_beside(cut_of, meshes.expert["edp"].size())
            fully_shard(mixer.experts, mesh=over(meshes.expert, "edp"), shard_placement_fn=place)
        place = place_beside(cut_of, layout.shards)
        fully_shard(module, mesh=over(meshes.dense, "fsdp"), shard_placement_fn=place)
    fully_shard(model, mesh=over(meshes.dense, "fsdp"), reshard_after_forward=False)
    for name in ("hidden", "mtp_hidden"):
        register_fsdp_forward_method(model, name)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def layers(model: Language) -> Iterator[Block | MtpLayer]:
    for module in model.modules():
        if isinstance(module, Block | MtpLayer) and module.mixer is not None:
            yield module


def place_beside(cut_of: dict[Tensor, Cut], parts: int) -> Callable[[nn.Parameter], Shard | None]:
    """Shards a parameter that is cut already along another dimension, if `parts` divides one: its part is then a block
    of the whole, which checkpoints can name."""

    def place(parameter: nn.Parameter) -> Shard | None:
        cut = cut_of.get(parameter)
        sizes = [] if cut is None else [(d, size) for d, size in enumerate(parameter.shape) if d != cut.dim]
        return next((Shard(dim) for dim, size in sizes if size % parts == 0), None)

    return place
