import itertools
import json
import random

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings

from nautilus.data.chat import render
from nautilus.data.template import template_text
from nautilus.data.tokenizer import SMALLEST, Tokenizer, train_tokenizer
from nautilus.serve.arguments import Signatures, named_types
from nautilus.serve.toolcalls import (
    Answer,
    AnswerStream,
    Arguments,
    Call,
    CallClosed,
    CallOpened,
    Content,
    Reasoning,
    gather,
    split_answer,
)


def counted():
    ids = (f"call_{number}" for number in itertools.count())
    return lambda: next(ids)


def tool(name, root=None, **properties):
    return {"type": "function", "function": {"name": name, "parameters": {"properties": properties, **(root or {})}}}


TOOLS = [
    tool("weather", city={"type": "string"}, days={"type": "integer"}),
    tool("note", body={"type": "string"}, tags={"type": "array"}, mode={"type": ["string", "null"]}),
]


def parts(pieces, *, inside=True, tools=TOOLS, **more):
    stream = AnswerStream(inside=inside, tools=tools, new_id=counted(), **more)
    return [*(delta for piece in pieces for delta in stream.add(piece)), *stream.finish()]


def read(text, **told):
    return gather(parts([text], **told))


def calls(text, **told):
    """Names and arguments of the calls."""
    return [(call.name, json.loads(call.arguments)) for call in read(text, **told).calls]


def value(text, schema):
    """What a parameter of this schema becomes."""
    shown = f"<tool_call>\n<function=f>\n<parameter=x>\n{text}\n</parameter>\n</function>\n</tool_call>"
    return calls(shown, tools=[tool("f", x=schema)])[0][1]["x"]


def pieces(text, cuts):
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[low:high] for low, high in itertools.pairwise(edges)]


WEATHER = "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>"
PARIS = ("weather", {"city": "Paris"})

# text: reasoning, content, calls
WHOLE = {
    "thought, said and called": ("Hm.\n</think>\nI look.\n\n" + WEATHER, "Hm.", "I look.", [PARIS]),
    "glued": ("Hm.</think>I look." + WEATHER, "Hm.", "I look.", [PARIS]),
    "two calls": (f"a</think>{WEATHER}\n{WEATHER}\n", "a", "", [PARIS, PARIS]),
    "text between calls": (f"a</think>{WEATHER}\nand\n{WEATHER}", "a", "\nand", [PARIS, PARIS]),
    "text after a call": (f"a</think>b\n{WEATHER}\nc\n", "a", "b\nc\n", [PARIS]),
    "a call ends the reasoning": (f"Hm.\n{WEATHER}", "Hm.", "", [PARIS]),
    "the closing tag comes after the call": (f"Hm.\n{WEATHER}\n</think>\nDone.", "Hm.", "Done.", [PARIS]),
    "a second closing tag": ("a\n</think>\n\n</think>\nb", "a", "b", []),
    "a second closing tag later": ("a</think>b</think>c", "a", "bc", []),
    "a third closing tag is text": ("a</think>b</think>c</think>d", "a", "bc</think>d", []),
    "the opening tag again": (f"<think>\nHm.\n</think>\n{WEATHER}", "Hm.", "", [PARIS]),
    "no end": ("cut off in the mid", "cut off in the mid", "", []),
    "no more than a begun marker": ("a</think>b\n<tool_ca", "a", "b\n<tool_ca", []),
    "no parameters": ("</think><tool_call>\n<function=f>\n</function>\n</tool_call>", "", "", [("f", {})]),
    "a function of no tool": (
        "</think><tool_call>\n<function=nine>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>",
        "", "", [("nine", {"x": "1"})],
    ),
    "no wrapper": ("</think>I look.\n" + WEATHER[12:-13], "", "I look.", [PARIS]),
    "no opening wrapper": ("</think>" + WEATHER[12:], "", "", [PARIS]),
    "no closing wrapper": (f"</think>{WEATHER[:-13]}\n{WEATHER}", "", "", [PARIS, PARIS]),
    "no closer at all": ("</think><tool_call>\n<function=weather>\n<parameter=city>\nParis\n", "", "", [PARIS]),
    "no closer of the parameter": (
        "</think><tool_call>\n<function=weather>\n<parameter=city>\nParis\n</function>\n</tool_call>", "", "", [PARIS],
    ),
    "no closer before the next parameter": (
        "</think><tool_call>\n<function=weather>\n<parameter=city>\nParis\n<parameter=days>\n3\n</function>",
        "", "", [("weather", {"city": "Paris", "days": 3})],
    ),
    "no closer before the next function": (
        "</think><tool_call>\n<function=weather>\n<parameter=city>\nParis\n<function=f>\n</function>",
        "", "", [PARIS, ("f", {})],
    ),
    "no closer before the next call": (
        f"</think><tool_call>\n<function=weather>\n<parameter=city>\nParis\n{WEATHER}", "", "", [PARIS, PARIS],
    ),
    "closers not on lines of their own": (
        "</think><tool_call>\n<function=weather>\n<parameter=city>\nParis</parameter>\n</function>\n</tool_call>",
        "", "", [PARIS],
    ),
    "closers with a margin": (
        "</think><tool_call>\n  <function=weather>\n    <parameter=city>\nParis\n    </parameter>\n</function>",
        "", "", [PARIS],
    ),
    "all in one line": (
        "</think><tool_call><function=weather><parameter=city>Paris</parameter><parameter=days>3</parameter></function>"
        "</tool_call>", "", "", [("weather", {"city": "Paris", "days": 3})],
    ),
    "all in one line, without the closer": (
        "</think><tool_call><function=weather><parameter=city>Paris</function></tool_call>", "", "", [PARIS],
    ),
    "text before the function": (
        f"</think><tool_call>Let me see.{WEATHER[12:]}", "", "Let me see.", [PARIS],
    ),
    "text before the end": (f"</think>{WEATHER[:-13]} ok </tool_call>", "", " ok", [PARIS]),
    "markers within lines are part of a value": (
        "</think><tool_call>\n<function=note>\n<parameter=body>\nWrite <tool_call><function=f><parameter=x>1"
        "</parameter></function></tool_call> so.\n  </parameter> too\n</parameter>\n</function>\n</tool_call>", "", "",
        [("note", {"body": "Write <tool_call><function=f><parameter=x>1</parameter></function></tool_call> so.\n"
                           "  </parameter> too"})],
    ),
    "a value ends in its own closer's words": (
        "</think><tool_call>\n<function=note>\n<parameter=body>\nreturn </parameter>\n</parameter>\n</function>",
        "", "", [("note", {"body": "return </parameter>"})],
    ),
    "a thinking tag in a value": (
        "</think><function=note>\n<parameter=body>\n</think>\n</parameter>\n</function>", "", "",
        [("note", {"body": "</think>"})],
    ),
    "a function named in prose": (
        "</think>The form is `<function=f>`, as said.", "", "The form is `<function=f>`, as said.", [],
    ),
    "one newline on both sides": (
        "</think><function=note>\n<parameter=body>\n\n a\n\n</parameter>\n</function>",
        "", "", [("note", {"body": "\n a\n"})],
    ),
    "empty values": (
        "</think><function=note>\n<parameter=body>\n\n</parameter>\n<parameter=mode>\n</parameter>\n<parameter=x></parameter>",
        "", "", [("note", {"body": "", "mode": "", "x": ""})],
    ),
    "odd names": (
        '</think><function=a "b"\\>\n<parameter=ü <"\\=>\n1\n</parameter>\n</function>', "", "",
        [('a "b"\\', {'ü <"\\=': "1"})],
    ),
    "the longest names": (
        f"</think><function={'f' * 256}>\n<parameter={'p' * 256}>\n1</parameter>\n<parameter={'q' * 256}>\n2\n",
        "", "", [("f" * 256, {"p" * 256: "1", "q" * 256: "2"})],
    ),
    "a longer name": (f"</think><function={'f' * 257}>", "", f"<function={'f' * 257}>", []),
    "a name that is none": ("</think><function=>\n<function=a\nb>", "", "<function=>\n<function=a\nb>", []),
}  # fmt: skip


@pytest.mark.parametrize("case", WHOLE)
def test_texts_of_models_are_read_as_meant_wherever_they_are_cut(case):
    text, reasoning, content, called = WHOLE[case]
    whole = read(text)
    found = [(call.name, json.loads(call.arguments)) for call in whole.calls]
    assert (whole.reasoning, whole.content, found) == (reasoning, content, called)
    for cut in range(1, len(text)):
        assert gather(parts([text[:cut], text[cut:]])) == whole, f"cut at {cut}: {text[:cut]!r}"
    assert gather(parts(text)) == whole, "letter by letter"


# Without tools: reasoning and content only.
@pytest.mark.parametrize(
    "text, inside, reasoning, content",
    [
        ("Two and two.\n</think>\nFour.\n", True, "Two and two.", "Four.\n"),
        ("Two and two.</think>Four.", True, "Two and two.", "Four."),
        ("cut off in the mid", True, "cut off in the mid", ""),
        ("</think>Four.", True, "", "Four."),
        ("\nFour </think> said", False, "", "\nFour </think> said"),
        ("<think>\nTwo.</think>Four.", False, "Two.", "Four."),
        ("Say <think>", False, "", "Say <think>"),
        ("<think>a</think>b", None, "", "<think>a</think>b"),
        (WEATHER, True, WEATHER, ""),
        (WEATHER, False, "", WEATHER),
    ],
)
def test_answers_without_tools_are_split_as_specified(text, inside, reasoning, content):
    assert split_answer(text, inside=inside) == Answer(reasoning=reasoning, content=content)
    assert gather(parts(text, inside=inside, tools=None)) == Answer(reasoning=reasoning, content=content)


thoughts = st.lists(st.sampled_from(["</think>", "</thi", "nk>", "\n", "<", "a", " "]), max_size=12).map("".join)
cut_lists = st.lists(st.integers(0, 60), max_size=8)


@given(text=thoughts, cuts=cut_lists)
def test_reasoning_waits_only_for_newlines_and_a_begun_tag(text, cuts):
    stream, out, seen = AnswerStream(inside=True), "", ""
    for piece in pieces(text, cuts):
        out, seen = out + gather(stream.add(piece)).reasoning, seen + piece
        if not stream.inside:
            return
        assert "</think>".startswith(seen[len(out) :].lstrip("\n"))


def test_a_call_is_told_while_it_is_written():
    stream, told = AnswerStream(inside=True, tools=TOOLS, new_id=counted()), []
    steps = [
        ("Hm", [Reasoning("Hm")]), (".\n<tool_ca", [Reasoning(".")]), ("ll>\n<function=weather", []),
        (">", [CallOpened(0, "call_0", "weather")]), ("\n<parameter=city", []), (">", [Arguments(0, '{"city": "')]),
        ('\nSt. "', [Arguments(0, 'St. \\"')]), ("Gall\n", [Arguments(0, "Gall")]),
        ("en\n</para", [Arguments(0, "\\nen")]),
        ("meter>", [Arguments(0, '"')]), ("\n<parameter=days>\n1", [Arguments(0, ', "days": ')]), ("2\n", []),
        ("</parameter>", [Arguments(0, "12")]), ("\n</function>", [Arguments(0, "}"), CallClosed(0)]),
        ("\n</tool_call>\n", []), ("So", [Content("\nSo")]),
    ]  # fmt: skip
    for text, want in steps:
        found = stream.add(text)
        told += found
        assert found == want, text
    assert stream.finish() == []
    assert gather(told).calls == (Call("call_0", "weather", '{"city": "St. \\"Gall\\nen", "days": 12}'),)


def test_ids_differ_and_indices_count():
    stream = AnswerStream(inside=False, tools=[])
    opened = [delta for delta in stream.add(WEATHER * 3) + stream.finish() if isinstance(delta, CallOpened)]
    assert [delta.index for delta in opened] == [0, 1, 2]
    assert len({delta.id for delta in opened}) == 3 and all(delta.id.startswith("call_") for delta in opened)


REFERS = {"$ref": "#/$defs/Point"}
POINT = {"$defs": {"Point": {"type": "object"}, "Loop": {"anyOf": [{"$ref": "#/$defs/Loop"}] * 9}}}


@pytest.mark.parametrize(
    "schema, text, want",
    [
        ({"type": "string"}, "5", "5"),
        ({"type": "string"}, ' "5" ', ' "5" '),
        ({"type": "string"}, "null", "null"),
        ({"type": "integer"}, "5", 5),
        ({"type": "integer"}, " 5\n", 5),
        ({"type": "integer"}, "five", "five"),
        ({"type": "integer"}, "05", "05"),
        ({"type": "integer"}, '"5"', "5"),
        ({"type": "integer"}, "5 + 5", "5 + 5"),
        ({"type": "number"}, "1e3", 1000.0),
        ({"type": "number"}, "NaN", "NaN"),
        ({"type": "number"}, "-Infinity", "-Infinity"),
        ({"type": "number"}, "9" * 5000, "9" * 5000),
        ({"type": "boolean"}, "true", True),
        ({"type": "boolean"}, "True", True),
        ({"type": "boolean"}, "False", False),
        ({"type": "boolean"}, "__import__('os')", "__import__('os')"),
        ({"type": "null"}, "None", None),
        ({"type": "array"}, "[1,\n {}]", [1, {}]),
        ({"type": "array"}, "[" * 100_000, "[" * 100_000),
        ({"type": "object"}, "{'a': 1}", "{'a': 1}"),
        ({"type": "object"}, '{"a": [true]}', {"a": [True]}),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "null"]}, "None", None),
        ({"type": ["string", "null"]}, "nothing", "nothing"),
        ({"type": ["string", "null"]}, "5", "5"),
        ({"type": ["string", "number"]}, "5", 5),
        ({"type": ["string", "integer"]}, "5.5", "5.5"),
        ({"type": ["string", "integer"]}, "True", "True"),
        ({"type": ["string", "integer"]}, " \n", " \n"),
        ({"anyOf": [{"type": "string"}, {"type": "object"}]}, '{"a": 1}', {"a": 1}),
        ({"anyOf": [{"type": "string"}, {"type": "object"}]}, "{a", "{a"),
        ({"oneOf": [{"type": "integer"}, {"anyOf": [{"type": "boolean"}]}]}, "true", True),
        ({"allOf": [{"type": "integer"}]}, "5", 5),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"enum": [1, 2]}, "1", 1),
        ({"const": True}, "true", True),
        ({"properties": {}}, "{}", {}),
        ({"items": {}}, "[]", []),
        ({"type": "dict"}, "{}", {}),
        ({}, "5", "5"),
        ({"description": "a number"}, "5", "5"),
        (True, "5", "5"),
        ({"type": {"a": 1}}, "5", "5"),
        ({"$ref": "https://example.org/schema"}, "5", "5"),
        ({"$ref": "#/none/such"}, "5", "5"),
    ],
)  # fmt: skip
def test_values_become_what_the_schema_says_and_stay_strings_where_they_cannot(schema, text, want):
    found = value(text, schema)
    assert found == want and type(found) is type(want)


def test_numbers_keep_their_digits():
    text = "<function=f>\n<parameter=x>\n1.10000000000000000001e400\n</parameter>"
    assert read(text, inside=False, tools=[tool("f", x={"type": "number"})]).calls[0].arguments == (
        '{"x": 1.10000000000000000001e400}'
    )


def test_types_are_found_where_schemas_keep_them():
    text = "<function=f>\n<parameter=x>\n{}\n</parameter>"
    for tools in (
        [tool("f", POINT, x=REFERS)],
        [tool("f", POINT, x={"anyOf": [REFERS, {"type": "null"}]})],
        [{"name": "f", "parameters": {"properties": {"x": {"type": "object"}}}}],
        [tool("f", {"additionalProperties": {"type": "object"}})],
        [tool("f", {"$ref": "#/$defs/all", "$defs": {"all": {"properties": {"x": {"type": "object"}}}}})],
    ):
        assert calls(text, inside=False, tools=tools) == [("f", {"x": {}})], tools
    for tools in (
        [tool("f", POINT, x={"$ref": "#/$defs/Loop"})],
        [{"name": "f"}],
        [{"name": "f", "parameters": 5}],
        [],
    ):
        assert calls(text, inside=False, tools=tools) == [("f", {"x": "{}"})], tools


def test_a_schema_is_looked_through_once_however_its_parts_refer_to_each_other(monkeypatch):
    looks = []
    monkeypatch.setattr("nautilus.serve.arguments.named_types", lambda part: looks.append(part) or named_types(part))
    schema = {"anyOf": [{"properties": {"y": {"$ref": "#"}}} for _ in range(100)] + [{"type": "integer"}]}
    signatures = Signatures([{"name": "f", "parameters": schema}])
    for _ in range(3):
        assert signatures.types("f", "y") == {"integer", "object"}
        assert len(looks) == 202  # the schema, its 101 parts and the 100 that refer to it


def test_only_what_may_be_something_else_waits_for_its_end():
    for schema, text, waits in (
        ({"type": "string"}, "{", False), ({"type": ["string", "null"]}, "a", False),
        ({"type": ["string", "null"]}, "n", True), ({"type": "integer"}, "a", True), ({}, "5", False),
    ):  # fmt: skip
        stream = AnswerStream(inside=False, tools=[tool("f", x=schema)])
        stream.add("<function=f>\n<parameter=x>\n")
        assert (stream.add(text) == []) is waits, (schema, text)


def test_a_parameter_kindstwice_counts_as_kindslast():
    text = "<function=note>\n<parameter=body>\na\n</parameter>\n<parameter=body>\nb\n</parameter>"
    assert read(text, inside=False).calls[0].arguments == '{"body": "a", "body": "b"}'
    assert calls(text, inside=False) == [("note", {"body": "b"})]


@pytest.mark.parametrize(
    "text, reasoning, content",
    [
        ("a</think>b", "a", "b"),
        ("a</think>\n", "", "a"),
        ("a", "", "a"),
        (f"a</think>{WEATHER}", "", "a"),
        (f"a{WEATHER}b", "", "ab"),
        (f"a</think>b{WEATHER}", "a", "b"),
        ("", "", ""),
    ],
)
def test_what_was_thought_counts_as_said_if_nothing_else_was(text, reasoning, content):
    for cut in (text, [text]):
        found = gather(parts(cut, force_nonempty_content=True))
        assert (found.reasoning, found.content) == (reasoning, content)


# A soup of markers, of what begins like them, of blanks, and of letters that each come once.
MARKERS = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", "</function>", "</parameter>", "<function=", "<parameter=",
    "\n</parameter>\n", "\n</function>\n", "\n<parameter=", "\n<function=", ">", ">", ">\n", "<", "</", "</param",
    "<tool", "\n", "\n", " ", "  ", "{", '"', "\\", "[1]", "null", "True", "-5",
]  # fmt: skip
LETTERS = [f"letter {i}" for i in range(4)]
SOUP_TOOLS = [tool("", POINT, **{"": {}}), {"name": "f", "parameters": {"additionalProperties": {"type": "array"}}}]


def soup(words):
    unique = (chr(code) for code in itertools.count(0x4E00))
    return "".join(next(unique) if word in LETTERS else word for word in words)


soups = st.lists(st.sampled_from(MARKERS + 3 * LETTERS), max_size=40).map(soup)


def letters(text):
    return [char for char in text if "\u4e00" <= char <= "\u9fff"]


def text_of(delta):
    return "" if isinstance(delta, CallClosed) else delta.name if isinstance(delta, CallOpened) else delta.text


@settings(max_examples=600, deadline=None)
@given(text=soups, cuts=st.lists(st.integers(0, 150), max_size=12), inside=st.sampled_from([True, False, None]))
@example(text="a</think>b<tool</think>_call>c", cuts=[10], inside=True)
@example(text="<function=a</parameter></function>\n</tool_call>\n", cuts=[14, 20], inside=False)
@example(text="<function=a>\n<parameter=b>\nc</parameter>\n</function", cuts=[30, 41], inside=False)
def test_any_text_is_read_the_same_however_it_is_cut_and_nothing_is_lost(text, cuts, inside):
    for tools in (SOUP_TOOLS, None):
        whole = parts([text], inside=inside, tools=tools)
        assert [char for delta in whole for char in letters(text_of(delta))] == letters(text)
        assert gather(parts(pieces(text, cuts), inside=inside, tools=tools)) == gather(whole)
        assert gather(parts(text, inside=inside, tools=tools)) == gather(whole)
        assert all(isinstance(json.loads(call.arguments), dict) for call in gather(whole).calls)


@settings(max_examples=300, deadline=None)
@given(text=soups, cuts=st.lists(st.integers(0, 150), max_size=12))
def test_parts_come_in_order_and_a_held_thought_is_told_once(text, cuts):
    open_call, seen = None, -1
    for delta in parts(pieces(text, cuts), force_nonempty_content=True):
        match delta:
            case CallOpened(index):
                assert open_call is None and index == seen + 1
                open_call = seen = index
            case Arguments(index):
                assert index == open_call
            case CallClosed(index):
                assert index == open_call
                open_call = None
            case Content(told) | Reasoning(told):
                assert told
    assert open_call is None
    found, plain = read(text, force_nonempty_content=True), read(text)
    assert letters(found.reasoning) in ([], letters(plain.reasoning)) and found.calls == plain.calls
    assert sorted(letters(found.reasoning + found.content)) == sorted(letters(plain.reasoning + plain.content))
    assert found.content.strip() or not plain.reasoning.strip()


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=200), seed=st.integers(0, 1 << 30))
def test_bytes_and_markers_at_random_raise_nothing(data, seed):
    draw, text = random.Random(seed), data.decode("latin-1")
    for _ in range(12):
        at = draw.randrange(len(text) + 1)
        text = text[:at] + draw.choice(MARKERS) + text[at:]
    for call in read(text, inside=draw.random() < 0.5, tools=SOUP_TOOLS).calls:
        assert isinstance(json.loads(call.arguments), dict)


# What templates write is read back.
TYPED = {
    "string": st.text(max_size=12)
    | st.sampled_from(["5", "null", "True", "[1]", "\n", "a\n\nb\n", "</parameter>", " x "]),
    "integer": st.integers(), "number": st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    "boolean": st.booleans(), "null": st.none(),
}  # fmt: skip
JSON = st.recursive(
    st.one_of(*TYPED.values()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
TYPED |= {"array": st.lists(JSON, max_size=3), "object": st.dictionaries(st.text(max_size=5), JSON, max_size=3)}
names = st.text(st.characters(exclude_characters=">\n", exclude_categories=["Cs"]), min_size=1, max_size=8)
arguments = st.dictionaries(
    names, st.sampled_from(sorted(TYPED)).flatmap(lambda kind: st.tuples(st.just(kind), TYPED[kind])), max_size=4
)
LINE_MARKERS = ("<tool_call>", "</tool_call>", "<function=", "</function>", "<parameter=", "</parameter>")


def readable(item):
    """A string with a marker at the start of a line ends there; the form has no way to write one."""
    return not isinstance(item, str) or not any(line.startswith(LINE_MARKERS) for line in item.split("\n"))


@pytest.fixture(scope="module")
def tokenizers():
    plain = train_tokenizer([], vocab=SMALLEST)
    return [
        Tokenizer(plain.core, bos="<s>", eos="<|im_end|>", template=template_text(style))
        for style in ("spaced", "glued")
    ]


@settings(max_examples=200, deadline=None)
@given(said=st.lists(st.tuples(names, arguments), min_size=1, max_size=3, unique_by=lambda call: call[0]))
@example(said=[("f", {"a": ("string", "x\n"), "b": ("boolean", True), "c": ("null", None)})])
def test_what_the_template_writes_is_read_back(tokenizers, said):
    said = [(name, {key: typed for key, typed in kinds.items() if readable(typed[1])}) for name, kinds in said]
    tools = [
        {"name": name, "parameters": {"properties": {key: {"type": kind} for key, (kind, _) in typed.items()}}}
        for name, typed in said
    ]
    called = [{"name": name, "arguments": {key: item for key, (_, item) in typed.items()}} for name, typed in said]
    message = {"role": "assistant", "reasoning": "Hm.", "content": "So.", "tool_calls": called}
    for tokenizer in tokenizers:
        prompt = render(tokenizer, [])
        text = render(tokenizer, [message], generate=False).removeprefix(prompt).removesuffix("<|im_end|>\n")
        found = read(text, tools=tools)
        assert (found.reasoning, found.content) == ("Hm.", "So.")
        assert [{"name": call.name, "arguments": json.loads(call.arguments)} for call in found.calls] == called
