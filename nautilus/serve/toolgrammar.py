"""The grammar of tool calls as models of the Nemotron 3 family write them, from the tools of a request.

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

Parameters come in the order of their schema, the required ones always. A value that may be a string is written as it
is: any lines of which none begins with a word of this form, so that only its own closer can end it. Any other value is
JSON of its schema. Of a string's schema `enum`, `const`, the lengths and `pattern` are held, `format` is not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from nautilus.runtime import UserError
from nautilus.serve.markers import CALLS, CLOSE, OPEN
from nautilus.serve.schema import expect, found, pointer, references, screened

NEWLINE = "\n"
END = "\n</parameter>\n"
MOST_LARK = 1 << 20  # characters, definitions shared by many parameters written out for each
MOST_TOOLS = 256
NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
KEY = re.compile(r"[^>\n]{1,256}")
TOP = {"type", "properties", "required", "additionalProperties", "$defs", "definitions"}

TEXT = r"""
LINE: /\n[^\n]*/ & ~/\n(<\/?tool_call>|<\/?function(=|>)|<\/?parameter(=|>))[^\n]*/
TEXT: LINE+ "\n</parameter>\n"
"""


def tools_lark(tools: Any, control: Mapping[str, int], *, parallel: bool) -> str:
    """A lark grammar of one call of one of the tools or, with `parallel`, of one or more.

    tools: the list of a request, of which a named choice leaves one. control: word → id of the tokenizer's own tokens.
    """
    tools = expect(tools, list, "tools")
    if not 1 <= len(tools) <= MOST_TOOLS:
        raise UserError(f"{len(tools)} tools were given, a call needs 1 to {MOST_TOOLS}; change the list")
    word = {marker: f"<[{control[marker]}]>" if marker in control else quoted(marker) for marker in (OPEN, CLOSE)}
    names = " | ".join(f"f{i}" for i in range(len(tools)))
    # A newline may follow the last call, as the chat template writes it.
    lines = [
        "%llguidance {}",
        'start: call ("\\n" call)* "\\n"?' if parallel else 'start: call "\\n"?',
        f'call: {word[OPEN]} "\\n" ({names}) {word[CLOSE]}',
        TEXT,
    ]
    size = 0
    for i, tool in enumerate(tools):
        for line in function_rules(f"f{i}", tool, f"tools/{i}"):
            lines.append(line)
            size += 1 + len(line)
            if size > MOST_LARK:  # at once: few definitions, written out often, can fill the memory
                raise UserError(
                    f"the tools make a grammar of more than {MOST_LARK:,} characters, as the definitions that they"
                    " refer to are written out for each; use fewer tools, parameters or definitions"
                )
    return "\n".join(lines)


def function_rules(rule: str, tool: Any, where: str) -> Iterator[str]:
    function = expect(tool, dict, where)
    function = expect(function.get("function", function), dict, where)
    name, where = function.get("name"), f"{where}/parameters"
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UserError(f"{where} belongs to the name {str(name)[:80]!r}; use 1 to 128 letters, digits and _ . : / -")
    root = screened(function.get("parameters") or {}, where)
    top = expect(resolved(root, root, where), dict, where)
    if strange := set(top) - TOP:
        raise UserError(
            f"{where} has {', '.join(sorted(strange))}; at the top of parameters only {', '.join(TOP)} work"
        )
    properties, required, extra = top.get("properties", {}), top.get("required", []), top.get("additionalProperties")
    parts = []
    for i, key in enumerate(dict.fromkeys([*properties, *required])):
        place = f"{where}/properties/{pointer(key)}"
        if not KEY.fullmatch(key):
            raise UserError(f"{place} has a name that no call can hold; leave out '>' and line breaks, name it shorter")
        parts.append(f"{rule}p{i}" if key in required else f"{rule}p{i}?")
        yield f"{rule}p{i}: {quoted(f'<parameter={key}>')} {rule}p{i}v"
        yield from value_rules(f"{rule}p{i}v", properties.get(key, extra or True), root, place)
    if extra:
        taken = " | ".join(quoted(f"<parameter={key}>") for key in {*properties, *required})
        parts.append(f"(KEY_{rule.upper()} {rule}x)*")
        yield rf"KEY_{rule.upper()}: /<parameter=[^>\n]+>/" + (f" & ~({taken})" if taken else "")
        yield from value_rules(f"{rule}x", extra, root, f"{where}/additionalProperties")
    yield f"{rule}: {quoted(f'<function={name}>{NEWLINE}')} {' '.join(parts)} {quoted(f'</function>{NEWLINE}')}"


def value_rules(rule: str, schema: Any, root: Any, where: str) -> Iterator[str]:
    """What follows `<parameter=KEY>`, the closer included."""
    schema = resolved(schema, root, where)
    if schema is False:
        raise UserError(f"{where} is false, so that no value fits; leave the parameter out")
    choices = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if not may_be_text(schema, root):
        yield f'{rule}: "\\n" %json {json.dumps(closed(schema, root, where))} {quoted(END)}'
    elif choices is not None:
        written = [choice if isinstance(choice, str) else json.dumps(choice) for choice in choices]
        if any(line.startswith(CALLS) for text in written for line in text.split(NEWLINE)):
            raise UserError(f"{where} has a choice with a line that begins like markup of a call; leave it out")
        yield f"{rule}: {' | '.join(quoted(f'{NEWLINE}{text}{END}') for text in written)}"
    elif schema.get("type") == "string" and (bounds := [*limits_of(schema, where)]):
        yield f"{rule}: {rule.upper()}"
        yield f"{rule.upper()}: TEXT & " + " & ".join(rf"/\n{bound}\n<\/parameter>\n/" for bound in bounds)
    else:
        yield f"{rule}: TEXT"


def limits_of(schema: dict, where: str) -> Iterator[str]:
    """Regular expressions for the lengths and the pattern of a string's schema."""
    if "minLength" in schema or "maxLength" in schema:
        yield f"(?s:.{{{schema.get('minLength', 0)},{schema.get('maxLength', '')}}})"
    if "pattern" in schema:
        from llguidance import regex_to_lark

        # A pattern may lie anywhere in the string, unless it is anchored.
        pattern = schema["pattern"]
        anchored = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith("\\$")
        if any(anchored) and "|" in pattern:
            raise UserError(
                f"{where} has a pattern with both | and ^ or $; list its choices as an enum, or leave it out"
            )
        inner = regex_to_lark(pattern[anchored[0] : len(pattern) - anchored[1]], use_ascii="dw")
        yield ("" if anchored[0] else "(?s:.*)") + f"(?:{inner})" + ("" if anchored[1] else "(?s:.*)")


def may_be_text(schema: Any, root: Any, depth: int = 32) -> bool:
    """Whether a string fits, as far as the schema says; where it says nothing, a value is read as a string."""
    if not isinstance(schema, dict) or not depth:
        return True
    if "type" in schema:
        return "string" in ([schema["type"]] if isinstance(schema["type"], str) else schema["type"])
    if "enum" in schema or "const" in schema:
        return any(isinstance(choice, str) for choice in schema.get("enum", [schema.get("const")]))
    if "$ref" in schema:
        return may_be_text(found(root, schema["$ref"]), root, depth - 1)
    for key, enough in (("anyOf", any), ("oneOf", any), ("allOf", all)):
        if key in schema:
            return enough(may_be_text(part, root, depth - 1) for part in schema[key])
    return not any(key in schema for key in ("properties", "items", "prefixItems"))


def resolved(schema: Any, root: Any, where: str) -> Any:
    """The schema itself, or what it refers to; an object or False."""
    for _ in range(32):
        if not (isinstance(schema, dict) and "$ref" in schema and set(schema) <= {"$ref", "$defs", "definitions"}):
            return {} if schema is True else schema
        schema = found(root, schema["$ref"])
    raise UserError(f"{where} is a $ref to a $ref, and so on; name a type")


def closed(schema: dict, root: dict, where: str) -> dict:
    """A parameter's schema as one of its own, with the definitions that it refers to."""
    if not any(True for _ in references(schema, where)):
        return schema
    whole = {**schema, **{key: root[key] for key in ("$defs", "definitions") if key in root}}
    for place, target in references(whole, where):
        if not target.startswith(("#/$defs/", "#/definitions/")):
            raise UserError(f"$ref {target[:200]!r} at {place}: parameters may refer to $defs of their function only")
    return whole


def quoted(text: str) -> str:
    return json.dumps(text)
