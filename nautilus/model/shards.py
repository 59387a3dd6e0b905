"""The safetensors files of a checkpoint folder: what they hold, one tensor after another, and writing them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nautilus.runtime import UserError, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Stored(NamedTuple):
    """What the header of a file says of one tensor."""

    file: Path
    dtype: str  # as safetensors spells it: BF16, F32, F8_E4M3, ...
    shape: tuple[int, ...]


def inventory(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder's safetensors files, from their headers alone."""
    found: dict[str, Stored] = {}
    for file in shard_files(folder):
        with opened(file) as shard:
            for name in shard.keys():  # noqa: SIM118  (a safe_open handle is no mapping)
                if name in found:
                    raise UserError(f"{name} is in {found[name].file} and in {file}; remove one of the two files")
                header = shard.get_slice(name)
                found[name] = Stored(file, header.get_dtype(), tuple(header.get_shape()))
    return found


def shard_files(folder: Path) -> list[Path]:
    if (folder / INDEX).exists():
        index = read_json(folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise UserError(f"{folder / INDEX} has no weight_map; copy or download it again")
        names = sorted({str(name) for name in index.values()})
        absent = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
        if absent:
            raise UserError(
                f"{folder / INDEX} lists {len(names)} files, of which {len(absent)} are not in the folder: "
                f"{', '.join(absent[:5])}; copy or download them"
            )
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", *PICKLES))
    hint = f" (it has {', '.join(others[:5])}; pickles are never opened, because they can run code)" if others else ""
    raise UserError(f"{folder} has neither {SINGLE} nor {INDEX}{hint}; convert the weights to safetensors")


@contextmanager
def opened(file: Path) -> Iterator:
    try:
        with safe_open(file, framework="pt", device="cpu") as shard:
            yield shard
    except SafetensorError as bad:
        raise UserError(
            f"{file} ({file.stat().st_size:,} bytes) is no complete safetensors file: {bad}; it is truncated or of "
            f"another kind; copy or download it again"
        ) from bad


def read_tensors(stored: dict[str, Stored]) -> Iterator[tuple[str, Tensor]]:
    """The tensors one by one, file after file. Each is mapped from the file, not copied."""
    by_file: dict[Path, list[str]] = {}
    for name, where in stored.items():
        by_file.setdefault(where.file, []).append(name)
    for file, names in by_file.items():
        with opened(file) as shard:
            for name in names:
                yield name, shard.get_tensor(name)


def write_shards(folder: Path, sizes: dict[str, int], tensor: Callable[[str], Tensor], *, shard_bytes: float) -> None:
    """Write the tensors named in `sizes` (name to bytes) in files of at most `shard_bytes`, and an index if several.

    `tensor` makes one tensor on demand, so no more than one file's worth of converted copies is alive.
    """
    shards = cut(sizes, shard_bytes)
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for file, members in zip(names, shards, strict=True):
        write_file(folder / file, {member: tensor(member) for member in members})
    if count > 1:
        where = {member: file for file, members in zip(names, shards, strict=True) for member in members}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_file(file: Path, tensors: dict[str, Tensor]) -> None:
    """The library reports a full disk as an error of its own; here it is the OSError that every writer raises."""
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as bad:
        number = re.search(r"os error (\d+)", str(bad))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from bad


def cut(sizes: dict[str, int], limit: float) -> list[list[str]]:
    """Consecutive names whose sizes add up to at most `limit`; a larger single one has a file of its own."""
    shards: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards
