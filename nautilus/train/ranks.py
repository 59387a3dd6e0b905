"""What the loop asks of the processes that train together. One process holds everything and has nobody to ask;
`nautilus.train.parallel` has the answers of many."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from nautilus.data.batch import Batch
from nautilus.model.language import Language
from nautilus.model.shards import write_file
from nautilus.runtime import atomic_folder

T = TypeVar("T")


def with_memory(model: Language, device: str | torch.device) -> Language:
    """A model from the meta device gets memory: its weights are unset, its counters zero. Any other is left alone."""
    if next(model.parameters()).is_meta:
        model.to_empty(device=device)
        for buffer in model.buffers():
            buffer.zero_()
    return model


class Ranks:
    """A single process.

    index, size: which process this is, of how many. rows, row: into how many streams the rows of a step are dealt, and
    which of them this process reads. readers: how many processes read the same one, and deal its tokens among them.
    """

    index, size = 0, 1
    row, rows = 0, 1
    readers = 1

    def distribute(self, model: Language) -> Language:
        """Leaves in the model what this process is to hold. Make the optimiser after this: its parameters are new.

        Of a model without memory (device="meta") only that gets some; `fill` it then.
        """
        return with_memory(model, "cpu")

    def fill(self, model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Takes what this process holds out of whole tensors, one at a time, by the names of a single process."""
        places = model.state_dict()
        for name, tensor in tensors:
            places[name].copy_(tensor)

    def gathered(self, model: Language) -> Language:
        """The whole model again, on the first process. The others have no more to do and end here."""
        return model

    def part(self, batch: Batch) -> Batch:
        """What of a batch this process computes with."""
        return batch

    def total(self, number: Tensor) -> Tensor:
        """The sum over the processes that see other tokens. Gradients are added up the same way."""
        return number

    def before(self, number: int) -> int:
        """The sum over the processes that read earlier rows."""
        return 0

    def gather(self, thing: T) -> list[T]:
        """Every process's."""
        return [thing]

    def stages(self, found: T) -> list[T]:
        """What each stage of the pipeline found, the first stage's first. A stage has some of the layers, and the last
        alone a head. Tensors must be on the CPU."""
        return [found]

    def union(self, found: dict) -> dict:
        """The entries of all stages."""
        return {name: value for part in self.stages(found) for name, value in part.items()}

    def turns(self, count: int) -> Iterable[str]:
        """In which order the micro-batches of a step go `forward` and `backward`; each kind is in their own order."""
        return ["forward", "backward"] * count

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of the loss of the oldest micro-batch that has not gone backward."""
        if loss.requires_grad:
            loss.backward()

    def join_copies(self, model: Language) -> None:
        """After a step's micro-batches: adds up the gradients of weights that several stages have."""

    def own(self, tensor: Tensor) -> Tensor:
        """What of a weight, or of its gradient, lies here."""
        return tensor

    def whole(self, parameters: Sequence[Tensor], numbers: Tensor) -> Tensor:
        """The sum over all processes of one number for the own part of each parameter, every element counted once."""
        return numbers.sum()

    def agree(self, asked: bool) -> bool:
        """Whether any process was asked."""
        return asked

    def on_first(self, function: Callable[[], T]) -> T:
        """What the call gives on the first process, which alone makes it."""
        return function()

    def first_then_all(self, function: Callable[[], T]) -> T:
        """The call's value on every process; the first makes it before the others, so that they find its files."""
        return function()

    def folder(self, path: Path) -> AbstractContextManager[Path]:
        """A folder that all write into and that appears whole; see `atomic_folder`."""
        return atomic_folder(path)

    def parts(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What of a state's tensors this process writes, as `write` takes it. They may be the same memory."""
        return tensors

    def write(self, folder: Path, model: dict[str, Tensor], training: dict[str, Tensor]) -> None:
        """Writes a state's tensors, each process its `parts`. training: moments and random states."""
        write_file(folder / "model.safetensors", model)
        write_file(folder / "training.safetensors", training)

    def apart(self) -> Ranks:
        """The same processes; `on_first`, `folder` and `write` talk in a group of their own, so that one thread may
        save while another trains."""
        return self

    def read(self, folder: Path, model: nn.Module) -> dict[str, Tensor]:
        """Fills the model from a state of any layout, and gives the training tensors of it."""
        if not (folder / "model.safetensors").exists():
            from nautilus.train.parallel.state import read_shards  # costs a second, and is rarely needed

            return read_shards(folder, model, {})
        model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
        return load_file(folder / "training.safetensors")

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's tensors as a single process has them, on the first process; the others get nothing."""
        return model.state_dict()

    def forget(self, model: nn.Module) -> None:
        """Lets go of weights that a forward without a backward has gathered; they are about to change."""


ALONE = Ranks()
