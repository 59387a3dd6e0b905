"""Matrix products of low-precision training, y = x W^T and its two gradients. Letters: R rows, I inputs, O outputs,
G groups of rows (one, or the experts), each with a matrix of its own.

    product      operand   blocks of NVFP4      rounding     operand  blocks           rounding
    y = x W^T    x         1x16 along I         nearest      W        16x16            nearest
    dx = dy W    dy        1x16 along O         stochastic   W        the same codes
    dW = dy^T x  dy turned 1x16 along R         stochastic   x turned 1x16 along R     nearest

Everything is quantised from the bf16 original (W: the master rounded to bf16), never from something quantised. Turned:
the Hadamard rotation of `encode.py` on 16 neighbouring rows, rounded to bf16; both sides turn alike, so the product is
what it was. Each operand has one tensor scale for each group; the rotated one has its own. MXFP8: blocks of 32 along
the axis that is summed over, for W too; no rotation, nothing stochastic. `How` can leave out each technique of NVFP4.

    y = (sum over the summed axis of (q s)_a (q s)_b) * (amax_a amax_b / 2688^2)            s block scale

A value q s has at most six significant bits, so it is exact in bf16 and a product of two in float32; the sum is one
float32 chain (native) or float32 in whatever order (torch); both tensor scales amax / 2688 are one float32, rounded
once; then one product in float32, and for y and dx one rounding to bf16. dW is float32. So quantised operands have the
same bits everywhere, and so have sums that float32 holds exactly; others agree to (terms) 2^-24 of the sum of
magnitudes, and natively do not depend on other rows, on chunks or on threads.

Random bits are those of an address (seed, step, use, group, row, column block; Philox, see `rounding.py`): neither
threads nor a resumed run changes them. Scales are those of the operand, so numbers do depend on how a step is cut into
micro-batches. The weight is quantised in every forward: as it rounds to the nearest, that gives the same codes for all
micro-batches of a step, and there is nothing to keep that could be out of date.

Where a step is computed in parts, the tokens that one process holds of one micro-batch, or of one piece of it
(`chunk`), are rows of a product of their own, with scales and addresses of their own, wherever their experts are. A
weight of which several processes hold a piece each is one operand: its scales are the whole's, so are those of the
activations that are cut with it, and sums over the cut axis are added in float32 before they are rounded (`Piece`).

Sources: "Pretraining Large Language Models with NVFP4" (2025); NVIDIA's Transformer Engine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nautilus.ops.cpu.lowbit import Trip, lowbit_refuses, product_native, quantise_native
from nautilus.ops.dispatch import Impl, choose
from nautilus.ops.encode import NVFP4_TOP, encode, hadamard
from nautilus.ops.experts import activate, combine, sort_pairs
from nautilus.ops.rounding import WORD, philox

BLOCK = 16  # rows that the rotation mixes: every group is filled up with zeros to a multiple
USES = 8  # streams of random bits of one module: two for each of at most three matrices


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """One process's piece of a matrix that is cut along its outputs or its inputs.

    lengths: of its sections, which are multiples of a block. first: this process gives what all have added up, and the
    others give zeros, so that whoever adds them up again gets it once.
    """

    axis: str  # outputs, inputs
    lengths: tuple[int, ...]
    blocks: Tensor  # which blocks of 16 outputs (or inputs) of the whole are here, int64
    first: bool
    largest: Callable[[Tensor], Tensor]  # over all processes
    total: Callable[[Tensor], Tensor]

    def cuts(self, operand: str) -> bool:
        return operand.removesuffix("_turned") in ("weight", {"outputs": "dy", "inputs": "x"}[self.axis])


@dataclass(frozen=True, kw_only=True)
class How:
    """In which format, and where its random bits lie."""

    format: str  # nvfp4, mxfp8
    forward: bool = True  # false: the forward product alone is in bf16
    rotate: bool = True  # NVFP4's techniques, which are left out only to measure what they are good for
    stochastic: bool = True
    square: bool = True
    seed: int = 0
    step: int = 0
    stream: int = 0  # different for every matrix, a multiple of 2
    row: int = 0  # how many rows earlier micro-batches of the step had
    group: int = 0  # number of the first expert
    piece: Piece | None = None
    matrix: str = ""  # one of several in what is watched
    watch: Callable[[str, int, int], None] | None = None  # told (operand, numbers that became zero, numbers)

    def trip(self, axis: str, *, turn: bool = False, zipped: bool = False, noise: int | None = None) -> Trip:
        four = self.format == "nvfp4"
        drawn = noise is not None and four and self.stochastic
        address = (self.seed, self.step, self.stream + (noise or 0), self.row) if drawn else None
        turn = turn and four and self.rotate
        return Trip(format=self.format, axis=axis, turn=turn, zipped=zipped, address=address, group=self.group)

    @property
    def one_weight(self) -> bool:
        """Whether both products with the weight read the same codes: blocks of 1x16 or 1x32 lie along the axis that is
        summed over, which is another one in the backward."""
        return self.format == "nvfp4" and self.square


class Operand(NamedTuple):
    """values * top / 2688. top is the largest magnitude in NVFP4, 2688 in MXFP8; without one: plain bf16 numbers."""

    values: Tensor
    top_G: Tensor | None


class Engine(NamedTuple):
    quantise: Callable[[Tensor, Tensor, Trip], tuple[Tensor, Tensor, int]]
    product: Callable[..., Tensor]


def low_linear(x: Tensor, weight_OI: Tensor, how: How) -> Tensor:
    """x W^T in x's dtype, with gradients; see above."""
    rows = x.reshape(-1, x.shape[-1])
    padded = torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % BLOCK))
    y = LowProduct.apply(padded.to(torch.bfloat16), weight_OI[None], torch.tensor([0, len(padded)]), how)
    return y[: len(rows)].to(x.dtype).view(*x.shape[:-1], -1)  # type: ignore[index]


def low_experts(x_RX, index_RK, weight_RK, up_EFX, down_EXF, gate_EFX, how: How) -> Tensor:
    """`ops/experts.py` in low precision: every matrix of every expert is a group with scales of its own."""
    pairs = sort_pairs(index_RK, weight_RK, len(up_EFX), BLOCK)
    x_ZX = Spread.apply(x_RX.to(torch.bfloat16), pairs.place_RK, len(pairs.token_Z))
    y_ZX = low_groups(x_ZX, pairs.counts, up_EFX, down_EXF, gate_EFX, how)
    return Gather.apply(y_ZX, weight_RK, pairs.place_RK).to(x_RX.dtype)  # type: ignore[union-attr]


def low_groups(x_ZX: Tensor, counts: Sequence[int], up_EFX, down_EXF, gate_EFX, how: How) -> Tensor:
    """What each expert makes of its rows, of which there are multiples of BLOCK, bf16."""
    first = torch.tensor([0, *counts]).cumsum(0)
    names = "up.", "down.", "gate."
    up, down, gate = (dataclasses.replace(how, stream=how.stream + 2 * i, matrix=name) for i, name in enumerate(names))
    up_ZF = LowProduct.apply(x_ZX, up_EFX, first, up)
    gate_ZF = None if gate_EFX is None else LowProduct.apply(x_ZX, gate_EFX, first, gate)
    return LowProduct.apply(activate(up_ZF, gate_ZF), down_EXF, first, down)  # type: ignore[arg-type,return-value]


class LowProduct(torch.autograd.Function):
    """(R, I) bf16 rows in groups first[g]..first[g+1] of multiples of 16, times (G, O, I): (R, O) bf16."""

    @staticmethod
    def forward(ctx, x_RI, weight_GOI, first, how):
        engine = engine_for(x_RI, weight_GOI)
        weight = quantised_weight(engine, weight_GOI, how, "tiles" if how.one_weight else "rows")
        if how.forward:
            x, w = quantised(engine, x_RI, first, how, "x", how.trip("rows")), weight
        else:
            x, w = Operand(x_RI.detach().contiguous(), None), Operand(weight_GOI.detach().bfloat16().contiguous(), None)
        # Without square blocks W is quantised along outputs for the backward: another copy.
        kept = weight if how.one_weight else Operand(weight.values.new_empty(0), None)
        ctx.save_for_backward(x_RI, weight_GOI, first, *kept)
        ctx.how = how
        return product(engine, "forward", x, w, first, how)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_RO):  # type: ignore[override]
        x_RI, weight_GOI, first, *kept = ctx.saved_tensors
        how, engine, dx, dweight = ctx.how, engine_for(x_RI, weight_GOI), None, None
        dy_RO = dy_RO.to(torch.bfloat16).contiguous()
        if ctx.needs_input_grad[0]:
            w = Operand(*kept)
            if not how.one_weight:
                w = quantised_weight(engine, weight_GOI, how, "columns")
            dy = quantised(engine, dy_RO, first, how, "dy", how.trip("rows", noise=0))
            dx = product(engine, "inputs", dy, w, first, how)
        if ctx.needs_input_grad[1]:
            turned = how.trip("columns", turn=True, zipped=True)
            dy = quantised(engine, dy_RO, first, how, "dy_turned", how.trip("columns", turn=True, zipped=True, noise=1))
            x = quantised(engine, x_RI, first, how, "x_turned", turned)
            tops = dy.top_G, x.top_G
            dweight = engine.product("weights", dy.values, x.values, tops, first, torch.float32).to(weight_GOI.dtype)
        return dx, dweight, None, None


def product(engine: Engine, kind: str, a: Operand, b: Operand, first: Tensor, how: How) -> Tensor:
    """y or dx, bf16. Where the axis that is summed over is cut, the processes' float32 sums are added up first."""
    if how.piece is None or how.piece.axis != {"forward": "inputs", "inputs": "outputs"}[kind]:
        return engine.product(kind, a.values, b.values, (a.top_G, b.top_G), first, torch.bfloat16)
    sums = how.piece.total(engine.product(kind, a.values, b.values, (None, None), first, torch.float32))
    if not how.piece.first:
        return torch.zeros_like(sums, dtype=torch.bfloat16)
    scale_G = both_scales(a.top_G, b.top_G, 1).to(sums.device)
    return (sums * scale_G).to(torch.bfloat16)


def both_scales(left_G: Tensor | None, right_G: Tensor | None, groups: int) -> Tensor:
    left, right = (torch.full((groups,), NVFP4_TOP) if top is None else top for top in (left_G, right_G))
    return (left.double() * right / NVFP4_TOP**2).float()


def quantised(engine: Engine, x_RC: Tensor, first: Tensor, how: How, name: str, trip: Trip) -> Operand:
    if how.piece is not None and trip.format == "nvfp4" and how.piece.cuts(name):
        trip = dataclasses.replace(trip, over=how.piece.largest, blocks=how.piece.blocks)
    values, top_G, flushed = engine.quantise(x_RC, first, trip)
    if how.watch is not None:
        how.watch(how.matrix + name, flushed, x_RC.numel())
    return Operand(values, top_G)


def quantised_weight(engine: Engine, weight_GOI: Tensor, how: How, axis: str) -> Operand:
    groups, outputs, inputs = weight_GOI.shape
    first = torch.arange(groups + 1) * outputs
    flat = quantised(engine, weight_GOI.reshape(-1, inputs), first, how, "weight", how.trip(axis))
    return flat._replace(values=flat.values.view(groups, outputs, inputs))


class Spread(torch.autograd.Function):
    """Rows of tokens to rows of their pairs; zeros between the groups."""

    @staticmethod
    def forward(ctx, x_RX, place_RK, pairs):
        ctx.save_for_backward(place_RK)
        x_ZX = x_RX.new_zeros(pairs, x_RX.shape[1])
        for place_R in place_RK.unbind(1):
            x_ZX[place_R] = x_RX
        return x_ZX

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_ZX):  # type: ignore[override]
        (place_RK,) = ctx.saved_tensors
        ones = torch.ones(place_RK.shape, device=dx_ZX.device)
        return combine(dx_ZX, place_RK, ones).to(dx_ZX.dtype), None, None


class Gather(torch.autograd.Function):
    """Each token's weighted sum over its pairs, float32."""

    @staticmethod
    def forward(ctx, y_ZX, weight_RK, place_RK):
        ctx.save_for_backward(y_ZX, weight_RK, place_RK)
        return combine(y_ZX, place_RK, weight_RK)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_RX):  # type: ignore[override]
        y_ZX, weight_RK, place_RK = ctx.saved_tensors
        dy_ZX, dweight = torch.zeros_like(y_ZX), []
        for place_R, weight_R in zip(place_RK.unbind(1), weight_RK.unbind(1), strict=True):
            dy_ZX[place_R] = (dout_RX * weight_R[:, None]).to(y_ZX.dtype)
            dweight.append((y_ZX[place_R].to(dout_RX.dtype) * dout_RX).sum(-1))
        return dy_ZX, torch.stack(dweight, 1).to(weight_RK.dtype), None


# ----- reference ------------------------------------------------------------------------------------------------------


def random_bits(
    address: tuple[int, int, int, int], group: int, rows: int, columns: int, device=None, blocks: Tensor | None = None
) -> Tensor:
    """uint8 (rows, columns). A Philox counter (column block and group, row, stream, step) gives those of 16 columns."""
    seed, step, stream, row = address
    block = (torch.arange(-(-columns // 16), device=device) if blocks is None else blocks.to(device)) | group << 20
    along = (torch.arange(rows, device=device)[:, None] + row) & WORD
    fixed = (torch.full_like(block, number & WORD) for number in (stream, step))
    words = torch.stack(philox((block, along, *fixed), (seed & WORD, seed >> 32 & WORD)), -1)
    eighths = torch.tensor((0, 8, 16, 24), device=device)
    return (words[..., None] >> eighths & 255).to(torch.uint8).flatten(1)[:, :columns]


def quantise_reference(x_RC: Tensor, first: Tensor, how: Trip) -> tuple[Tensor, Tensor, int]:
    """As `quantise_native` does, group by group with `encode`; values are float32 and never zipped."""
    values, tops, flushed, counts = [], [], 0, first.diff().tolist()
    known_G = [None] * len(counts)
    if how.over is not None:
        alone = quantise_reference(x_RC, first, dataclasses.replace(how, over=None))
        known_G = how.over(alone[1])
    for group, (x, known) in enumerate(zip(x_RC.detach().bfloat16().split(counts), known_G, strict=True)):
        value, top = quantise_group(x, group, how, known)
        values.append(value)
        tops.append(top.to(x.device))
        turned = hadamard(x.mT).mT if how.turn else x
        flushed += int(((value == 0) & (turned != 0)).sum())
    return torch.cat(values), torch.stack(tops), flushed


def quantise_group(x: Tensor, group: int, how: Trip, known: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """known: the largest magnitude of what these rows are a piece of."""
    empty = float(NVFP4_TOP) if how.format == "mxfp8" else 0.0
    if len(x) == 0:
        return x.float(), torch.full((), empty) if known is None else known
    if not x.isfinite().all() or (known is not None and known.isnan()):
        return torch.zeros_like(x, dtype=torch.float32), torch.full((), torch.nan)
    bits, columns = how.bits, x.shape[-1]
    if how.address is not None:
        bits = random_bits(how.address, how.group + group, *x.shape, device=x.device, blocks=how.blocks)
    if how.axis == "columns":
        x, bits = x.mT, None if bits is None else bits.mT
    x = hadamard(x) if how.turn else x
    odd = (0, x.shape[-1] % 2)  # bytes hold two codes
    x, bits = torch.nn.functional.pad(x, odd), None if bits is None else torch.nn.functional.pad(bits, odd)
    tile = "16x16" if how.axis == "tiles" else None
    rule, rounding = "train" if how.format == "nvfp4" else "ceil", "nearest" if bits is None else "stochastic"
    packed = encode(x, how.format, rule=rule, tile=tile, rounding=rounding, bits=bits, largest=known)  # type: ignore
    top = torch.full((), empty)
    if packed.tensor_scale is not None:
        packed = dataclasses.replace(packed, tensor_scale=torch.ones_like(packed.tensor_scale))
        top = x.abs().amax().float() if known is None else known
    value = packed.decode().mT if how.axis == "columns" else packed.decode()
    return value[:, :columns], top


def product_reference(kind, a, b, tops, first, dtype) -> Tensor:
    counts, parts = first.diff().tolist(), []
    scales = both_scales(tops[0], tops[1], len(counts))
    others = b.split(counts) if kind == "weights" else b
    for rows, other, scale in zip(a.float().split(counts), others, scales, strict=True):
        other = other.float()
        y = rows.mT @ other if kind == "weights" else rows @ (other.mT if kind == "forward" else other)
        parts.append((y * scale).to(dtype))
    return torch.stack(parts) if kind == "weights" else torch.cat(parts)


IMPLS = (
    Impl("native", lambda: Engine(quantise_native, product_native), lowbit_refuses),
    Impl("torch", lambda: Engine(quantise_reference, product_reference)),
    Impl("reference", lambda: Engine(quantise_reference, product_reference)),
)


def engine_for(x_RI: Tensor, weight_GOI: Tensor) -> Engine:
    return choose("low_precision", IMPLS, x_RI, weight_GOI)()
