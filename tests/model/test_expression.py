"""Expressions of unknown origin against Python's own matcher, and in time."""

import re
import time
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nautilus.model.expression import INSTRUCTIONS, Expression

NAMES = (
    "lm_head",
    "model.layers.12.self_attn.q_proj",
    "model.layers.3.mlp.gate",
    "model.layers.3.mlp.gate_proj",
    "backbone.layers.7.mixer.experts.11.down_proj",
    "visual.blocks.1.attn.qkv",
    "mtp.layers.0.eh_proj",
    "",
)
PUBLISHED = (
    r".*lm_head",
    r".*mlp\.gate$",
    r"model\.layers\.(\d+)\..*proj",
    r".*(q_proj|k_proj)$",
    r".*(q|k|v|o)_proj$",
    r".*self_attn\.(?:q|k)_proj",
    r".*layers\.(0|1\d|2[0-3])\.",
    r"^(?!.*experts).*proj$",
    r"visual.*",
    r".*\.mixer\.experts\.[0-9]+\.(up|down)_proj",
    r"mtp\..+",
    r".*layers\.\d{1,2}\.mlp\.(gate|up|down)_proj$",
)


@pytest.mark.parametrize("pattern", PUBLISHED)
def test_expressions_as_published_name_the_same_modules_as_in_python(pattern):
    expression, own = Expression(pattern), re.compile(pattern)
    assert [expression.match(name) for name in NAMES] == [own.match(name) is not None for name in NAMES]


PIECES = st.sampled_from(
    r"a b c . | ( (?: (?P<n> ) * + ? *? +? {2} {1,2} {,2} {1,} {2 ^ $ [ab] [^a] []a] \. \w \A \Z".split()
)


@given(st.lists(PIECES, max_size=9), st.sampled_from(["", "(?!a)", "^(?=.b)", "(?!.*c)(?=a)"]), st.data())
def test_expressions_match_what_python_matches(pieces, before, data):
    pattern = before + "".join(pieces)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            own = re.compile(pattern)
        except re.error:
            return
    try:
        expression = Expression(pattern)
    except re.error as bad:
        assert re.search("not understood|ahead|nothing to repeat", str(bad))
        return
    for text in data.draw(st.lists(st.text("abc.{", max_size=6), min_size=1, max_size=6)):
        assert expression.match(text) == (own.match(text) is not None), (pattern, text)


HOSTILE = [
    "(a|a)*b",
    "(a|ab)*c",
    "(a*)*b",
    "(a?){40}a{40}",
    "([a-z.]+)+X",
    "(|a)*b",
    ".*.*.*.*.*.*.*.*b",
    "(?!(a+)+b)a*c",
]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("pattern", HOSTILE)
def test_a_hostile_expression_takes_time_as_the_text_grows(pattern):
    expression = Expression(pattern)
    begin = time.process_time()
    expression.match("a" * 20_000)
    assert time.process_time() - begin < 5


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "pattern", ["((a{30}){30}){30}", "(){4000000000}", "((()){1000}){1000}", "a{,99999}", "(a|b)" * 500]
)
def test_an_expression_that_would_be_written_out_too_long_is_refused(pattern):
    with pytest.raises(re.error, match=f"more than {INSTRUCTIONS} instructions"):
        Expression(pattern)


@pytest.mark.parametrize(
    "pattern",
    [r"(a)\1", r"(?i)a", r"a\b", r"(?<=a)b", r"a(?!b)", r"(?!a)b|c", r"a*+", r"(?>a)", r"(?P<x>a)(?P=x)", "("],
)
def test_what_cannot_be_followed_all_at_once_is_refused(pattern):
    with pytest.raises(re.error):
        Expression(pattern)
