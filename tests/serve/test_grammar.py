import ast
import json
import math
import re
import sys
import time
from pathlib import Path

import pytest
import tokenizers
import torch

from nautilus.data.tokenizer import SMALLEST, Tokenizer, train_tokenizer
from nautilus.runtime import UserError
from nautilus.serve import grammar, trial
from nautilus.serve.grammar import compile_grammar, vocabulary
from nautilus.serve.schema import screened

pytest.importorskip("llguidance")
torch.set_num_threads(1)
TEXT = (
    'def go(name: str): return {"name": "größer 😀", "ok": true, "n": [1, 2.5, -3e8]}  # <tool_call> </think>\n\n' * 3
)
BYTES = train_tokenizer([TEXT], vocab=SMALLEST)  # one token per byte: every other character is split
MERGED = train_tokenizer([TEXT, "<function=look>\n<parameter=place>\n</parameter>\n</function>\n" * 9], vocab=420)
PADDED = 64  # a model's vocabulary may be larger than its tokenizer's


@pytest.fixture
def at_once(monkeypatch):
    """No trial in a process of its own: for grammars that are known to be harmless."""
    monkeypatch.setattr(trial, "tried", lambda *task: ("", 0))


def generate(rule, tokenizer, seed, most=3000, favour=b'"}]', closer=b""):
    """What a model with random logits says under the rule, and whether it came to an end.

    To make it short, bytes of `favour` are likely, and so is the next one of `closer`.
    """
    generator = torch.Generator().manual_seed(seed)
    bias_V = torch.zeros(tokenizer.vocab + PADDED, dtype=torch.float64)
    bias_V[[id for id, spelt in enumerate(tokenizer.token_bytes) if spelt and set(spelt) <= set(favour)]] = 6
    bias_V[list(tokenizer.stop)] = 8
    tokens = []
    while len(tokens) < most:
        logits_V = torch.randn(len(bias_V), dtype=torch.float64, generator=generator) * 2 + bias_V
        if closer:
            text = b"".join(tokenizer.token_bytes[token] for token in tokens[-len(closer) :])
            rest = closer[max(length for length in range(len(closer)) if text.endswith(closer[:length])) :]
            logits_V[[id for id, spelt in enumerate(tokenizer.token_bytes) if rest.startswith(spelt)]] += 14
        before_V = logits_V.clone()
        forced, changed_V = rule.forced(), rule.change(logits_V)
        assert torch.equal(before_V, logits_V)  # never in place
        assert changed_V[tokenizer.vocab :].max() == -math.inf or rule.free
        token = forced if forced is not None else int(changed_V.softmax(0).multinomial(1, generator=generator))
        assert changed_V[token] == logits_V[token] > -math.inf
        ended = rule.ended
        rule.add(token)
        if token in tokenizer.stop:
            return tokens, True
        assert not ended
        tokens.append(token)
    return tokens, False


def fits(value, schema):
    """A check of the part of JSON Schema that the tests use, written from the standard."""
    kinds = {"object": dict, "array": list, "string": str, "null": type(None), "boolean": bool}
    if "anyOf" in schema:
        return any(fits(value, part) for part in schema["anyOf"])
    if "enum" in schema:
        return any(type(value) is type(choice) and value == choice for choice in schema["enum"])
    kind = schema.get("type")
    if kind in ("integer", "number"):
        good = isinstance(value, int | float) and not isinstance(value, bool)
        good = good and (kind == "number" or value == int(value))
        return good and schema.get("minimum", -math.inf) <= value <= schema.get("maximum", math.inf)
    if kind and not isinstance(value, kinds[kind]):
        return False
    if kind == "string":
        return (
            len(value) <= schema.get("maxLength", math.inf) and re.search(schema.get("pattern", ""), value) is not None
        )
    if kind == "array":
        return len(value) >= schema.get("minItems", 0) and all(fits(item, schema.get("items", {})) for item in value)
    if kind == "object":
        known = schema.get("properties", {})
        extra = schema.get("additionalProperties", {})
        return set(schema.get("required", ())) <= set(value) and all(
            fits(item, known.get(key, extra or {})) and (key in known or extra is not False)
            for key, item in value.items()
        )
    return True


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 9, "description": "with 😀"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["ä", 'a "b"', 3, None, False]},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{2,4}$"}, "minItems": 2},
        "next": {"anyOf": [{"$ref": "#/$defs/next"}, {"type": "null"}]},
    },
    "required": ["name", "kind", "tags"],
    "additionalProperties": False,
    "$defs": {"next": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}},
}
PLAIN_PERSON = {
    **PERSON,
    "properties": {**PERSON["properties"], "next": {"anyOf": [PERSON["$defs"]["next"], {"type": "null"}]}},
}
KINDS = {
    "json_schema": (json.dumps(PERSON), lambda text: fits(json.loads(text), PLAIN_PERSON)),
    "json_object": ("", lambda text: isinstance(json.loads(text), dict)),
    "regex": (r"[äöü€😀]{3,5}(/|\d{2,3}){2}", lambda text: re.fullmatch(r"[äöü€😀]{3,5}(/|\d{2,3}){2}", text)),
    "choice": (
        json.dumps(["yes", "no", "né 😀", 'a"b\n', "yes or no"]),
        lambda text: text in ("yes", "no", "né 😀", 'a"b\n', "yes or no"),
    ),
    "lark": (
        'start: "(" start ")" | NAME\nNAME: /[a-c]+/',
        lambda text: re.fullmatch(r"(\(*)[a-c]+(\)*)", text) and text.count("(") == text.count(")"),
    ),
}


@pytest.mark.parametrize("tokenizer", [BYTES, MERGED], ids=["bytes", "merged"])
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_a_random_model_says_fits(kind, tokenizer, at_once):
    text, check = KINDS[kind]
    finished = 0
    for seed in range(8):
        tokens, ended = generate(compile_grammar(kind, text, tokenizer), tokenizer, seed)
        said = b"".join(tokenizer.token_bytes[token] for token in tokens).decode(errors="strict" if ended else "ignore")
        assert not ended or check(said), said
        assert tokenizer.control_ids.isdisjoint(tokens)
        finished += ended
    assert finished >= 6


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {"type": "string"},
                    "much": {"type": "integer", "minimum": 1, "maximum": 20},
                    "unit": {"type": "string", "enum": ["°C", "°F"]},
                    "code": {"type": "string", "minLength": 2, "pattern": r"^[A-Z]+\d?$"},
                    "list": {"type": "array", "items": {"$ref": "#/$defs/flag"}},
                    "either": {"anyOf": [{"type": "string"}, {"type": "object"}]},
                },
                "required": ["place", "unit", "list"],
                "$defs": {"flag": {"type": "boolean"}},
            },
        },
    },
    {
        "type": "function",
        "function": {"name": "free", "parameters": {"type": "object", "additionalProperties": {"type": "null"}}},
    },
    {"type": "function", "function": {"name": "bare"}},
]
CHECKS = {
    "place": lambda text: True,
    "much": lambda text: 1 <= json.loads(text) <= 20,
    "unit": lambda text: text in ("°C", "°F"),
    "code": lambda text: re.fullmatch(r"[A-Z]+[0-9]?", text) and len(text) >= 2,
    "list": lambda text: all(isinstance(flag, bool) for flag in json.loads(text)),
    "either": lambda text: True,
}


def calls_of(text):
    """By the rule that a value ends at the first line that begins with a closer; fails for any other text."""
    calls = []
    for call in re.split(r"(?<=</tool_call>)\n", text.strip("\n")):
        name, body = re.fullmatch(
            r"<tool_call>\n<function=([^>\n]+)>\n(.*)</function>\n</tool_call>", call, re.DOTALL
        ).groups()
        values, end = [], 0
        for found in re.finditer(r"<parameter=([^>\n]+)>\n((?:(?!</parameter>).*\n)+)</parameter>\n", body):
            assert found.start() == end
            end = found.end()
            values.append((found[1], found[2][:-1]))
        assert end == len(body)
        calls.append((name, values))
    return calls


@pytest.mark.parametrize("tokenizer", [BYTES, MERGED], ids=["bytes", "merged"])
def test_calls_of_tools_parse_and_hold_their_types(tokenizer, at_once):
    seen, finished = set(), 0
    for seed in range(12):
        rule = compile_grammar("tools", json.dumps(TOOLS), tokenizer, parallel=seed % 2 == 0)
        tokens, ended = generate(
            rule, tokenizer, seed, most=400, favour=b"]" if seed % 3 else b"", closer=b"\n</parameter>\n</function>\n"
        )
        if not ended:
            continue
        finished += 1
        calls = calls_of(tokenizer.decode(tokens))
        assert tokens.count(tokenizer.control["<tool_call>"]) == len(calls)  # the tokens, not their letters
        assert len(calls) == 1 or seed % 2 == 0
        for name, values in calls:
            seen.add(name)
            keys = [key for key, _ in values]
            if name == "look":
                assert {"place", "unit", "list"} <= set(keys) and len(set(keys)) == len(keys)
                assert all(CHECKS[key](text) for key, text in values), values
                markers = ("<tool_call>", "</tool_call>", "<function=", "</function>", "<parameter=", "</parameter>")
                assert not any(line.startswith(markers) for _, text in values for line in text.split("\n"))
            else:
                assert not keys if name == "bare" else all(text == "null" for _, text in values)
    assert finished >= 8 and seen == {"look", "free", "bare"}


def test_a_text_that_looks_like_markup_stays_in_its_value(at_once):
    rule = compile_grammar("tools", json.dumps(TOOLS[:1]), MERGED)
    opener, closer = MERGED.control["<tool_call>"], MERGED.control["</tool_call>"]

    def feed(rule, text):
        for token in MERGED.encode(text):
            rule.add(token)

    rule.add(opener)
    feed(rule, "\n<function=look>\n<parameter=place>\na </parameter>\n </function>\nif x <parameter=y>:\n")
    with pytest.raises(ValueError, match="does not allow"):
        feed(rule.fork(), "</function>")
    with pytest.raises(ValueError, match="does not allow"):
        rule.fork().add(closer)
    feed(
        rule, "</parameter>\n<parameter=unit>\n°C\n</parameter>\n<parameter=list>\n[true]\n</parameter>\n</function>\n"
    )
    rule.add(closer)
    assert MERGED.eos in torch.nonzero(rule.change(torch.zeros(MERGED.vocab, dtype=torch.float64)) == 0)


def test_thinking_is_free_until_its_token_and_cannot_end_the_answer(at_once):
    thought, opener = MERGED.control["</think>"], MERGED.control["<tool_call>"]
    logits_V = torch.zeros(MERGED.vocab, dtype=torch.float64)
    rule = compile_grammar("choice", '["{}"]', MERGED, thinking=True)
    for token in MERGED.encode("so {} or </think> as text\n"):
        assert rule.forced() is None and not rule.ended
        barred = set((rule.change(logits_V) == -math.inf).nonzero()[:, 0].tolist())
        assert barred == {*MERGED.stop, opener}
        rule.add(token)
    rule.add(thought)
    newline, brace = MERGED.encode("\n")[0], MERGED.encode("{")[0]
    for _ in range(2):  # newlines after the tag belong to no side
        assert rule.forced() is None
        assert rule.change(logits_V)[[newline, brace]].tolist() == [0, 0]
        rule.add(newline)
    assert rule.change(logits_V)[newline] == -math.inf
    rule.add(brace)
    rule.add(MERGED.encode("}")[0])
    assert rule.ended and rule.forced() == MERGED.eos


def test_a_call_ends_thinking_when_calls_are_asked_for(at_once):
    opener = MERGED.control["<tool_call>"]
    rule = compile_grammar("tools", json.dumps(TOOLS), MERGED, thinking=True)
    assert rule.change(torch.zeros(MERGED.vocab, dtype=torch.float64))[opener] == 0
    rule.add(opener)
    assert not rule.free and rule.forced() == MERGED.encode("\n")[0]


@pytest.mark.parametrize("seed", range(3))
def test_thinking_then_an_answer_of_a_random_model(seed, at_once):
    rule = compile_grammar("json_schema", json.dumps(PERSON), MERGED, thinking=True)
    for token in MERGED.encode("hm"):
        rule.add(token)
    rule.add(MERGED.control["</think>"])
    tokens, ended = generate(rule, MERGED, seed)
    assert ended and fits(json.loads(MERGED.decode(tokens)), PLAIN_PERSON)


def test_certain_text_comes_in_its_own_tokenisation(at_once):
    text = 'return {"name": größer 😀 </think>'
    rule = compile_grammar("choice", json.dumps([text]), MERGED)
    said = []
    while not rule.ended:
        said.append(rule.forced())
        rule.add(said[-1])
    assert said == MERGED.encode(text) and len(said) < len(text)


def changed(change):
    """MERGED after a change to its file."""
    plan = json.loads(MERGED.core.to_str())
    change(plan)
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(plan)), bos="<s>", eos="<|im_end|>")


def test_ids_that_the_tokenizer_leaves_out_never_come(at_once):
    def leave_out(plan):
        vocab = plan["model"]["vocab"]
        word = max(vocab, key=vocab.get)
        vocab["more"] = vocab.pop(word) + 1
        plan["model"]["merges"] = [pair for pair in plan["model"]["merges"] if "".join(pair) != word]

    tokenizer = changed(leave_out)
    hole = tokenizer.vocab - 2
    assert tokenizer.token_bytes[hole] == "\ufffd".encode()
    changed_V = compile_grammar("regex", "(?s:.*)", tokenizer).change(torch.zeros(tokenizer.vocab, dtype=torch.float64))
    assert changed_V[[hole, hole + 1]].tolist() == [-math.inf, 0]


def test_a_normaliser_does_not_change_what_is_certain(at_once):
    tokenizer = changed(lambda plan: plan.update(normalizer={"type": "NFC"}))
    text = "e\u0301 {"
    rule = compile_grammar("choice", json.dumps([text]), tokenizer)
    tokens, ended = generate(rule, tokenizer, 0)
    assert ended and tokenizer.decode(tokens) == text


def test_a_fork_is_on_its_own(at_once):
    rule = compile_grammar("regex", "ab*c", BYTES)
    a, b, c = (BYTES.encode(char)[0] for char in "abc")
    rule.add(a)
    other = rule.fork()
    other.add(c)
    assert other.ended and not rule.ended
    rule.add(b)
    assert other.ended and not rule.ended
    last = rule.fork()
    rule.add(c)
    assert rule.ended and not last.ended
    fresh = compile_grammar("regex", "ab*c", BYTES)  # the kept one has not moved either
    assert fresh.forced() == a


def test_the_end_may_come_once_the_grammar_is_complete(at_once):
    rule = compile_grammar("regex", "ab*", BYTES)
    logits_V = torch.zeros(BYTES.vocab, dtype=torch.float64)
    assert rule.change(logits_V)[list(BYTES.stop)].max() == -math.inf
    rule.add(BYTES.encode("a")[0])
    assert rule.forced() is None and not rule.ended
    assert rule.change(logits_V)[list(BYTES.stop)].min() == 0
    rule.add(BYTES.eos)
    with pytest.raises(ValueError, match="does not allow"):
        compile_grammar("regex", "ab*", BYTES).add(BYTES.encode("b")[0])


def test_a_model_with_a_smaller_vocabulary_and_bans_that_leave_nothing(at_once):
    rule = compile_grammar("choice", '["a", "b"]', MERGED)
    id_K = [MERGED.encode(char)[0] for char in "ab"]
    logits_V = torch.zeros(max(id_K) + 1, dtype=torch.float64)
    assert (rule.change(logits_V) == 0).nonzero()[:, 0].tolist() == sorted(id_K)
    logits_V[id_K] = -math.inf
    with pytest.raises(UserError, match="2 tokens .* none of them may"):
        rule.change(logits_V)
    wide = compile_grammar("regex", ".*", MERGED)
    assert len(wide.change(logits_V)) == len(logits_V)


@pytest.mark.parametrize("allowed", [grammar.FEW, 0])
def test_picking_out_a_few_tokens_and_going_through_all_give_the_same(allowed, at_once, monkeypatch):
    rule = compile_grammar("regex", "[a-z]+", MERGED)
    logits_V = torch.randn(MERGED.vocab + PADDED, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected_V = torch.full_like(logits_V, -math.inf)
    for id, spelt in enumerate(MERGED.token_bytes):
        if spelt.isalpha() and spelt.islower() and spelt.isascii() and id not in MERGED.control_ids:
            expected_V[id] = logits_V[id]
    monkeypatch.setattr(grammar, "FEW", allowed)
    assert torch.equal(rule.change(logits_V), expected_V)


SHARING = {
    "properties": {f"p{i}": {"type": "object", "properties": {"z": {"$ref": "#/$defs/0"}}} for i in range(1500)},
    "$defs": {str(i): {"type": "integer"} for i in range(4000)},
}
HOSTILE = {
    "parentheses": ("regex", "(" * 2000 + "a" + ")" * 2000),
    "very many parentheses": ("regex", "(" * 30000 + "a" + ")" * 30000),
    "deep lark": ("lark", "start: " + "(" * 30000 + '"a"' + ")" * 30000),
    "a chain of rules": ("lark", "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(4000)) + 'r4000: "a"'),
    "doubling terminals": (
        "lark",
        "start: A0\n" + "".join(f"A{i}: A{i + 1} A{i + 1}\n" for i in range(3000)) + 'A3000: "a"',
    ),
    "a deep schema": ("json_schema", '{"items":' * 5000 + "{}" + "}" * 5000),
    "a reference to itself": ("json_schema", '{"$ref": "#"}'),
    "a chain of references": (
        "json_schema",
        json.dumps(
            {"$ref": "#/$defs/0", "$defs": {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(4000)} | {"4000": {}}}
        ),
    ),
    "very many properties": (
        "json_schema",
        json.dumps({"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(8000)}}),
    ),
    "a schema too large": ("json_schema", json.dumps({"enum": ["x" * 300_000]})),
    "too many alternatives": (
        "json_schema",
        json.dumps({"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {}}} for j in range(9)]} for i in range(9)]}),
    ),
    "an endless number": ("json_schema", '{"const": ' + "9" * 5000 + "}"),
    "not a number": ("json_schema", '{"minimum": NaN}'),
    "a panic of the compiler": ("lark", 'start: %json {"minLength": "' + "é" * 80 + '"}'),
    "half a pair among choices": ("choice", r'["\ud800"]'),
    "half a pair in a schema": ("json_schema", r'{"const": "\ud800"}'),
    "definitions that very many parameters share": (
        "tools",
        json.dumps([{"name": "a", "parameters": SHARING}]),
    ),
    "half a pair in a tool": ("tools", r'[{"name": "a", "parameters": {"properties": {"\ud800": {}}}}]'),
    "half a pair in a pattern": ("regex", "a\ud800"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_is_an_error_and_soon(name):
    vocabulary(BYTES)
    kind, text = HOSTILE[name]
    start = time.process_time()
    with pytest.raises(UserError) as bad:
        compile_grammar(kind, text, BYTES)
    assert len(str(bad.value)) < 1000
    assert time.process_time() - start < 2


# Compact to write and harmless, or refused when they have become too large: never slow.
@pytest.mark.parametrize("pattern", ["(a{1,1000}){1,1000}", "(.{1,1000}b){1,1000}", "(.*[a-m].{40}){3}&", ".*a.{500}"])
def test_a_costly_pattern_works_or_is_an_error(pattern, at_once):
    rule = compile_grammar("regex", pattern, BYTES)
    start = time.process_time()
    try:
        generate(rule, BYTES, 0, most=50)
    except UserError as bad:
        assert "too costly" in str(bad) and rule.ended is False
    assert time.process_time() - start < 5


def test_a_giant_enum_works():
    words = [f"word {i}" for i in range(10000)]
    tokens, ended = generate(compile_grammar("json_schema", json.dumps({"enum": words}), MERGED), MERGED, 0)
    assert ended and json.loads(MERGED.decode(tokens)) in words


def test_an_error_of_the_trial_itself_is_not_the_clients(monkeypatch):
    monkeypatch.setattr(trial, "__file__", str(Path(trial.__file__).with_name("no_such_file.py")))
    with pytest.raises(RuntimeError, match="trial failed"):
        compile_grammar("regex", "itself", BYTES)


def test_time_and_memory_of_a_trial_are_limited(monkeypatch):
    vocabulary(BYTES)
    monkeypatch.setattr(trial, "GROWTH", 1000)
    with pytest.raises(UserError, match="MB of memory"):
        compile_grammar("regex", "memory", BYTES)
    monkeypatch.setattr(trial, "WAIT", 0.001)
    with pytest.raises(UserError, match="more than 0.001 s"):
        compile_grammar("regex", "time", BYTES)


def test_the_trial_imports_nothing_that_is_slow_to_import():
    tree = ast.parse(Path(trial.__file__).read_text())
    named = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    named += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert {name.split(".")[0] for name in named} - set(sys.stdlib_module_names) == {"llguidance"}


@pytest.mark.parametrize(
    "schema, message",
    [
        ({"properties": {"a/b": {"not": {}}}}, "'not' at #/properties/a~1b/not"),
        ({"items": {"anyOf": [{}, {"uniqueItems": True}]}}, "'uniqueItems' at #/items/anyOf/1/uniqueItems"),
        ({"$defs": {"x": {"if": {}}}}, "'if' at #/\\$defs/x/if"),
        ({"type": "float"}, "'type' at #/type is 'float'; it must be one of null, boolean"),
        ({"type": ["string", ["null"]]}, "'type' at #/type"),
        ({"$ref": "https://example.com/schema.json"}, "nothing is fetched"),
        ({"$ref": "other.json#/x"}, "nothing is fetched"),
        ({"properties": {"a": {"$ref": "#/$defs/b"}}}, "at #/properties/a points at no schema"),
        ({"anyOf": [{"$ref": "#/anyOf/" + "1" * 5000}]}, "at #/anyOf/0 points at no schema"),
        ({"type": "string", "pattern": "a" * 5000}, "at most 4,096 characters"),
        ({"type": "string", "format": "regex"}, "'format' at #/format is 'regex'; it must be one of date-time"),
        ({"minLength": "3"}, "'minLength' at #/minLength is '3'; it must be a whole number"),
        ({"enum": []}, "'enum' at #/enum"),
        ({"properties": []}, "#/properties is .* an object"),
        ({"items": 3}, "#/items is '3'; a schema is"),
        ([], "# is .* a schema is"),
        (False, "the schema is false"),
        ({"items": {"$id": "http://x"}}, "a document of its own"),
        ({"properties": {"a": {"oneOf": [{"type": "object"}, {}]}}}, "'oneOf' .* It stands at #/properties/a/oneOf"),
        ({"type": "string", "pattern": "(?=x)"}, "cannot be used"),
        ({"type": "string", "minLength": 4, "maxLength": 3}, "cannot be used|no answer fits"),
    ],
)
def test_what_a_grammar_cannot_hold_is_named_with_its_place(schema, message, at_once):
    with pytest.raises(UserError, match=message):
        compile_grammar("json_schema", json.dumps(schema), BYTES)


def test_annotations_and_old_spellings_are_read_as_the_standard_says(at_once):
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "$id": "https://example.com/x",
        "title": "t",
        "x-mine": {"not": 1},
        "uniqueItems": False,
        "default": {"not": 1},
        "items": [{"type": "null", "deprecated": True}],
        "additionalItems": False,
        "type": "array",
    }
    assert screened(schema) == {"type": "array", "prefixItems": [{"type": "null"}], "items": False}
    tokens, ended = generate(compile_grammar("json_schema", json.dumps({**schema, "minItems": 1}), BYTES), BYTES, 0)
    assert ended and json.loads(BYTES.decode(tokens)) == [None]


@pytest.mark.parametrize(
    "tools, message",
    [
        ([], "0 tools"),
        ({}, "a list"),
        ([{"function": {"name": "a>b"}}], "the name 'a>b'"),
        ([{"name": "a", "parameters": {"properties": {"k>": {}}}}], "tools/0/parameters/properties/k>"),
        (
            [{"name": "a", "parameters": {"properties": {"k": {"not": {}}}}}],
            "'not' at tools/0/parameters/properties/k/not",
        ),
        ([{"name": "a", "parameters": {"anyOf": []}}], "has anyOf"),
        ([{"name": "a", "parameters": {"properties": {"k": False}}}], "false"),
        ([{"name": "a", "parameters": {"properties": {"k": {"$ref": "#/properties/k"}}}}], "a \\$ref to a \\$ref"),
        ([{"name": "a", "parameters": {"properties": {"k": {"enum": ["x\n</function>"]}}}}], "like markup"),
        ([{"name": "a", "parameters": {"properties": {"k": {"type": "string", "pattern": "^a|b$"}}}}], "both | and"),
        (
            [
                {
                    "name": "a",
                    "parameters": {"properties": {"k": {"type": "array", "items": {"$ref": "#/properties/k"}}}},
                }
            ],
            "may refer to \\$defs",
        ),
    ],
)
def test_tools_that_no_call_can_be_made_of(tools, message):
    with pytest.raises(UserError, match=message):
        compile_grammar("tools", json.dumps(tools), BYTES)


@pytest.mark.parametrize(
    "kind, text, message",
    [
        ("yaml", "", "use json_schema, json_object"),
        ("regex", "", "0 characters"),
        ("regex", "a" * 4097, "4,097 characters"),
        ("regex", "(", "cannot be used"),
        ("lark", "start: b", "cannot be used"),
        ("lark", "x" * 70000, "70,000 characters"),
        ("choice", "[]", "not empty"),
        ("choice", '["a", 1]', "list of strings"),
        ("json_schema", "{", "no JSON"),
    ],
)
def test_what_is_no_grammar(kind, text, message, at_once):
    with pytest.raises(UserError, match=message):
        compile_grammar(kind, text, BYTES)


def test_compiled_grammars_are_kept_within_bounds(at_once, monkeypatch):
    calls = []
    build = trial.build
    monkeypatch.setattr(trial, "build", lambda *task: calls.append(task[1]) or build(*task))
    monkeypatch.setattr(grammar, "MOST_CACHED", 2)
    tokenizer = train_tokenizer([TEXT], vocab=SMALLEST)
    for pattern in ("a", "b", "a", "c", "a", "b"):
        compile_grammar("regex", pattern, tokenizer)
    assert [re.search('[abc](?=/|"|$|\\\\)', call) is not None for call in calls] == [True] * 4  # a, b, c and b again
    monkeypatch.setattr(trial, "tried", lambda *task: ("", 200 << 20))
    for pattern in ("d", "e"):
        compile_grammar("regex", pattern, tokenizer)
    assert len(vocabulary(tokenizer).compiled) == 1  # two of these are more than the bytes that may be kept


def test_thinking_needs_its_token_and_grammars_their_library(monkeypatch):
    rule_words = vocabulary(BYTES)
    monkeypatch.setattr(rule_words, "control", {})
    with pytest.raises(UserError, match="no token </think>"):
        compile_grammar("json_object", "", BYTES, thinking=True)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match="llguidance; .*serve"):
        compile_grammar("json_object", "", BYTES)
