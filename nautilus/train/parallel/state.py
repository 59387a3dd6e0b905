"""Training state of many processes on disk, by torch.distributed.checkpoint: written in one layout, read in any other.

On disk every tensor has its whole shape and the name that a single process gives it, so that a state of one process
(safetensors) is read by many, and the other way round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, HuggingFaceStorageReader
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from nautilus.runtime import UserError
from nautilus.train.parallel.cuts import Cut

SHARDS = "shards"  # the folder in a state that holds what many processes wrote
Cuts = dict[str, Cut]


def write_shards(folder: Path, views: dict[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """views: each rank's own, by the names of a single process. group: what the ranks talk in, by default that of all.

    What goes wrong on one rank is raised on all.
    """
    try:
        dcp.save(views, checkpoint_id=folder / SHARDS, process_group=group)
    except CheckpointException as bad:
        raise next(error for error, _ in bad.failures.values()) from bad


def read_shards(folder: Path, model: nn.Module, cuts: Cuts, everywhere: Sequence[str] = ()) -> dict[str, Tensor]:
    """Fills the model with its own part of a state and gives the other tensors of it: `optimizer.` ones as parts.

    everywhere: names of the tensors that the stages of a pipeline have, if the model is one of several.
    """
    shards = folder / SHARDS
    reader = FileSystemReader(shards) if shards.is_dir() else HuggingFaceStorageReader(str(folder))
    kept: dict[str, Any] = reader.read_metadata().state_dict_metadata
    own, parameters = model.state_dict(), dict(model.named_parameters())
    names = {name for name in kept if not name.startswith(("optimizer.", "random."))}
    if differing := sorted(names ^ {*own, *everywhere}):
        raise UserError(f"cannot resume: the state in {folder} and the model differ in {', '.join(differing[:4])}")
    for name in sorted(kept.keys() - names):
        if parameter_of(name) in names - own.keys():
            continue
        own[name] = room_for(name, kept[name], parameters)
    views = disk_views(own, cuts)
    for name, view in views.items():
        if tuple(view.shape) != tuple(kept[name].size):
            sizes = f"{tuple(kept[name].size)} there and {tuple(view.shape)} here"
            raise UserError(f"cannot resume: {name} of the state in {folder} is {sizes}; start a new run")
    dcp.load(views, storage_reader=reader, no_dist=not dist.is_initialized())
    for name, tensor in own.items():
        put_back(tensor, views[name], cut_of(name, tensor, cuts))
    return {name: tensor for name, tensor in own.items() if name not in names}


def room_for(name: str, kept, parameters: dict[str, nn.Parameter]) -> Tensor:
    """Memory for a tensor that is not the model's: a moment lies as its parameter does."""
    parameter = parameters.get(parameter_of(name))
    if parameter is None or not kept.size:
        return torch.zeros(kept.size, dtype=kept.properties.dtype)
    return torch.zeros_like(parameter.detach(), dtype=kept.properties.dtype)


def parameter_of(name: str) -> str:
    """The parameter that a moment belongs to; any other tensor is its own."""
    return name.removeprefix("optimizer.").rpartition(".")[0] if name.startswith("optimizer.") else name


def cut_of(name: str, tensor: Tensor, cuts: Cuts) -> Cut | None:
    """The cut of a parameter, and of its moments."""
    return cuts.get(parameter_of(name)) if tensor.ndim else None


def disk_views(tensors: dict[str, Tensor], cuts: Cuts) -> dict[str, Tensor]:
    """Every rank must ask, in the same order of names."""
    return {name: disk_view(tensor, cut_of(name, tensor, cuts)) for name, tensor in tensors.items()}


def disk_view(tensor: Tensor, cut: Cut | None) -> Tensor:
    """The same memory as part of a tensor of the whole shape, where torch has a word for such a part; otherwise a copy
    of the whole."""
    if cut is None:
        return tensor
    assert isinstance(tensor, DTensor)
    sharded = tensor.placements[-1]
    if not simple(sharded, cut):
        return whole(tensor, cut)
    shape = list(tensor.shape)
    shape[cut.dim] *= cut.parts
    axes = ("replica", "edp" if cut.axis == "ep" else "fsdp", cut.axis)
    placed = [Replicate(), sharded, Shard(cut.dim)]
    strides = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        tensor.to_local(), cut.mesh[axes], placed, run_check=False, shape=torch.Size(shape), stride=strides
    )


def simple(sharded, cut: Cut) -> bool:
    return not cut.sections and isinstance(sharded, Shard) and sharded.dim != cut.dim


def put_back(tensor: Tensor, view: Tensor, cut: Cut | None) -> None:
    """What was read into a copy of the whole goes to where the part lies."""
    if cut is not None and not isinstance(view, DTensor):
        take_part(tensor, view, cut)


@torch.no_grad()
def take_part(tensor: Tensor, given: Tensor, cut: Cut | None) -> None:
    """Fills a tensor with what of a whole one it holds."""
    piece = given if cut is None else cut.take(given)
    if isinstance(tensor, DTensor):
        piece = piece.to(tensor.device)
        piece = distribute_tensor(piece, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
        tensor = tensor.to_local()
    tensor.copy_(piece)


@torch.no_grad()
def whole(tensor: Tensor, cut: Cut | None) -> Tensor:
    """The tensor of a single process. Every rank must ask."""
    piece = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    if cut is None:
        return piece
    pieces = [torch.empty_like(piece) for _ in range(cut.parts)]
    dist.all_gather(pieces, piece.contiguous(), group=cut.mesh[cut.axis].get_group())
    return cut.join(pieces)


def on_first(function: Callable, group: dist.ProcessGroup | None = None):
    """What the first rank's call gives, on every rank; a person's or the disk's mistake is raised everywhere too."""
    found: list = [None]
    if dist.get_rank() == 0:
        try:
            found = [(function(), None)]
        except (ValueError, OSError) as bad:  # UserError is one; the others would wait for ever
            found = [(None, bad)]
    dist.broadcast_object_list(found, 0, group=group)
    value, bad = found[0]
    if bad is not None:
        raise bad
    return value
