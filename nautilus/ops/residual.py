"""The residual stream: where it begins and how it grows. Letters: V vocabulary, D width."""

from __future__ import annotations

import torch
from torch import Tensor

from nautilus.ops.cpu.norm import add_native, add_refuses, embed_native, embed_refuses
from nautilus.ops.dispatch import Impl, choose
from nautilus.ops.formats import Packed


def add(a: Tensor, b: Tensor) -> Tensor:
    """a + b, two tensors of one shape and dtype."""
    return choose("add", ADD_IMPLS, a, b)(a, b)


def embed(index: Tensor, table_VD: Tensor | Packed, dtype: torch.dtype) -> Tensor:
    """Rows of the table, in `dtype`."""
    return choose("embed", EMBED_IMPLS, index, table_VD, dtype)(index, table_VD, dtype)


def embed_torch(index: Tensor, table_VD: Tensor | Packed, dtype: torch.dtype) -> Tensor:
    if isinstance(table_VD, Packed):
        return table_VD.rows(index.flatten()).decode(dtype).unflatten(0, index.shape)
    return torch.nn.functional.embedding(index, table_VD).to(dtype)


ADD_IMPLS = (Impl("native", add_native, add_refuses), Impl("torch", torch.add), Impl("reference", torch.add))
EMBED_IMPLS = (
    Impl("native", embed_native, embed_refuses),
    Impl("torch", embed_torch),
    Impl("reference", embed_torch),
)
