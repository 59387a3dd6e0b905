"""The one command syntax: `a.b=v` changes one setting of a tree of frozen records.

width=512              a plain value
rotary.theta=500000    a value inside a record
layers=MEM*E           a new pattern; every letter keeps the sizes it has in the old one
layers.E.active=4      one setting of every layer of a kind
layers.3.groups=2      one setting of one layer
"""

from __future__ import annotations

import dataclasses
import difflib
import keyword
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from nautilus.config.layer import KINDS, Layer, lay, require


class Based:
    """A settings record whose defaults depend on what is asked for."""

    @classmethod
    def base(cls, asked: Mapping[str, str]) -> Self:
        """The record that what was asked for, name by name as it was written, is then applied to."""
        return cls()


class Change(NamedTuple):
    """What is left of one override on its way down: the rest of its path, its value, its name as it was written."""

    path: list[str]
    value: str
    full: str


def apply_overrides(settings, overrides: Sequence[str]):
    """A copy of `settings` with every `path=value` applied; the first wrong one is a ValueError.

    A record is built once, with all that changes in it: settings that depend on one another may come in any order.
    Where one setting is given twice the later one counts.
    """
    changes = []
    for text in overrides:
        path, equals, value = text.partition("=")
        require(bool(equals and path), f"{text!r} is not of the form name=value")
        # A hyphen equals an underscore, but alone it is the letter of MLP layers.
        parts = [field_name(part) for part in path.split(".")]
        changes.append(Change(parts, value, path))
    return changed(settings, changes)


def setting(default: Any, text: str) -> Any:
    """A field with its help text."""
    return dataclasses.field(default=default, metadata={"help": text})


def settings_of(record) -> list[dataclasses.Field]:
    """The fields that text sets: all but those marked with `metadata={"setting": False}`, which are for code."""
    return [field for field in dataclasses.fields(record) if field.metadata.get("setting", True)]


def field_name(part: str) -> str:
    """The field that a word stands for: Python's own words, such as `from`, have an underscore behind them there."""
    name = part if part == "-" else part.replace("-", "_")
    return f"{name}_" if keyword.iskeyword(name) else name


def changed(settings, changes: Sequence[Change]):
    """The record with the changes made in it and in the records inside."""
    by_name: dict[str, list[Change]] = {}
    for change in changes:
        require_name(settings, change)
        by_name.setdefault(change.path[0], []).append(change._replace(path=change.path[1:]))
    values = {name: new_value(settings, name, inner) for name, inner in by_name.items()}
    where = ".".join(changes[0].full.split(".")[: -len(changes[0].path)]) if changes else ""
    try:
        return dataclasses.replace(settings, **values)
    except ValueError as bad:
        if where and not str(bad).startswith(where):
            bad.args = (f"{where}: {bad}",)  # errors of any kind stay what they are
        raise


def require_name(settings, change: Change) -> None:
    names = [field.name for field in settings_of(settings)]
    if change.path[0] in names:
        return
    near = nested(settings, change.path[0]) or difflib.get_close_matches(change.path[0], names, n=1)
    ahead = change.full.split(".")[: -len(change.path)]
    hint = f"did you mean {'.'.join([*ahead, near[0]])!r}?" if near else f"have {', '.join(names)}"
    raise ValueError(f"no setting {change.full!r}; {hint}")


def nested(settings, name: str) -> list[str]:
    """`group.name` for every record of these settings that has one of this name."""
    groups = {field.name: getattr(settings, field.name) for field in settings_of(settings)}
    records = {group: value for group, value in groups.items() if dataclasses.is_dataclass(value)}
    return [f"{group}.{name}" for group, value in records.items() if name in (f.name for f in settings_of(value))]


def new_value(settings, name: str, changes: list[Change]):
    old, hint = getattr(settings, name), typing.get_type_hints(type(settings))[name]
    if isinstance(old, tuple) and "Layer" in str(settings.__annotations__.get(name, "")):
        return changed_layers(old, changes, donors=(*settings.layers, *settings.mtp))
    inside = [change for change in changes if change.path]
    for change in changes:
        if not change.path:
            old = parse(change.value, hint, change.full)
    if not inside:
        return old
    kind = record_type(hint)
    require(dataclasses.is_dataclass(kind), f"{inside[0].full!r}: {name!r} is a plain value, set it directly")
    return changed(kind() if old is None else old, inside)


def changed_layers(layers: tuple[Layer, ...], changes: list[Change], donors: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """A new pattern first, then the settings of single layers and of kinds."""
    for change in changes:
        if not change.path:
            first_of_kind = {layer.letter: layer for layer in reversed(donors)}
            layers = lay(change.value, *first_of_kind.values())
    inside: dict[int, list[Change]] = {}
    for change in changes:
        for index in chosen_layers(layers, change) if change.path else ():
            inside.setdefault(index, []).append(change._replace(path=change.path[1:]))
    return tuple(changed(layer, inside[i]) if i in inside else layer for i, layer in enumerate(layers))


def chosen_layers(layers: tuple[Layer, ...], change: Change) -> list[int]:
    (which, *rest), full = change.path, change.full
    require(bool(rest), f"{full}={change.value!r}: name the setting too, such as {full}.heads=8")
    if which.isdecimal():
        require(int(which) < len(layers), f"{full!r}: layer {which} does not exist, the model has 0..{len(layers) - 1}")
        return [int(which)]
    require(which in KINDS, f"{full!r}: {which!r} is neither a layer number nor one of {' '.join(KINDS)}")
    found = [i for i, layer in enumerate(layers) if layer.letter == which]
    require(bool(found), f"{full!r}: the model has no layer of kind {which!r}")
    return found


def record_type(hint):
    """The record class inside `Record` or `Record | None`; otherwise the hint itself."""
    options = [a for a in typing.get_args(hint) if a is not type(None)] if is_union(hint) else [hint]
    return options[0] if len(options) == 1 else hint


def is_union(hint) -> bool:
    return isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union


def parse(text: str, hint, full: str):
    """The text as a value of the annotated type; a ValueError says what was expected."""
    if is_union(hint) and type(None) in typing.get_args(hint) and text.lower() in ("none", ""):
        return None
    kind = record_type(hint)
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        return tuple(parse(item.strip(), inner, full) for item in text.strip("()").split(",") if item.strip())
    readers = {bool: parse_bool, int: parse_int, float: parse_float, str: str, Path: Path}
    group = f"{full!r} is a group of settings; set one of its fields, such as {full}.{first_field(kind)}"
    require(kind in readers, group)
    try:
        return readers[kind](text)
    except ValueError as bad:
        kinds = {float: "a finite number", int: "a whole number"}
        raise ValueError(f"{full}={text!r} is not {kinds.get(kind, f'of type {kind.__name__}')}") from bad


def first_field(kind) -> str:
    return dataclasses.fields(kind)[0].name if dataclasses.is_dataclass(kind) else "name"


def parse_bool(text: str) -> bool:
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if text.lower() not in words:
        raise ValueError(text)
    return words[text.lower()]


def asked_int(asked: Mapping[str, str], name: str, default: int) -> int:
    """A whole number out of what was asked for, as it was written; a ValueError names it."""
    return typing.cast(int, parse(asked[name], int, name)) if name in asked else default


def parse_float(text: str) -> float:
    """Neither NaN nor an infinity, which sums would carry far; for what is to have no end a large number does."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def parse_int(text: str) -> int:
    """Whole numbers, also written 1_000 or 2e6."""
    try:
        return int(text)
    except ValueError:
        number = parse_float(text)
        if not number.is_integer():
            raise
        return int(number)
