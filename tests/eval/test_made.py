"""Answers are what the prompts ask for, by another way than they were made; sizes are kept; nothing is trained on that
is asked later."""

import json
import re
import sqlite3
from collections import Counter
from dataclasses import make_dataclass

import pytest

from nautilus.eval import made
from nautilus.eval.families import FAMILIES
from nautilus.eval.made import END, KINDS, SIZES, prompts, training_documents
from nautilus.runtime import UserError

FEW = 8


def of_kind(kind, steps, count=FEW):
    family = next(family for family, kinds in KINDS.items() if kind in kinds)
    for one in prompts(family, count * len(KINDS[family]), seed=3, steps=steps, size=1500):
        if one.id.startswith(f"{kind}/"):
            yield one.prompt.removesuffix(END), one.reference


def edited(body, told):
    """The instructions carried out on text, line by line."""
    count = 0
    for name, value in re.findall(r"Set (.+?) to (\d+)\.", told):
        body, n = re.subn(rf"^((?:- )?{name}\D+?)\d+(\)?)$", rf"\g<1>{value}\2", body, flags=re.MULTILINE)
        count += n
    for old, new in re.findall(r"Rename (.+?) to (.+?)\.", told):
        body, n = re.subn(rf"^((?:- )?){old}\b", rf"\g<1>{new}", body, flags=re.MULTILINE)
        count += n
    for name in re.findall(r"Remove (.+?)\.", told):
        body, n = re.subn(rf"^(?:- )?{name}\b.*\n?", "", body, flags=re.MULTILINE)
        count += n
    return body.strip("\n"), count


@pytest.mark.parametrize("steps", [1, 3])
def test_the_edited_document_has_the_changes_and_no_others(steps):
    for question, reference in of_kind("document", steps):
        _, body, told = question.split("\n\n")
        assert edited(body, told) == (reference, steps)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_agent_writes_what_it_read_with_the_change_asked_for(steps):
    for question, reference in of_kind("loop", steps):
        tasks = dict(re.findall(r"In (\w+\.txt): ((?:Set|Remove|Rename) .+?\.)(?: |$)", question.split("\n")[1]))
        turns = question.split("\n\n")[1:] + [reference]
        written = [turn for turn in turns if turn.startswith("Agent: write")]
        assert len(tasks) == len(written) == steps == question.count("Agent: read")
        for before, turn in zip(turns, turns[1:], strict=False):
            if turn in written:
                path, _, body = turn.removeprefix("Agent: write ").partition("\n")
                assert edited(before.removeprefix("Tool:\n"), tasks[path]) == (body, 1)


@pytest.mark.parametrize("steps", [1, 3])
def test_functions_are_renamed_wherever_they_are_called(steps):
    for question, reference in of_kind("rename", steps):
        path, _, rest = question.partition("\n")
        body, _, told = rest.rpartition("\n\n")
        pairs = dict(re.findall(r"Rename (\w+) to (\w+)\.", told))
        assert len(pairs) == steps and path.endswith(".py")
        tokens = re.split(r"(\w+)", body)
        assert "".join(pairs.get(token, token) for token in tokens) == reference
        compile(reference, path, "exec")


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_accessors_run_and_give_the_row_back(steps):
    for question, reference in of_kind("accessors", steps):
        name = re.search(r"class (\w+):", question)
        fields = dict(re.findall(r"^    (\w+): (\w+)$", question, flags=re.MULTILINE))
        kinds = {"int": int, "str": str, "float": float}
        assert name and fields
        space: dict = {name[1]: make_dataclass(name[1], [*fields])}
        exec(reference, space)
        row = {field: kinds[kind](7) for field, kind in fields.items()}
        one = space[name[1]](**row)
        assert space["to_row"](one) == row and len(re.findall("^def", reference, flags=re.MULTILINE)) == steps
        if steps > 1:
            assert space["from_row"](row) == one
        if steps > 2:
            space["check"](row)
            with pytest.raises(AssertionError):
                space["check"](row | {[*fields][0]: None})


@pytest.mark.parametrize("steps", [1, 3])
def test_records_are_those_of_the_text_in_their_schema(steps):
    order = re.compile(r"Order (\d+) is for ([\w ]+), (\d+) of them, to be sent to (\w+) (by \w+)\.")
    for question, reference in of_kind("records", steps):
        schema = json.loads(question.rpartition("\n")[2])
        told = [
            {"order": int(a), "item": b, "count": int(c), "city": d, "way": e}
            for a, b, c, d, e in order.findall(question)
        ]
        assert json.loads(reference) == [{field: row[field] for field in schema["required"]} for row in told]
        assert len(schema["required"]) == 2 + steps == len(schema["properties"])


@pytest.mark.parametrize("steps", [1, 3])
def test_queries_run_on_the_tables_and_find_the_rows_asked_for(steps):
    for question, reference in of_kind("query", steps):
        base = sqlite3.connect(":memory:")
        base.executescript(question.partition("\n\n")[0])
        table = re.search(r"of every (\w+) where (.*), ordered by (\w+)\.", question)
        assert table and table[2].count(" is ") == steps
        values = {}
        for column, words, value in re.findall(r"(\w+) is (more than|less than|exactly) (\d+)", table[2]):
            values[column] = int(value) + {"more than": 1, "less than": -1, "exactly": 0}[words]
        for place in (2, 1):
            names = [row[1] for row in base.execute(f"PRAGMA table_info({table[1]})")]
            row = {name: values.get(name, place) for name in names}
            base.execute(f"INSERT INTO {table[1]} VALUES ({', '.join('?' * len(row))})", [*row.values()])
        assert base.execute(reference).fetchall() == [(1, 1), (2, 2)]
        base.execute(f"UPDATE {table[1]} SET {[*values][-1]} = 1000 WHERE {table[3]} = 1")
        assert len(base.execute(reference).fetchall()) == 1 or f"{[*values][-1]} >" in reference
        base.close()


@pytest.mark.parametrize("steps", [1, 3])
def test_calls_are_of_functions_that_are_listed(steps):
    for question, reference in of_kind("calls", steps):
        listed = {each["name"]: each for each in map(json.loads, re.findall(r"^\{.*\}$", question, flags=re.MULTILINE))}
        asked = re.findall(r"Use (\w+) with (\w+) (\d+) and (\w+) (\d+)\.", question)
        found = [*map(json.loads, reference.split("\n"))]
        assert [(each["name"], each["arguments"]) for each in found] == [
            (name, {a: int(x), b: int(y)}) for name, a, x, b, y in asked
        ]
        assert len(found) == steps and all(
            {*each["arguments"]} == {*listed[each["name"]]["parameters"]} for each in found
        )


@pytest.mark.parametrize("steps", [1, 3])
def test_the_answer_follows_the_facts(steps):
    for question, reference in of_kind("hops", steps):
        body, _, asked = question.partition("\n\n")
        after = dict(re.findall(r"([A-Z]\w+) [a-z ]+ ([A-Z]\w+)\.", body))
        start = re.search(r"of (\w+)\?", asked)
        facts, _, answer = reference.partition(" The answer is ")
        at, chain = start and start[1], []
        for _ in range(1 + steps):
            chain += [fact for fact in re.findall(r"[^.]+\.", body) if fact.split()[0] == at]
            at = after[at]
        assert f"{at}." == answer and " ".join(fact.strip() for fact in chain) == facts


@pytest.mark.parametrize("steps", [1, 3])
def test_what_is_extracted_stands_in_the_document_in_its_order(steps):
    for question, reference in of_kind("summary", steps):
        firsts = re.findall(r"^# \w+\n(.+?\.)(?: |$)", question, flags=re.MULTILINE)
        assert reference.split("\n") == firsts and len(firsts) == 2 + steps
    for question, reference in of_kind("minutes", steps):
        decided = [line for line in question.split("\n") if line.startswith("Decision")]
        assert reference.split("\n") == decided and len(decided) == 1 + steps


@pytest.mark.parametrize("kind", ["story", "ideas"])
def test_open_answers_have_the_length_asked_for_and_name_the_thing(kind):
    for question, reference in of_kind(kind, 1):
        count, thing = re.search(r"\d+", question), re.search(r"the (\w+ \w+)\.", question)
        assert count and thing and len(re.findall(r"\.(?:\s|$)", reference)) == int(count[0])
        assert kind == "ideas" or thing[1] in reference


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("steps", [1, 3])
def test_sizes_are_kept_and_prompts_are_the_same_every_time(family, steps):
    sizes, count = ((4096, 8192), 2) if family == "long" else ((900, 1500), FEW)
    for size in sizes:
        found = prompts(family, count, size=size, steps=steps)
        lengths = [len(one.text) + len(one.reference) for one in found]
        assert max(lengths) <= size and min(lengths) > 0.7 * size and all(one.text.isascii() for one in found)
        assert found == prompts(family, count, size=size, steps=steps) and len({one.id for one in found}) == count
        assert {one.text for one in found}.isdisjoint(one.text for one in prompts(family, count, seed=1, size=size))
    assert SIZES[family] * 0.7 < sum(map(lambda one: len(one.text) + len(one.reference), prompts(family, 4))) / 4


def test_nothing_is_trained_on_that_is_asked_later():
    asked = {one.prompt for seed in range(3) for one in prompts("open", 300, seed=seed, size=260)}
    asked |= {one.prompt for family in FAMILIES for one in prompts(family, 6)}
    trained = [*training_documents(1500, sizes={"open": 261}), *training_documents(60, seed=9)]
    assert asked.isdisjoint(document.partition(END)[0] + END for document in trained)
    # The texts are short enough that some would meet by chance.
    every = {made.made("open", "story", f"{i}", size=260, steps=1, held_out=i < 300)[0] for i in range(3000)}
    assert len(every) < 3000


def test_training_documents_are_of_all_families_and_sizes():
    documents = [*training_documents(240)]
    assert len(set(documents)) == 240 and documents == [*training_documents(240)] != [*training_documents(240, seed=1)]
    assert all(document.count(END) == 1 and document.isascii() for document in documents)
    sizes = [len(document) for document in documents]
    assert sum(size < 600 for size in sizes) > 60 and max(sizes) > 1800 and max(sizes) <= max(SIZES.values())
    firsts = Counter(document.split()[0] for document in documents)
    assert firsts["This"] + firsts["Tools:"] == 40 and firsts["#"] >= 40
    short = [*training_documents(24, sizes={"open": 300})]
    assert all(document.startswith(("Write", "There")) and len(document) <= 300 for document in short)


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"size=150 was asked for, but a prompt of agentic \(document\) with steps=3"):
        prompts("agentic", 1, size=150, steps=3)
    with pytest.raises(UserError, match=r"family='prose' with steps=1: have agentic"):
        prompts("prose", 1)
    with pytest.raises(UserError, match="steps=4"):
        prompts("open", 1, steps=4)
