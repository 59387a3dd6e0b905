"""The loop's questions, answered by many processes; see `nautilus.train.ranks`."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from nautilus.data.batch import Batch
from nautilus.model.language import Language
from nautilus.runtime import atomic_folder, disk_errors
from nautilus.train.layout import Layout, Work
from nautilus.train.parallel import pipeline
from nautilus.train.parallel.context import stretch
from nautilus.train.parallel.cuts import Cut
from nautilus.train.parallel.mesh import Meshes, device, meshes
from nautilus.train.parallel.shard import distribute
from nautilus.train.parallel.state import disk_views, on_first, read_shards, take_part, whole, write_shards
from nautilus.train.ranks import Ranks, T


@dataclass(frozen=True, kw_only=True)
class ManyRanks(Ranks):
    """Of `layout.size` processes. `share`, by parameter: 1 / how many processes hold the same part of it. work: what a
    step is, for the costs of a pipeline's stages; pipe: where there are several. saving: a group on the CPU; group: the
    one that states are saved in, by default that of all."""

    layout: Layout
    work: Work
    meshes: Meshes
    pipe: pipeline.Pipe | None = None
    saving: dist.ProcessGroup | None = None
    group: dist.ProcessGroup | None = None
    cuts: dict[str, Cut] = field(default_factory=dict)
    share: dict[Tensor, float] = field(default_factory=dict)

    @property
    def index(self) -> int:  # type: ignore[override]
        return dist.get_rank()

    @property
    def size(self) -> int:  # type: ignore[override]
        return self.layout.size

    @property
    def row(self) -> int:  # type: ignore[override]
        return self.meshes.rows["dp"].get_local_rank()

    @property
    def rows(self) -> int:  # type: ignore[override]
        return self.layout.dp

    @property
    def readers(self) -> int:  # type: ignore[override]
        return self.layout.cp

    def part(self, batch: Batch) -> Batch:
        return batch if self.layout.cp == 1 else stretch(batch, self.meshes.rows["cp"].get_group())

    def total(self, number: Tensor) -> Tensor:
        return summed(number, self.meshes.data["data"].get_group())

    def before(self, number: int) -> int:
        numbers = torch.zeros(self.rows, dtype=torch.float64)
        numbers[self.row] = number
        return int(summed(numbers, self.meshes.rows["dp"].get_group())[: self.row].sum())

    def gather(self, thing: T) -> list[T]:
        things: list[Any] = [None] * self.size
        dist.all_gather_object(things, thing)
        return things

    def stages(self, found):
        if self.pipe is None:
            return [found]
        parts = [None] * self.layout.pp
        dist.all_gather_object(parts, found, group=self.pipe.back)
        return parts

    def turns(self, count: int) -> Iterable[str]:
        if self.pipe is None:
            return super().turns(count)
        return pipeline.turns(count, self.layout.pp - 1 - self.pipe.stage)

    def backward(self, loss: Tensor) -> None:
        super().backward(loss) if self.pipe is None else pipeline.backward(loss, self.pipe)

    def join_copies(self, model: Language) -> None:
        if self.pipe is not None and self.pipe.shares_embedding:
            pipeline.join_copies(model, self.pipe)

    def own(self, tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def whole(self, parameters: Sequence[Tensor], numbers: Tensor) -> Tensor:
        shares = torch.tensor([self.share[parameter] for parameter in parameters], dtype=torch.float64)
        return summed((numbers.double() * shares.to(numbers.device)).sum(), None)

    def agree(self, asked: bool) -> bool:
        return bool(summed(torch.tensor(float(asked)), None))

    def on_first(self, function):
        return on_first(function, self.group)

    def first_then_all(self, function):
        found = []
        on_first(lambda: found.append(function()))
        return found[0] if found else function()

    @contextlib.contextmanager
    def folder(self, path: Path) -> Iterator[Path]:
        with disk_errors(path), contextlib.ExitStack() as stack:
            yield self.on_first(lambda: stack.enter_context(atomic_folder(path)))
            dist.barrier(group=self.group)
            self.on_first(stack.close)

    def parts(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return disk_views(tensors, self.cuts)

    def write(self, folder: Path, model: dict[str, Tensor], training: dict[str, Tensor]) -> None:
        write_shards(folder, model | training, self.group)

    def apart(self) -> ManyRanks:
        return replace(self, group=self.saving)

    def read(self, folder: Path, model: nn.Module) -> dict[str, Tensor]:
        return read_shards(folder, model, self.cuts, [*self.union(dict.fromkeys(model.state_dict()))])

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        found, leads = {}, self.index % (self.size // self.layout.pp) == 0
        for name, tensor in model.state_dict().items():
            value = whole(tensor, self.cuts.get(name))
            if leads:
                found[name] = value.cpu()
        return pipeline.collect(found, self.pipe, device()) if self.pipe is not None and leads else found

    def distribute(self, model: Language) -> Language:
        if self.pipe is not None:
            pipeline.leave_stage(model, self.pipe, self.work)
        cuts, share = distribute(model, self.layout, self.meshes)
        self.cuts.update(cuts)
        self.share.update(share)
        if self.pipe is not None:
            pipeline.remember(model, self.pipe)
            if self.pipe.shares_embedding:
                self.share[model.backbone.embeddings.weight] /= 2  # type: ignore[index]
        return model

    def fill(self, model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
        places = model.state_dict()
        for name, tensor in tensors:
            if self.pipe is None or name in places:  # else it is another stage's
                take_part(places[name], tensor, self.cuts.get(name))

    def gathered(self, model: Language) -> Language:
        weights = self.weights(model)
        first = self.index == 0
        dist.destroy_process_group()
        if not first:
            raise SystemExit(0)
        one = Language(model.config)
        one.compute = model.compute
        one.load_state_dict(weights)
        return one

    def forget(self, model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def summed(number: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over a group (None: all). Counts may be on the CPU although the group speaks on GPUs only."""
    there = number.to(device(), copy=True)
    dist.all_reduce(there, group=group)
    return there.to(number.device)


def end_with_launcher() -> None:
    """A process of torchrun gets SIGTERM, at which a training saves and ends, soon after torchrun was killed: in a
    session of its own it would train on, and nobody could start the run again. (The signal that Linux sends at a
    parent's death comes once for each of its threads, and the second SIGTERM ends a training at once.)"""
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=watch, daemon=True, name="launcher").start()


def join(layout: Layout, work: Work) -> ManyRanks:
    if not dist.is_initialized():
        end_with_launcher()
        gpu = torch.cuda.is_available()
        if gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        # torchrun has one store for all its restarts, in which the addresses of processes that are dead still stand.
        store, rank, size = next(rendezvous("env://"))
        attempt = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group("nccl" if gpu else "gloo", store=attempt, rank=rank, world_size=size)
    found = meshes(layout)
    pipe = pipeline.pipe_of(found.rows) if layout.pp > 1 else None
    saving = dist.new_group(backend="gloo")
    return ManyRanks(layout=layout, work=work, meshes=found, pipe=pipe, saving=saving)  # type: ignore[arg-type]
