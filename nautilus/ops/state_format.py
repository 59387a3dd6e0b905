"""How the recurrent state of a Mamba-2 layer is stored between calls. Letters: B rows, H heads, P head width, N state.

The update itself is float32; only what rests between two calls is narrower. A block is the N numbers of one head and
one row of P.

    float formats     code = round(x)                   int8, fp8     scale = amax of the block / largest,
                                                                      code = round(x / scale)

| format | bits a number | rounding | |
|---|---|---|---|
| `fp32` | 32 | none | the default: the tensor as it is, not even copied (float64 in a float64 model) |
| `fp16_sr` | 16 | stochastic | what released recipes serve with |
| `fp16` | 16 | nearest | |
| `bf16` | 16 | nearest | only here so that its harm can be shown: do not use it |
| `int8_sr`, `fp8_sr` | 8 + 32 / N | stochastic | |
| `int8`, `fp8` | 8 + 32 / N | nearest | |
| `int8_ef` | 12 + 32 / N | nearest | int8, and the error it made in 4 bits |
| `fp16_ef` | 20 | nearest | fp16, and the error it made in 4 bits |

Why rounding to the nearest does harm: where the decay is close to 1, one step changes a number by less than half the
distance to its neighbour in the format, and it is rounded back to where it was, each time. Stochastic rounding is right
on average. Its bits depend on (seed, layer, position in the document, element of the state) and on nothing else, so a
row has the same state alone and in any batch.

Error feedback (`_ef`): the error of a write is kept beside it, in fifteenths of the distance of two neighbours, and
comes back with the next read, so nothing is lost that is larger than a thirtieth of that distance. This is the same as
rounding to a grid 15 times as fine; it needs no random numbers and 4 bits more.

Sources: the Nemotron 3 Super and Ultra reports (arXiv 2604.12374, 2606.15007).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import torch
from torch import Tensor

from nautilus.ops.formats import pack, require, unpack
from nautilus.ops.rounding import (
    E4M3_LARGEST,
    HALF_BITS,
    HALF_GRID,
    HALF_LARGEST,
    INT8_LARGEST,
    bits_at,
    spacing,
    stochastic_e4m3,
    stochastic_half,
    stochastic_int8,
)

HALF, E4M3, ROUNDS = torch.float16, torch.float8_e4m3fn, 5
PARTS = 15  # of a step, in which an error is kept: -7 to 7 of them reach from the middle of a step to the other


@dataclass(frozen=True, kw_only=True)
class Kind:
    codes: torch.dtype
    largest: float = 0.0
    blocks: bool = False  # with a float32 scale for each
    stochastic: bool = False
    feedback: bool = False


KINDS = {
    "fp32": Kind(codes=torch.float32),
    "fp16": Kind(codes=HALF, largest=HALF_LARGEST),
    "fp16_sr": Kind(codes=HALF, largest=HALF_LARGEST, stochastic=True),
    "fp16_ef": Kind(codes=HALF, largest=HALF_LARGEST, feedback=True),
    "bf16": Kind(codes=torch.bfloat16, largest=torch.finfo(torch.bfloat16).max),
    "int8": Kind(codes=torch.int8, largest=INT8_LARGEST, blocks=True),
    "int8_sr": Kind(codes=torch.int8, largest=INT8_LARGEST, blocks=True, stochastic=True),
    "int8_ef": Kind(codes=torch.int8, largest=INT8_LARGEST, blocks=True, feedback=True),
    "fp8": Kind(codes=E4M3, largest=E4M3_LARGEST, blocks=True),
    "fp8_sr": Kind(codes=E4M3, largest=E4M3_LARGEST, blocks=True, stochastic=True),
}


@dataclass(frozen=True, kw_only=True)
class StateFormat:
    """A format by name, and the seed of its random bits (formats without any do not look at it)."""

    name: str = "fp32"
    seed: int = 0

    def __post_init__(self):
        near = difflib.get_close_matches(self.name, KINDS, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(KINDS)}"
        require(self.name in KINDS, "state format", f"there is none called {self.name!r}", hint)
        clash = f"its seed is {self.seed!r}"
        require(0 <= self.seed < 1 << 64, f"state format {self.name}", clash, "choose a seed in [0, 2^64)")

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]

    @property
    def lossless(self) -> bool:
        return self.name == "fp32"


EXACT = StateFormat()


@dataclass(frozen=True, kw_only=True, eq=False)
class Stored:
    """The states of B rows in a format. `error` holds two 4-bit numbers to a byte along N, the even one low."""

    format: str
    codes_BHPN: Tensor
    scale_BHP: Tensor | None = None
    error: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(part for part in (self.codes_BHPN, self.scale_BHP, self.error) if part is not None)

    @property
    def bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self.tensors)

    def rows(self, index: Tensor) -> Stored:
        """Some rows only, in the given order; a row may be taken several times."""
        scale, error = (None if part is None else part[index] for part in (self.scale_BHP, self.error))
        return Stored(format=self.format, codes_BHPN=self.codes_BHPN[index], scale_BHP=scale, error=error)


def encode(state_BHPN: Tensor, format: StateFormat, *, layer: int, position_B: Tensor) -> Stored:
    """A state as it is stored after the token at `position_B` of each row's document; one number may serve all rows.

    Numbers that are not finite come back as NaN or infinity; with blocks, as a block of NaN. ValueError where a
    gradient is to flow through the state: codes pass none on.
    """
    kind = format.kind
    if format.lossless:
        return Stored(format=format.name, codes_BHPN=state_BHPN)
    check(state_BHPN, format, position_B)
    x = state_BHPN.detach().float()
    scale_BHP = block_scale(x, kind.largest) if kind.blocks else None
    y = x if scale_BHP is None else x / scale_BHP[..., None]
    if kind.stochastic:
        size = y.shape[1:].numel()
        bits = bits_at(position_B.to(y.device), size, seed=format.seed, stream=layer, rounds=ROUNDS)
        codes = stochastic(y, kind.codes, bits.view(len(position_B), *y.shape[1:]))
    else:
        codes = nearest(y, kind)
    error = error_codes(y, codes) if kind.feedback else None
    return Stored(format=format.name, codes_BHPN=codes, scale_BHP=scale_BHP, error=error)


def decode(stored: Stored) -> Tensor:
    """The states in float32 (what was stored as `fp32`: the very tensor)."""
    codes_BHPN = stored.codes_BHPN
    if stored.format == "fp32":
        return codes_BHPN
    y = codes_BHPN.float()
    if stored.error is not None:
        y = y + (unpack(stored.error)[..., : y.shape[-1]].float() - 8) * (step_of(codes_BHPN) / PARTS)
    return y if stored.scale_BHP is None else y * stored.scale_BHP[..., None]


def check(state_BHPN: Tensor, format: StateFormat, position_B: Tensor) -> None:
    asked, shape = f"state in {format.name}", tuple(state_BHPN.shape)
    fits = state_BHPN.ndim == 4 and state_BHPN.is_floating_point()
    require(fits, asked, f"it is {state_BHPN.dtype} of shape {shape}", "hand over floats of shape (B, H, P, N)")
    one_each = position_B.shape in ((1,), shape[:1])
    clash = f"positions of shape {tuple(position_B.shape)} for {shape[0]} rows"
    require(one_each, asked, clash, "give one position, or one for each row")
    wanted = torch.is_grad_enabled() and state_BHPN.requires_grad
    require(not wanted, asked, "it has a gradient, which codes do not pass on", "use fp32, or torch.no_grad()")


def block_scale(x: Tensor, largest: float) -> Tensor:
    """1 for a block of zeros, and for one so small that its scale would be zero."""
    scale = x.abs().amax(-1) / largest
    return torch.where(scale == 0, 1.0, scale)


def nearest(y: Tensor, kind: Kind) -> Tensor:
    held = y.clamp(-kind.largest, kind.largest)
    if kind.codes == torch.int8:
        return held.round_().nan_to_num_(0).to(torch.int8)
    return torch.where(y.isinf(), y, held).to(kind.codes)


def stochastic(y: Tensor, codes: torch.dtype, bits: Tensor) -> Tensor:
    if codes == HALF:
        return stochastic_half(y, bits & (1 << HALF_BITS) - 1)
    return stochastic_int8(y, bits) if codes == torch.int8 else stochastic_e4m3(y, bits)


# ----- error feedback ------------------------------------------------------------------------------------------------


def step_of(codes: Tensor) -> Tensor | float:
    """The distance of a code to its neighbours."""
    return spacing(codes.float().abs(), HALF_GRID) if codes.dtype == HALF else 1.0


def error_codes(y: Tensor, codes: Tensor) -> Tensor:
    """What rounding took away, from -7 to 7 fifteenths of a step, each plus 8; two to a byte."""
    parts = ((y - codes.float()) * PARTS / step_of(codes)).nan_to_num(0, 0, 0)
    nibbles = (parts.round().clamp(-7, 7) + 8).to(torch.uint8)
    return pack(torch.nn.functional.pad(nibbles, (0, nibbles.shape[-1] % 2)))
