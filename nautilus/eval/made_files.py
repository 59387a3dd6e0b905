"""Work on files, made from a seed: documents and code to edit, tools in a loop, output in a form that is set.

A maker is a function (draw, more, steps) to a question and its answer. `more` is how many lines it has beside those
that it needs; `steps` how much is asked for at once: edits, files, functions, fields, conditions, calls.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping

from nautilus.eval.ruler import ADJECTIVES, NOUNS, invent

LEAST = 3  # rows of a file that is to be edited, beside those that are
KINDS_OF, OBJECTS = ADJECTIVES.split(), NOUNS.split()
STYLES = "{}: {}", "{} = {}", "- {} ({})", "{} | {}"
CITIES = "Accra Bergen Cusco Dakar Essen Fukui Genoa Hanoi Izmir Jaipur Kazan Lima Malmo Nice Oran Porto".split()
WAYS = "by train,by ship,by air,by road".split(",")
OPERATORS = "+ - *".split()
COMPARISONS = {"more than": ">", "less than": "<", "exactly": "="}


def things(draw: random.Random, count: int, between: str = " ") -> list[str]:
    """So many different names such as `amber bridge 47`."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[between.join((draw.choice(KINDS_OF), draw.choice(OBJECTS), str(draw.randint(10, 99))))] = None
    return [*found]


def edits(draw: random.Random, rows: Mapping[str, int], steps: int) -> tuple[str, dict[str, int]]:
    """Instructions for so many changes, and the rows after them."""
    told, after = [], dict(rows)
    for name in draw.sample([*rows], steps):
        how = draw.choice(("set", "rename", "remove"))
        if how == "set":
            after[name] = draw.randint(100, 999)
            told.append(f"Set {name} to {after[name]}.")
        elif how == "remove":
            del after[name]
            told.append(f"Remove {name}.")
        else:
            new = f"{invent(draw)} {draw.randint(10, 99)}"
            after = {new if key == name else key: value for key, value in after.items()}
            told.append(f"Rename {name} to {new}.")
    return " ".join(told), after


def stock(draw: random.Random, count: int) -> dict[str, int]:
    return {name: draw.randint(100, 999) for name in things(draw, count)}


def written(rows: Mapping[str, int], style: str) -> str:
    return "\n".join(style.format(name, value) for name, value in rows.items())


def document(draw: random.Random, more: int, steps: int) -> tuple[str, str]:
    """A file of rows to be changed; the answer is the whole file."""
    rows, style = stock(draw, LEAST + steps + more), draw.choice(STYLES)
    told, after = edits(draw, rows, steps)
    question = f"This is the file {invent(draw)}.txt.\n\n{written(rows, style)}\n\n{told} Answer with the whole file."
    return question, written(after, style)


def loop(draw: random.Random, more: int, steps: int) -> tuple[str, str]:
    """An agent that reads a file and writes it changed, `steps` times; the answer is its last turn."""
    tasks, turns, answer = [], [], ""
    for _ in range(steps):
        path, style = f"{invent(draw)}.txt", draw.choice(STYLES)
        rows = stock(draw, LEAST + more // steps)
        told, after = edits(draw, rows, 1)
        tasks.append(f"In {path}: {told}")
        turns += [f"Agent: read {path}", f"Tool:\n{written(rows, style)}"]
        answer = f"Agent: write {path}\n{written(after, style)}"
        turns += [answer, "Tool: written"]
    told = "Tools: read a path; write a path and the text that it shall have.\nTask: " + " ".join(tasks)
    return "\n\n".join([told, *turns[:-2]]), answer


def program(draw: random.Random, names: list[str]) -> str:
    """A function for each name; many call the one before."""
    parts = []
    for place, name in enumerate(names):
        first, second, result = draw.sample("abcdefghkmnpqrstuvwxyz", 3)
        end = f"{result} {draw.choice(OPERATORS)} {draw.randint(2, 99)}"
        if place and draw.random() < 0.6:
            end = f"{names[place - 1]}({result}, {first})"
        head = f"def {name}({first}, {second}):\n    {result} = {first} {draw.choice(OPERATORS)} {second}"
        parts.append(f"{head}\n    return {end}")
    return "\n\n\n".join(parts)


def rename(draw: random.Random, more: int, steps: int) -> tuple[str, str]:
    """Functions to be renamed wherever they stand; the answer is the whole file."""
    names = things(draw, 1 + steps + more, "_")
    text, told = program(draw, names), []
    question, after = text, text
    for old in draw.sample(names, steps):
        new = f"{invent(draw)}_{draw.randint(10, 99)}"
        after = re.sub(rf"\b{old}\b", new, after)
        told.append(f"Rename {old} to {new}.")
    return f"# Path: {invent(draw)}.py\n{question}\n\n{' '.join(told)} Answer with the whole file.", after


def accessors(draw: random.Random, more: int, steps: int) -> tuple[str, str]:
    """Functions for the fields of a class from another file: to a row, for 2 steps also from one, for 3 a check."""
    name = invent(draw).capitalize()
    fields = {field: draw.choice(("int", "str", "float")) for field in things(draw, 2 + more, "_")}
    declared = "\n".join(f"    {field}: {kind}" for field, kind in fields.items())
    parts = {
        "to_row": [
            "def to_row(one):",
            "    return {",
            *(f'        "{field}": one.{field},' for field in fields),
            "    }",
        ],
        "from_row": [
            "def from_row(row):",
            f"    return {name}(",
            *(f'        {field}={kind}(row["{field}"]),' for field, kind in fields.items()),
            "    )",
        ],
        "check": [
            "def check(row):",
            *(f'    assert isinstance(row["{field}"], {kind})' for field, kind in fields.items()),
        ],
    }
    asked = [*parts][:steps]
    question = f"# Path: models.py\nclass {name}:\n{declared}\n\nWrite rows.py with {', '.join(asked)} for {name}."
    return question, "\n\n\n".join("\n".join(parts[each]) for each in asked)


def records(draw: random.Random, more: int, steps: int) -> tuple[str, str]:
    """Orders in words; the answer is a JSON array of them with the first 2 + steps fields of their schema."""
    kinds = {"order": "integer", "item": "string", "count": "integer", "city": "string", "way": "string"}
    fields = [*kinds][: 2 + steps]
    rows, told = [], []
    for item in things(draw, 2 + more):
        values = draw.randint(1000, 9999), item, draw.randint(2, 99), draw.choice(CITIES), draw.choice(WAYS)
        told.append("Order {} is for {}, {} of them, to be sent to {} {}.".format(*values))
        rows.append({field: value for field, value in zip(kinds, values, strict=True) if field in fields})
    schema = {"type": "object", "properties": {field: {"type": kinds[field]} for field in fields}, "required": fields}
    question = f"{' '.join(told)}\n\nAnswer with a JSON array of objects of this schema:\n{json.dumps(schema)}"
    return question, "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]"


def query(draw: random.Random, more: int, steps: int) -> tuple[str, str]:
    """A question to one of some tables; the answer is a query with `steps` conditions."""
    tables = {invent(draw): [invent(draw) for _ in range(3 + steps)] for _ in range(2 + more)}
    shown = "\n".join(f"CREATE TABLE {name} (id integer, {', '.join(f'{c} integer' for c in columns)});"
                      for name, columns in tables.items())  # fmt: skip
    name = draw.choice([*tables])
    first, second, order, *tested = draw.sample(tables[name], 3 + steps)
    said, conditions = [], []
    for column in tested:
        words, value = draw.choice([*COMPARISONS]), draw.randint(10, 99)
        said.append(f"{column} is {words} {value}")
        conditions.append(f"{column} {COMPARISONS[words]} {value}")
    question = f"{shown}\n\nShow {first} and {second} of every {name} where {' and '.join(said)}, ordered by {order}. "
    answer = f"SELECT {first}, {second} FROM {name} WHERE {' AND '.join(conditions)} ORDER BY {order};"
    return f"{question}Answer with one query in SQL.", answer


def calls(draw: random.Random, more: int, steps: int) -> tuple[str, str]:
    """Requests for some of the functions that are listed; the answer is a call on each line."""
    functions = {name: [invent(draw) for _ in range(2)] for name in things(draw, 1 + steps + more, "_")}
    listed = [{"name": name, "parameters": dict.fromkeys(names, "integer")} for name, names in functions.items()]
    said, answer = [], []
    for name in draw.sample([*functions], steps):
        values = {parameter: draw.randint(10, 99) for parameter in functions[name]}
        said.append(f"Use {name} with {' and '.join(f'{key} {value}' for key, value in values.items())}.")
        answer.append(json.dumps({"name": name, "arguments": values}))
    question = "\n".join(map(json.dumps, listed))
    return f"Functions:\n{question}\n\n{' '.join(said)} Answer with the calls as JSON.", "\n".join(answer)
