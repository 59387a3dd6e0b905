"""Where text comes from, and which of it is held out.

A `Source` says where. `read` yields its documents in an order that depends on nothing but their names. `survey` looks
at all of them once and settles, by hashes of the names, which are held out and which are left out for size; what it
returns gives the documents of either part, as often as wanted, without keeping them in memory.
"""

from __future__ import annotations

import hashlib
import itertools
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nautilus.data import embedded
from nautilus.data.readers import Decoder, files_at, is_jsonl, name_of, read_dataset, read_files, read_jsonl
from nautilus.runtime import UserError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".tex", ".py", ".c", ".h", ".cpp", ".rs", ".go", ".java", ".js", ".ts", ".sh")
TEXTS = {"python": embedded.code, "docstrings": embedded.docstrings, "reference": embedded.reference}
EMBEDDED = {**TEXTS, "twice": embedded.twice}
KINDS = (*EMBEDDED, "files", "jsonl", "dataset", "tokens")


@dataclass(frozen=True, kw_only=True)
class Document:
    source: str
    name: str  # unique inside its source and the same on every reading: a relative path, a row number
    text: str


@dataclass(frozen=True, kw_only=True)
class Source:
    """One place that text comes from. `weight` is its share of a mixture; None: as many tokens as it has."""

    name: str
    kind: str
    where: str = ""
    field: str = "text"
    split: str = "train"
    suffixes: tuple[str, ...] = TEXT_SUFFIXES
    undecodable: str = "error"
    held_out: float = 0.05
    max_bytes: int = 0
    weight: float | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(f"source {self.name!r}: kind={self.kind!r} is none of {', '.join(KINDS)}")
        if self.undecodable not in ("error", "skip", "replace"):
            raise UserError(f"source {self.name!r}: undecodable={self.undecodable!r} is none of error, skip, replace")
        if not 0 <= self.held_out < 1:
            raise UserError(f"source {self.name!r}: held_out={self.held_out} must be at least 0 and below 1")
        if self.max_bytes < 0:
            raise UserError(f"source {self.name!r}: max_bytes={self.max_bytes} must be 0 (no limit) or positive")
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise UserError(
                f"source {self.name!r}: weight={self.weight} must be positive; to leave it out, do not name it"
            )


def sources(
    places: Sequence[str], *, undecodable: str = "error", held_out: float = 0.05, max_bytes: int = 0
) -> tuple[Source, ...]:
    """Sources as people write them: `[weight*]place[#field]`.

    A place is `embedded` (or one of python, docstrings, reference), `twice` (lines to copy), a text file or folder, a
    .jsonl file or a folder of them, a folder written by `datasets`, `hub:owner/name[:split]`, or a pair of Megatron's
    token files, NAME.bin and NAME.idx, by either name or none. `max_bytes` limits each source of text.
    """
    found = []
    for text in places:
        weight, star, rest = text.rpartition("*")
        place, field = parted(rest)
        for kind, name, where, split in locate(place):
            source = Source(
                name=name,
                kind=kind,
                where=where,
                field=field or "text",
                split=split,
                undecodable=undecodable,
                held_out=held_out,
                max_bytes=max_bytes,
                weight=parse_weight(weight, text) if star else None,
            )
            found.append(source)
    names = [source.name for source in found]
    if len(set(names)) < len(names):
        raise UserError(f"two sources share a name: {', '.join(names)}; rename one file or folder")
    return tuple(found)


def parted(place: str) -> tuple[str, str]:
    """A place and a field of it, "" where none is named; a folder may have a # in its name."""
    before, mark, field = place.rpartition("#")
    return (before, field) if mark and "/" not in field else (place, "")


def parse_weight(text: str, whole: str) -> float:
    try:
        return float(text)
    except ValueError as bad:
        raise UserError(f"source {whole!r}: {text!r} before the * is not a number; write it like 0.5*folder") from bad


def locate(place: str) -> list[tuple[str, str, str, str]]:
    """(kind, name, where, split) for each source that a place stands for."""
    if place == "embedded":
        return [(kind, kind, "", "train") for kind in TEXTS]
    if place in EMBEDDED:
        return [(place, place, "", "train")]
    if place.startswith("hub:"):
        name, _, split = place.removeprefix("hub:").partition(":")
        return [("dataset", name.replace("/", "-"), name, split or "train")]
    path = Path(place).expanduser()
    base = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    if not path.is_dir() and base.with_name(base.name + ".idx").is_file():
        return [("tokens", base.name, str(base), "train")]
    if not path.exists():
        raise UserError(f"no text at {place!r}: no such file or folder; use 'embedded', a path, or hub:owner/name")
    return [(kind_of(path), name_of(Path(path.resolve().name)), str(path), "train")]


def kind_of(path: Path) -> str:
    if (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
        return "dataset"
    rows = [is_jsonl(file) for _, file in files_at(str(path))]
    return "jsonl" if rows and all(rows) else "files"


def read(source: Source, skipped: list[str] | None = None, broken: list[str] | None = None) -> Iterator[Document]:
    """Every document that is not blank, in a fixed order. What is left out as undecodable is named in `skipped`; where
    `broken` is given, rows of JSONL that hold no text are left out too, and it says why."""
    if source.kind == "tokens":
        raise UserError(f"source {source.name!r} is tokens, {source.where}.bin, where text is needed; give its text")
    decode = Decoder(undecodable=source.undecodable, skipped=[] if skipped is None else skipped)
    if source.kind == "files":
        pairs = read_files(source.where, source.suffixes, decode)
    elif source.kind == "jsonl":
        pairs = read_jsonl(source.where, source.field, decode, broken)
    elif source.kind == "dataset":
        pairs = read_dataset(source.where, source.field, source.split, decode)
    else:
        pairs = iter(EMBEDDED[source.kind]())
    return (Document(source=source.name, name=name, text=text) for name, text in pairs if text.strip())


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A source that has been looked at: which documents it gives, in which part, and a hash of all of it.

    `skipped` names what was left out as undecodable. The embedded text differs between interpreters, so `python` and
    `fingerprint` belong to every number that is reported.
    """

    source: Source
    train: frozenset[str]
    held_out: frozenset[str]
    train_bytes: int
    held_out_bytes: int
    skipped: tuple[str, ...]
    fingerprint: str
    python: str

    def documents(self, part: str) -> Iterator[Document]:
        """The documents of `train` or of `held_out`."""
        names = {"train": self.train, "held_out": self.held_out}[part]
        return (document for document in read(self.source) if document.name in names)


def survey(source: Source) -> Corpus:
    """Read everything once. An empty source is an error that says what was looked at."""
    skipped: list[str] = []
    sizes, digests = {}, {}
    for document in read(source, skipped):
        raw = document.text.encode()
        sizes[document.name], digests[document.name] = len(raw), hashlib.sha256(raw).digest()
    if not sizes:
        raise UserError(f"source {source.name!r} is empty: {looked_at(source, skipped)}")
    kept = within(sizes, source.max_bytes)
    if not kept:
        raise UserError(
            f"source {source.name!r}: max_bytes={source.max_bytes} is below its smallest document, "
            f"{min(sizes.values())} bytes; raise it, or set 0 for no limit"
        )
    held_out = choose_held_out(kept, source.held_out)
    whole = hashlib.sha256()
    for name in sorted(kept):
        whole.update(f"{len(name)}:{name}:{name in held_out}:".encode() + digests[name])
    return Corpus(
        source=source,
        train=kept - held_out,
        held_out=held_out,
        train_bytes=sum(sizes[name] for name in kept - held_out),
        held_out_bytes=sum(sizes[name] for name in held_out),
        skipped=tuple(skipped),
        fingerprint=whole.hexdigest(),
        python=f"{platform.python_implementation()} {platform.python_version()}",
    )


def looked_at(source: Source, skipped: list[str]) -> str:
    if skipped:
        return (
            f"all {len(skipped)} documents were skipped as undecodable, the first {skipped[0]}; convert them to UTF-8"
        )
    if source.kind != "files":
        return f"{source.where or 'the standard library here'} holds no text; choose another source"
    present = sorted({path.suffix or path.name for _, path in itertools.islice(files_at(source.where), 1000)})
    found = f"found {', '.join(present[:20])}" if present else "found no files"
    return (
        f"looked in {source.where} for text in {' '.join(source.suffixes)}, {found}; choose another place or suffixes"
    )


def place_of(name: str, purpose: str) -> float:
    """A number in [0, 1) that depends on these two words alone, on every machine."""
    return int.from_bytes(hashlib.blake2b(f"{purpose}:{name}".encode(), digest_size=8).digest()) / 2**64


def within(sizes: dict[str, int], max_bytes: int) -> frozenset[str]:
    """In an order settled by the names, every document that still fits. 0: no limit."""
    if not max_bytes:
        return frozenset(sizes)
    kept, room = set(), max_bytes
    for name in sorted(sizes, key=lambda name: (place_of(name, "keep"), name)):
        if sizes[name] <= room:
            kept.add(name)
            room -= sizes[name]
    return frozenset(kept)


def choose_held_out(names: frozenset[str], share: float) -> frozenset[str]:
    """Names whose hash is below the share, so that new documents never move old ones. At least one of two or more."""
    if share == 0 or len(names) < 2:
        return frozenset()
    held_out = frozenset(name for name in names if place_of(name, "held out") < share)
    if held_out == names or not held_out:
        return frozenset([min(names, key=lambda name: (place_of(name, "held out"), name))])
    return held_out
