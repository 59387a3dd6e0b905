"""One frozen record per layer. A model is a tuple of these; a pattern such as `MEM*E` is shorthand for such a tuple.

    letter  record     what the layer's mixer is
    M       Mamba      Mamba-2 (SSD) mixer
    *       Attention  causal grouped attention
    E       Experts    routed experts with an optional shared expert, at full or latent width
    -       Mlp        one dense two-layer perceptron
    L       Linear     one square matrix (architecture search puts it where attention was)
    _       Nothing    adds nothing to the residual; holds no weights and no cache slot

Every size is the layer's own, so that pruned and searched models are ordinary models.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

MOST_LAYERS = 10_000  # of a model; the deepest ones have a few hundred


def require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary position embedding with the frequency rescaling of Llama 3.

    factor = 1 switches the rescaling off. Wavelengths beyond original/low are stretched by `factor`, those below
    original/high are kept, those between are interpolated (Llama 3 report, arXiv 2407.21783, and its released code).
    """

    theta: float = 10000.0
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original: int = 8192

    def __post_init__(self):
        require(self.theta > 1, f"rotary.theta={self.theta} must be above 1")
        require(self.factor >= 1, f"rotary.factor={self.factor} must be at least 1")
        require(self.high > self.low, f"rotary.high={self.high} must be above rotary.low={self.low}")


@dataclass(frozen=True, kw_only=True)
class Mamba:
    letter: ClassVar[str] = "M"
    heads: int
    head_width: int = 64
    state: int = 128
    groups: int = 8
    taps: int = 4
    chunk: int = 128

    def __post_init__(self):
        positive(self, "heads", "head_width", "state", "groups", "taps", "chunk")
        divides("mamba.groups", self.groups, "mamba.heads", self.heads)

    @property
    def inner(self) -> int:
        """Width of x, z and y: heads times head width, whatever the model's width is."""
        return self.heads * self.head_width

    @property
    def conv_width(self) -> int:
        """Channels that pass the convolution: x, B and C."""
        return self.inner + 2 * self.groups * self.state


@dataclass(frozen=True, kw_only=True)
class Attention:
    letter: ClassVar[str] = "*"
    heads: int
    groups: int
    head_width: int = 128
    rotary: Rotary | None = None
    window: int = 0
    head_norm: bool = False

    def __post_init__(self):
        positive(self, "heads", "groups", "head_width")
        divides("attention.groups", self.groups, "attention.heads", self.heads)
        require(self.window >= 0, f"attention.window={self.window} must be 0 (no window) or positive")
        require(
            self.rotary is None or self.head_width % 2 == 0,
            f"attention.head_width={self.head_width} must be even for rotary positions",
        )


@dataclass(frozen=True, kw_only=True)
class Experts:
    letter: ClassVar[str] = "E"
    experts: int
    active: int
    hidden: int
    shared: int = 0
    latent: int = 0
    gated: bool = False
    scale: float = 1.0
    score: str = "sigmoid"
    normalise: bool = True
    expert_groups: int = 1
    active_groups: int = 1

    def __post_init__(self):
        positive(self, "experts", "hidden", "expert_groups")
        require(
            1 <= self.active <= self.experts,
            f"experts.active={self.active} must lie in 1..experts.experts={self.experts}",
        )
        require(min(self.shared, self.latent) >= 0, "experts.shared and experts.latent must be 0 (absent) or positive")
        require(self.score in ("sigmoid", "softmax"), f"experts.score={self.score!r:.80} must be sigmoid or softmax")
        divides("experts.expert_groups", self.expert_groups, "experts.experts", self.experts)
        require(
            1 <= self.active_groups <= self.expert_groups,
            f"experts.active_groups={self.active_groups} must lie in 1..experts.expert_groups={self.expert_groups}",
        )
        reachable = self.active_groups * (self.experts // self.expert_groups)
        require(
            self.active <= reachable,
            f"experts.active={self.active} exceeds the {reachable} experts of {self.active_groups} active groups",
        )


@dataclass(frozen=True, kw_only=True)
class Mlp:
    letter: ClassVar[str] = "-"
    hidden: int
    gated: bool = False

    def __post_init__(self):
        positive(self, "hidden")


@dataclass(frozen=True, kw_only=True)
class Linear:
    letter: ClassVar[str] = "L"


@dataclass(frozen=True, kw_only=True)
class Nothing:
    letter: ClassVar[str] = "_"


Layer = Mamba | Attention | Experts | Mlp | Linear | Nothing
KINDS: dict[str, type[Layer]] = {kind.letter: kind for kind in (Mamba, Attention, Experts, Mlp, Linear, Nothing)}


def positive(record: object, *names: str) -> None:
    for name in names:
        value = getattr(record, name)
        require(value >= 1, f"{type(record).__name__.lower()}.{name}={value} must be at least 1")


def divides(small_name: str, small: int, large_name: str, large: int) -> None:
    require(large % small == 0, f"{small_name}={small} must divide {large_name}={large}")


def lay(pattern: str, *records: Layer) -> tuple[Layer, ...]:
    """The tuple of layers that `pattern` spells, each letter standing for the one of `records` of that kind.

    >>> [layer.letter for layer in lay("ME", Mamba(heads=8), Experts(experts=8, active=2, hidden=64))]
    ['M', 'E']
    """
    by_letter: dict[str, Layer] = {"L": Linear(), "_": Nothing()}
    by_letter |= {record.letter: record for record in records}
    for position, letter in enumerate(pattern):
        require(
            letter in KINDS,
            f"layer pattern {pattern!r} has {letter!r} at position {position}; known letters are {' '.join(KINDS)}",
        )
        require(
            letter in by_letter,
            f"layer pattern {pattern!r} asks for {letter!r} ({KINDS[letter].__name__}) but no such layer's sizes are "
            f"known here; start from a preset that has one",
        )
    return tuple(by_letter[letter] for letter in pattern)


def pattern_of(layers: tuple[Layer, ...]) -> str:
    return "".join(layer.letter for layer in layers)


def describe(layer: Layer) -> str:
    """The record as one short string, defaults left out: `E(experts=8, active=2, hidden=64)`."""
    shown = [
        f"{field.name}={getattr(layer, field.name)!r}"
        for field in dataclasses.fields(layer)
        if getattr(layer, field.name) != field.default
    ]
    return f"{layer.letter}({', '.join(shown)})"
