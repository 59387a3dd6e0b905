"""A study: variants of one training, over several seeds. The first variant is the control.

A TOML file, read by `nautilus compare study=FILE`:

    about = "Whether the rotation is needed at this size."
    model = "toy"                                  # a preset, as in `nautilus pretrain toy`
    base = ["steps=400", "data=python"]            # settings of `nautilus pretrain` that all variants share
    equal = ["tokens", "parameters"]               # what must agree within 2 %; also "active"
    measure = "held_out"                           # or "needle": retrieval beyond the length of training

    [variants]                                     # a name, and what it changes
    bf16 = []
    nvfp4 = ["precision.format=nvfp4"]
    no_rotation = ["precision.format=nvfp4", "precision.rotate=false"]

A seed has the same order of the text and, tensor by tensor of equal name and shape, the same initial weights in every
variant. `seed` and `out` are the study's own.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from nautilus.config import apply_overrides, weight_count
from nautilus.presets import preset
from nautilus.runtime import UserError, read_text
from nautilus.train.continuing import Following

MEASURES = ("held_out", "needle")
WORK = ("tokens", "parameters", "active")
TOLERANCE = 0.02
OWN = ("seed", "out")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, kw_only=True)
class Study:
    name: str
    variants: Mapping[str, tuple[str, ...]]
    base: tuple[str, ...] = ()
    about: str = ""
    model: str = "toy"
    equal: tuple[str, ...] = ("tokens",)
    measure: str = "held_out"
    needles: int = 8  # of a document, where they are measured
    demonstrate: bool = False  # the techniques of NVFP4 on the page

    def __post_init__(self):
        asked = f"study {self.name}"
        if len(self.variants) < 2:
            raise UserError(f"{asked} has {len(self.variants)} variants; give a control and at least one to compare")
        for name in self.variants:
            if not NAME.fullmatch(name):
                raise UserError(f"{asked}: variant {name!r} names a folder; use letters, digits, _ . and -")
        if self.measure not in MEASURES:
            raise UserError(f"{asked}: measure={self.measure!r} is unknown; have {', '.join(MEASURES)}")
        if strange := sorted(set(self.equal) - set(WORK)):
            raise UserError(f"{asked}: equal={', '.join(strange)} is unknown; have {', '.join(WORK)}")
        for words in (self.base, *self.variants.values()):
            for word in words:
                if word.partition("=")[0].lstrip("-") in OWN:
                    raise UserError(f"{asked}: {word!r} is the study's own; give seeds= and out= to compare")

    @property
    def control(self) -> str:
        return next(iter(self.variants))

    def narrowed(self, base: Sequence[str], variants: Sequence[str]) -> Self:
        """With more settings for all, and of the variants only the control and those named."""
        if unknown := [name for name in variants if name not in self.variants]:
            raise UserError(f"study {self.name} has no variant {unknown[0]!r}; have {', '.join(self.variants)}")
        kept = {n: w for n, w in self.variants.items() if not variants or n in variants or n == self.control}
        return replace(self, base=(*self.base, *base), variants=kept)

    def settings(self, kind: type[Following], variant: str, *own: str):
        """The settings record of one training; a UserError names the variant."""
        overrides = [*self.base, *self.variants[variant], *own]
        asked = dict(word.split("=", 1) for word in overrides if "=" in word)
        try:
            start: Any = kind.base(asked)
            if "from" not in asked:
                start = replace(start, model=preset(self.model))
            return apply_overrides(start, overrides)
        except ValueError as bad:
            raise UserError(f"study {self.name}, variant {variant}: {bad}") from bad


def work_of(settings) -> dict[str, int]:
    """Trained tokens; stored weights; those that one token multiplies with in the main stack, so its multiply-adds."""
    count = weight_count(settings.model)
    tokens = settings.steps * settings.rows * settings.length
    return {"tokens": tokens, "parameters": count["main"] + count["mtp"], "active": count["active"]}


def refuse_unequal(study: Study, records: Mapping[str, Any]) -> None:
    """A UserError where variants differ in what the study says is equal."""
    work = {name: work_of(settings) for name, settings in records.items()}
    control = work[study.control]
    for name, own in work.items():
        for what in study.equal:
            if abs(own[what] - control[what]) > TOLERANCE * control[what]:
                raise UserError(
                    f"study {study.name}: {name} has {what}={own[what]:,}, {study.control} has {control[what]:,}; make "
                    f"them agree within {TOLERANCE:.0%}, or take {what!r} out of equal="
                )


def open_study(where: str, named: Mapping[str, Study]) -> Study:
    """One of the named studies, or a TOML file."""
    if where in named:
        return named[where]
    path = Path(where)
    if not path.is_file():
        near = difflib.get_close_matches(where, named, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"have {', '.join(named)}, or a TOML file"
        raise UserError(f"no study {where!r}; {hint}")
    try:
        found = tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as bad:
        raise UserError(f"study {where} is no TOML: {bad}") from bad
    return read_study(path.stem, where, found)


def read_study(name: str, where: str, found: dict[str, Any]) -> Study:
    known = {field.name for field in fields(Study)} - {"name"}
    if unknown := sorted(found.keys() - known):
        raise UserError(f"study {where} has {unknown[0]!r}; it may have {', '.join(sorted(known))}")
    variants = found.get("variants")
    if not isinstance(variants, dict):
        raise UserError(f"study {where} has no variants; give a table [variants] of names with their settings")
    lists = {"base": found.get("base", []), "equal": found.get("equal", ["tokens"])}
    for key, value in (lists | {f"variants.{name}": words for name, words in variants.items()}).items():
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise UserError(f'study {where}: {key} must be a list of settings, such as ["steps=400"]')
    for key, kind in {"about": str, "model": str, "measure": str, "needles": int, "demonstrate": bool}.items():
        if type(found.get(key, kind())) is not kind:
            raise UserError(f"study {where}: {key}={found[key]!r} must be of type {kind.__name__}")
    plain: dict[str, Any] = {key: tuple(value) for key, value in lists.items()}
    plain["variants"] = {name: tuple(words) for name, words in variants.items()}
    return Study(name=name, **(found | plain))
