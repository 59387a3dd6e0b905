"""What a folder says of its quantisation, in `hf_quant_config.json` and under `quantization_config` in config.json.

    ModelOpt             quant_algo for every matrix but those of exclude_modules (in config.json: ignore), or
                         MIXED_PRECISION and an algorithm for each module under quantized_layers
    compressed-tensors   config_groups of modules with bits, type and group size, and ignore

Nano's NVFP4 folder has the first file only, newer ones have both. What a module holds is decided by its tensors
(`packed.py`); what is read here is held against that, so that a file and its description cannot disagree unnoticed.
Every algorithm goes by ModelOpt's name for it.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from nautilus.config.keys import short
from nautilus.model.expression import Expression
from nautilus.runtime import UserError, read_json

OWN_FILE = "hf_quant_config.json"
MIXED = "MIXED_PRECISION"
OURS = "nautilus"
# What stays numbers in every folder: the router works in float32, and a convolution is no product of matrices.
NEVER = ("experts.gate", "mamba.conv1d")
UNNAMED = (*NEVER, "embeddings")  # roles that a description means only where it names them
INSTEAD = "load the BF16 checkpoint of the model, or one in FP8 or NVFP4"


class Algorithm(NamedTuple):
    format: str  # of ops/formats.py
    tiles: tuple[str, ...]
    group_size: int = 0  # where the description states it


GROUPED = ("row", "1x32", "1x64", "1x128")
ALGORITHMS = {
    "FP8": Algorithm("fp8_e4m3", ("tensor",)),
    "FP8_PER_CHANNEL_PER_TOKEN": Algorithm("fp8_e4m3", ("row",)),
    "NVFP4": Algorithm("nvfp4", ("1x16",), 16),
    "W4A16_NVFP4": Algorithm("nvfp4", ("1x16",), 16),
    "NVFP4_AWQ": Algorithm("nvfp4", ("1x16",), 16),  # as far as its input scales were folded into the norms
    "MXFP8": Algorithm("mxfp8", ("1x32",), 32),
    "MXFP4": Algorithm("mxfp4", ("1x32",), 32),
    "W8A16": Algorithm("int8", GROUPED),
    "W8A8_SQ_PER_CHANNEL": Algorithm("int8", ("row",)),
    "INT4": Algorithm("int4", GROUPED[1:]),
}
WITH_INPUTS = ("FP8", "NVFP4")  # whose files hold a scale for what a matrix is given
REFUSED = {
    "W4A16_AWQ": "its int4 is packed along the rows",
    "W4A8_AWQ": "its int4 is packed along the rows",
    "W4A8_NVFP4_FP8": "its scales have a rule of their own",
    "W4A8_MXFP4_FP8": "its scales have a rule of their own",
    "NVFP4_SVD": "it adds a low-rank branch",
    "FP8_PB_REAL": "it has a scale for each block of 128x128",
    "FP8_PB_WO": "it has a scale for each block of 128x128",
}


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """What a model was quantised to: the algorithm of each module that can be, None for those left as numbers."""

    schemes: Mapping[str, str | None]
    producer: str = ""
    kv_cache: str | None = None  # the number format that keys and values were calibrated for
    kv_scales: tuple[str, ...] = ()  # the attention mixers whose scales its files hold


@dataclass(frozen=True, kw_only=True)
class Names:
    """Modules: by name, with all that lies below; by glob; by regular expression, matched from the beginning."""

    exact: frozenset[str] = frozenset()
    patterns: tuple[re.Pattern | Expression, ...] = ()

    def __contains__(self, module: str) -> bool:
        return any(
            bool(self.exact and self.exact.intersection(ancestry(name))) or any(p.match(name) for p in self.patterns)
            for name in spellings(module)
        )


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """What one of the two files says."""

    file: Path
    producer: str
    kv_cache: str | None
    listed: Mapping[str, str] = field(default_factory=dict)
    groups: tuple[tuple[Names, str], ...] = ()
    everywhere: str | None = None
    excluded: Names = Names()

    def algorithm(self, module: str) -> tuple[str | None, bool]:
        """The algorithm of a module, and whether it is meant by name or pattern rather than as a matrix like any."""
        if module in self.excluded:
            return None, True
        for name in spellings(module):
            if name in self.listed:
                return self.listed[name], True
        for names, algorithm in self.groups:
            if module in names:
                return algorithm, True
        return self.everywhere, False


def spellings(module: str) -> tuple[str, ...]:
    """`backbone.layers.0` and `model.layers.0`: files say one, descriptions now and then the other."""
    first, _, rest = module.partition(".")
    other = {"backbone": "model", "model": "backbone"}.get(first)
    return (module,) if other is None else (module, f"{other}.{rest}")


def ancestry(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


# ----- reading -------------------------------------------------------------------------------------------------------


def declarations(folder: Path, document: dict) -> list[Declaration]:
    """What the folder says, twice, once or not at all. document: its config.json."""
    found = []
    if (folder / OWN_FILE).exists():
        own = read_json(folder / OWN_FILE)
        body = section(own, "quantization", folder / OWN_FILE)
        if "quant_algo" not in body:
            raise UserError(f"{folder / OWN_FILE} has no quant_algo under 'quantization'; copy or download it again")
        found.append(read_modelopt(body | {"producer": own.get("producer")}, folder / OWN_FILE))
    for key in ("quantization_config", "quantization"):
        if document.get(key):
            found.append(read_section(section(document, key, folder / "config.json"), folder / "config.json"))
            break
    return found


def read_section(body: dict, file: Path) -> Declaration:
    if isinstance(body.get("quantization"), dict):  # the other file as a whole
        body = body["quantization"] | {"producer": body.get("producer")}
    method = body.get("quant_method", "modelopt" if "quant_algo" in body else None)
    if method == "compressed-tensors" or (method == "modelopt" and "quant_algo" not in body):
        return read_groups(body, file)
    if method == "modelopt":
        return read_modelopt(body, file)
    raise UserError(
        f"{file} says that the weights are quantised by quant_method={short(method)}; modelopt and compressed-tensors"
        f" can be read; {INSTEAD}"
    )


def read_modelopt(body: dict, file: Path) -> Declaration:
    algorithm = body.get("quant_algo")
    listed = {}
    if algorithm == MIXED:
        layers = section(body, "quantized_layers", file)
        listed = {name: known_algorithm(section(layers, name, file).get("quant_algo"), name, file) for name in layers}
    everywhere = None if algorithm in (None, MIXED) else known_algorithm(algorithm, "every matrix", file)
    excluded = names_of([*strings(body, "exclude_modules", file), *strings(body, "ignore", file)], file)
    return Declaration(
        file=file, producer=producer(body), kv_cache=kv_cache(body), listed=listed, everywhere=everywhere,
        excluded=excluded,
    )  # fmt: skip


def read_groups(body: dict, file: Path) -> Declaration:
    everywhere, groups = None, []
    for name in section(body, "config_groups", file):
        group = section(section(body, "config_groups", file), name, file)
        algorithm = group_algorithm(group, f"{name} of {file}")
        targets = strings(group, "targets", file)
        everywhere = algorithm if "Linear" in targets else everywhere
        groups.append((names_of([target for target in targets if target != "Linear"], file), algorithm))
    excluded = names_of(strings(body, "ignore", file), file)
    return Declaration(
        file=file, producer=producer(body), kv_cache=kv_cache(body), groups=tuple(groups), everywhere=everywhere,
        excluded=excluded,
    )  # fmt: skip


def group_algorithm(group: dict, where: str) -> str:
    """A group's numbers as ModelOpt would call them."""
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise UserError(f"{where} has no weights; copy or download it again")
    kind = weights.get("num_bits"), weights.get("type")
    size, strategy = weights.get("group_size"), weights.get("strategy")
    match (*kind, size, strategy):
        case (4, "float", 16, _):
            return "NVFP4" if group.get("input_activations") else "W4A16_NVFP4"
        case (4, "float", 32, _):
            return "MXFP4"
        case (8, "float", 32, _):
            return "MXFP8"
        case (8, "float", None, "channel"):
            return "FP8_PER_CHANNEL_PER_TOKEN"
        case (8, "float", None, "tensor" | None):
            return "FP8"
        case (8, "int", _, _):
            return "W8A16"
        case (4, "int", _, _):
            return "INT4"
    raise UserError(
        f"{where} is for weights of num_bits={short(kind[0])}, type={short(kind[1])}, group_size={short(size)},"
        f" strategy={short(strategy)}, which cannot be read; {INSTEAD}"
    )


def known_algorithm(name: object, module: str, file: Path) -> str:
    algorithm = str(name).upper()
    if algorithm in ALGORITHMS:
        return algorithm
    why = REFUSED.get(algorithm, f"known are {', '.join(ALGORITHMS)}")
    raise UserError(f"{file} gives {module} the algorithm {short(name)}, which cannot be read: {why}; {INSTEAD}")


def names_of(patterns: list[str], file: Path) -> Names:
    exact, compiled, globs = set(), [], []
    for pattern in patterns:
        if pattern.startswith("re:"):
            compiled.append(regular(pattern[3:], file))
        elif re.search(r"[*?\[]", pattern):
            globs += [fnmatch.translate(pattern), fnmatch.translate(f"{pattern}.*")]
        else:
            exact.add(pattern)
    if globs:
        compiled.append(re.compile("|".join(globs)))  # as fnmatch writes them, a letter is tried once for each star
    return Names(exact=frozenset(exact), patterns=tuple(compiled))


def regular(pattern: str, file: Path) -> Expression:
    try:
        return Expression(pattern)
    except (re.error, RecursionError, OverflowError) as bad:
        raise UserError(f"{file} names modules by the expression {short(pattern)}: {bad}; copy it again") from bad


def section(body: dict, key: str, file: Path) -> dict:
    value = body.get(key)
    if not isinstance(value, dict):
        raise UserError(f"{file} has {short(value)} under {short(key)}, not settings; copy or download it again")
    return value


def strings(body: dict, key: str, file: Path) -> list[str]:
    value = body.get(key) or []
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise UserError(f"{file} has {short(value)} as {key}, not a list of names; copy or download it again")
    return value


def producer(body: dict) -> str:
    """`modelopt 0.29.0`."""
    told = body.get("producer") or body.get("quant_method")
    parts = [told.get("name"), told.get("version")] if isinstance(told, dict) else [told]
    return " ".join(str(part) for part in parts if part)


def kv_cache(body: dict) -> str | None:
    scheme = body.get("kv_cache_quant_algo") or body.get("kv_cache_scheme")
    if isinstance(scheme, dict):
        eight = (scheme.get("num_bits"), scheme.get("type")) == (8, "float")
        return "FP8" if eight else short(scheme)
    return None if scheme is None else str(scheme)


# ----- writing -------------------------------------------------------------------------------------------------------


def describe(quantisation: Quantisation) -> dict:
    """The hf_quant_config.json of it. Engines know the layout by the producer's name, whoever it was."""
    version = quantisation.producer.removeprefix("modelopt ") if quantisation.producer.startswith("modelopt ") else OURS
    used = {module: algorithm for module, algorithm in quantisation.schemes.items() if algorithm is not None}
    kinds = set(used.values())
    body: dict = {"quant_algo": MIXED if kinds else None, "kv_cache_quant_algo": quantisation.kv_cache}
    if len(kinds) < 2:
        body |= layer_entry(kinds.pop()) if kinds else {}
        body["exclude_modules"] = [module for module, kind in quantisation.schemes.items() if kind is None]
    else:
        body["quantized_layers"] = {module: layer_entry(algorithm) for module, algorithm in used.items()}
    return {"producer": {"name": "modelopt", "version": version}, "quantization": body}


def layer_entry(algorithm: str) -> dict:
    size = ALGORITHMS[algorithm].group_size
    return {"quant_algo": algorithm} | ({"group_size": size} if size else {})
