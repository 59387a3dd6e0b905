"""What a model is, before any tensor exists."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from nautilus.config.keys import real, short, switch, token_ids, whole
from nautilus.config.layer import (
    KINDS,
    MOST_LAYERS,
    Attention,
    Experts,
    Layer,
    Linear,
    Mamba,
    Mlp,
    Nothing,
    Rotary,
    pattern_of,
    require,
)
from nautilus.config.override import setting


@dataclass(frozen=True, kw_only=True)
class Config:
    """A stack of layers between an embedding and a head.

    `mtp` holds the layers of the one multi-token-prediction block (empty: none); training and drafting apply the same
    block several times over. `init_std` = 0 means 0.9 / sqrt(width), which reproduces the published values.
    """

    vocab: int = dataclasses.field(metadata={"help": "different tokens"})
    width: int = dataclasses.field(metadata={"help": "of what passes from layer to layer"})
    layers: tuple[Layer, ...] = dataclasses.field(metadata={"help": "M Mamba-2, * attention, E experts, - MLP: MEM*E"})
    mtp: tuple[Layer, ...] = setting((), "layers of the block that predicts further ahead")
    tied: bool = setting(False, "the head is the embedding")
    norm_eps: float = setting(1e-5, "below the root of every norm")
    init_std: float = setting(0.0, "spread of new weights, 0: 0.9 / sqrt(width)")
    positions: int = setting(262144, "most tokens of a text")
    bos: int = setting(1, "the token that texts begin with")
    eos: tuple[int, ...] = setting((2,), "tokens that end a text")
    pad: int = setting(0, "the token that fills rows up")

    def __post_init__(self):
        require(self.vocab >= 1 and self.width >= 1, f"vocab={self.vocab} and width={self.width} must be positive")
        require(len(self.layers) > 0, "layers is empty; a model needs at least one layer")
        depth = len(self.layers) + len(self.mtp)
        require(depth <= MOST_LAYERS, f"layers and mtp hold {depth:,} layers; at most {MOST_LAYERS:,} can be built")
        require(self.positions >= 1, f"positions={self.positions} must be at least 1")
        require(self.norm_eps > 0, f"norm_eps={self.norm_eps} must be positive")
        require(self.init_std >= 0, f"init_std={self.init_std} must be 0 (0.9/sqrt(width)) or positive")
        strange = [layer for layer in self.mtp if not isinstance(layer, (Attention, Experts))]
        require(not strange, f"mtp={pattern_of(self.mtp)!r} may hold only attention (*) and experts (E)")

    @property
    def pattern(self) -> str:
        return pattern_of(self.layers)

    @property
    def std(self) -> float:
        """Standard deviation of the initial weights."""
        return self.init_std or 0.9 / self.width**0.5

    @property
    def fingerprint(self) -> str:
        """Short hash of every setting; equal exactly when the configs are equal."""
        return hashlib.sha256(json.dumps(to_dict(self), sort_keys=True).encode()).hexdigest()[:12]


def to_dict(value) -> Any:
    """Plain JSON values for a (nested) settings record; layers carry their letter."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        letter = {"kind": value.letter} if isinstance(value, tuple(KINDS.values())) else {}
        return letter | {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [to_dict(item) for item in value]
    return value


def from_dict(values: dict) -> Config:
    """The inverse of `to_dict` for a Config. Unknown and missing names are a ValueError."""
    values = dict(values)
    for name in ("layers", "mtp"):
        values[name] = tuple(layer_from_dict(item) for item in values.get(name, ()))
    values["eos"] = token_ids({"eos_token_id": values.get("eos", [2])})
    return build(Config, values)


def layer_from_dict(values: dict) -> Layer:
    values = dict(values)
    letter = values.pop("kind", None)
    require(
        letter in KINDS, f"layer record {short(values)} has kind {short(letter)}; known kinds are {' '.join(KINDS)}"
    )
    if values.get("rotary") is not None:
        values["rotary"] = build(Rotary, values["rotary"])
    return build(KINDS[letter], values)


READERS = {"int": whole, "float": real, "bool": switch}


def build(kind: type, values: dict):
    known = {field.name for field in dataclasses.fields(kind)}
    unknown = sorted(set(values) - known)
    require(
        not unknown,
        f"{kind.__name__} has no setting {', '.join(map(str, unknown))[:80]}; it has {', '.join(sorted(known))}",
    )
    for field in dataclasses.fields(kind):
        if field.name in values and (read := READERS.get(str(field.type))):
            read(values, field.name, None)
    try:
        return kind(**values)
    except TypeError as bad:
        raise ValueError(f"{kind.__name__} cannot be built from {short(values)}: {bad}") from bad


def weight_count(config: Config) -> dict[str, int]:
    """Number of stored elements (load-balancing biases included) as {'main', 'mtp', 'active'}.

    `active` counts what one token multiplies with in the main stack: the active experts only, the head but not the
    embedding (architecture table of the three reports, arXiv 2512.20848, 2604.12374, 2606.15007).
    """
    width = config.width
    main = sum(layer_weights(layer, width) for layer in config.layers)
    main += width + config.vocab * width * (1 if config.tied else 2)
    mtp = 0
    if config.mtp:
        mtp = sum(layer_weights(layer, width) for layer in config.mtp) + 3 * width + 2 * width * width
    idle = sum(idle_weights(layer, width) for layer in config.layers)
    return {"main": main, "mtp": mtp, "active": main - idle - (0 if config.tied else config.vocab * width)}


def layer_weights(layer: Layer, width: int) -> int:
    """Stored elements of one mixer and of the norm before it; a layer that adds nothing has neither."""
    return 0 if isinstance(layer, Nothing) else width + mixer_weights(layer, width)


def mixer_weights(layer: Layer, width: int) -> int:
    match layer:
        case Mamba():
            rows = layer.inner + layer.conv_width + layer.heads
            return rows * width + layer.conv_width * (layer.taps + 1) + 3 * layer.heads + layer.inner * (1 + width)
        case Attention():
            norms = 2 * layer.head_width if layer.head_norm else 0
            return 2 * (layer.heads + layer.groups) * layer.head_width * width + norms
        case Experts():
            matrices = 3 if layer.gated else 2
            latent = 2 * layer.latent * width
            routed = layer.experts * matrices * layer.hidden * (layer.latent or width)
            # Only sigmoid routers have a load-balancing bias.
            router = layer.experts * (width + (layer.score == "sigmoid"))
            return router + routed + matrices * layer.shared * width + latent
        case Mlp():
            return (3 if layer.gated else 2) * layer.hidden * width
        case Linear():
            return width * width
    return 0


def idle_weights(layer: Layer, width: int) -> int:
    """Elements of the experts that one token does not visit."""
    if not isinstance(layer, Experts):
        return 0
    matrices = 3 if layer.gated else 2
    return (layer.experts - layer.active) * matrices * layer.hidden * (layer.latent or width)
