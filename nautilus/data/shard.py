"""A corpus encoded once: tokens as flat files that later runs open in no time.

    <cache>/<source>-<key>/train.bin  held_out.bin  index.json

The key is a hash of the texts and the tokenizer, so another corpus or another tokenizer gives another folder and
nothing stale is ever read. Every document is followed by the tokenizer's document_end, which plain text cannot contain,
so the file needs no table of documents.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nautilus.data.batch import Batch
from nautilus.data.card import encoded_card
from nautilus.data.corpus import Corpus, Document
from nautilus.data.pack import cut_rows
from nautilus.data.tokenizer import Tokenizer
from nautilus.runtime import UserError, atomic_folder, write_atomic

PARTS = ("train", "held_out")
BATCH_BYTES = 1 << 20  # text handed to the encoder's threads at a time


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One part of one encoded source. `bytes` counts its UTF-8 text, `tokens` includes one end per document."""

    source: str
    part: str
    path: str
    dtype: str
    tokens: int
    documents: int
    bytes: int
    document_end: int
    sha256: str

    def rows(self, length: int, *, reset: bool = True, pad: int = 0, term: str = "next_token") -> ShardRows:
        return ShardRows(shard=self, length=length, reset=reset, pad=pad, term=term)


@dataclass(frozen=True, kw_only=True)
class ShardRows:
    """A shard as numbered rows; see pack.py for what `reset` decides."""

    shard: Shard
    length: int
    reset: bool = True
    pad: int = 0
    term: str = "next_token"

    def __len__(self) -> int:
        return -(-self.shard.tokens // self.length)

    @property
    def fingerprint(self) -> str:
        plain = (self.shard.sha256, self.length, self.reset, self.term)
        return hashlib.sha256(repr(plain).encode()).hexdigest()[:16]

    @functools.cached_property
    def flat(self) -> np.ndarray:
        return np.memmap(self.shard.path, dtype=self.shard.dtype, mode="r")

    def take(self, rows: Sequence[int]) -> Batch:
        pieces = [self.flat[row * self.length : (row + 1) * self.length] for row in rows]
        return cut_rows(pieces, self.length, self.shard.document_end, self.pad, self.reset, self.term)


def encode_corpus(
    corpus: Corpus, tokenizer: Tokenizer, cache: str | Path, *, report: Callable[[int, int], None] | None = None
) -> dict[str, Shard]:
    """The shards `train` and (unless nothing is held out) `held_out` of a corpus; encoded now, or found in the cache.
    `report` is called with (bytes done, bytes in all)."""
    key = hashlib.sha256(f"{corpus.fingerprint} {tokenizer.fingerprint}".encode()).hexdigest()[:12]
    folder = Path(cache) / f"{corpus.source.name}-{key}"
    if (folder / "index.json").exists():
        return open_shards(folder)
    total, done = corpus.train_bytes + corpus.held_out_bytes, 0
    with atomic_folder(folder) as fresh:
        written = {}
        for part in PARTS:
            written[part] = write_tokens(corpus.documents(part), tokenizer, fresh / f"{part}.bin", report, done, total)
            done += written[part]["bytes"]
        if written["train"]["bytes"] != corpus.train_bytes or written["held_out"]["bytes"] != corpus.held_out_bytes:
            raise UserError(f"source {corpus.source.name!r} changed while it was read; start again once it is still")
        index = {
            "source": corpus.source.name,
            "document_end": tokenizer.document_end,
            "corpus": corpus.fingerprint,
            "tokenizer": tokenizer.fingerprint,
            "python": corpus.python,
            "skipped": len(corpus.skipped),
            "parts": written,
        }
        (fresh / "README.md").write_text(encoded_card(index))
        write_atomic(fresh / "index.json", json.dumps(index, indent=2) + "\n")
    return open_shards(folder)


def write_tokens(
    documents: Iterable[Document], tokenizer: Tokenizer, path: Path, report, done: int, total: int
) -> dict:
    """Write one flat file; returns what the index says about it."""
    dtype = np.dtype("uint16" if tokenizer.vocab <= 1 << 16 else "uint32").newbyteorder("<")
    digest, end = hashlib.sha256(), np.asarray([tokenizer.document_end], dtype)
    counts = {"tokens": 0, "documents": 0, "bytes": 0}
    with path.open("wb") as file:
        for group in in_groups(documents):
            for text, tokens in zip(group, tokenizer.encode_batch(group), strict=True):
                raw = np.concatenate([np.asarray(tokens, dtype), end]).tobytes()
                file.write(raw)
                digest.update(raw)
                counts["tokens"] += len(tokens) + 1
                counts["documents"] += 1
                counts["bytes"] += len(text.encode())
            if report is not None:
                report(done + counts["bytes"], total)
    return {**counts, "dtype": dtype.str, "sha256": digest.hexdigest()}


def in_groups(documents: Iterable[Document]) -> Iterator[list[str]]:
    held, size = [], 0
    for document in documents:
        held.append(document.text)
        size += len(document.text)
        if size >= BATCH_BYTES:
            yield held
            held, size = [], 0
    if held:
        yield held


def open_shards(folder: str | Path, *, verify: bool = True) -> dict[str, Shard]:
    """The parts of an encoded source that hold text. `verify` reads the files once and compares their hashes."""
    folder = Path(folder)
    try:
        index = json.loads((folder / "index.json").read_text())
        shards = [shard_of(folder, part, index) for part in PARTS]
    except (OSError, ValueError, KeyError, TypeError) as bad:
        raise UserError(
            f"{folder} is no folder of token shards ({bad}); remove it and it will be written anew"
        ) from bad
    for shard in shards:
        size = Path(shard.path).stat().st_size if Path(shard.path).exists() else 0
        good = size == shard.tokens * np.dtype(shard.dtype).itemsize
        if not good or (verify and hash_of(shard.path) != shard.sha256):
            raise UserError(
                f"{shard.path} is not what its index describes; remove {folder} and it will be written anew"
            )
    return {shard.part: shard for shard in shards if shard.tokens}


def shard_of(folder: Path, part: str, index: dict) -> Shard:
    names = {field.name for field in dataclasses.fields(Shard)}
    entry = {name: value for name, value in index["parts"][part].items() if name in names}
    path = str((folder / f"{part}.bin").absolute())
    return Shard(source=index["source"], part=part, path=path, document_end=index["document_end"], **entry)


def hash_of(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
