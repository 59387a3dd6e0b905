"""JSON schemas from strangers: what is accepted, and what is left of one for the grammar.

Refused with the place and the reason: too large or too deep, references to other documents, keywords of the standard
that the grammar cannot hold, values of the wrong kind. Left out: annotations, and words that the standard does not
know, which it tells readers to ignore. What remains is exactly what the grammar enforces.
"""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

from nautilus.runtime import UserError

MOST_BYTES, MOST_DEPTH, MOST_PATTERN = 256 << 10, 64, 4096
TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
# In the standard, and not in the grammar. To leave one out would let answers through that its author forbade.
REFUSED = """
    not if then else contains minContains maxContains uniqueItems propertyNames dependencies dependentRequired
    dependentSchemas unevaluatedItems unevaluatedProperties $dynamicRef $recursiveRef
""".split()
HARMLESS = {"uniqueItems": False, "unevaluatedProperties": True, "unevaluatedItems": True, "minContains": 1}
MAPS = ("properties", "patternProperties", "$defs", "definitions")
LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
SINGLE = ("items", "additionalProperties")

number = lambda value: isinstance(value, int | float) and not isinstance(value, bool)
count = lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0
words = lambda value: isinstance(value, list) and all(isinstance(word, str) for word in value)
# What the other keywords must hold.
HOLDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "type": (
        lambda value: value in TYPES or (words(value) and value and set(value) <= set(TYPES)),
        f"one of {', '.join(TYPES)}, or a list of them",
    ),
    "enum": (lambda value: isinstance(value, list) and bool(value), "a list of values, not empty"),
    "const": (lambda value: True, "a value"),
    "$ref": (
        lambda value: isinstance(value, str) and (value == "#" or value.startswith("#/")),
        "a place in this schema (#/…): nothing is fetched",
    ),
    "required": (words, "a list of names"),
    "pattern": (
        lambda value: isinstance(value, str) and len(value) <= MOST_PATTERN,
        f"a regular expression of at most {MOST_PATTERN:,} characters",
    ),
    "format": (lambda value: value in FORMATS, f"one of {', '.join(FORMATS)}"),
    "multipleOf": (lambda value: number(value) and value > 0, "a positive number"),
    **{
        key: (count, "a whole number, 0 or more")
        for key in ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
    },
    **{key: (number, "a number") for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")},
}


def read_json_text(text: str, what: str) -> Any:
    """JSON within the limits of size and depth; else a UserError."""
    if len(text.encode()) > MOST_BYTES:
        raise UserError(
            f"the {what} has {len(text.encode()):,} bytes; at most {MOST_BYTES:,} are read: make it smaller"
        )
    try:
        value = json.loads(text, parse_constant=no_number)
    except (ValueError, RecursionError) as bad:
        raise UserError(f"the {what} is no JSON ({str(bad)[:200]}); correct it") from bad
    level, depth = [value], 0
    while level:
        if depth > MOST_DEPTH:
            raise UserError(f"the {what} is nested more than {MOST_DEPTH} deep; make it flatter")
        level, depth = [child for node in level for child in children(node)], depth + 1
    return value


def no_number(word: str):
    raise ValueError(f"{word} is not a number of JSON")


def children(node: Any) -> Iterator[Any]:
    if isinstance(node, dict):
        yield from node.values()
    elif isinstance(node, list):
        yield from node


def screened(schema: Any, where: str = "#") -> Any:
    """What the grammar is made of: the schema's keywords that it can hold, all others left out or refused by name."""
    clean = screened_part(schema, where, top=True)
    for place, target in references(clean, where):
        if found(clean, target) is None:
            raise UserError(f"$ref {target[:200]!r} at {place} points at no schema here; put what it names under $defs")
    return clean


def screened_part(schema: Any, where: str, top: bool = False) -> Any:
    if isinstance(schema, bool):
        return schema
    if not isinstance(schema, dict):
        raise UserError(f"{where} is {str(schema)[:80]!r}; a schema is an object, true or false")
    if not top and isinstance(schema.get("$id", schema.get("id")), str):
        raise UserError(f"{where} is a document of its own by its $id, which is not supported; leave the $id out")
    if isinstance(schema.get("items"), list):  # how drafts before 2020-12 wrote prefixItems
        rest = schema.get("additionalItems", True)
        schema = {**without(schema, "items", "additionalItems"), "prefixItems": schema["items"], "items": rest}
    clean: dict[str, Any] = {}
    for key, value in schema.items():
        place = f"{where}/{pointer(key)}"
        if key in REFUSED and not (key in HARMLESS and value == HARMLESS[key]):
            raise UserError(
                f"{key!r} at {place} is not supported in a grammar; leave it out and check the answer for it"
            )
        if key in MAPS:
            parts = expect(value, dict, place)
            clean[key] = {name: screened_part(part, f"{place}/{pointer(name)}") for name, part in parts.items()}
        elif key in LISTS:
            parts = expect(value, list, place)
            clean[key] = [screened_part(part, f"{place}/{i}") for i, part in enumerate(parts)]
        elif key in SINGLE:
            clean[key] = screened_part(value, place)
        elif key in HOLDS:
            clean[key] = held(key, value, place)
    return clean


def held(key: str, value: Any, place: str) -> Any:
    fits, what = HOLDS[key]
    try:
        good = fits(value)
    except TypeError:  # a list within a list is no member of a set
        good = False
    if not good:
        raise UserError(f"{key!r} at {place} is {str(value)[:80]!r}; it must be {what}")
    return value


def expect(value: Any, kind: type, place: str) -> Any:
    if not isinstance(value, kind):
        raise UserError(f"{place} is {str(value)[:80]!r}; it must be {'an object' if kind is dict else 'a list'}")
    return value


def without(schema: dict, *keys: str) -> dict:
    return {key: value for key, value in schema.items() if key not in keys}


def parts_of(schema: Any) -> Iterator[tuple[str, Any]]:
    """The schemas directly within a screened one, each with its place below it."""
    if not isinstance(schema, dict):
        return
    for key, value in schema.items():
        if key in MAPS:
            yield from ((f"{key}/{pointer(name)}", part) for name, part in value.items())
        elif key in LISTS:
            yield from ((f"{key}/{i}", part) for i, part in enumerate(value))
        elif key in SINGLE:
            yield key, value


def references(schema: Any, where: str) -> Iterator[tuple[str, str]]:
    """(place, target) of every $ref in a screened schema."""
    if isinstance(schema, dict) and "$ref" in schema:
        yield where, schema["$ref"]
    for place, part in parts_of(schema):
        yield from references(part, f"{where}/{place}")


def found(root: Any, target: str) -> Any:
    """The schema within a screened one that a $ref names; None if there is none."""
    here, steps = root, [urllib.parse.unquote(step).replace("~1", "/").replace("~0", "~") for step in target.split("/")]
    steps = steps[:0:-1]  # the first is the #
    while steps:
        key = steps.pop()
        here = here.get(key) if isinstance(here, dict) and key in (*MAPS, *LISTS, *SINGLE) else None
        if key in MAPS and steps:
            here = (here or {}).get(steps.pop())
        elif key in LISTS and steps:
            here = member(here or [], steps.pop())
        elif key not in SINGLE:
            return None
    return here


def member(parts: list, index: str) -> Any:
    at = int(index) if index.isdecimal() and len(index) < 10 else len(parts)
    return parts[at] if at < len(parts) else None


def pointer(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
