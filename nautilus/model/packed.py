"""Which tensors of a folder are matrices in few bits, and whether they are what it says: from headers and scales alone.

A matrix stays where its file has it: it is mapped, and none of its codes is read before it is used.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from nautilus.config import Config
from nautilus.model.held import REPEATED, Held, Place, algorithm_of
from nautilus.model.layout import Slot, role
from nautilus.model.quantised import ALGORITHMS, NEVER, OWN_FILE, UNNAMED, WITH_INPUTS, Declaration, Quantisation
from nautilus.model.shards import Stored, read_tensors
from nautilus.ops.formats import FORMATS, Packed, from_compressed_tensors, from_modelopt

log = logging.getLogger("nautilus.model")

# As safetensors spells types, and what they are here. E8M0 scales are bytes; float scales of fewer bits become float32.
CODES = {"U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, "F8_E4M3": torch.float8_e4m3fn}
SCALES = {"F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8, "F8_E8M0": torch.uint8}
SCALES |= dict.fromkeys(("F32", "BF16", "F16"), torch.float32)
ONE_NUMBER = ("weight_scale_2", "weight_global_scale", "input_scale", "input_global_scale")
PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", *ONE_NUMBER)
STRANGE = {
    "pre_quant_scale": "AWQ and SmoothQuant scale what a matrix is given",
    "svdquant_lora_a": "SVDQuant adds a low-rank branch",
    "svdquant_lora_b": "SVDQuant adds a low-rank branch",
    "weight_scale_inv": "it has a scale for each block of 128x128",
    "weight_g_idx": "its groups are not neighbours",
    **dict.fromkeys(("qweight", "qzeros", "scales", "g_idx"), "GPTQ and AWQ pack integers in orders of their own"),
    **dict.fromkeys(("input_zero_point", "output_scale", "q_scale"), "nothing here computes with it"),
}


@dataclass(frozen=True, kw_only=True)
class Contents:
    """The tensors of a folder by what they are for, and what it says of them. Names as in its files."""

    folder: Path
    config: Config
    slots: Mapping[str, Slot]
    declared: list[Declaration]
    modules: dict[str, dict[str, Stored]] = field(default_factory=dict)  # in few bits: module → part → tensor
    kv_scales: dict[str, Stored] = field(default_factory=dict)
    plain: dict[str, Stored] = field(default_factory=dict)

    @property
    def plain_slots(self) -> dict[str, Slot]:
        return {name: slot for name, slot in self.slots.items() if name.removesuffix(".weight") not in self.modules}

    def matrices(self) -> Iterator[tuple[str, str]]:
        """Every module with a weight of two axes that the folder holds, and its role."""
        for name, slot in self.slots.items():
            module = name.removesuffix(".weight")
            if module != name and len(slot.shape) == 2 and (name in self.plain or module in self.modules):
                yield module, role(slot.parameter, self.config).removeprefix("mtp.")

    def formats(self) -> Iterator[tuple[str, str, int]]:
        """(role, format, bytes) of every weight; one in few bits with its scales."""
        for module, parts in self.modules.items():
            said = next((algorithm for d in self.declared if (algorithm := d.algorithm(module)[0])), None)
            kind = role(self.slots[f"{module}.weight"].parameter, self.config)
            yield kind, said or format_of(parts) or "unknown", sum(where.bytes for where in parts.values())
        for name, where in self.plain.items():
            kind = role(self.slots[name].parameter, self.config) if name in self.slots else "unknown"
            yield kind, where.dtype, where.bytes
        for where in self.kv_scales.values():
            yield "attention.cache_scale", where.dtype, where.bytes


def sort_tensors(
    folder: Path, config: Config, slots: Mapping[str, Slot], declared: list[Declaration], stored: Mapping[str, Stored]
) -> Contents:
    found = Contents(folder=folder, config=config, slots=slots, declared=declared)
    for name, where in stored.items():
        module, _, part = name.rpartition(".")
        codes = part in PARTS or part in STRANGE or (part == "weight" and where.dtype in CODES)
        if part in ("k_scale", "v_scale") and mixer_of(name, slots):
            found.kv_scales[name] = where
        elif codes and f"{module}.weight" in slots:
            found.modules.setdefault(module, {})[part] = where
        else:
            found.plain[name] = where
    for module, parts in found.modules.items():
        if f"{module}.weight" in found.plain:
            parts["weight"] = found.plain.pop(f"{module}.weight")
    return found


def mixer_of(scale: str, slots: Mapping[str, Slot]) -> str | None:
    """The attention mixer that `…mixer.k_proj.k_scale` or `…mixer.k_scale` is about, as the model names it."""
    module, _, part = scale.rpartition(".")
    projection = f"{part[0]}_proj"
    slot = slots.get(f"{module.removesuffix(f'.{projection}')}.{projection}.weight")
    return None if slot is None else slot.parameter.removesuffix(f".{projection}.weight")


# ----- what headers show ---------------------------------------------------------------------------------------------


def faults(found: Contents) -> Iterator[str]:
    """What is wrong with matrices in few bits, a line for each."""
    for module, parts in found.modules.items():
        slot = found.slots[f"{module}.weight"]
        if fault := fault_of(parts, slot, role(slot.parameter, found.config).removeprefix("mtp.")):
            yield f"{module} in {next(iter(parts.values())).file.name}: {fault}"
    for name, where in found.kv_scales.items():
        if where.dtype not in ("F32", "BF16") or math.prod(where.shape) != 1:
            yield f"{name} in {where.file.name}: it is {spelled(where)}, not one F32 number"


def fault_of(parts: Mapping[str, Stored], slot: Slot, kind: str) -> str | None:
    if strange := [part for part in STRANGE if part in parts]:
        return f"{strange[0]} cannot be read: {STRANGE[strange[0]]}"
    name = "weight_packed" if "weight_packed" in parts else "weight"
    if name not in parts or ("weight" in parts and name != "weight"):
        return f"it has {', '.join(sorted(parts))}; one of weight and weight_packed must be there"
    codes, companions = parts[name], {part: where for part, where in parts.items() if part != name}
    if codes.dtype not in CODES:
        return f"{', '.join(sorted(companions))} beside a weight in {codes.dtype}"
    if kind in NEVER or len(slot.shape) != 2:
        return f"the weight of {kind} is {codes.dtype}; it can be BF16, F16 or F32 only"
    if "weight_scale" not in parts:
        return f"its {name} is {codes.dtype}, and its weight_scale is missing"
    if format_of(parts) is None:
        return f"codes in {codes.dtype} with scales in {parts['weight_scale'].dtype} are no known format"
    shape = slot.shape[0], math.ceil(slot.shape[1] / {"U8": 2, "I32": 8}.get(codes.dtype, 1))
    if codes.shape != shape:
        return f"{name} is {spelled(codes)}, config.json asks for {list(shape)}"
    return next(filter(None, map(fault_of_companion, companions, companions.values())), None)


def fault_of_companion(part: str, where: Stored) -> str | None:
    if part in ONE_NUMBER:
        fits, asked = where.dtype in ("F32", "BF16") and math.prod(where.shape) == 1, "one F32 number"
    elif part == "weight_shape":
        fits, asked = where.dtype in ("I64", "I32") and where.shape == (2,), "two whole numbers"
    elif part == "weight_zero_point":
        fits, asked = where.dtype == "I32" and len(where.shape) == 2, "a matrix of I32"
    else:
        fits, asked = len(where.shape) <= 2, "a matrix of scales"
    return None if fits else f"{part} is {spelled(where)}, not {asked}"


def spelled(where: Stored) -> str:
    return f"{where.dtype} {list(where.shape)}"


def format_of(parts: Mapping[str, Stored]) -> str | None:
    """The number format, by the types of codes and scales."""
    codes, scale = parts.get("weight_packed", parts.get("weight")), parts.get("weight_scale")
    if codes is None or scale is None:
        return None
    if codes.dtype == "I32":
        return "int4"
    types = CODES.get(codes.dtype), SCALES.get(scale.dtype)
    return next((name for name, kind in FORMATS.items() if name != "int4" and (kind.codes, kind.scale) == types), None)


def clashes(found: Contents) -> Iterator[str]:
    """Modules that are not what the folder says they are, a line for each."""
    for module, kind in found.matrices() if found.declared else ():
        format = format_of(found.modules[module]) if module in found.modules else None
        # Exporters copy the prediction block without looking at it, nor do they look at routers and embeddings.
        unnamed = kind in UNNAMED or module.startswith("mtp.")
        for declaration in found.declared:
            algorithm, by_name = declaration.algorithm(module)
            wanted = None if algorithm is None else ALGORITHMS[algorithm].format
            if format != wanted and (by_name or format or not unnamed):
                said, held = algorithm or "not quantised", format or found.plain[f"{module}.weight"].dtype
                yield f"{module}: {declaration.file.name} says {said}, the file holds {held}"


# ----- what scales show ----------------------------------------------------------------------------------------------


def read_modules(found: Contents, device) -> tuple[dict[Place, Held], dict[str, str], list[str]]:
    """What each place in the model holds, the algorithm of each module, and what is wrong, a line for each."""
    wanted = {f"{module}.{part}": where for module, parts in found.modules.items() for part, where in parts.items()}
    scales = lambda name: not name.endswith((".weight", ".weight_packed"))
    tensors = {name: tensor.to(device) for name, tensor in read_tensors(wanted, scales)}
    held, schemes, wrong = {}, {}, []
    for module, parts in found.modules.items():
        slot = found.slots[f"{module}.weight"]
        try:
            one = read_module({part: tensors[f"{module}.{part}"] for part in parts})
            schemes[module] = scheme_of(module, one, found.declared)
            if one.matrix.shape != slot.shape:
                raise ValueError(f"it is {list(one.matrix.shape)}, config.json asks for {list(slot.shape)}")
            held[REPEATED if found.config.tied and module == "lm_head" else (slot.parameter, slot.expert)] = one
        except ValueError as bad:
            wrong.append(f"{module} in {next(iter(parts.values())).file.name}: {bad}")
    return held, schemes, wrong


def read_module(tensors: dict[str, Tensor]) -> Held:
    """ValueError where the parts do not belong together, or hold what no scale can be."""
    e8m0 = torch.float8_e8m0fnu
    tensors = {part: t.view(torch.uint8) if t.dtype == e8m0 else t for part, t in tensors.items()}
    compressed = {"weight_packed", "weight_global_scale", "input_global_scale"} & tensors.keys()
    packed = (from_compressed_tensors if compressed else from_modelopt)(tensors)
    scale = tensors.get("input_scale")
    if "input_global_scale" in tensors:  # the reciprocal, as the weight's is
        scale = tensors["input_global_scale"].float().reciprocal()
    if scale is not None and not (scale.isfinite().all() and (scale >= 0).all()):
        raise ValueError(f"its input scale is {scale.item()}, which is none; quantise the model again")
    return Held(packed, scale)


def scheme_of(module: str, one: Held, declared: list[Declaration]) -> str:
    """The algorithm by the description, which must fit in what shares a scale too; else by what is held."""
    assert isinstance(one.matrix, Packed)
    said = [algorithm for d in declared if (algorithm := d.algorithm(module)[0]) is not None]
    for algorithm in said:
        tiles, tile = ALGORITHMS[algorithm].tiles, one.matrix.tile
        if tile not in tiles and one.matrix.scale.numel() > 1:
            raise ValueError(f"it is said to be {algorithm}, but has a scale for each {tile}, not {' or '.join(tiles)}")
    return said[0] if said else algorithm_of(one)


def record(found: Contents, schemes: Mapping[str, str]) -> Quantisation | None:
    """What the model was quantised to; what is odd about it goes to the log."""
    if not found.declared and not found.modules:
        return None
    folder, declared = found.folder, found.declared
    kv_cache = next((d.kv_cache for d in declared if d.kv_cache), None)
    if not declared:
        log.warning("%s holds quantised weights but no %s, which would say which", folder, OWN_FILE)
    if kv_cache and not found.kv_scales:
        log.info("%s is meant for keys and values in %s, but has no scales for them: they are 1.0", folder, kv_cache)
    static = [module for module, algorithm in schemes.items() if algorithm in WITH_INPUTS]
    if bare := [m for m in static if not {"input_scale", "input_global_scale"} & found.modules[m].keys()]:
        log.warning("%s: %d matrices were not calibrated and have no input scale: %s", folder, len(bare), bare[:5])
    names = [module for module, kind in found.matrices() if module in schemes or kind not in UNNAMED]
    return Quantisation(
        schemes={module: schemes.get(module) for module in names},
        producer=next((d.producer for d in declared), ""),
        kv_cache=kv_cache,
        kv_scales=tuple(dict.fromkeys(mixer_of(name, found.slots) or "" for name in found.kv_scales)),
    )
