"""The safetensors files of a checkpoint folder: what they hold, one tensor after another, and writing them."""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nautilus.runtime import UserError, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


# A file may be larger than all memory, and hardly any page of it will be written to. Python has no name for this flag.
NO_RESERVE = 0x4000 if sys.platform == "linux" else 0
# As safetensors spells types. There are others, which nothing here reads.
TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}


class Stored(NamedTuple):
    """What the header of a file says of one tensor."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int  # of its bytes in the file
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.begin


def inventory(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder's safetensors files, from their headers alone."""
    found: dict[str, Stored] = {}
    for file in shard_files(folder):
        for name, where in entries(file):
            if name in found:
                raise UserError(f"{name} is in {found[name].file} and in {file}; remove one of the two files")
            found[name] = where
    return found


def entries(file: Path) -> Iterator[tuple[str, Stored]]:
    """What a header lists. The library has checked it first: its length, its types, that offsets fit the file."""
    with opened(file) as shard, open(file, "rb") as whole:
        length = int.from_bytes(whole.read(8), "little")
        header, total = json.loads(whole.read(length)), os.fstat(whole.fileno()).st_size
        header.pop("__metadata__", None)
        if header.keys() != set(shard.keys()):
            raise UserError(f"{file} lists a tensor twice; copy or download it again")
        for name, entry in header.items():
            shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
            # The first two hold unless a key is there twice; an axis beyond this only where another one is empty.
            size = math.prod(shape) * TYPES[entry["dtype"]].itemsize if entry["dtype"] in TYPES else end - begin
            if size != end - begin or 8 + length + end > total or max(shape, default=0) >= 1 << 62:
                raise UserError(f"{name} in {file} is said to be {entry}; copy or download it again")
            yield name, Stored(file, entry["dtype"], shape, 8 + length + begin, 8 + length + end)


def shard_files(folder: Path) -> list[Path]:
    if (folder / INDEX).exists():
        index = read_json(folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise UserError(f"{folder / INDEX} has no weight_map; copy or download it again")
        names = sorted({str(name) for name in index.values()})
        here = {path.name for path in folder.iterdir() if path.is_file()}  # so that no name leads out of the folder
        absent = [name for name in names if name not in here]
        if absent:
            raise UserError(
                f"{folder / INDEX} lists {len(names)} files, of which {len(absent)} are not in the folder: "
                f"{', '.join(name[:80] for name in absent[:5])}; copy or download them"
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
    except (OSError, MemoryError) as bad:
        raise unmapped(file, bad) from bad


def unmapped(file: Path, bad: Exception) -> UserError:
    return UserError(
        f"cannot map {file} ({file.stat().st_size:,} bytes) into memory: {bad}; see whether it may be read and whether"
        f" ulimit -v leaves room for it"
    )


def read_tensors(stored: dict[str, Stored], soon: Callable[[str], bool] = bool) -> Iterator[tuple[str, Tensor]]:
    """The tensors one by one, file after file: the file's own memory, copied page by page where it is written to.

    soon: which are about to be read as a whole, so that the disk can begin; by default all.
    """
    by_file: dict[Path, list[str]] = {}
    for name, where in stored.items():
        by_file.setdefault(where.file, []).append(name)
    for file, names in by_file.items():
        memory = mapped(file)
        for where in (stored[name] for name in names if soon(name)):
            begin = where.begin // mmap.PAGESIZE * mmap.PAGESIZE
            if where.bytes > mmap.PAGESIZE:
                memory.madvise(mmap.MADV_WILLNEED, begin, where.end - begin)
        for name in names:
            yield name, view_of(memory, stored[name])


def mapped(file: Path) -> mmap.mmap:
    with open(file, "rb") as whole:
        flags, access = mmap.MAP_PRIVATE | NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        try:
            return mmap.mmap(whole.fileno(), 0, flags=flags, prot=access)
        except (OSError, ValueError) as bad:  # no room; a file that has become empty
            raise unmapped(file, bad) from bad


def view_of(memory: mmap.mmap, where: Stored) -> Tensor:
    dtype = TYPES[where.dtype]
    if where.bytes == 0:
        return torch.empty(where.shape, dtype=dtype)
    flat = torch.frombuffer(memory, dtype=torch.uint8, count=where.bytes, offset=where.begin)
    aligned = flat if flat.data_ptr() % dtype.itemsize == 0 else flat.clone()
    return aligned.view(dtype).view(where.shape)


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


def write_file(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """The library reports a full disk as an error of its own; here it is the OSError that every writer raises."""
    try:
        save_file(tensors, file, metadata={"format": "pt"} if metadata is None else metadata)
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
