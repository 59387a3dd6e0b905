"""Rows of the files that sets of prompts are published as: JSONL, JSON, CSV and parquet, each with its place.

    for row in rows_at("hotpot_dev_distractor_v1.json", ("hotpot_*.json",)):
        row.text("question"), row.place

A file may be packed (.gz), but for parquet. A `.json` file holds one value, or one on each line as BFCL has it.
"""

from __future__ import annotations

import csv
import fnmatch
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from nautilus.data.readers import Decoder, files_at, lines_of, parse_row
from nautilus.runtime import UserError, installing

BATCH = 64  # rows of a parquet file that are in memory together
FIELD = 1 << 26  # characters of a CSV field: whole articles and reports stand in one


@dataclass(frozen=True, kw_only=True)
class Row:
    """The fields of one row, asked for by the names that its publishers gave them. place: for errors, file and line."""

    fields: Mapping[str, Any]
    file: Path
    place: str

    def refuse(self, problem: str) -> NoReturn:
        raise UserError(f"{self.place}: {problem}; check that this is a file of the set, whole and as it was published")

    def get(self, *names: str) -> Any:
        """The first of these fields that the row has, None where it has none of them."""
        return next((self.fields[name] for name in names if self.fields.get(name) is not None), None)

    def value(self, *names: str) -> Any:
        found = self.get(*names)
        if found is None:
            self.refuse(f"no field {' or '.join(map(repr, names))} among {', '.join(map(repr, self.fields)) or 'none'}")
        return found

    def text(self, *names: str) -> str:
        found = self.value(*names)
        if not isinstance(found, str):
            self.refuse(f"field {' or '.join(map(repr, names))} holds a {type(found).__name__}, not text")
        return self.whole(found)

    def whole(self, text: str) -> str:
        """JSON can spell half a surrogate pair, which no encoder accepts."""
        try:
            text.encode()
        except UnicodeEncodeError as bad:
            self.refuse(f"character {bad.start} of a field is no Unicode character")
        return text

    def listed(self, *names: str) -> list:
        found = self.value(*names)
        if not isinstance(found, list):
            self.refuse(f"field {' or '.join(map(repr, names))} holds a {type(found).__name__}, not a list")
        return found

    def inner(self, value: Any, what: str) -> Row:
        """A row of what stands inside this one."""
        if not isinstance(value, Mapping):
            self.refuse(f"{what} is a {type(value).__name__}, not an object")
        return Row(fields=value, file=self.file, place=f"{self.place}, {what}")


def rows_at(where: str | Path, patterns: Sequence[str]) -> Iterator[Row]:
    """The rows of a file; of a folder, those of all files below it whose names match one of the patterns."""
    alone = Path(where).is_file()
    found = [
        path
        for name, path in files_at(str(where))
        if alone or any(fnmatch.fnmatch(name.rpartition("/")[2], pattern) for pattern in patterns)
    ]
    if not found:
        raise UserError(f"{where} has no file named {' or '.join(patterns)}; name the file itself, or another folder")
    for path in found:
        yield from rows_of(path)


def rows_of(path: Path) -> Iterator[Row]:
    kind = Path(path.name.removesuffix(".gz")).suffix
    readers = {".jsonl": json_lines, ".json": json_values, ".csv": csv_rows, ".parquet": parquet_rows}
    readers[".traj"] = json_values  # SWE-agent's name for it
    if kind not in readers:
        raise UserError(f"{path} is none of {', '.join(readers)}; name a file of such a kind")
    for value, place in readers[kind](path):
        if not isinstance(value, Mapping):
            raise UserError(f"{place} holds a {type(value).__name__}, where every row must be an object")
        yield Row(fields=value, file=path, place=place)


def text_lines(path: Path) -> Iterator[str]:
    decode, offset = Decoder(), 0
    for number, raw in enumerate(lines_of(path)):
        line = decode(raw, str(path), offset)
        offset += len(raw)
        assert line is not None
        yield line if number else line.removeprefix("\ufeff")


def json_lines(path: Path) -> Iterator[tuple[Any, str]]:
    for number, line in enumerate(text_lines(path), start=1):
        if line.strip():
            yield parse_row(line, f"{path} line {number}"), f"{path} line {number}"


def json_values(path: Path) -> Iterator[tuple[Any, str]]:
    lines = [*text_lines(path)]
    try:
        value = json.loads("".join(lines))
    except json.JSONDecodeError as bad:
        if bad.msg == "Extra data" and bad.lineno > 1:
            yield from json_lines(path)
            return
        raise UserError(f"{path} line {bad.lineno} is not JSON ({bad.msg}); copy or download it again") from bad
    except (ValueError, RecursionError) as bad:
        raise UserError(f"{path} is not JSON ({bad}); copy or download it again") from bad
    if not isinstance(value, list):
        yield value, f"{path} line 1"
        return
    for number, each in enumerate(value, start=1):
        yield each, f"{path} entry {number}"


def csv_rows(path: Path) -> Iterator[tuple[Any, str]]:
    csv.field_size_limit(FIELD)
    reader = csv.DictReader(text_lines(path), strict=True)
    try:
        for row in reader:
            place = f"{path} line {reader.line_num}"
            if None in row or None in row.values():
                raise UserError(f"{place} has another number of fields than line 1; copy or download the file again")
            yield row, place
    except csv.Error as bad:
        raise UserError(f"{path} line {reader.reader.line_num} is not CSV ({bad}); copy or download it again") from bad


def parquet_rows(path: Path) -> Iterator[tuple[Any, str]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as bad:
        raise UserError(f"{path} needs the library 'pyarrow'; {installing('data')}") from bad
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield row, f"{path} row {number}"
    except (OSError, pyarrow.ArrowException) as bad:
        raise UserError(f"cannot read {path} after row {number}: {bad}; copy or download it again") from bad
