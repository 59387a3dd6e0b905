"""Matrices in few bits as a model holds them: put in, found again, turned back into numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from nautilus.config import Config
from nautilus.model.attention import AttentionMixer
from nautilus.model.layout import Slot, role
from nautilus.model.linear import Matrix
from nautilus.model.moe import ExpertWeights
from nautilus.model.quantised import ALGORITHMS, UNNAMED, Quantisation
from nautilus.ops.formats import Packed
from nautilus.runtime import UserError


class Modules(Protocol):
    def named_modules(self) -> Iterator[tuple[str, Any]]: ...


class Model(Modules, Protocol):
    """A Language, which the files below it do not import."""

    config: Config
    quantised: Quantisation | None

    def state_dict(self) -> dict[str, Any]: ...


class Held(NamedTuple):
    matrix: Packed | Tensor
    input_scale: Tensor | None = None


Place = tuple[str, int | None]  # a parameter of the model, and which expert's matrix of a stack
REPEATED: Place = ("lm_head.weight", None)  # where the embedding is the head, a file may hold it under this name too


def put(model: nn.Module, held: Mapping[Place, Held]) -> None:
    """Give the model its matrices. Experts' of one stack come together, those that stayed numbers among them."""
    stacks: dict[str, dict[int, Held]] = {}
    for (parameter, expert), one in held.items():
        if expert is not None:
            stacks.setdefault(parameter, {})[expert] = one
            continue
        module = model.get_submodule(parameter.removesuffix(".weight"))
        assert isinstance(module, Matrix) and isinstance(one.matrix, Packed)
        module.hold(one.matrix, one.input_scale)
    for parameter, experts in stacks.items():
        owner, _, name = parameter.rpartition(".")
        weights, ordered = model.get_submodule(owner), [experts[e] for e in range(len(experts))]
        assert isinstance(weights, ExpertWeights)
        weights.hold(name, tuple(one.matrix for one in ordered), tuple(one.input_scale for one in ordered))


def put_scale(model: nn.Module, mixer: str, part: str, value: float) -> None:
    """part: k_scale or v_scale. ValueError for a value that is no scale."""
    if not 0 < value < math.inf:
        raise ValueError(f"it is {value}, which is no scale; calibrate the cache again, or remove the tensor")
    module = model.get_submodule(mixer)
    assert isinstance(module, AttentionMixer)
    if part == "k_scale":
        module.k_scale = value
    else:
        module.v_scale = value


def held_by(model: Modules) -> dict[Place, Held]:
    """Every matrix in few bits, and the numbers beside them in their stacks."""
    held: dict[Place, Held] = {}
    for name, module in model.named_modules():
        if isinstance(module, Matrix) and isinstance(module.weight, Packed):
            held[f"{name}.weight", None] = Held(module.weight, module.input_scale)
        elif isinstance(module, ExpertWeights):
            for part, scales in module.input_scales.items():
                for expert, (matrix, scale) in enumerate(zip(getattr(module, part), scales, strict=True)):
                    held[f"{name}.{part}", expert] = Held(matrix, scale)
    return held


def formats_of(held: Mapping[Place, Held]) -> list[str]:
    return sorted({one.matrix.format for one in held.values() if isinstance(one.matrix, Packed)})


def decode_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Turn every matrix in few bits into a parameter with its numbers; after that the model is one like any other."""
    for module in model.modules():
        if isinstance(module, Matrix) and isinstance(module.weight, Packed):
            module.release(dtype)
        elif isinstance(module, ExpertWeights):
            for part in tuple(module.input_scales):
                module.release(part, dtype)


def refuse_training(model: Modules) -> None:
    """UserError where weights are in few bits: the parameters that are left would be trained alone, without a word."""
    if held := held_by(model):
        raise UserError(
            f"{len(held):,} matrices of the model are in {' and '.join(formats_of(held))}, which cannot be trained;"
            f" train the BF16 checkpoint, or first call decode_weights(model, torch.float32) of nautilus.model.held"
        )


# ----- what a folder is to say of it ---------------------------------------------------------------------------------


def algorithm_of(one: Held) -> str:
    """What ModelOpt calls it; UserError for a format that it does not have."""
    assert isinstance(one.matrix, Packed)
    if one.matrix.format == "nvfp4":
        return "W4A16_NVFP4" if one.input_scale is None else "NVFP4"
    kind = one.matrix.format, one.matrix.tile
    names = [name for name, known in ALGORITHMS.items() if kind[0] == known.format and kind[1] in known.tiles]
    if not names:
        raise UserError(f"{kind[0]} with a scale for each {kind[1]} has no name in files; use fp8_e4m3 or nvfp4")
    return names[0]


def quantisation_of(model: Model, slots: Mapping[str, Slot], held: Mapping[Place, Held]) -> Quantisation:
    """Of the model under the names of these slots: as it was read where that is still true."""
    read = model.quantised or Quantisation(schemes={})
    schemes: dict[str, str | None] = {}
    for name, slot in slots.items():
        module, one = name.removesuffix(".weight"), held.get((slot.parameter, slot.expert))
        if one is not None and isinstance(one.matrix, Packed):
            before = read.schemes.get(module)
            same = before is not None and ALGORITHMS[before].format == one.matrix.format
            schemes[module] = before if same else algorithm_of(one)
        elif module != name and len(slot.shape) == 2 and not role(slot.parameter, model.config).endswith(UNNAMED):
            schemes[module] = None
    return dataclasses.replace(read, schemes=schemes)


def scales_of_cache(model: Model, slots: Mapping[str, Slot]) -> dict[str, Tensor]:
    """Those that the model was read with, by their names in files."""
    kept = () if model.quantised is None else model.quantised.kv_scales
    mixers, stored = dict(model.named_modules()), {}
    for name, slot in slots.items():
        owner, _, projection = slot.parameter.removesuffix(".weight").rpartition(".")
        if owner in kept and projection in ("k_proj", "v_proj"):
            scale = mixers[owner].k_scale if projection == "k_proj" else mixers[owner].v_scale
            stored[f"{name.removesuffix('.weight')}.{projection[0]}_scale"] = torch.tensor(scale, dtype=torch.float32)
    return stored
