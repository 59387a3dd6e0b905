"""The groups that processes talk in, and where each computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nautilus.train.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Meshes:
    """One set of ranks, seen in several ways."""

    dense: DeviceMesh  # pp, replica, fsdp, tp
    expert: DeviceMesh  # pp, replica, edp, ep
    rows: DeviceMesh  # pp, dp, cp, tp
    data: DeviceMesh  # pp, data (= dp x cp), tp


def device() -> torch.device:
    """Where this process computes: each its own GPU, or the CPU."""
    if dist.get_backend() != "nccl":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def meshes(layout: Layout) -> Meshes:
    def mesh(**axes: int) -> DeviceMesh:
        axes = {"pp": layout.pp, **axes}
        return init_device_mesh(device().type, tuple(axes.values()), mesh_dim_names=tuple(axes))

    replicas, tp = layout.replicas, layout.tp
    return Meshes(
        dense=mesh(replica=replicas, fsdp=layout.shards, tp=tp),
        expert=mesh(replica=replicas, edp=layout.edp, ep=layout.ep),
        rows=mesh(dp=layout.dp, cp=layout.cp, tp=tp),
        data=mesh(data=layout.dp * layout.cp, tp=tp),
    )
