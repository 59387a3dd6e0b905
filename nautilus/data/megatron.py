"""Token files of Megatron: `NAME.bin`, tokens one after another, and `NAME.idx`, which says where each sequence is.

    idx: b"MMIDIDX\\0\\0", u64 version 1, u8 type of a token, u64 sequences, u64 documents + 1,
         int32 lengths of the sequences, int64 byte offsets of them, int64 first sequence of each document, and the end

Everything is little-endian. Such a pair whose documents all end with the tokenizer's document_end (Megatron's
`--append-eod`) is read where it lies; any other is refused, because rows could not tell its documents apart.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nautilus.data.shard import Shard
from nautilus.runtime import UserError, write_atomic

MAGIC = b"MMIDIDX\x00\x00"
TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
HEADER = len(MAGIC) + 8 + 1 + 8 + 8
PIECE = 1 << 22  # tokens looked at together


@dataclass(frozen=True)
class Index:
    """What an .idx file says. `documents` are the first sequences of the documents, and the number of sequences."""

    dtype: str
    lengths: np.ndarray
    offsets: np.ndarray
    documents: np.ndarray


def stem(place: str | Path) -> Path:
    """The path of a pair without .bin or .idx."""
    path = Path(place)
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


def pair(place: str | Path) -> tuple[Path, Path]:
    base = stem(place)
    return base.with_name(base.name + ".bin"), base.with_name(base.name + ".idx")


def read_index(place: str | Path) -> Index:
    """The index of a pair, held against the length of its tokens' file."""
    tokens, path = pair(place)
    for each in (tokens, path):
        if not each.is_file():
            raise UserError(f"no file {each}; Megatron's token files come in pairs, .bin and .idx: copy both")
    raw = path.read_bytes()
    if raw[: len(MAGIC)] != MAGIC or len(raw) < HEADER or int.from_bytes(raw[9:17], "little") != 1:
        raise UserError(f"{path} does not begin like an index of version 1 of Megatron's; prepare the data anew")
    sequences, bounds = (int.from_bytes(raw[at : at + 8], "little") for at in (18, 26))
    if raw[17] not in TYPES or len(raw) != HEADER + 12 * sequences + 8 * bounds:
        raise UserError(
            f"{path} says {sequences:,} sequences and {bounds:,} document bounds of type {raw[17]}, which does not fit"
            f" its {len(raw):,} bytes; copy or prepare it again"
        )
    found = Index(
        dtype=np.dtype(TYPES[raw[17]]).str,
        lengths=np.frombuffer(raw, "<i4", sequences, HEADER),
        offsets=np.frombuffer(raw, "<i8", sequences, HEADER + 4 * sequences),
        documents=np.frombuffer(raw, "<i8", bounds, HEADER + 12 * sequences),
    )
    refuse_faults(found, tokens, path)
    return found


def refuse_faults(found: Index, tokens: Path, path: Path) -> None:
    """An index whose sequences do not fill the tokens' file, or whose documents do not follow one another."""
    sequences = len(found.lengths)
    size, ends = np.dtype(found.dtype).itemsize, np.cumsum(found.lengths.astype(np.int64))
    total = int(ends[-1]) if sequences else 0
    in_order = np.array_equal(found.offsets, (ends - found.lengths) * size) and bool((found.lengths >= 0).all())
    if not in_order or tokens.stat().st_size != total * size:
        raise UserError(
            f"{path} speaks of {total:,} tokens of {size} bytes, one sequence after another; {tokens} has"
            f" {tokens.stat().st_size:,} bytes; copy or prepare both again"
        )
    inside = len(found.documents) and found.documents[0] == 0 and found.documents[-1] == sequences
    if not inside or bool((np.diff(found.documents) < 0).any()):
        raise UserError(f"{path}: its document bounds do not rise from 0 to {sequences:,}; prepare it again")


def open_megatron(place: str | Path, *, source: str, document_end: int, vocab: int) -> Shard:
    """The pair as a shard. All of it is read once: its hash, the largest token, and how its documents end."""
    index, (path, _) = read_index(place), pair(place)
    if np.dtype(index.dtype).kind == "f" or not index.lengths.sum():
        raise UserError(f"{path} holds {index.lengths.sum()} tokens of type {index.dtype}; whole numbers are needed")
    flat = np.memmap(path, index.dtype, mode="r")
    digest, low, high, ends = looked_through(flat, document_end)
    if low < 0 or high >= vocab:
        raise UserError(
            f"{path} has tokens from {low} to {high}, the tokenizer {vocab} words; give the one it was prepared with"
        )
    bounds = np.concatenate([[0], np.cumsum(index.lengths.astype(np.int64))])[index.documents]
    last = bounds[1:][np.diff(bounds) > 0] - 1
    if ends != len(last) or not bool((flat[last] == document_end).all()):
        raise UserError(
            f"{path} has {len(last):,} documents and {ends:,} tokens {document_end}, the tokenizer's document_end; each"
            " document must end with it and have no other (--append-eod): prepare the data with this tokenizer"
        )
    return Shard(
        source=source,
        part="train",
        path=str(path.absolute()),
        dtype=index.dtype,
        tokens=len(flat),
        documents=len(last),
        bytes=0,
        document_end=document_end,
        sha256=digest,
    )


def looked_through(flat: np.ndarray, document_end: int) -> tuple[str, int, int, int]:
    """(hash of all tokens, the smallest or 0, the largest, how many are document_end)."""
    digest, low, high, ends = hashlib.sha256(), 0, 0, 0
    for start in range(0, len(flat), PIECE):
        part = flat[start : start + PIECE]
        digest.update(part.tobytes())
        low, high = min(low, int(part.min())), max(high, int(part.max()))
        ends += int((part == document_end).sum())
    return digest.hexdigest(), low, high, ends


def write_megatron(shard: Shard, place: str | Path) -> None:
    """A shard as a pair that Megatron reads: one sequence per document, its end included."""
    tokens, path = pair(place)
    flat = np.memmap(shard.path, shard.dtype, mode="r")
    # Megatron has no uint32; the numbers are below 2**31 all the same.
    code, dtype = (8, "<u2") if np.dtype(shard.dtype).itemsize == 2 else (4, "<i4")
    stops = []
    with open(tokens, "wb") as file:
        for start in range(0, len(flat), PIECE):
            part = flat[start : start + PIECE]
            stops.append(np.flatnonzero(part == shard.document_end) + start + 1)
            file.write(part.astype(dtype).tobytes())
    ends = np.concatenate(stops)
    starts = np.concatenate([[0], ends[:-1]])
    counts = np.array([len(ends), len(ends) + 1], "<u8").tobytes()
    arrays = ((ends - starts, "<i4"), (starts * np.dtype(dtype).itemsize, "<i8"), (np.arange(len(ends) + 1), "<i8"))
    body = b"".join(values.astype(kind).tobytes() for values, kind in arrays)
    write_atomic(path, MAGIC + (1).to_bytes(8, "little") + bytes([code]) + counts + body)
