"""Text out of files, JSONL rows and Hugging Face datasets, as (name, text) pairs in a fixed order."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nautilus.runtime import UserError, installing

PIECE = 16384  # bytes; a lone file is read in pieces of about this size, so that a part of it can be held out


@dataclass(kw_only=True)
class Decoder:
    """Bytes → text, with one answer to bytes that are no UTF-8: error, skip (counted here) or replace."""

    undecodable: str = "error"
    skipped: list[str] = field(default_factory=list)

    def __call__(self, raw: bytes, where: str, offset: int = 0) -> str | None:
        """The text, or None to leave it out. `offset` is where `raw` begins in the file."""
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as bad:
            if self.undecodable == "error":
                raise UserError(
                    f"{where}: byte {offset + bad.start} (0x{raw[bad.start]:02x}) is not UTF-8 and undecodable=error; "
                    "convert the file to UTF-8, or set undecodable=skip to leave such documents out and count them, "
                    "or undecodable=replace to read each bad byte as U+FFFD"
                ) from bad
            if self.undecodable == "skip":
                self.skipped.append(f"{where} (byte {offset + bad.start})")
                return None
        return raw.decode("utf-8", "replace")


def walk(root: Path) -> list[tuple[str, Path]]:
    """Files below a folder by relative name, sorted; hidden files and folders are left out, links are not followed."""

    def refuse(bad: OSError) -> None:
        raise bad

    found = []
    try:
        for folder, below, files in os.walk(root, onerror=refuse):
            below[:] = [name for name in below if not name.startswith(".")]
            paths = [Path(folder, name) for name in files if not name.startswith(".")]
            # Regular files only: a pipe would be waited for without end.
            found += [(name_of(path.relative_to(root)), path) for path in paths if path.is_file()]
    except OSError as bad:
        raise UserError(
            f"cannot read all of {root}: {bad.strerror} ({bad.filename}); change its permissions or name other places"
        ) from bad
    return sorted(found)


def name_of(path: Path) -> str:
    """A path as text that can be written anywhere: the bytes of a file's name need not be UTF-8."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def files_at(where: str) -> list[tuple[str, Path]]:
    root = Path(where)
    if not root.is_file() and not root.is_dir():
        raise UserError(f"no text at {where!r}: no such file or folder, or a pipe or device; check the path")
    return [(name_of(Path(root.name)), root)] if root.is_file() else walk(root)


def lines_of(path: Path) -> Iterator[bytes]:
    """The lines of a file, unpacked where its name ends in .gz."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            yield from file
    except (OSError, EOFError, zlib.error) as bad:
        raise UserError(f"cannot read {path}: {bad}; check its permissions and that it is whole") from bad


def read_files(where: str, suffixes: tuple[str, ...], decode: Decoder) -> Iterator[tuple[str, str]]:
    """One document per file with one of the suffixes, or the file that `where` names; a lone file in pieces."""
    found = [(name, path) for name, path in files_at(where) if path.suffix in suffixes or Path(where).is_file()]
    alone = len(found) == 1
    for name, path in found:
        offset = 0
        for i, raw in enumerate(pieces(lines_of(path)) if alone else [b"".join(lines_of(path))]):
            text = decode(raw, str(path), offset)
            offset += len(raw)
            if text is not None:
                yield f"{name}:{i:06d}" if alone else name, text.removeprefix("\ufeff")


def pieces(lines: Iterator[bytes]) -> Iterator[bytes]:
    """Cut at the first blank line past PIECE bytes, or at the first line end past four times that."""
    held, size = [], 0
    for line in lines:
        held.append(line)
        size += len(line)
        if size >= 4 * PIECE or (size >= PIECE and not line.strip()):
            yield b"".join(held)
            held, size = [], 0
    if held:
        yield b"".join(held)


def is_jsonl(path: Path) -> bool:
    return path.name.endswith((".jsonl", ".jsonl.gz"))


def read_jsonl(
    where: str, column: str, decode: Decoder, broken: list[str] | None = None
) -> Iterator[tuple[str, str]]:  # fmt: skip
    """One document per row: the text in its field `column`. A row without it is an error, or is told to `broken`."""
    for name, path in files_at(where):
        if not is_jsonl(path):
            continue
        offset = 0
        for number, raw in enumerate(lines_of(path), start=1):
            line = decode(raw, str(path), offset)
            offset += len(raw)
            if line is None or not line.strip():
                continue
            place = f"{path} line {number}"
            try:
                text = text_in(parse_row(line, place), column, place, decode)
            except UserError as bad:
                if broken is None:
                    raise
                broken.append(str(bad))
                continue
            if text is not None:
                yield f"{name}:{number}", text


def parse_row(line: str, place: str):
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as bad:
        raise UserError(f"{place} is not JSON ({bad}); every line must be one object") from bad


def text_in(row, column: str, place: str, decode: Decoder) -> str | None:
    if not isinstance(row, dict) or column not in row:
        have = f"the fields {sorted(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
        raise UserError(f"{place} has {have} but no field {column!r}; name the one that holds text, as in place#field")
    if not isinstance(row[column], str):
        raise UserError(f"{place}: field {column!r} holds a {type(row[column]).__name__}, not text; name another field")
    # JSON can spell half a surrogate pair, which no encoder accepts: the same care as for bad bytes.
    return decode(row[column].encode("utf-8", "surrogatepass"), place)


def read_dataset(where: str, column: str, split: str, decode: Decoder) -> Iterator[tuple[str, str]]:
    """One document per row of a folder written by `datasets`, or of a dataset on the hub."""
    for i, row in enumerate(open_dataset(where, split)):
        text = text_in(row, column, f"{where} row {i}", decode)
        if text is not None:
            yield f"{i:09d}", text


def open_dataset(where: str, split: str):
    try:
        import datasets
    except ImportError as bad:
        raise UserError(f"{where!r} needs the library 'datasets'; {installing('data')}") from bad
    try:
        if not Path(where).is_dir():
            return datasets.load_dataset(where, split=split)
        found = datasets.load_from_disk(where)
    except (OSError, ValueError) as bad:
        raise UserError(f"cannot open the dataset {where!r}: {bad}; check its name, its split and the network") from bad
    if isinstance(found, datasets.Dataset):
        return found
    if split not in found:
        raise UserError(f"{where!r} has the splits {sorted(found)} but not {split!r}; set split")
    return found[split]
