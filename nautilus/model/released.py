"""What the released quantised checkpoints hold, tensor by tensor, from a Config and a table of rules.

A rule gives modules of a role an algorithm, everywhere or in some layers; the first that fits decides, and modules that
none fits stay in BF16. For Nano and Super in NVFP4 the number of tensors and of bytes is that of the files. The others
have not been seen: their rules follow the model cards, the technical reports and the recipes of ModelOpt.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from nautilus.config import Attention, Config
from nautilus.model.layout import ALWAYS_FLOAT32, Shape, Slot, role, written_slots
from nautilus.model.quantised import UNNAMED, Quantisation
from nautilus.model.shards import TYPES
from nautilus.runtime import UserError

Entry = tuple[str, Shape]  # type as safetensors spells it, shape


class Rule(NamedTuple):
    algorithm: str
    roles: tuple[str, ...]
    layers: tuple[int, ...] | None = None  # None: all
    but: tuple[int, ...] = ()
    before_attention: bool = True  # also in layers whose next one is attention


@dataclass(frozen=True, kw_only=True)
class Scheme:
    rules: tuple[Rule, ...]
    producer: str = "modelopt"
    router: str = "BF16"
    kv_cache: str | None = "FP8"
    kv_scales: bool = True  # whether the file holds them; never for the prediction block
    in_config: bool = True  # whether config.json says it all again
    shards: int = 1


MAMBA = ("mamba.in_proj", "mamba.out_proj")
ROUTED = ("experts.up_proj", "experts.down_proj")
SHARED_UP, SHARED_DOWN = "experts.shared_experts.up_proj", "experts.shared_experts.down_proj"
EXPERTS = (*ROUTED, SHARED_UP, SHARED_DOWN)


def nano(algorithm: str) -> Scheme:
    """All but attention and the Mamba layer before each attention layer."""
    rules = Rule(algorithm, EXPERTS), Rule(algorithm, MAMBA, before_attention=False)
    old = {"producer": "modelopt 0.29.0", "router": "F32", "kv_scales": False, "in_config": False}
    return Scheme(rules=rules, shards=5, **old)


# What a search for the best mix of formats at 4.75 bits a weight found.
SUPER_IN = 0, 2, 4, 6, 9, 11, 13, 15, 18, 20, 27, 29, 31, 40, 49, 51, 53, 55, 57, 60, 62, 66, 68, 71, 73, 82, 84, 86
SUPER_OUT = (0, 2, 4, 9, 11, 13, 18, 38, 40, 42, 44, 49, 51, 53, 55, 57, 60, 62, 64, 66, 68, 71, 73, 75, 77, 80, 82, 84,
             86)  # fmt: skip
SUPER = (
    Rule("NVFP4", ROUTED),
    Rule("NVFP4", (SHARED_DOWN,), (1,)),
    Rule("FP8", (SHARED_DOWN,), but=(8, 76)),
    Rule("FP8", (SHARED_UP,), but=(41,)),
    Rule("FP8", ("experts.fc1_latent_proj",), (1, 3, 5)),
    Rule("FP8", ("experts.fc2_latent_proj",), (3,)),
    Rule("FP8", ("mamba.in_proj",), SUPER_IN),
    Rule("FP8", ("mamba.out_proj",), SUPER_OUT),
    Rule("FP8", ("attention.o_proj",), (69, 78)),
)
SCHEMES: dict[str, Scheme] = {
    "bf16": Scheme(rules=(), producer="", kv_cache=None, kv_scales=False, in_config=False),
    "nano_nvfp4": nano("NVFP4"),
    "nano_fp8": nano("FP8"),
    "super_nvfp4": Scheme(rules=SUPER, producer="modelopt 0.43.0", shards=17),
    "super_fp8": Scheme(rules=(Rule("FP8", (*EXPERTS, *MAMBA)),), shards=26),
    "ultra_nvfp4": Scheme(
        rules=(Rule("NVFP4", ROUTED), Rule("FP8", (SHARED_UP, SHARED_DOWN, *MAMBA))),
        shards=72,
    ),
    "lightning_nvfp4": Scheme(
        rules=(Rule("W4A16_NVFP4", (*EXPERTS, "lm_head")), Rule("FP8", MAMBA)),
        producer="modelopt 0.44.0rc5",
        shards=5,
    ),
}
NUMBER = re.compile(r"layers\.(\d+)\.")


def scheme_named(name: str) -> Scheme:
    if name not in SCHEMES:
        near = difflib.get_close_matches(name, SCHEMES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"have {', '.join(SCHEMES)}"
        raise UserError(f"no quantisation scheme {name!r}; {hint}")
    return SCHEMES[name]


def algorithm_for(slot: Slot, config: Config, scheme: Scheme) -> str | None:
    kind, found = role(slot.parameter, config), NUMBER.search(slot.parameter)
    layer = int(found[1]) if found else -1
    feeds = isinstance(next(iter(config.layers[layer + 1 :]), None), Attention) if layer >= 0 else False
    for rule in scheme.rules:
        here = layer not in rule.but and (rule.layers is None or layer in rule.layers)
        if kind in rule.roles and here and (rule.before_attention or not feeds):
            return rule.algorithm
    return None


def released_tensors(config: Config, scheme: str) -> dict[str, Entry]:
    """Name → (type, shape) of every tensor of the checkpoint of that model under that scheme."""
    how, table = scheme_named(scheme), {}
    for name, slot in written_slots(config, "legacy").items():
        algorithm = algorithm_for(slot, config, how)
        if algorithm is None:
            table[name] = plain_type(name, slot, config, how), slot.shape
        else:
            table |= {f"{name.removesuffix('.weight')}.{part}": entry for part, entry in parts(slot.shape, algorithm)}
        if how.kv_scales and role(slot.parameter, config) in ("attention.k_proj", "attention.v_proj"):
            module = name.removesuffix(".weight")
            table[f"{module}.{module.rpartition('.')[2][0]}_scale"] = "F32", ()
    return table


def plain_type(name: str, slot: Slot, config: Config, scheme: Scheme) -> str:
    if name.endswith(ALWAYS_FLOAT32):
        return "F32"
    return scheme.router if role(slot.parameter, config) == "experts.gate" else "BF16"


def parts(shape: Shape, algorithm: str) -> Iterator[tuple[str, Entry]]:
    rows, columns = shape
    if algorithm == "FP8":
        yield "weight", ("F8_E4M3", shape)
        yield "weight_scale", ("F32", ())
    else:
        yield "weight", ("U8", (rows, columns // 2))
        yield "weight_scale", ("F8_E4M3", (rows, math.ceil(columns / 16)))
        yield "weight_scale_2", ("F32", ())
    if algorithm != "W4A16_NVFP4":
        yield "input_scale", ("F32", ())


def bytes_of(entry: Entry) -> int:
    return TYPES[entry[0]].itemsize * math.prod(entry[1])


def released_quantisation(config: Config, scheme: str) -> Quantisation:
    """What such a checkpoint says of itself."""
    how, schemes = scheme_named(scheme), {}
    for name, slot in written_slots(config, "legacy").items():
        module, algorithm = name.removesuffix(".weight"), algorithm_for(slot, config, how)
        named = module != name and len(slot.shape) == 2 and not role(slot.parameter, config).endswith(UNNAMED)
        if algorithm is not None or named:
            schemes[module] = algorithm
    return Quantisation(schemes=schemes, producer=how.producer, kv_cache=how.kv_cache)
