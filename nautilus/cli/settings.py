"""Words on the command line to a settings record, and a settings record to lines for people."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from nautilus.config import KINDS, Based, Config, Layer, apply_overrides, pattern_of, settings_of
from nautilus.presets import preset
from nautilus.runtime import UserError

ASSIGNMENT = re.compile(r"[A-Za-z_][^\s/=]*=")
TRUTH = {"true", "false", "yes", "no", "on", "off", "1", "0"}


def resolve(kind: type, words: Sequence[str]):
    """The record that the words ask for: `kind()` with MODEL and then every `a.b=v`, `--a.b=v`, `--a.b v` applied."""
    given, overrides = [*assignments(words, switches(kind))], []
    asked = {name.replace("-", "_"): value for name, value in given}
    settings: Any = kind.base(asked) if issubclass(kind, Based) else kind()
    for name, value in given:
        if name == "model" and typing.get_type_hints(kind).get("model") is Config:
            settings = dataclasses.replace(settings, model=preset(value))
        else:
            overrides.append(f"{name}={value}")
    return apply_overrides(settings, overrides)


def switches(kind: type) -> set[str]:
    """The settings that are on or off: alone on the command line, `--json` means json=true."""
    return {name for name, hint in typing.get_type_hints(kind).items() if hint is bool}


def assignments(words: Sequence[str], switches: set[str]) -> Iterator[tuple[str, str]]:
    """(name, value) of each setting; a word that is no assignment is the MODEL, of which there may be one."""
    model, position = None, 0
    while position < len(words):
        word = words[position]
        following = words[position + 1] if position + 1 < len(words) else None
        position += 1
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            if not equals:
                alone = name.replace("-", "_") in switches and (following or "").lower() not in TRUTH
                if not alone and (following is None or following.startswith("--")):
                    raise UserError(f"{word} was given without a value; write {word}=value")
                value = "true" if alone else str(following)
                position += not alone
            yield name, value
        elif ASSIGNMENT.match(word):
            name, _, value = word.partition("=")
            yield name, value
        else:
            if model is not None:
                raise UserError(f"two models were given, {model!r} and {word!r}; write settings as name=value")
            model = word
            yield "model", word


class Row(NamedTuple):
    name: str
    value: str
    help: str


def rows(record, prefix: str = "") -> Iterator[Row]:
    """One row per setting, groups opened up."""
    for field in settings_of(record):
        # `from_` is written `from`: the underscore is Python's need.
        value, name = getattr(record, field.name), prefix + field.name.removesuffix("_")
        about = help_of(type(record), field.name)
        if dataclasses.is_dataclass(value):
            yield from rows(value, f"{name}.")
        elif isinstance(value, tuple) and value and isinstance(value[0], tuple(KINDS.values())):
            yield Row(name, pattern_of(value), about or "one letter per layer")
            yield from layer_rows(value, name)
        else:
            yield Row(name, text_of(value), about)


def help_of(kind: type, name: str) -> str:
    """The field's help, or what the field that it overrides in a parent class says."""
    for parent in kind.__mro__:
        fields = vars(parent).get("__dataclass_fields__", {})
        if name in fields and "help" in fields[name].metadata:
            return fields[name].metadata["help"]
    return ""


def layer_rows(layers: tuple[Layer, ...], name: str) -> Iterator[Row]:
    """`layers.E.active` where all layers of a kind agree, `layers.3.active` where they do not."""
    for letter in dict.fromkeys(layer.letter for layer in layers):
        same_kind = {index: layer for index, layer in enumerate(layers) if layer.letter == letter}
        if len(set(same_kind.values())) == 1:
            yield from rows(next(iter(same_kind.values())), f"{name}.{letter}.")
        else:
            for index, layer in same_kind.items():
                yield from rows(layer, f"{name}.{index}.")


def text_of(value) -> str:
    """The value as one would write it on the command line."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(text_of(item) for item in value)
    return str(value).replace("\n", "\\n")


def pasteable(settings) -> list[str]:
    return [f"{row.name}={row.value}" for row in rows(settings)]


def listing(settings) -> str:
    """The settings with defaults and their help, one a line; the sizes of layers are left to --show."""
    found = [row for row in rows(settings) if not re.search(r"(layers|mtp)\.", row.name)]
    name, value = (max((len(row[column]) for row in found), default=0) for column in (0, 1))
    return "".join(f"  {row.name:<{name}}  {row.value:<{min(value, 24)}}  {row.help}".rstrip() + "\n" for row in found)
