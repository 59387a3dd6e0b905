"""y = x W^T with W in NVFP4, repacked once: sixteen rows beside each other, as `nvfp4.cpp` describes.

Activations are rounded to int8 with one scale for 32 neighbours; the products inside a block are then exact integers,
and the weights are used as they are stored.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nautilus.ops.cpu.library import call, pointer, refuses
from nautilus.ops.formats import Packed

ROWS, GROUP = 16, 32  # of nvfp4.cpp


class Pack(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("inputs", "outputs")),
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "packed_codes", "packed_scale")),
    ]


class Forward(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "outputs", "wide")),
        *((name, ctypes.c_void_p) for name in ("x", "packed_codes", "packed_scale")),
        ("tensor_scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("y", "q", "q_scale", "q_sum")),
    ]


@dataclass(frozen=True, kw_only=True, eq=False)
class Nvfp4:
    """A repacked matrix of `outputs` rows and `inputs` columns."""

    inputs: int
    outputs: int
    codes: Tensor
    scale: Tensor
    tensor_scale: float


def repacked(matrix: Packed) -> Nvfp4:
    """From the released layout; ValueError for another format or a stack of matrices."""
    if matrix.format != "nvfp4" or len(matrix.shape) != 2:
        raise ValueError(
            f"nvfp4 kernels were given {matrix.format} of shape {matrix.shape}; they take one nvfp4 matrix"
        )
    outputs, inputs = matrix.shape
    blocks, panels = math.ceil(inputs / GROUP) * 2, math.ceil(outputs / ROWS)
    codes, scale = (torch.empty(panels, blocks, size, dtype=torch.uint8) for size in (ROWS * 8, ROWS))
    given = matrix.codes.contiguous(), matrix.scale.view(torch.uint8).contiguous()
    call("nautilus_nvfp4_pack", Pack(inputs, outputs, *map(pointer, (*given, codes, scale))))
    assert matrix.tensor_scale is not None
    return Nvfp4(inputs=inputs, outputs=outputs, codes=codes, scale=scale, tensor_scale=matrix.tensor_scale.item())


def nvfp4_refuses(x: Tensor, matrix: Nvfp4) -> str | None:
    if x.shape[-1] != matrix.inputs:
        return f"activations have {x.shape[-1]} numbers, the matrix takes {matrix.inputs}"
    return refuses(x) if x.dtype == torch.bfloat16 else f"activations are {x.dtype}, not bfloat16"


def linear_nvfp4(x: Tensor, matrix: Nvfp4) -> Tensor:
    """x in bf16, y in bf16, without gradient. ValueError for activations that do not fit the matrix."""
    refusal = nvfp4_refuses(x, matrix)
    if refusal is not None:
        raise ValueError(f"linear_nvfp4: {refusal}")
    rows = x.contiguous().view(-1, matrix.inputs)
    y = rows.new_empty(*x.shape[:-1], matrix.outputs)
    blocks = matrix.scale.shape[1]
    q = torch.empty(len(rows), blocks * 16, dtype=torch.int8)
    q_scale = torch.empty(len(rows), blocks // 2, dtype=torch.float32)
    q_sum = torch.empty(len(rows), blocks, dtype=torch.int32)
    sizes = len(rows), matrix.inputs, matrix.outputs, False
    given = (*sizes, *map(pointer, (rows, matrix.codes, matrix.scale)), matrix.tensor_scale)
    call("nautilus_nvfp4_forward", Forward(*given, *map(pointer, (y, q, q_scale, q_sum))))
    return y
