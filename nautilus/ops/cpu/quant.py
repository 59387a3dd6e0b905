"""Products with matrices in few bits, used as they are stored and only repacked: sixteen rows beside each other, as
`quant.cpp` describes.

NVFP4, MXFP4, INT4, INT8: activations are rounded to int8 with one scale for 32 neighbours; the products inside a block
are then exact integers. FP8: activations stay bf16.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nautilus.ops.cpu.experts import Forward as Pairs
from nautilus.ops.cpu.experts import Sizes, index_refuses
from nautilus.ops.cpu.library import call, native, pointer, refuses
from nautilus.ops.cpu.memory import let_go, roomy
from nautilus.ops.cpu.packs import packed_form
from nautilus.ops.formats import Packed, columns

NUMBERS = {"nvfp4": 0, "mxfp4": 1, "int4": 2, "int8": 3, "fp8_e4m3": 4}  # QuantFormat of kernels.h
GROUP = 32  # QUANT_GROUP


class Matrix(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("count", "inputs", "outputs", "format", "group")),
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "zero", "tensor_scale")),
    ]


class Pack(ctypes.Structure):
    _fields_ = [("to", Matrix), *((name, ctypes.POINTER(ctypes.c_void_p)) for name in ("codes", "zero", "scale"))]


class Linear(ctypes.Structure):
    _fields_ = [
        ("w", Matrix),
        *((name, ctypes.c_int64) for name in ("rows", "wide", "squared_relu")),
        *((name, ctypes.c_void_p) for name in ("x", "y")),
    ]


class Experts(ctypes.Structure):
    _fields_ = [("pairs", Pairs), ("up", Matrix), ("down", Matrix), ("gate", Matrix)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Repacked:
    """`count` matrices of `outputs` rows and `inputs` columns in one format. `record` points into the tensors."""

    format: str
    count: int
    inputs: int
    outputs: int
    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    tensor_scale: Tensor
    record: Matrix


def repack_refuses(matrices: Sequence[Packed]) -> str | None:
    first = matrices[0]
    if first.format not in NUMBERS:
        return f"there is no kernel for {first.format}"
    if first.format == "fp8_e4m3" and first.shape[-1] % 2:
        return f"{first.shape[-1]} inputs are an odd number"
    kinds = {(m.format, m.shape, m.tile, m.zero is None) for m in matrices}
    if len(kinds) > 1 or len(first.shape) != 2:
        return f"the matrices are no single ones of one kind: {sorted(map(str, kinds))[:3]}"
    return native().reason if native().functions is None else None


def repacked_form(matrices: Packed | tuple[Packed, ...]) -> Repacked:
    """Repacked once where that is said; see `packs.py`."""
    return packed_form(("repacked", id(matrices)), matrices, lambda kept: repacked(matrices, kept=kept))


def repacked(matrices: Packed | Sequence[Packed], *, kept: bool = False) -> Repacked:
    """From the released layout, one matrix or the matrices of all experts. ValueError where `repack_refuses`.

    kept: for many uses, so that what was read for it from a file need not stay in memory."""
    matrices = [matrices] if isinstance(matrices, Packed) else matrices
    refusal = repack_refuses(matrices)
    if refusal is not None:
        raise ValueError(f"quantised matrices cannot be repacked: {refusal}")
    functions, first, count = native().functions, matrices[0], len(matrices)
    assert functions is not None
    outputs, inputs = first.shape
    group = min(columns(first.tile, inputs), inputs) if first.format in ("int4", "int8") else GROUP
    sizes = (count, inputs, outputs, NUMBERS[first.format], math.ceil(group / GROUP) * GROUP)
    scales = ctypes.c_int64()
    codes = functions.nautilus_quant_sizes(ctypes.byref(Matrix(*sizes)), ctypes.byref(scales))
    kind = torch.uint8 if first.format in ("nvfp4", "mxfp4") else torch.float32
    to_codes, to_scale = roomy(count, codes), roomy(count, scales.value, dtype=kind)
    to_zero = None if first.zero is None else roomy(count, scales.value, dtype=torch.int32)
    one = torch.ones(())
    tensor_scale = torch.stack([one if m.tensor_scale is None else m.tensor_scale for m in matrices])
    record = Matrix(*sizes, *map(pointer, (to_codes, to_scale, to_zero, tensor_scale)))
    given = [stored_parts(matrix, first.tile) for matrix in matrices]
    lists = ((ctypes.c_void_p * count)(*map(pointer, parts)) for parts in zip(*given, strict=True))
    call("nautilus_quant_pack", Pack(record, *lists))
    if kept:
        let_go(part for parts in given for part in parts if part is not None)
    return Repacked(
        format=first.format, count=count, inputs=inputs, outputs=outputs,
        codes=to_codes, scale=to_scale, zero=to_zero, tensor_scale=tensor_scale, record=record,
    )  # fmt: skip


def stored_parts(matrix: Packed, tile: str) -> tuple[Tensor, Tensor | None, Tensor]:
    """Codes, zero points and scales as `quant_pack` reads them."""
    scale = matrix.scale.expand(matrix.shape[0]) if tile == "tensor" else matrix.scale
    zero = None if matrix.zero is None else matrix.zero.contiguous()
    return matrix.codes.contiguous(), zero, scale.contiguous()


def quant_refuses(x: Tensor, matrix: Repacked) -> str | None:
    if x.shape[-1] != matrix.inputs:
        return f"activations have {x.shape[-1]} numbers, the matrix takes {matrix.inputs}"
    return refuses(x) if x.dtype == torch.bfloat16 else f"activations are {x.dtype}, not bfloat16"


def linear_quant(x: Tensor, matrix: Repacked, *, wide: bool = False, squared_relu: bool = False) -> Tensor:
    """x W^T, or the square of its positive part; bf16 or, if `wide`, float32; without gradient. ValueError where the
    two do not fit."""
    refusal = quant_refuses(x, matrix)
    if refusal is not None:
        raise ValueError(f"linear_quant: {refusal}")
    rows = x.contiguous()
    y = rows.new_empty(*x.shape[:-1], matrix.outputs, dtype=torch.float32 if wide else x.dtype)
    sizes = rows.numel() // matrix.inputs, wide, squared_relu
    call("nautilus_quant_linear", Linear(matrix.record, *sizes, pointer(rows), pointer(y)))
    return y


def linear_packed(x: Tensor, weight_OI: Packed, *, exact=False, wide=False, squared_relu=False) -> Tensor:
    """See `ops/linear.py`."""
    return linear_quant(x, repacked_form(weight_OI), wide=wide, squared_relu=squared_relu)


def linear_packed_refuses(x: Tensor, weight_OI: Packed, *, exact=False, wide=False, squared_relu=False) -> str | None:
    if exact or (torch.is_grad_enabled() and x.requires_grad):
        return f"a product with {weight_OI.format} has no gradient and rounds its activations"
    if x.shape[-1:] != weight_OI.shape[1:] or x.dtype != torch.bfloat16:
        return f"a matrix of shape {weight_OI.shape} cannot take {x.shape[-1]} inputs in {x.dtype}"
    return repack_refuses([weight_OI]) or refuses(x)


def experts_quant_refuse(
    x_RX, index_RK, weight_RK, up: Repacked, down: Repacked, gate: Repacked | None = None
) -> str | None:
    (rows, width), hidden = x_RX.shape, up.outputs
    shapes = (up.inputs, down.inputs, down.outputs, down.count)
    if shapes != (width, hidden, width, up.count):
        return f"matrices of {up.count} and {down.count} experts, {shapes[:3]}, do not fit {width} and {hidden} numbers"
    alike = lambda m: (m.format, m.count, m.inputs, m.outputs)  # noqa: E731
    if gate is not None and alike(gate) != alike(up):
        return f"gates are {alike(gate)}, what they open {alike(up)}; they must be alike"
    return index_refuses(rows, index_RK, weight_RK) or quant_refuses(x_RX, up) or refuses(weight_RK)


def experts_quant(
    x_RX: Tensor, index_RK: Tensor, weight_RK: Tensor, up: Repacked, down: Repacked, gate: Repacked | None = None
) -> Tensor:
    """See `ops/experts.py`. The hidden numbers are float32 until they are rounded once, to int8, or for FP8 to bf16."""
    refusal = experts_quant_refuse(x_RX, index_RK, weight_RK, up, down, gate)
    if refusal is not None:
        raise ValueError(f"experts_quant: {refusal}")
    x_RX, index_RK, weight_RK = (t.contiguous() for t in (x_RX, index_RK, weight_RK.to(torch.float32)))
    out = torch.empty_like(x_RX)
    sizes = Sizes(len(x_RX), up.inputs, up.outputs, up.count, index_RK.shape[1], True, True, gate is not None, True)
    pairs = Pairs(sizes, *map(pointer, (x_RX, index_RK, weight_RK, None, None, None, out)))
    matrices = up.record, down.record, Matrix() if gate is None else gate.record
    call("nautilus_quant_experts", Experts(pairs, *matrices))
    return out


def experts_packed(x_RX, index_RK, weight_RK, up_EFX, down_EXF, gate_EFX=None) -> Tensor:
    """See `ops/experts.py`."""
    matrices = (None if stack is None else repacked_form(stack) for stack in (up_EFX, down_EXF, gate_EFX))
    return experts_quant(x_RX, index_RK, weight_RK, *matrices)  # type: ignore[arg-type]


def experts_packed_refuse(x_RX, index_RK, weight_RK, up_EFX, down_EXF, gate_EFX=None) -> str | None:
    stacks = [stack for stack in (up_EFX, down_EXF, gate_EFX) if stack is not None]
    if not all(isinstance(stack, tuple) for stack in stacks):
        return "some of the experts' matrices are in few bits and others are not"
    if (reason := next(filter(None, map(kind_refuses, stacks)), None)) is not None:
        return reason
    up, gate = up_EFX[0], up_EFX[0] if gate_EFX is None else gate_EFX[0]
    if (gate.format, gate.shape) != (up.format, up.shape):
        return f"gates are {gate.format} of shape {gate.shape}, what they open {up.format} of {up.shape}"
    if (torch.is_grad_enabled() and x_RX.requires_grad) or x_RX.dtype != torch.bfloat16:
        return f"experts in {up.format} have no gradient and take bf16, not {x_RX.dtype}"
    (hidden, width), down = up.shape, down_EXF[0].shape
    if (width, hidden) != down or x_RX.shape[1] != width or len({*map(len, stacks)}) > 1:
        return "the shapes of its matrices do not fit together"
    return index_refuses(len(x_RX), index_RK, weight_RK) or refuses(x_RX, weight_RK)


def kind_refuses(matrices: tuple) -> str | None:
    """Whether the matrices of all experts go together; looked at once where they are packed once."""

    def why(kept: bool) -> str | None:
        some = sum(not isinstance(matrix, Packed) for matrix in matrices)
        return f"{some} of {len(matrices)} matrices are not in few bits" if some else repack_refuses(matrices)

    return packed_form(("kinds", id(matrices)), matrices, why)
