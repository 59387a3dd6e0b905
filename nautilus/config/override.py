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
import types
import typing
from collections.abc import Sequence
from pathlib import Path

from nautilus.config.layer import KINDS, Layer, lay, require


def apply_overrides(settings, overrides: Sequence[str]):
    """A copy of `settings` with each `path=value` applied in turn; the first wrong one is a ValueError."""
    for text in overrides:
        path, equals, value = text.partition("=")
        require(bool(equals and path), f"{text!r} is not of the form name=value")
        # A hyphen equals an underscore, but alone it is the letter of MLP layers.
        parts = [part if part == "-" else part.replace("-", "_") for part in path.split(".")]
        settings = change(settings, parts, value, path)
    return settings


def change(settings, path: list[str], value: str, full: str):
    names = [field.name for field in dataclasses.fields(settings)]
    if path[0] not in names:
        near = difflib.get_close_matches(path[0], names, n=1)
        hint = f"did you mean {'.'.join([*full.split('.')[: -len(path)], near[0]])!r}?" if near else f"have {names}"
        raise ValueError(f"no setting {full!r}; {hint}")
    old, hint = getattr(settings, path[0]), typing.get_type_hints(type(settings))[path[0]]
    if isinstance(old, tuple) and "Layer" in str(settings.__annotations__.get(path[0], "")):
        new = change_layers(old, path[1:], value, full, donors=(*settings.layers, *settings.mtp))
    elif len(path) > 1:
        require(dataclasses.is_dataclass(record_type(hint)), f"{full!r}: {path[0]!r} is a plain value, set it directly")
        new = change(old if old is not None else record_type(hint)(), path[1:], value, full)
    else:
        new = parse(value, hint, full)
    return replaced(settings, path[0], new)


def replaced(settings, name: str, new):
    return dataclasses.replace(settings, **{name: new})


def change_layers(old: tuple[Layer, ...], path: list[str], value: str, full: str, donors: tuple[Layer, ...]):
    if not path:
        first_of_kind = {layer.letter: layer for layer in reversed(donors)}
        return lay(value, *first_of_kind.values())
    require(len(path) > 1, f"{full}={value!r}: name the setting too, such as {full}.heads=8")
    if path[0].isdigit():
        chosen = [int(path[0])]
        require(chosen[0] < len(old), f"{full!r}: layer {path[0]} does not exist, the model has 0..{len(old) - 1}")
    else:
        require(path[0] in KINDS, f"{full!r}: {path[0]!r} is neither a layer number nor one of {' '.join(KINDS)}")
        chosen = [i for i, layer in enumerate(old) if layer.letter == path[0]]
        require(bool(chosen), f"{full!r}: the model has no layer of kind {path[0]!r}")
    return tuple(change(layer, path[1:], value, full) if i in chosen else layer for i, layer in enumerate(old))


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
    readers = {bool: parse_bool, int: parse_int, float: float, str: str, Path: Path}
    group = f"{full!r} is a group of settings; set one of its fields, such as {full}.{first_field(kind)}"
    require(kind in readers, group)
    try:
        return readers[kind](text)
    except ValueError as bad:
        raise ValueError(f"{full}={text!r} is not of type {kind.__name__}") from bad


def first_field(kind) -> str:
    return dataclasses.fields(kind)[0].name if dataclasses.is_dataclass(kind) else "name"


def parse_bool(text: str) -> bool:
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if text.lower() not in words:
        raise ValueError(text)
    return words[text.lower()]


def parse_int(text: str) -> int:
    """Whole numbers, also written 1_000 or 2e6."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer():
            raise
        return int(number)
