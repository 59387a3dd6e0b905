"""Places of text cut into pieces that can be read apart from each other, and gathered into tasks of about one size.

A piece is a whole file, or a range of bytes of a .jsonl file: the lines that begin inside it. What is packed (.gz) or
arranged in columns (.parquet) is one piece whatever its size; it is still read row by row.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from nautilus.data.corpus import EMBEDDED, TEXT_SUFFIXES, read, sources
from nautilus.data.readers import Decoder, files_at, lines_of, name_of, parse_row, read_files, text_in
from nautilus.runtime import UserError, installing

HTML_SUFFIXES = (".html", ".htm", ".xhtml")
KIND_OF = {".jsonl": "jsonl", ".parquet": "parquet"} | dict.fromkeys(HTML_SUFFIXES, "html")
KIND_OF |= dict.fromkeys(TEXT_SUFFIXES, "text")
MOST_TASKS = 512  # every task leaves a file, and files of all tasks are open together when duplicates are sought


class Piece(NamedTuple):
    """Documents begin with `name`. `stop` is where the last line of a .jsonl begins at the latest; 0: no range."""

    name: str
    kind: str
    path: str
    field: str
    size: int
    start: int = 0
    stop: int = 0


def pieces_at(place: str, size: int, skip: list[str]) -> Iterator[Piece]:
    """The pieces of a place, of at most about `size` bytes where a file can be cut; `skip` hears of other files."""
    if place.startswith("hub:") or place in ("embedded", *EMBEDDED):
        yield from (Piece(source.name, "source", place, source.name, size) for source in sources([place]))
        return
    where, _, field = place.partition("#")
    files = files_at(str(Path(where).expanduser()))
    kinds = [KIND_OF.get(Path(path.name.removesuffix(".gz")).suffix, "") for _, path in files]
    for (name, path), kind in zip(files, kinds, strict=True):
        whole = os.stat(path).st_size
        # A lone text file is read in parts, as in training; among others a text file is one document.
        kind = "lone text" if kind == "text" and len(files) == 1 else kind
        if not kind:
            skip.append(name_of(path))
        elif kind == "jsonl" and path.suffix != ".gz":
            for start in range(0, whole, size):
                stop = min(start + size, whole)
                yield Piece(name, kind, str(path), field or "text", stop - start, start, stop)
        else:
            yield Piece(name, kind, str(path), field or "text", whole)


def plan(places: Sequence[str], size: int) -> tuple[list[list[Piece]], list[str]]:
    """(tasks, files that hold no text by their names). A task is at least `size` bytes of pieces, but for the last."""
    skipped: list[str] = []
    found = [piece for place in places for piece in pieces_at(place, size, skipped)]
    total = sum(piece.size for piece in found)
    if not total:
        raise UserError(
            f"no text at {', '.join(places)}: looked for .jsonl, .parquet, {', '.join(TEXT_SUFFIXES + HTML_SUFFIXES)}"
            f" (each but .parquet also .gz), saw {len(skipped)} other files; name another place"
        )
    tasks: list[list[Piece]] = [[]]
    for piece in found:
        if sum(each.size for each in tasks[-1]) >= max(size, total // MOST_TASKS):
            tasks.append([])
        tasks[-1].append(piece)
    return tasks, skipped


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every task of a curation is told. `work` is the folder of what lies in between, `sets` are named."""

    work: Path
    text: Path
    tasks: tuple[tuple[Piece, ...], ...]
    filters: tuple[str, ...]
    languages: tuple[str, ...]
    html: bool
    undecodable: str
    words: int
    width: int
    sets: tuple[tuple[str, tuple[Piece, ...]], ...]
    near: bool


class Raw(NamedTuple):
    """A document as it was found; `text` is None where its bytes are no UTF-8 and were to be skipped."""

    name: str
    text: str | None
    html: bool


def read_piece(piece: Piece, undecodable: str) -> Iterator[Raw]:
    decode = Decoder(undecodable=undecodable)
    if piece.kind == "source":
        source = next(each for each in sources([piece.path]) if each.name == piece.field)
        yield from (Raw(f"{piece.name}:{document.name}", document.text, False) for document in read(source))
    elif piece.kind == "jsonl":
        yield from read_rows(piece, decode)
    elif piece.kind == "parquet":
        yield from read_parquet(piece, decode)
    elif piece.kind == "lone text":
        for name, text in read_files(piece.path, TEXT_SUFFIXES, decode):
            yield Raw(name, text, False)
    else:
        yield Raw(piece.name, decode(b"".join(lines_of(Path(piece.path))), piece.path), piece.kind == "html")


def read_rows(piece: Piece, decode: Decoder) -> Iterator[Raw]:
    """The lines that begin in the range: one that began before it belongs to the piece before."""
    for offset, raw in lines_from(piece):
        where = f"{piece.path} at byte {offset}"
        line = decode(raw, where)
        if line is None or line.strip():
            row = None if line is None else text_in(parse_row(line, where), piece.field, where, decode)
            yield Raw(f"{piece.name}@{offset}", row, False)


def lines_from(piece: Piece) -> Iterator[tuple[int, bytes]]:
    if not piece.stop:
        offset = 0
        for line in lines_of(Path(piece.path)):
            yield offset, line
            offset += len(line)
        return
    with open(piece.path, "rb") as file:
        if piece.start:
            file.seek(piece.start - 1)
            file.readline()
        offset = file.tell()
        while offset < piece.stop and (line := file.readline()):
            yield offset, line
            offset += len(line)


def read_parquet(piece: Piece, decode: Decoder) -> Iterator[Raw]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as bad:
        raise UserError(f"{piece.path} needs the library 'pyarrow'; {installing('data')}") from bad
    try:
        with parquet.ParquetFile(piece.path) as table:
            if piece.field not in table.schema_arrow.names:
                raise UserError(
                    f"{piece.path} has the columns {table.schema_arrow.names} but not {piece.field!r}; name the one"
                    " that holds text, as in place#column"
                )
            number = 0
            for batch in table.iter_batches(batch_size=256, columns=[piece.field]):
                for row in batch.to_pylist():
                    yield Raw(f"{piece.name}:{number}", text_in(row, piece.field, piece.path, decode), False)
                    number += 1
    except (OSError, pyarrow.ArrowException) as bad:
        raise UserError(f"cannot read {piece.path}: {bad}; copy or download it again") from bad
