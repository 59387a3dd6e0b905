"""The value of one argument of a tool call: from the text the model wrote to JSON, by the tool's schema.

Nothing is ever evaluated. Where the text is not JSON of a type that the schema allows, it stays what it is: a string.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

FIRST = {
    "object": "{",
    "array": "[",
    "integer": "-0123456789",
    "number": "-0123456789",
    "boolean": "tfTF",
    "null": "nN",
}
WORDS = {"True": "true", "False": "false", "None": "null"}  # as templates write them that print with Python's str


class ArgumentText:
    """The text of one value, in pieces, as JSON, in pieces.

    types: what the schema allows; empty where it does not say, and then the value is a string. A string is released as
    it comes. Any other value is released when it is complete, and so is one that may be a string or something else,
    unless its first character shows that it can only be a string.
    """

    def __init__(self, types: frozenset[str]):
        self.types, self.held, self.opened = types, [], False
        self.starts = "".join(FIRST.get(kind, "") for kind in types)
        self.string = True if types <= {"string"} else None if "string" in types else False  # None: not yet known

    def add(self, text: str) -> str:
        self.held.append(text)
        if self.string is None and text.strip():
            self.string = text.lstrip()[0] not in self.starts
        return self.release() if self.string else ""

    def release(self) -> str:
        text, self.held = "".join(self.held), []
        quote, self.opened = "" if self.opened else '"', True
        return quote + escaped(text)

    def finish(self) -> str:
        return self.release() + '"' if self.string else as_json("".join(self.held), self.types)


def as_json(text: str, types: frozenset[str]) -> str:
    """`text` if it is JSON of a type that is allowed, else a JSON string of it. Numbers keep all their digits.

    Where a string is not allowed, any JSON passes: a value of the wrong type tells its reader more than a string of it.
    """
    word = WORDS.get(text.strip(), text.strip())
    try:
        value = json.loads(word, parse_constant=refuse)
    except (ValueError, RecursionError):
        return f'"{escaped(text)}"'
    kind = type_of(value)
    fits = "string" not in types or kind in types or (kind == "integer" and "number" in types)
    return word if fits else f'"{escaped(text)}"'


def escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def refuse(word: str):
    raise ValueError(f"{word} is not JSON")


def type_of(value: Any) -> str:
    """What JSON Schema calls the type of a value that came from JSON."""
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "null")


class Signatures:
    """Which types the parameters of the declared functions may have."""

    def __init__(self, tools: Sequence[Mapping]):
        functions = [tool.get("function", tool) for tool in tools]
        self.schemas = {function.get("name"): function.get("parameters") for function in functions}
        self.parts: dict[str, list[Mapping]] = {}  # of the functions that were asked for
        self.known: dict[tuple[str, str], frozenset[str]] = {}  # a model may give one parameter very often

    def types(self, function: str, parameter: str) -> frozenset[str]:
        """Empty for what is not declared and for what is declared without a type."""
        if (function, parameter) not in self.known:
            root = self.schemas.get(function)
            if function not in self.parts:
                self.parts[function] = list(alternatives([root], root))
            self.known[function, parameter] = types_of(self.parts[function], parameter, root)
        return self.known[function, parameter]


def types_of(parts: Sequence[Mapping], parameter: str, root: Any) -> frozenset[str]:
    """The types of a parameter of the function that these are the parts of, with all alternatives."""
    declared = [part["properties"] for part in parts if isinstance(part.get("properties"), Mapping)]
    named = [properties[parameter] for properties in declared if parameter in properties]
    schemas = named or [part.get("additionalProperties") for part in parts]
    return frozenset(kind for part in alternatives(schemas, root) for kind in named_types(part))


def named_types(schema: Mapping) -> list[str]:
    declared = schema.get("type")
    declared = [declared] if isinstance(declared, str) else declared
    if isinstance(declared, list):
        return [kind for kind in declared if isinstance(kind, str)]
    if isinstance(values := schema.get("enum"), list):
        return [type_of(value) for value in values]
    if "const" in schema:
        return [type_of(schema["const"])]
    return ["object"] if "properties" in schema else ["array"] if "items" in schema else []


def alternatives(schemas: Iterable[Any], root: Any) -> Iterator[Mapping]:
    """The schemas, and all that they refer to or are composed of, each once."""
    waiting, seen = deque(schemas), set()
    while waiting:
        part = waiting.popleft()
        if not isinstance(part, Mapping) or id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        if isinstance(place := part.get("$ref"), str):
            waiting.append(referred(place, root))
        for word in ("anyOf", "oneOf", "allOf"):
            if isinstance(parts := part.get(word), list):
                waiting += parts


def referred(place: str, root: Any) -> Any:
    """What a reference within the same schema points to; nothing for any other."""
    if not place.startswith("#"):
        return None
    for key in filter(None, place[1:].split("/")):
        root = root.get(key.replace("~1", "/").replace("~0", "~")) if isinstance(root, Mapping) else None
    return root
