"""Number formats: how a matrix is stored in few bits, and the one way back to numbers.

    x = value(code) * scale * tensor_scale        in float32, in this order

| format | value | one scale for | scale |
|---|---|---|---|
| fp8_e4m3, fp8_e5m2 | float8 | a matrix, or a row | float32 |
| mxfp8 | E4M3 | 32 neighbours | E8M0: a power of two |
| mxfp4 | E2M1 | 32 neighbours | E8M0 |
| nvfp4 | E2M1 | 16 neighbours | E4M3, times one float32 for the matrix |
| int8 | -127..127 | a row, or 32, 64, 128 neighbours | float32 |
| int4 | code - 8, or code - zero | 32, 64, 128 neighbours | float32 |

Neighbours lie along the last axis. Axes before the last two stack matrices (experts), each with its own tensor scale.
Codes are stored as released checkpoints store them: two 4-bit codes in a byte, the even element in the low half. NaN
codes of float8 decode to NaN; code 8 of E2M1 is -0. How numbers become codes is in `ops/encode.py`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of codes 0 to 7; bit 3 is the sign
INT4_ZERO = 8  # the code of 0 where no zero point is given


@dataclass(frozen=True, kw_only=True)
class Format:
    codes: torch.dtype  # as stored; uint8 holds two codes
    scale: torch.dtype  # as stored; uint8 is E8M0
    largest: float
    tiles: tuple[str, ...]  # rows x columns that may have a scale in common; the first one unless told otherwise
    rules: tuple[str, ...]  # by which an encoder may choose scales; the first one unless told otherwise

    @property
    def nibbles(self) -> bool:
        return self.codes == torch.uint8

    @property
    def e2m1(self) -> bool:
        return self.largest == E2M1[-1]


FP8, POWER = torch.float8_e4m3fn, torch.uint8
POWERS = ("ceil", "floor", "half_up")
NVFP4_RULES = ("ptq", "train", "four_over_six", "sweep")
GROUPS = ("1x32", "1x64", "1x128")
FORMATS: dict[str, Format] = {
    "fp8_e4m3": Format(codes=FP8, scale=torch.float32, largest=448, tiles=("tensor", "row"), rules=("max",)),
    "fp8_e5m2": Format(
        codes=torch.float8_e5m2, scale=torch.float32, largest=57344, tiles=("tensor", "row"), rules=("max",)
    ),
    "mxfp8": Format(codes=FP8, scale=POWER, largest=448, tiles=("1x32",), rules=POWERS),
    "mxfp4": Format(codes=torch.uint8, scale=POWER, largest=6, tiles=("1x32",), rules=POWERS),
    "nvfp4": Format(codes=torch.uint8, scale=FP8, largest=6, tiles=("1x16", "16x16"), rules=NVFP4_RULES),
    "int8": Format(codes=torch.int8, scale=torch.float32, largest=127, tiles=("row", *GROUPS), rules=("max", "mse")),
    "int4": Format(codes=torch.uint8, scale=torch.float32, largest=7, tiles=GROUPS, rules=("max", "mse", "zero_point")),
}


def require(holds: bool, asked: str, clash: str, remedy: str) -> None:
    """ValueError in three parts unless `holds`."""
    if not holds:
        raise ValueError(f"{asked}: {clash}; {remedy}")


def known(name: str) -> Format:
    if name in FORMATS:
        return FORMATS[name]
    near = difflib.get_close_matches(name, FORMATS, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(FORMATS)}"
    raise ValueError(f"number format: there is none called {name!r}; {hint}")


def pack(codes: Tensor) -> Tensor:
    """4-bit codes to bytes along the last axis, even elements in the low half."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack(packed: Tensor) -> Tensor:
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def power_of_two(scale: Tensor) -> Tensor:
    """E8M0 bytes: 2^(byte - 127), exact down to the subnormal 2^-127."""
    return scale.view(torch.float8_e8m0fnu).float()


def columns(tile: str, width: int) -> int:
    """How many neighbours along the last axis have a scale in common."""
    return int(tile.partition("x")[2]) if "x" in tile else width


def scale_shape(shape: tuple[int, ...], tile: str) -> tuple[int, ...]:
    """Tiles of several rows store their scale once for each row, so that every file has one scale for a block."""
    return shape[:-2] if tile == "tensor" else (*shape[:-1], math.ceil(shape[-1] / columns(tile, shape[-1])))


@dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
    """A matrix, or a stack of them, in a number format. ValueError where its parts do not belong together."""

    format: str
    shape: tuple[int, ...]  # of the numbers
    codes: Tensor
    scale: Tensor
    tensor_scale: Tensor | None = None  # nvfp4: one for each matrix
    zero: Tensor | None = None  # int4: the code of 0 for each group

    def __post_init__(self):
        kind, name = known(self.format), f"{self.format} of shape {self.shape}"
        require(len(self.shape) > 0, name, "a single number has no row", "give it a shape of at least one axis")
        odd = kind.nibbles and self.shape[-1] % 2 == 1
        require(not odd, name, f"{self.shape[-1]} columns do not fill bytes of two codes", "pad the matrix by a column")
        stored = (*self.shape[:-1], self.shape[-1] // 2) if kind.nibbles else self.shape
        expect(name, "codes", self.codes, kind.codes, {stored})
        expect(name, "scale", self.scale, kind.scale, {scale_shape(self.shape, tile) for tile in kind.tiles})
        if self.format == "nvfp4":
            expect(name, "tensor_scale", self.tensor_scale, torch.float32, {self.shape[:-2]})
        else:
            require(self.tensor_scale is None, name, "a tensor scale is given", "only nvfp4 has one; leave it out")
        if self.zero is not None:
            require(self.format == "int4", name, "zero points are given", "only int4 has them; leave them out")
            expect(name, "zero", self.zero, torch.uint8, {tuple(self.scale.shape)})
        for part, scale in (("scale", self.scale), ("tensor_scale", self.tensor_scale)):
            bad = 0 if scale is None or usable(scale) else int(unusable(scale).sum())
            remedy = "the file is damaged, or was written by another format's rules; quantise the weight again"
            require(bad == 0, name, f"{bad} of its {part} numbers are negative, NaN or infinite", remedy)

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers: computed in float32, rounded once to `dtype`."""
        width, matrix = columns(self.tile, self.shape[-1]), (1,) * min(2, len(self.shape))
        values = self.values()
        if short := -self.shape[-1] % width:
            values = torch.nn.functional.pad(values, (0, short))
        values = values.unflatten(-1, (-1, width))
        if self.format == "int4":
            values.sub_(INT4_ZERO if self.zero is None else self.zero.float().unsqueeze(-1))
        scale = power_of_two(self.scale) if self.scale.dtype == torch.uint8 else self.scale.float()
        scale = scale.reshape(*self.shape[:-2], *matrix) if self.tile == "tensor" else scale
        values.mul_(scale.unsqueeze(-1))
        if self.tensor_scale is not None:
            values.mul_(self.tensor_scale.reshape(*self.shape[:-2], *matrix, 1))
        return values.flatten(-2)[..., : self.shape[-1]].to(dtype).contiguous()

    def rows(self, index: Tensor) -> Packed:
        """Some rows of one matrix, in any order."""
        scale = self.scale if self.tile == "tensor" else self.scale[index]
        zero, shape = None if self.zero is None else self.zero[index], (len(index), *self.shape[1:])
        return dataclasses.replace(self, shape=shape, codes=self.codes[index], scale=scale, zero=zero)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def tile(self) -> str:
        """Which neighbours share a scale, by the shape of the scales; tiles of several rows are stored row by row."""
        tiles, found = known(self.format).tiles, tuple(self.scale.shape)
        return next(tile for tile in tiles if scale_shape(self.shape, tile) == found)

    def values(self) -> Tensor:
        """What the codes stand for before any scale, in float32; of int4 the codes themselves."""
        if not known(self.format).nibbles:
            return self.codes.float()
        table = range(16) if self.format == "int4" else (*E2M1, *(-v for v in E2M1))
        values = torch.tensor(tuple(table), dtype=torch.float32, device=self.codes.device)
        return values[unpack(self.codes).int()]


def expect(name: str, part: str, tensor: Tensor | None, dtype: torch.dtype, shapes: set[tuple[int, ...]]) -> None:
    remedy = f"it must be {dtype} of shape {' or '.join(str(shape) for shape in sorted(shapes))}"
    found = "missing" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"
    fits = tensor is not None and tensor.dtype == dtype and tuple(tensor.shape) in shapes
    require(fits, name, f"its {part} is {found}", remedy)


def usable(scale: Tensor) -> bool:
    """Whether `unusable` would find none, at the speed of memory: a large model has billions of scales."""
    if scale.numel() == 0:
        return True
    if scale.dtype != torch.float32:
        return int(scale.view(torch.uint8).max()) < (255 if scale.dtype == torch.uint8 else 127)
    # Negative numbers, -0 included, are the negative integers; infinity and NaN the largest.
    low, high = torch.aminmax(scale.contiguous().view(torch.int32))
    return 0 <= int(low) and int(high) < 0x7F800000


def unusable(scale: Tensor) -> Tensor:
    """Which scales are negative, NaN or infinite, whatever they are stored in. -0 counts as negative."""
    if scale.dtype == torch.float32:
        return ~scale.isfinite() | scale.signbit()
    # E8M0 has one NaN and no sign; E4M3 has NaN at 127, and all that has a sign above.
    return scale.view(torch.uint8) >= (255 if scale.dtype == torch.uint8 else 127)


def dense(matrix: Tensor | Packed, dtype: torch.dtype) -> Tensor:
    """The numbers of a matrix, however it is held."""
    return matrix.decode(dtype) if isinstance(matrix, Packed) else matrix.to(dtype)


# ----- as two families of checkpoints name them ----------------------------------------------------------------------


def from_modelopt(tensors: dict[str, Tensor]) -> Packed:
    """`weight`, `weight_scale` and, for nvfp4, `weight_scale_2`, which multiplies. `input_scale` is about activations
    and is passed over. ValueError for every other tensor: it would change what the weight means."""
    check_names(tensors, "ModelOpt weight", ("weight", "weight_scale"), ("weight_scale_2", "input_scale"))
    return from_parts(tensors["weight"], tensors["weight_scale"], tensors.get("weight_scale_2"))


def to_modelopt(packed: Packed) -> dict[str, Tensor]:
    remedy = "write it under another family's names, or in nvfp4"
    require(packed.format != "int4", "ModelOpt weight", "its int4 is packed along the other axis", remedy)
    scale = packed.scale.squeeze(-1) if packed.tile == "row" else packed.scale
    tensors = {"weight": packed.codes, "weight_scale": scale}
    return tensors if packed.tensor_scale is None else {**tensors, "weight_scale_2": packed.tensor_scale}


def from_compressed_tensors(tensors: dict[str, Tensor]) -> Packed:
    """`weight_packed` or `weight`, `weight_scale`, and for nvfp4 `weight_global_scale`: the RECIPROCAL of the tensor
    scale. Integers of 4 bits come eight in an int32 with `weight_shape`, zero points packed along the rows. What is
    about activations is passed over."""
    name, codes = "compressed-tensors weight", "weight_packed" if "weight_packed" in tensors else "weight"
    whole = codes in tensors and tensors[codes].dtype == torch.int32
    others = ("weight_shape", "weight_zero_point") if whole else ("weight_global_scale",)
    check_names(tensors, name, (codes, "weight_scale"), (*others, "input_global_scale", "input_scale"))
    if whole:
        shape, zero = (tensors.get(other) for other in others)
        return from_int32(tensors[codes], tensors["weight_scale"], shape, zero)
    reciprocal = tensors.get("weight_global_scale")
    if reciprocal is None:
        return from_parts(tensors[codes], tensors["weight_scale"], None)
    good, remedy = bool((reciprocal.isfinite() & (reciprocal > 0)).all()), "it must be positive: 2688 / largest weight"
    require(good, name, f"weight_global_scale is {reciprocal.flatten()[:4].tolist()}", remedy)
    return from_parts(tensors[codes], tensors["weight_scale"], reciprocal.float().reciprocal())


def from_int32(words: Tensor, scale: Tensor, shape: Tensor | None, zero_point: Tensor | None) -> Packed:
    """Eight codes in a word, least significant first: on a little-endian machine these are our bytes."""
    size: list[int] = [] if shape is None else shape.tolist()
    fits = len(size) == words.ndim and math.ceil(size[-1] / 8) == words.shape[-1]
    clash = f"weight_packed has shape {tuple(words.shape)}, weight_shape says {size or 'nothing'}"
    require(fits, "compressed-tensors weight", clash, "only 4 bits are read, which are eight to an int32")
    zero = None if zero_point is None else unpack(as_bytes(zero_point.mT))[..., : size[-2]].mT.contiguous()
    codes = as_bytes(words)[..., : size[-1] // 2]
    return Packed(format="int4", shape=tuple(size), codes=codes, scale=scale.float(), zero=zero)


def as_bytes(words: Tensor) -> Tensor:
    # Flat first: a last axis of length one may have any stride, and then cannot be seen as bytes.
    return words.flatten().view(torch.uint8).reshape(*words.shape[:-1], -1)


def check_names(tensors: dict[str, Tensor], name: str, needed: tuple[str, ...], allowed: tuple[str, ...]) -> None:
    absent = [key for key in needed if key not in tensors]
    require(
        not absent, name, f"{', '.join(absent)} absent from {sorted(tensors)}", "hand over the weight and its scales"
    )
    foreign = sorted(set(tensors) - {*needed, *allowed})
    require(not foreign, name, f"{', '.join(foreign)} would change its meaning", f"known are {[*needed, *allowed]}")


def from_parts(codes: Tensor, scale: Tensor, tensor_scale: Tensor | None) -> Packed:
    """The format follows from the dtypes; axes of length one that files drop or add are put back."""
    if scale.dtype in (torch.bfloat16, torch.float16):
        scale = scale.float()
    found = [name for name, kind in FORMATS.items() if (kind.codes, kind.scale) == (codes.dtype, scale.dtype)]
    clash = f"{codes.dtype} with scales in {scale.dtype}"
    require(bool(found) and found != ["int4"], "stored weight", clash, f"readable are {', '.join(FORMATS)} but no int4")
    shape = (*codes.shape[:-1], codes.shape[-1] * (2 if codes.dtype == torch.uint8 else 1))
    if scale.dtype == torch.float32 and scale.shape == shape[:-1]:
        scale = scale.unsqueeze(-1)
    elif scale.dtype == torch.float32 and scale.shape == (*shape[:-2], 1):
        scale = scale.squeeze(-1)
    if tensor_scale is not None and tensor_scale.numel() == math.prod(shape[:-2]):
        tensor_scale = tensor_scale.reshape(shape[:-2])
    return Packed(format=found[0], shape=shape, codes=codes, scale=scale, tensor_scale=tensor_scale)
