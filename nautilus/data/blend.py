"""Blend files: which sources, in which shares, and where in the run the shares change.

A TOML or JSON file, read by `nautilus pretrain blend=FILE`:

    unit = "share"               # what `until` counts: shares of the run, or "tokens"

    [sources]                    # name = place[#field], as in data=
    web = "texts/web"
    maths = "texts/maths.jsonl#text"

    [[phases]]
    until = 0.8
    weights = { web = 9, maths = 1 }

    [[phases]]                   # the last phase goes to the end
    weights = { web = 1, maths = 1 }

In place of phases a file may say `base = "nano"`, "super" or "ultra": the phases of that model (data/mixtures.py),
whose sources it maps to places. Every source of the phases needs a place; with `missing = "drop"` those without one are
left out, and the shares of the others keep their ratio. Relative places begin at the file's own folder.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import operator
import re
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nautilus.data.corpus import Source, sources
from nautilus.data.mix import Phase
from nautilus.data.mixtures import BORDERS, mixture
from nautilus.runtime import UserError, read_text

FILE_NAME = re.compile(r"[^/.\0][^/\0]{0,99}")
KEYS = {"base", "missing", "unit", "sources", "phases"}


@dataclass(frozen=True, kw_only=True)
class Blend:
    """`phases` are (where the phase ends in `unit`, weight by source) in order; the last one ends with the run."""

    where: str
    places: Mapping[str, str]
    phases: tuple[tuple[float, Mapping[str, float]], ...]
    unit: str = "share"

    def sources(self, *, undecodable: str = "error", max_bytes: int = 0) -> tuple[Source, ...]:
        """The sources by the blend's own names."""
        return tuple(
            self.source(name, place, undecodable=undecodable, max_bytes=max_bytes)
            for name, place in self.places.items()
        )

    def source(self, name: str, place: str, **how) -> Source:
        path, mark, field = place.partition("#")
        beside = Path(self.where).parent / Path(path).expanduser()
        # A path that is not there goes on as it was written, so that the message names it so.
        known = ":" in path or not (beside.exists() or beside.with_suffix(".idx").exists())
        found = sources([place if known else f"{beside}{mark}{field}"], **how)
        if len(found) != 1:
            raise UserError(
                f"{self.where}: source {name!r} is {place!r}, which stands for {', '.join(s.name for s in found)};"
                " name one of them"
            )
        return dataclasses.replace(found[0], name=name)

    def rows(self, *, length: int, total: int) -> tuple[Phase, ...]:
        """The phases in rows of `length` tokens, of a run of `total` rows; those that begin after its end are left
        out. A border lies at the row nearest to it."""
        row = (lambda until: round(until * total)) if self.unit == "share" else (lambda until: round(until / length))
        return self.phases_by([row], [total], f"{total:,} rows of {length} tokens")[0]

    def rows_of_several(self, rows: Sequence[Callable[[float], int]], *, tokens: int) -> list[tuple[Phase, ...]]:
        """The same for several streams that give the rows of a run of `tokens` together. rows: for each stream, how
        many of its rows the run has had after so many tokens."""
        unit = tokens if self.unit == "share" else 1
        scaled = [lambda until, row=row: row(until * unit) for row in rows]
        return self.phases_by(scaled, [row(tokens) for row in rows], f"{tokens:,} tokens")

    def phases_by(self, rows: Sequence[Callable], ends: Sequence[int], run: str) -> list[tuple[Phase, ...]]:
        """By stream, phases that begin at row(until) of the one before; those that the stream has no rows of are left
        out. rows, ends: of each stream. A UserError where no stream has rows of a phase that begins in the run."""
        found = []
        for row, end in zip(rows, ends, strict=True):
            starts = [0, *(row(until) for until, _ in self.phases[:-1])]
            found.append([min(start, end) for start in starts] + [end])
        for number, spans in enumerate(zip(*map(itertools.pairwise, found), strict=True), start=1):
            if all(start == stop for start, stop in spans) and any(map(operator.lt, (s for s, _ in spans), ends)):
                raise UserError(
                    f"{self.where}: in a run of {run} phase {number} has no rows; train longer, or move the borders"
                    " apart"
                )
        return [
            tuple(
                Phase(start, weights)
                for (start, stop), (_, weights) in zip(itertools.pairwise(starts), self.phases, strict=True)
                if start < stop
            )
            for starts in found
        ]


def read_blend(path: str | Path) -> Blend:
    """The blend of a file; a UserError says which part of it cannot be."""
    path = Path(path)
    if str(path) in BORDERS:
        raise UserError(
            f"blend={path} names the mixture of a model, but not where your text is; write a file with"
            f' base = "{path}" and a table [sources], and give its name'
        )
    document = parsed(path)
    if unknown := sorted(set(document) - KEYS):
        raise UserError(f"{path} has {', '.join(unknown)}, which no blend has; it may have {', '.join(sorted(KEYS))}")
    places, unit = document.get("sources"), document.get("unit", "share")
    if not isinstance(places, dict) or not places or not all(isinstance(each, str) for each in places.values()):
        raise UserError(f'{path} needs a table [sources] of name = "place"; it has {places!r}')
    if strange := [name for name in places if not FILE_NAME.fullmatch(name)]:
        raise UserError(f"{path}: source {strange[0]!r} names a folder of the run; take / and a dot in front out of it")
    if unit not in ("share", "tokens"):
        raise UserError(f"{path}: unit={unit!r} is neither share nor tokens")
    phases = checked(path, phases_in(path, document), unit)
    phases = with_places(path, phases, places, document.get("missing", "error"))
    used = {name for _, weights in phases for name, weight in weights.items() if weight}
    if idle := sorted(set(places) - used):
        raise UserError(f"{path}: no phase gives weight to {', '.join(idle)}; give it some, or take out its place")
    return Blend(where=str(path), places=places, phases=phases, unit=unit)


def sources_of(data: Sequence[str], blend: Path | None, **how) -> tuple[Source, ...]:
    """The sources of a blend file or, without one, of `data`."""
    return sources(data, **how) if blend is None else read_blend(blend).sources(**how)


def parsed(path: Path) -> dict:
    text = read_text(path, "check the path of the blend file")
    try:
        document = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as bad:
        raise UserError(f"{path} is no {'JSON' if path.suffix == '.json' else 'TOML'} ({bad}); mend it") from bad
    if not isinstance(document, dict):
        raise UserError(f"{path} holds a {type(document).__name__}; a blend is a table with [sources] and [[phases]]")
    return document


def phases_in(path: Path, document: dict) -> list[tuple[float, dict[str, float]]]:
    base, phases = document.get("base"), document.get("phases")
    if (base is None) == (phases is None):
        raise UserError(f"{path} must have either base or phases; it has {'neither' if base is None else 'both'}")
    if base is not None:
        if base not in BORDERS or document.get("unit", "share") != "share":
            raise UserError(f'{path}: base={base!r} must be one of {", ".join(BORDERS)}, with unit = "share"')
        return mixture(base)
    if not isinstance(phases, list) or not phases or not all(isinstance(each, dict) for each in phases):
        raise UserError(f"{path}: phases={phases!r} must be a list of tables, [[phases]]")
    found = []
    for i, phase in enumerate(phases):
        last = i == len(phases) - 1
        if set(phase) - {"until", "weights"} or "weights" not in phase or ("until" not in phase and not last):
            raise UserError(f"{path}: phase {i + 1} has {sorted(phase)}; it needs weights and, but for the last, until")
        if last and "until" in phase:
            raise UserError(f"{path}: the last phase has until={phase['until']}, but it goes to the end; take it out")
        found.append((phase.get("until", float("inf")), phase["weights"]))
    return found


def checked(path: Path, phases: list, unit: str) -> list:
    border = 0.0
    for i, (until, weights) in enumerate(phases):
        numbers = [until, *(weights.values() if isinstance(weights, dict) else ["no table"])]
        if any(type(each) not in (int, float) or each < 0 or each != each or beyond(each) for each in numbers):
            raise UserError(f"{path}: phase {i + 1} has until={until}, weights={weights}; numbers from 0 on are needed")
        if sum(weights.values()) in (0, float("inf")):
            raise UserError(
                f"{path}: the weights of phase {i + 1} are {weights}; their sum must be positive and finite"
            )
        inside = i == len(phases) - 1 or border < until < (1 if unit == "share" else float("inf"))
        if not inside:
            raise UserError(f"{path}: phase {i + 1} ends at until={until} {unit}; borders rise, shares from 0 to 1")
        border = until
    return phases


def beyond(number: float) -> bool:
    """Whether a whole number, which may have any length, is none of floating point."""
    return isinstance(number, int) and number > sys.float_info.max


def with_places(path: Path, phases: list, places: Mapping[str, str], missing: str) -> tuple:
    if missing not in ("error", "drop"):
        raise UserError(f"{path}: missing={missing!r} is neither error nor drop")
    absent = sorted({name for _, weights in phases for name, weight in weights.items() if weight} - set(places))
    if absent and missing == "error":
        raise UserError(f'{path} has no place for {", ".join(absent)}; add them to [sources], or set missing = "drop"')
    kept = tuple((until, {n: w for n, w in weights.items() if n in places and w}) for until, weights in phases)
    if empty := [str(i + 1) for i, (_, weights) in enumerate(kept) if not weights]:
        raise UserError(f"{path}: no source of phase {', '.join(empty)} has a place; add one to [sources]")
    return kept
