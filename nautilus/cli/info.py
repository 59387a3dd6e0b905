"""What a model is made of: its layers, parameters and memory. Nothing of its size is allocated, no weight is read.

MODEL is a preset, a run, a checkpoint folder, or a hub id, of which only config.json is fetched. Of a quantised folder
the number formats are shown too, by what the weights are for.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nautilus
from nautilus.config import Attention, Config, Layer, Mamba, setting, weight_count
from nautilus.config.model import idle_weights, layer_weights
from nautilus.config.released import read_config
from nautilus.presets import PRESETS, preset
from nautilus.runtime import HUB_ID, UserError, hub_folder, read_json


@dataclass(frozen=True, kw_only=True)
class Settings:
    model: str = setting("toy", "preset, run, checkpoint folder or hub id")
    json: bool = setting(False, "print one JSON object instead of tables")


# As the publishers state them: technical reports and model cards; arXiv 2512.20848, 2604.12374, 2606.15007.
PUBLISHED = {
    "nano": "31.6 B, active 3.2 B (3.6 B with embeddings)",
    "lightning": "32.9 B with the prediction block",
    "super": "120.6 B, active 12.1 B (12.7 B with embeddings)",
    "ultra": "550 B, active 55 B",
}
# NVFP4: 4 bits a value and one 8-bit scale for 16 values. Real checkpoints keep some layers wide.
BITS = {"FP32": 32.0, "BF16": 16.0, "FP8": 8.0, "NVFP4": 4.5}


def main(settings: Settings) -> None:
    facts = examine(settings.model, config_of(settings.model)) | stored_formats(settings.model)
    if settings.json:
        print(json.dumps(facts, indent=2))
    else:
        show(facts)


def config_of(source: str) -> Config:
    if source in PRESETS:
        return preset(source)
    folder = Path(nautilus.checkpoint_of(source))
    path = folder / "config.json" if folder.is_dir() else folder
    if not path.is_file():
        path = fetch_config(source)
    document = read_json(path, "it should be the config.json of a checkpoint folder")
    try:
        return read_config(document)
    except ValueError as bad:
        raise UserError(f"{path}: {bad}") from bad


def fetch_config(source: str) -> Path:
    if Path(source).is_dir():
        raise UserError(f"no config.json in the folder {source}; give a run, a checkpoint folder, or a preset")
    if not HUB_ID.fullmatch(source):
        near = difflib.get_close_matches(source, PRESETS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"presets are {', '.join(PRESETS)}"
        raise UserError(f"{source!r} is no preset, no folder here, and no hub id (owner/name); {hint}")
    return hub_folder(source, ["config.json"]) / "config.json"


# ----- the facts -----------------------------------------------------------------------------------------------------


def examine(name: str, config: Config) -> dict:
    """Everything that is shown, as plain values."""
    count = weight_count(config)
    stored = count["main"] + count["mtp"]
    attention = [layer for layer in config.layers if isinstance(layer, Attention)]
    mamba = [layer for layer in config.layers if isinstance(layer, Mamba)]
    return {
        "model": name,
        "pattern": config.pattern,
        "width": config.width,
        "vocab": config.vocab,
        "positions": config.positions,
        "layers": [*kinds_of(config.layers, config.width), *kinds_of(config.mtp, config.width, "mtp ")],
        "parameters": {
            "main": count["main"],
            "mtp": count["mtp"],
            "total": stored,
            "active": count["active"],
            "active_with_embedding": count["active"] + (0 if config.tied else config.vocab * config.width),
            "published": PUBLISHED.get(name),
        },
        "weight_bytes": {kind: round(stored * bits / 8) for kind, bits in BITS.items()},
        # Keys and values in bf16, of layers without a window; with one, no more than `window` tokens are kept.
        "kv_bytes_per_token": sum(2 * 2 * layer.groups * layer.head_width for layer in attention),
        "windowed_layers": sum(layer.window > 0 for layer in attention),
        # The scan's state stays float32; the convolution's tail is bf16. Neither grows with the length.
        "state_bytes": sum(4 * layer.inner * layer.state + 2 * layer.conv_width * (layer.taps - 1) for layer in mamba),
    }


def kinds_of(layers: tuple[Layer, ...], width: int, prefix: str = "") -> Iterator[dict]:
    """One entry per distinct layer record: where it stands, its sizes, its weights."""
    places: dict[Layer, list[int]] = {}
    for index, layer in enumerate(layers):
        places.setdefault(layer, []).append(index)
    for layer, where in places.items():
        one = layer_weights(layer, width)
        sizes = {f.name: getattr(layer, f.name) for f in dataclasses.fields(layer) if shown(layer, f)}
        yield {
            "kind": prefix + type(layer).__name__,
            "letter": layer.letter,
            "where": where,
            "sizes": {name: plain(value) for name, value in sizes.items()},
            "parameters": one,
            "active": one - idle_weights(layer, width),
            "all": one * len(where),
        }


def stored_formats(source: str) -> dict:
    """How many weights of each role a quantised folder holds in which format, and their bytes; from headers alone."""
    folder = Path(source if source in PRESETS else nautilus.checkpoint_of(source))
    if source in PRESETS or not (folder / "config.json").is_file():
        return {}
    document = read_json(folder / "config.json")
    if not any((folder / name).exists() for name in ("model.safetensors", "model.safetensors.index.json")):
        return {}
    if not (folder / "hf_quant_config.json").exists() and not document.get("quantization_config"):
        return {}
    from nautilus.model.weights import contents  # and torch with it, which everything else here does without

    rows: dict[tuple[str, str], list[int]] = {}
    for role, kind, size in contents(folder, document).formats():
        count = rows.setdefault((role, kind), [0, 0])
        count[0], count[1] = count[0] + 1, count[1] + size
    facts = [{"role": role, "format": kind, "count": n, "bytes": size} for (role, kind), (n, size) in rows.items()]
    return {
        "formats": sorted(facts, key=lambda row: -row["bytes"]),
        "stored_bytes": sum(row["bytes"] for row in facts),
    }


ALWAYS_SHOWN = ("heads", "head_width", "groups", "state", "experts", "active", "hidden")


def shown(layer: Layer, field: dataclasses.Field) -> bool:
    """Sizes, and whatever differs from its default."""
    return field.name in ALWAYS_SHOWN or getattr(layer, field.name) != field.default


def plain(value):
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


# ----- for people ----------------------------------------------------------------------------------------------------


def show(facts: dict) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True)
    console.print(
        f"{facts['model']}: {len(facts['pattern'])} layers {facts['pattern']}, width {facts['width']},"
        f" vocabulary {facts['vocab']:,}, up to {facts['positions']:,} tokens",
        highlight=False,
        markup=False,
    )
    layers = Table("layer", "at", "sizes", box=SIMPLE)
    layers.add_column("each", justify="right", no_wrap=True)
    layers.add_column("all", justify="right", no_wrap=True)
    for row in facts["layers"]:
        sizes = " ".join(f"{name}={value}" for name, value in row["sizes"].items() if not isinstance(value, dict))
        kind = f"{len(row['where'])} x {row['letter']} {row['kind']}"
        layers.add_row(kind, indices(row["where"]), sizes, count_text(row["parameters"]), count_text(row["all"]))
    console.print(layers)
    for title, rows in (("stored", formats_of(facts)), ("total", totals_of(facts))):
        if rows := [*rows]:
            table = Table(title, box=SIMPLE)
            for _ in rows[0][1:]:
                table.add_column("", justify="right")
            for row in rows:
                table.add_row(*row)
            console.print(table)


def formats_of(facts: dict) -> Iterator[tuple[str, ...]]:
    for row in facts.get("formats", ()):
        yield row["role"], row["format"], f"{row['count']:,}", bytes_text(row["bytes"])


def totals_of(facts: dict) -> Iterator[tuple[str, str]]:
    count = facts["parameters"]
    if count["mtp"]:
        yield "parameters with prediction block (MTP)", f"{count['total']:,}"
        yield "parameters without it", f"{count['main']:,}"
    else:
        yield "parameters", f"{count['total']:,}"
    yield "active per token, head included", f"{count['active']:,}"
    yield "active per token, embedding too", f"{count['active_with_embedding']:,}"
    if count["published"]:
        yield "published", count["published"]
    if "stored_bytes" in facts:
        yield "all weights as stored", bytes_text(facts["stored_bytes"])
    for kind, size in facts["weight_bytes"].items():
        yield f"all weights in {kind}", bytes_text(size)
    window = f" ({facts['windowed_layers']} layers keep a window only)" if facts["windowed_layers"] else ""
    yield "keys and values per token, BF16", bytes_text(facts["kv_bytes_per_token"]) + window
    yield "Mamba state per sequence", bytes_text(facts["state_bytes"])


def indices(where: list[int]) -> str:
    """The first few positions: `5, 12, 19, …`."""
    return ", ".join(map(str, where[:4])) + (", …" if len(where) > 4 else "")


def count_text(count: int) -> str:
    """Exact up to a million, then 4 digits; --json has every digit."""
    for unit, name in ((1e9, "B"), (1e6, "M")):
        if count >= unit:
            return f"{count / unit:.4g} {name}"
    return f"{count:,}"


def bytes_text(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.4g} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"
