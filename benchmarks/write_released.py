"""A checkpoint folder of random weights, laid out as a released one: benchmarks at full size need no download.

    python -m benchmarks.write_released nano nano_nvfp4 /data/nano             # 19.3 GB, under a minute on a fast disk
    python -m benchmarks.write_released super super_nvfp4 /data/super --layers 9
    python -m benchmarks.write_released nano nano_nvfp4 /tmp/twin --toy        # a twin of a few hundred kB

Names, types, shapes, configs and the number of files are those of the release (`nautilus/model/released.py`); every
matrix has a standard deviation near 0.02, so that activations stay of a sensible size in any depth. Files are written
piece by piece in less than 1 GB of memory. A run that was stopped goes on with the first file that is not complete.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nautilus.config import Config
from nautilus.config.released import write_config
from nautilus.model.quantised import OWN_FILE, describe
from nautilus.model.released import (
    SCHEMES,
    Entry,
    bytes_of,
    released_quantisation,
    released_tensors,
    scheme_named,
)
from nautilus.model.save import generation_settings, write_json
from nautilus.model.shards import INDEX, SINGLE, TYPES, cut
from nautilus.presets import preset, shrink
from nautilus.runtime import UserError

PIECE = 1 << 25  # bytes made at a time
STD = 0.02
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
MANTISSAS = 1 + np.arange(8) / 8
# Block scales are sixteen E4M3 numbers from 64 to 240, FP8 weights all those of magnitude below 2.
BLOCK_CODE, BLOCK_SCALES = 0x68, np.concatenate([64 * MANTISSAS, 128 * MANTISSAS])
BELOW_TWO = np.concatenate([2.0**-6 * np.arange(8) / 8, *(2.0**e * MANTISSAS for e in range(-6, 1))])


def rms(values: np.ndarray) -> float:
    return math.sqrt(np.square(values).mean())


# ----- contents ------------------------------------------------------------------------------------------------------


def contents(name: str, entry: Entry, random: np.random.Generator) -> Iterator[np.ndarray]:
    """The bytes of a tensor, piece by piece."""
    kind, shape = entry
    part, count = name.rpartition(".")[2], math.prod(shape)
    if count == 1 or kind == "F32" or len(shape) < 2:
        yield numbers(name, part, count, random).astype(np.float32).view(np.uint8 if kind == "F32" else np.uint32)
        return
    for size in pieces(bytes_of(entry)):
        raw = random.integers(0, 2**64 - 1, size=-(-size // 8), dtype=np.uint64, endpoint=True).view(np.uint8)[:size]
        yield shaped(raw, kind, part, wide="conv1d" in name)


def pieces(size: int) -> Iterator[int]:
    for begin in range(0, size, PIECE):
        yield min(PIECE, size - begin)


def shaped(raw: np.ndarray, kind: str, part: str, wide: bool) -> np.ndarray:
    """Random bytes as numbers of the right size: any E2M1 codes, block scales, small E4M3, BF16 of one power of two."""
    if kind == "BF16":
        exponent = 125 if wide else 121  # 0.25 to 0.5, or 1/64 to 1/32
        return ((raw.view(np.uint16) & 0x807F) | exponent << 7).view(np.uint8)
    if kind == "F8_E4M3":
        return (raw & 0x0F) + BLOCK_CODE if part == "weight_scale" else raw & 0xBF
    return raw


def numbers(name: str, part: str, count: int, random: np.random.Generator) -> np.ndarray:
    """Vectors, scalars and whatever is float32: as a trained model might have them."""
    uniform = random.random(count)
    match part:
        case "A_log":
            return np.log(1 + 15 * uniform)
        case "dt_bias":
            step = np.exp(np.log(1e-3) + uniform * np.log(100))
            return step + np.log(-np.expm1(-step))
        case "e_score_correction_bias":
            return 0.01 * (uniform - 0.5)
        case "weight_scale_2":
            return np.full(count, STD / rms(E2M1) / rms(BLOCK_SCALES))
        case "weight_scale":
            return np.full(count, STD / rms(BELOW_TWO))
        case "input_scale":
            return np.full(count, 8 / 448)
        case "bias":
            return np.zeros(count)
        case "weight" if name.endswith("gate.weight"):
            return STD * random.standard_normal(count)
    return np.ones(count)


def to_bf16(data: np.ndarray) -> np.ndarray:
    """float32 as bit patterns to BF16, rounded down: good enough for random numbers."""
    return (data >> 16).astype(np.uint16).view(np.uint8)


# ----- files ---------------------------------------------------------------------------------------------------------


def header_of(tensors: dict[str, Entry], facts: dict[str, str]) -> bytes:
    described, offset = {"__metadata__": {"format": "pt"} | facts}, 0
    for name, entry in tensors.items():
        end = offset + bytes_of(entry)
        described[name] = {"dtype": entry[0], "shape": list(entry[1]), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def complete(file: Path, header: bytes, size: int) -> bool:
    """Whether the file is there as these settings would write it; it got its name after its last byte."""
    if not file.is_file() or file.stat().st_size != len(header) + size:
        return False
    with open(file, "rb") as open_file:
        return open_file.read(len(header)) == header


def write_file(file: Path, tensors: dict[str, Entry], header: bytes, random: np.random.Generator, progress) -> None:
    beside = file.with_suffix(".part")
    with open(beside, "wb") as out:
        out.write(header)
        for name, entry in tensors.items():
            for piece in contents(name, entry, random):
                data = to_bf16(piece) if piece.dtype == np.uint32 else piece
                out.write(data.data)
                progress(len(data))
    beside.rename(file)


class Line:
    """`7.2/19.3 GB  1.1 GB/s  11 s left` on standard error: in place on a terminal, else every ten seconds."""

    def __init__(self, total: int):
        self.total, self.done, self.kept, self.begin = total, 0, 0, time.monotonic()
        self.said = self.begin  # a rate needs some time to be one

    def __call__(self, size: int) -> None:
        self.done += size
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if self.done < self.total and now - self.said < (0.2 if terminal else 10):
            return
        self.said = now
        rate = (self.done - self.kept) / max(now - self.begin, 1e-9)
        left = (self.total - self.done) / max(rate, 1e-9)
        text = f"{self.done / 1e9:.1f}/{self.total / 1e9:.1f} GB  {rate / 1e9:.2f} GB/s  {left:.0f} s left"
        print(f"\r{text}   " if terminal else text, end="" if terminal else "\n", file=sys.stderr, flush=True)

    def keep(self, size: int) -> None:
        self.kept += size
        self(size)


def config_document(config: Config, scheme: str) -> dict:
    """config.json: newer releases repeat what hf_quant_config.json says."""
    document = write_config(config) | {"torch_dtype": "bfloat16"}
    if not scheme_named(scheme).in_config:
        return document
    own = describe(released_quantisation(config, scheme))
    said = own["quantization"]
    section = {"quant_method": "modelopt", "quant_algo": said["quant_algo"], "producer": own["producer"]}
    section |= {key: said[key] for key in ("quantized_layers",) if key in said}
    section["ignore"] = said.get("exclude_modules", [])
    if said["kv_cache_quant_algo"] == "FP8":
        section["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    return document | {"quantization_config": section}


def shared_out(sizes: dict[str, int], count: int) -> list[list[str]]:
    """Names in order, in that many groups of nearly the same size."""
    limit = math.ceil(sum(sizes.values()) / count)
    while len(groups := cut(sizes, limit)) > count:
        limit += limit // 50 + 1
    return groups


def write(config: Config, scheme: str, folder: Path, *, seed: int = 0, shards: int | None = None) -> None:
    """The folder, or what is missing of it. UserError where the disk is too small."""
    tensors = released_tensors(config, scheme)
    sizes = {name: bytes_of(entry) for name, entry in tensors.items()}
    total, count = sum(sizes.values()), shards or scheme_named(scheme).shards
    groups = shared_out(sizes, count)
    files = [SINGLE] if len(groups) == 1 else [
        f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)
    ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    plan = []
    for number, (name, members) in enumerate(zip(files, groups, strict=True)):
        # Wide types first: every number then lies at a multiple of its size.
        held = {member: tensors[member] for member in sorted(members, key=lambda m: -TYPES[tensors[m][0]].itemsize)}
        plan.append((folder / name, held, header_of(held, {"scheme": scheme, "seed": str(seed)}), number))
    progress = Line(total)
    missing = []
    for file, held, header, number in plan:
        size = sum(map(bytes_of, held.values()))
        if complete(file, header, size):
            progress.keep(size)
        else:
            missing.append((file, held, header, number))
    needed = sum(sum(map(bytes_of, held.values())) for _, held, _, _ in missing)
    if (free := shutil.disk_usage(folder).free) < needed + (1 << 28):
        raise UserError(f"{folder} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; choose another folder")
    write_json(folder / "config.json", config_document(config, scheme))
    write_json(folder / "generation_config.json", generation_settings(config))
    if SCHEMES[scheme].rules:
        write_json(folder / OWN_FILE, describe(released_quantisation(config, scheme)))
    if len(groups) > 1:
        where = {member: name for name, members in zip(files, groups, strict=True) for member in members}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    for file, held, header, number in missing:
        write_file(file, held, header, np.random.Generator(np.random.SFC64([seed, number])), progress)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", help="nano, lightning, super, ultra or any other preset")
    parser.add_argument("scheme", help=", ".join(SCHEMES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, help="only this many layers")
    parser.add_argument("--toy", action="store_true", help="a twin of toy size")
    options = parser.parse_args()
    try:
        config = preset(options.preset)
        if options.layers:
            config = dataclasses.replace(config, layers=config.layers[: options.layers])
        write(shrink(config) if options.toy else config, options.scheme, options.folder, seed=options.seed)
    except ValueError as bad:
        sys.exit(f"write_released: {bad}")
    files = [file for file in options.folder.iterdir() if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    print(f"{size:,} bytes in {len(files)} files of {options.folder}, without a tokenizer: nautilus bench speed, info")


if __name__ == "__main__":
    main()
