"""Templates, schemas and grammars out of pieces thrown together: a result or an error of ours, and soon."""

import json
import time

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from nautilus.data.template import render_template, template_text
from nautilus.runtime import UserError
from nautilus.serve.grammar import compile_grammar, vocabulary
from tests.serve.reliability.parts import TOKENIZER

pytestmark = pytest.mark.slow
MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": []}]
PIECES = [
    "{{ ", " }}", "{% ", " %}", "for m in messages", "endfor", "if x", "else", "endif", "set x = ", "m.content", "'a'",
    "messages", "x", "99999", "-1", " * ", " ~ ", " + ", " | ", "length", "tojson", "join", "format", "center(", ")",
    "(", "[", "]", "[:", ".", "__class__", "__mro__", "loop.index", "macro f(y)", "endmacro", "f(", "range(",
    "namespace(", "raise_exception(", "strftime_now(", "is defined", "not ", "{#", "#}", "{%- ", " -%}", "\n", "%",
]  # fmt: skip
soups = st.lists(st.sampled_from(PIECES), max_size=25).map("".join)
whole = template_text()


@st.composite
def templates(draw):
    """A soup, or our own template with one put into it or something taken out."""
    if draw(st.booleans()):
        return draw(soups)
    at, drop = draw(st.integers(0, len(whole))), draw(st.integers(0, 12))
    return whole[:at] + draw(soups) + whole[at + drop :]


@settings(max_examples=300, deadline=None)
@given(template=templates())
def test_a_template_renders_or_is_refused(template):
    start = time.process_time()
    try:
        assert isinstance(render_template(template, {"messages": MESSAGES, "add_generation_prompt": True}), str)
    except UserError as bad:
        assert str(bad)
    assert time.process_time() - start < 5


names = st.sampled_from(["a", "b", "\u00e9", "$ref", "", '"'])
values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 10**9) | st.text(max_size=4), lambda inner: st.lists(inner, max_size=3)
)
KINDS = ["string", "integer", "number", "object", "array", "null", "boolean", "nothing"]


def larger(inner):
    """Some of everything that a schema may say, with whatever in it."""
    several, kinds = st.lists(inner, max_size=2), st.sampled_from(KINDS)
    fields = {
        "type": kinds | st.lists(kinds, max_size=2), "enum": st.lists(values, max_size=3), "const": values,
        "properties": st.dictionaries(names, inner, max_size=3), "required": st.lists(names, max_size=2),
        "items": inner, "prefixItems": several, "anyOf": several, "allOf": several, "oneOf": several, "not": inner,
        "additionalProperties": inner, "pattern": st.sampled_from(["^a+$", "(", "a{1,999}", "[a", "\\d\\p{L}"]),
        "minimum": values, "maxLength": values, "minItems": values, "format": st.just("date"), "default": values,
        "$ref": st.sampled_from(["#", "#/$defs/a", "#/$defs/b", "http://x/y"]),
        "$defs": st.dictionaries(names, inner, max_size=2),
    }  # fmt: skip
    return st.fixed_dictionaries({}, optional=fields)


def joined(*pieces):
    return st.lists(st.sampled_from(pieces), max_size=12).map("".join)


schemas = st.recursive(st.booleans() | st.just({}) | values, larger, max_leaves=12)
tools = st.lists(st.fixed_dictionaries({"name": names, "parameters": schemas}), max_size=2)
GRAMMARS = {
    "json_schema": schemas.map(json.dumps),
    "tools": tools.map(json.dumps),
    "choice": values.map(json.dumps),
    "regex": joined(*"ab()[]{}*+?|^$.\\,19-", "\u00e9", "(?:", "\\p{L}", "{2,}"),
    "lark": joined("start: ", "a", '"x"', "/y+/", " | ", "\n", "A: ", "(", ")", "*", "%json {}", "@"),
}


@pytest.mark.parametrize("kind", GRAMMARS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_grammar_compiles_or_is_refused(kind, data):
    pytest.importorskip("llguidance")
    vocabulary(TOKENIZER)
    text, start = data.draw(GRAMMARS[kind]), time.process_time()
    try:
        compile_grammar(kind, text, TOKENIZER)
    except UserError as bad:
        assert len(str(bad)) < 2000
    assert time.process_time() - start < 2
