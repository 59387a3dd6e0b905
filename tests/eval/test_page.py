import html
import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import given

from nautilus.eval.charts import DARK, LIGHT
from nautilus.eval.page import amount, chart, duration, folded, number, page, plain, table, text

HOSTILE = "</pre><script>alert(1)</script>\" onload='x' & \x00\x1b[31m \u202e \ud800"
any_text = st.text(alphabet=st.one_of(st.characters(), st.sampled_from("<>&\"'\x00\x1f\x7f\ud800")), max_size=30)


@given(words=any_text)
def test_text_can_neither_open_a_tag_nor_end_a_quote(words):
    safe = text(words)
    assert not set(safe) & set("<>\"'\x00\x1f\x7f\ud800")
    assert safe.count("&") == sum(safe.count(entity) for entity in ("&lt;", "&gt;", "&amp;", "&quot;", "&#x27;"))


@given(words=st.text(alphabet=st.characters(exclude_categories=["Cc", "Cs"]), max_size=30))
def test_ordinary_text_is_read_back_as_it_was(words):
    assert html.unescape(text(words)) == words and plain(words) == words


def test_a_page_of_hostile_text_holds_no_element_but_its_own(outline):
    harmless, hostile = (
        page(words, chart(words, words, None, table([words], [[words]], kind="words")) + folded(words, text(words)))
        for words in ("words", HOSTILE)
    )
    assert [tag for tag, _ in outline(hostile).elements] == [tag for tag, _ in outline(harmless).elements]
    assert all(not name.startswith("on") for _, attributes in outline(hostile).elements for name in attributes)
    assert "␀␛[31m" in outline(hostile).text


def test_a_page_may_load_nothing(outline):
    policy = [
        each for each in outline(page("t", "")).named("meta") if "content" in each and "default-src" in each["content"]
    ]
    assert policy[0]["content"] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_both_colour_schemes_stand_in_the_style_sheet():
    css = page("t", "")
    assert all(f"--{name}: {colour};" in css for colours in (LIGHT, DARK) for name, colour in colours.items())
    assert LIGHT.keys() == DARK.keys() and "prefers-color-scheme: dark" in css


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_all_text_has_the_contrast_that_reading_needs(colours):
    for ink, ground in itertools.product(("ink", "muted", "one", "two", "three", "four"), ("card", "page")):
        dark, light = sorted((luminance(colours[ink]), luminance(colours[ground])))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, f"{ink} on {ground} (WCAG 2.1, 1.4.3)"


def test_numbers_are_short_and_readable():
    assert [number(value) for value in (1234567, 0.123456, 3.0, "x", True, float("nan"))] == [
        "1,234,567",
        "0.1235",
        "3",
        "x",
        True,
        "nan",
    ]
    assert [amount(value) for value in (950, 7_180_000, 12.2e9, 25e12, 1500)] == [
        "950",
        "7.18 M",
        "12.2 B",
        "25 T",
        "1.5 k",
    ]
    assert [duration(value) for value in (4.21, 75, 9000, 200000)] == ["4.21 s", "1.25 min", "2.5 h", "2.31 d"]
