"""Parameters of which each rank of an axis keeps a piece, so that a module computes with what it has."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Equal pieces along `dim`, one for each rank of the mesh's `axis`.

    sections: lengths of parts that are cut one by one, as the rows of Mamba's in_proj are z, x, B, C and dt under one
    another; none: the whole length is one.
    """

    mesh: DeviceMesh
    axis: str
    dim: int
    sections: tuple[int, ...] = ()

    @property
    def parts(self) -> int:
        return self.mesh[self.axis].size()

    def lengths(self, whole: int) -> list[int]:
        return list(self.sections or (whole,))

    def take(self, whole: Tensor) -> Tensor:
        """This rank's piece."""
        mine = self.mesh[self.axis].get_local_rank()
        sections = whole.split(self.lengths(whole.shape[self.dim]), self.dim)
        return torch.cat([section.chunk(self.parts, self.dim)[mine] for section in sections], self.dim)

    def join(self, pieces: list[Tensor]) -> Tensor:
        """The whole, of every rank's piece."""
        whole = sum(piece.shape[self.dim] for piece in pieces)
        lengths = [length // self.parts for length in self.lengths(whole)]
        split = [piece.split(lengths, self.dim) for piece in pieces]
        return torch.cat([one[i] for i in range(len(lengths)) for one in split], self.dim)


def keep_piece(module: nn.Module, name: str, cut: Cut) -> None:
    """Replaces a parameter by this rank's piece of it."""
    whole = getattr(module, name)
    piece = nn.Parameter(cut.take(whole.detach()).clone(), requires_grad=whole.requires_grad)
    setattr(module, name, piece)
