"""From numbers to codes: how each format chooses its scales, and how an element is rounded.

Everything happens in float32. Rounding is to the nearest, ties to the even code: for E2M1 (0 0.5 1 1.5 2 3 4 6) 0.25
goes to 0, 0.75 and 1.25 to 1, 1.75 and 2.5 to 2, 3.5 and 5 to 4. Numbers beyond the largest become the largest, by an
explicit clamp: casts to float8 saturate on some devices only. Two encoders for NVFP4 differ on purpose:

    train            S = 2688 / amax,  s = E4M3(amax_block (S / 6)),  code = E2M1(x / (s / S)); s may be 0
    ptq and searches t = amax / 2688,  s = E4M3(amax_block / 6t), at least 2^-9 and 1 for zeros,  code = E2M1(x / st)

The first is what pre-training kernels do, the second what released files hold; one decoder reads both. Sources:
NVIDIA's Transformer Engine and Model Optimizer; "Pretraining Large Language Models with NVFP4" (2025), appendix B;
"Four Over Six" (2025); the OCP Microscaling specification 1.0.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from nautilus.ops.formats import (
    FORMATS,
    INT4_ZERO,
    NVFP4_RULES,
    Packed,
    columns,
    known,
    pack,
    power_of_two,
    require,
)

LARGEST = torch.finfo(torch.float32).max
# What the largest element is stored as: the largest E2M1 times the largest block scale. Four over six keeps head-room
# in the block scale, for 256 * 6 / 4 = 384 is still one.
NVFP4_TOP, FOUR_OVER_SIX_TOP = 6 * 448, 6 * 256
SMALLEST_BLOCK_SCALE = 2.0**-9
MULTIPLIERS = tuple(0.25 + 0.1 * step for step in range(38))  # of amax, where a search for integers looks
SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


def encode(
    x: Tensor,
    format: str,
    *,
    rule: str | None = None,
    tile: str | None = None,
    rounding: str = "nearest",
    bits: Tensor | torch.Generator | None = None,
    tensor_scale: Tensor | float | None = None,
    largest: Tensor | float | None = None,
) -> Packed:
    """x in a number format; axes before the last two stack matrices (activations of a batch: flatten them to one).

    rule: how scales are chosen, `FORMATS[format].rules`. tile: what shares a scale, `FORMATS[format].tiles`.
    rounding: "stochastic" (E2M1 only) takes `bits`: uint8 as x is shaped, or a generator to draw them from.
    tensor_scale: of nvfp4, instead of the matrix's own; matrices that are read as one need one (`tensor_scale_of`).
    largest: of nvfp4 under the rule train, the largest magnitude of the matrix that x is a piece of.
    """
    kind = known(format)
    rule, tile = one_of("rule", rule, kind.rules, format), one_of("tile", tile, kind.tiles, format)
    check(x, format, tile)
    size, given = tile_size(x, tile), given_scale(tensor_scale, x, format)
    work = Work(split(x.detach().float(), size), format, rule, noise_for(x, format, rounding, bits, size))
    if format == "nvfp4":
        done = nvfp4_train(work, given, largest) if rule == "train" else nvfp4_ptq(work, given)
    elif kind.scale == torch.uint8:
        done = powers(work)
    else:
        done = zero_point(work) if rule == "zero_point" else linear(work)
    return assemble(done, x.shape, format, tile, size)


def hadamard(x: Tensor) -> Tensor:
    """x (diag(signs) H_16) / 4 on groups of 16 along the last axis: spreads outliers, x y^T stays what it is.

    H is Sylvester's matrix, the signs are fixed. Sums are float32 (float64 for float64), of neighbours, then of
    neighbouring sums, so that every machine finds the same bits; the result has x's dtype, so bf16 is rounded once,
    before any scale is chosen from it.
    """
    clash = f"{x.shape[-1] if x.ndim else 0} columns are not groups of 16"
    require(x.ndim > 0 and x.shape[-1] % 16 == 0, "hadamard", clash, "pad x with zeros, which stay zeros as a group")
    require(x.is_floating_point(), "hadamard", f"x is {x.dtype}", "convert it to bfloat16 or float32")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    mixed = x.to(wide).unflatten(-1, (-1, 16)) * torch.tensor(SIGNS, dtype=wide, device=x.device)
    for half in (1, 2, 4, 8):
        first, second = mixed.unflatten(-1, (-1, 2, half)).unbind(-2)
        mixed = torch.stack((first + second, first - second), -2).flatten(-3)
    return (mixed / 4).flatten(-2).to(x.dtype)


# ----- what is asked -------------------------------------------------------------------------------------------------


def one_of(what: str, given: str | None, allowed: tuple[str, ...], format: str) -> str:
    if given is None:
        return allowed[0]
    near = difflib.get_close_matches(given, allowed, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(allowed)}"
    require(given in allowed, f"encode to {format}", f"it has no {what} {given!r}", hint)
    return given


def check(x: Tensor, format: str, tile: str) -> None:
    asked, shape = f"encode to {format}", tuple(x.shape)
    require(x.is_floating_point(), asked, f"x is {x.dtype}", "convert it to a float dtype")
    require(x.ndim > 0 and x.numel() > 0, asked, f"x of shape {shape} holds no row of numbers", "leave it out")
    odd = FORMATS[format].nibbles and shape[-1] % 2 == 1
    require(not odd, asked, f"{shape[-1]} columns do not fill bytes of two codes", "pad x by a column")
    require(x.ndim > 1 or tile != "16x16", asked, f"x of shape {shape} has no rows for tiles of 16x16", "use 1x16")
    bad = int((~x.float().isfinite()).sum())
    clash = f"{bad} of {x.numel()} numbers are NaN or infinite in float32"
    require(bad == 0, asked, clash, "find out where they arose")


def noise_for(
    x: Tensor, format: str, rounding: str, bits: Tensor | torch.Generator | None, size: tuple[int, int]
) -> Tensor | None:
    """The share of a step, in [0, 1), that stochastic rounding adds to each element before it rounds down, in tiles."""
    asked = f"encode to {format}"
    require(rounding in ("nearest", "stochastic"), asked, f"rounding is {rounding!r}", "choose nearest or stochastic")
    if rounding == "nearest":
        require(bits is None, asked, "random bits are given for rounding to the nearest", "say rounding='stochastic'")
        return None
    require(FORMATS[format].e2m1, asked, "stochastic rounding is for E2M1", "use nvfp4 or mxfp4, or round to nearest")
    if isinstance(bits, torch.Generator):
        bits = torch.randint(0, 256, x.shape, generator=bits, device=bits.device, dtype=torch.uint8)
    found = "missing" if bits is None else f"{bits.dtype} of shape {tuple(bits.shape)}"
    if bits is None or bits.dtype != torch.uint8 or bits.shape != x.shape:
        raise ValueError(f"{asked}: bits are {found}; hand over a generator, or uint8 of shape {tuple(x.shape)}")
    return split(bits.to(x.device).float() / 256, size)


def given_scale(scale: Tensor | float | None, x: Tensor, format: str) -> Tensor | None:
    if scale is None:
        return None
    asked = f"encode to {format}"
    require(format == "nvfp4", asked, "a tensor_scale is given", "only nvfp4 has one; leave it out")
    scale = torch.as_tensor(scale, dtype=torch.float32, device=x.device)
    clash = f"tensor_scale of shape {tuple(scale.shape)} for x of shape {tuple(x.shape)}"
    fits = scale.ndim == 0 or scale.shape == x.shape[:-2]
    require(fits, asked, clash, f"give one number, or one for each matrix: {tuple(x.shape[:-2])}")
    good = bool((scale.isfinite() & (scale > 0)).all())
    require(good, asked, f"tensor_scale is {scale.flatten()[:4].tolist()}", "it must be positive and finite")
    return scale.expand(x.shape[:-2])[..., None, None, None, None]


# ----- tiles ---------------------------------------------------------------------------------------------------------


class Work(NamedTuple):
    tiles: Tensor  # (..., tiles down, rows of one, tiles across, columns of one)
    format: str
    rule: str
    noise: Tensor | None


class Done(NamedTuple):
    codes: Tensor  # one to an element, tiled as the work is
    scale: Tensor  # one to a tile
    tensor_scale: Tensor | None = None
    zero: Tensor | None = None


def tile_size(x: Tensor, tile: str) -> tuple[int, int]:
    rows = x.shape[-2] if x.ndim > 1 else 1
    return {"tensor": rows, "16x16": 16}.get(tile, 1), columns(tile, x.shape[-1])


def split(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(..., N, K) padded with zeros to whole tiles: (..., N/r, r, K/c, c)."""
    x = x[None] if x.ndim == 1 else x
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % size[1], 0, -x.shape[-2] % size[0]))
    return padded.unflatten(-1, (-1, size[1])).unflatten(-3, (-1, size[0]))


def assemble(done: Done, shape: torch.Size, format: str, tile: str, size: tuple[int, int]) -> Packed:
    """Tiles back to rows, without the padding; tiles of several rows give each row its scales."""
    count, across = shape[-2] if len(shape) > 1 else 1, done.scale.shape[-2]
    codes = done.codes.flatten(-2).flatten(-3, -2)[..., :count, : shape[-1]].reshape(shape)

    def by_row(one: Tensor) -> Tensor:
        if tile == "tensor":
            return one.reshape(shape[:-2])
        rows = one.expand(*one.shape[:-3], size[0], across, 1).flatten(-2).flatten(-3, -2)
        return rows[..., :count, :].reshape(*shape[:-1], across)

    return Packed(
        format=format,
        shape=tuple(shape),
        codes=pack(codes) if FORMATS[format].nibbles else codes,
        scale=by_row(done.scale),
        tensor_scale=None if done.tensor_scale is None else done.tensor_scale.reshape(shape[:-2]),
        zero=None if done.zero is None else by_row(done.zero),
    )


def largest_of(tiles: Tensor) -> Tensor:
    return tiles.abs().amax((-3, -1), keepdim=True)


def number(like: Tensor, value: float) -> Tensor:
    """A divisor or dividend as a tensor: a plain number would be turned into a product with its rounded reciprocal."""
    return like.new_full((), value)


# ----- scales --------------------------------------------------------------------------------------------------------


def tensor_scale_of(amax: Tensor, rule: str = "ptq") -> Tensor:
    """NVFP4's float32 scale for matrices whose largest magnitude is amax. For matrices that are read as one (q, k and
    v; gate and up) take the maximum of their amax first. At least 1 / the largest float32; 1 for zeros."""
    top = FOUR_OVER_SIX_TOP if one_of("rule", rule, NVFP4_RULES, "nvfp4") == "four_over_six" else NVFP4_TOP
    scale = (amax.float() / number(amax.float(), top)).clamp(min=1 / LARGEST)
    return torch.where(amax == 0, 1.0, scale)


def nvfp4_train(work: Work, given: Tensor | None, largest: Tensor | float | None = None) -> Done:
    """Transformer Engine's arithmetic, rounding by rounding; a given tensor scale stands for 1 / S."""
    block = largest_of(work.tiles)
    amax = block.amax((-4, -2), keepdim=True)
    amax = amax if largest is None else torch.full_like(amax, float(largest))
    grow = (number(amax, NVFP4_TOP) / amax if given is None else 1 / given).clamp(max=LARGEST)
    scale = (block * (grow * (1 / 6))).clamp(max=448).to(torch.float8_e4m3fn)
    # A scale of 0 gives codes of +-7, which decode to 0.
    shrink = (1 / (scale.float() * (1 / grow))).clamp(max=LARGEST)
    codes = to_codes(work.tiles * shrink, work)
    return Done(codes, scale, tensor_scale_of(amax) if given is None else given)


def nvfp4_ptq(work: Work, given: Tensor | None) -> Done:
    """amax / 6 alone; the better of amax / 6 and amax / 4; or the best of all positive E4M3 numbers."""
    block = largest_of(work.tiles)
    whole = tensor_scale_of(block.amax((-4, -2), keepdim=True), work.rule) if given is None else given
    scale = torch.where(block == 0, 1.0, block_scale(block / (6 * whole)))
    if work.rule == "four_over_six":
        scale = best(work, whole, (scale, block_scale(block / (4 * whole))))
    elif work.rule == "sweep":
        every = torch.arange(1, 127, dtype=torch.uint8, device=block.device).view(torch.float8_e4m3fn).float()
        scale = best(work, whole, (scale, *every))
    return Done(to_codes(work.tiles / (scale * whole), work), scale.to(torch.float8_e4m3fn), whole)


def block_scale(exact: Tensor) -> Tensor:
    return exact.clamp(SMALLEST_BLOCK_SCALE, 448).to(torch.float8_e4m3fn).float()


def powers(work: Work) -> Done:
    """E8M0. ceil: the smallest power of two under which nothing saturates. floor (OCP): log2 of the largest element
    rounded down, less the format's own; the top may saturate. half_up (compressed-tensors): as floor, after rounding
    the largest element to one bit behind the point, so from 1.75 times a power of two upwards it is the next one."""
    mantissa, exponent = torch.frexp(largest_of(work.tiles))  # mantissa 2^exponent, mantissa in [1/2, 1)
    top, top_exponent = math.frexp(FORMATS[work.format].largest)
    up = {"ceil": mantissa > top, "floor": mantissa > 1, "half_up": mantissa >= 1.75 / 2}[work.rule]
    power = torch.where(mantissa == 0, -127, exponent - top_exponent + up.int()).clamp(-127, 127)
    scale = (power + 127).to(torch.uint8)
    return Done(to_codes(work.tiles * power_of_two(254 - scale), work), scale)


def linear(work: Work) -> Done:
    """amax / largest; with rule mse times whichever multiplier leaves the least squared error."""
    amax = largest_of(work.tiles)
    scale = amax / number(amax, FORMATS[work.format].largest)
    scale = torch.where(scale == 0, 1.0, scale)
    if work.rule == "mse":
        scale = scale * best(work, scale, (number(scale, m) for m in (1.0, *MULTIPLIERS)))
    return Done(to_codes(work.tiles / scale, work), scale)


def zero_point(work: Work) -> Done:
    """Asymmetric: codes 0 to 15 span the smallest to the largest element and 0, which has a code of its own."""
    low = work.tiles.amin((-3, -1), keepdim=True).clamp(max=0)
    high = work.tiles.amax((-3, -1), keepdim=True).clamp(min=0)
    scale = (high - low) / number(high, 15)
    scale = torch.where(scale == 0, 1.0, scale)
    zero = (-low / scale).round().clamp(0, 15)
    codes = ((work.tiles / scale).round() + zero).clamp(0, 15)
    return Done(codes.to(torch.uint8), scale, zero=zero.to(torch.uint8))


def best(work: Work, whole: Tensor, candidates: Iterable[Tensor]) -> Tensor:
    """For each tile the scale with the least squared error, the earlier one of equals. Errors are measured in units of
    `whole`, so that their squares neither overflow nor vanish."""
    target = work.tiles / whole
    chosen = torch.ones_like(largest_of(target))
    least = torch.full_like(chosen, math.inf)
    for scale in candidates:
        error = nearest(work.tiles / (scale * whole), work.format) * scale - target
        error = error.square().sum((-3, -1), keepdim=True)
        chosen, least = torch.where(error < least, scale, chosen), torch.minimum(error, least)
    return chosen


# ----- elements ------------------------------------------------------------------------------------------------------


def nearest(y: Tensor, format: str, noise: Tensor | None = None) -> Tensor:
    """Elements as the values they are stored as, in float32. With noise: up with probability floor(256 f) / 256, where
    f is how far y is on its way to the next value."""
    kind = FORMATS[format]
    y = y.clamp(-kind.largest, kind.largest)
    if not kind.e2m1:
        return y.round() if kind.codes in (torch.int8, torch.uint8) else y.to(kind.codes).float()
    size = y.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, torch.ones_like(size), 2.0))
    steps = size / step
    steps = steps.round() if noise is None else (steps + noise).floor()
    return torch.where(y < 0, -steps * step, steps * step)


def to_codes(y: Tensor, work: Work) -> Tensor:
    """One code to an element, before two are packed into a byte. Every negative y keeps its sign, also as -0."""
    kind, value = FORMATS[work.format], nearest(y, work.format, work.noise)
    if kind.codes != torch.uint8:
        return value.to(kind.codes)
    if work.format == "int4":
        return (value + INT4_ZERO).to(torch.uint8)
    size = value.abs()
    code = torch.where(size < 2, 2 * size, torch.where(size < 4, size + 2, size / 2 + 4))
    return (code + 8 * (y < 0)).to(torch.uint8)
