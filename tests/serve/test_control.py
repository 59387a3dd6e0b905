import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from nautilus.serve.control import Answer, StopStrings, Thinking, opens_thinking, split_answer

letters = st.text(alphabet="ab\n", max_size=12)
stop_lists = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=3), max_size=3)
cut_lists = st.lists(st.integers(0, 12), max_size=8)


def pieces(text, cuts):
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[low:high] for low, high in itertools.pairwise(edges)]


def letter_by_letter(text, stops):
    """The definition: write letters until one of the strings is what was written last; then take it away."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            return text[: end - max(map(len, ended))], True
    return text, False


@settings(max_examples=300)
@given(text=letters, stops=stop_lists, cuts=cut_lists)
def test_stop_strings_end_the_text_at_the_same_letter_however_it_is_cut(text, stops, cuts):
    matcher = StopStrings(stops)
    out = "".join(matcher.add(piece) for piece in pieces(text, cuts)) + matcher.finish()
    assert (out, matcher.hit) == letter_by_letter(text, stops)


@given(text=letters, stops=stop_lists, cuts=cut_lists)
def test_text_is_released_as_soon_as_it_cannot_be_part_of_a_stop_string(text, stops, cuts):
    matcher, out, seen = StopStrings(stops), "", ""
    for piece in pieces(text, cuts):
        out, seen = out + matcher.add(piece), seen + piece
        if matcher.hit:
            return
        waiting = seen[len(out) :]
        assert not waiting or any(stop.startswith(waiting) for stop in stops), "only a begun stop string waits"


wide_cuts = st.lists(st.integers(0, 40), max_size=8)
thoughts = st.lists(st.sampled_from(["</think>", "</thi", "nk>", "\n", "<", "a", " "]), max_size=12).map("".join)


def by_partition(text, inside):
    if not inside:
        return Answer(content=text)
    reasoning, _, content = text.partition("</think>")
    return Answer(reasoning=reasoning.rstrip("\n"), content=content.lstrip("\n"))


@given(text=thoughts, cuts=wide_cuts, inside=st.booleans())
def test_reasoning_and_content_do_not_depend_on_the_cut(text, cuts, inside):
    thinking, reasoning, content = Thinking(inside=inside), "", ""
    answers = [thinking.add(piece) for piece in pieces(text, cuts)]
    for answer in (*answers, thinking.finish()):
        reasoning, content = reasoning + answer.reasoning, content + answer.content
    want = by_partition(text, inside)
    assert Answer(reasoning=reasoning, content=content) == want == split_answer(text, inside=inside)


@given(text=thoughts, cuts=wide_cuts)
def test_reasoning_waits_only_for_newlines_and_a_begun_tag(text, cuts):
    thinking, out, seen = Thinking(inside=True), "", ""
    for piece in pieces(text, cuts):
        out, seen = out + thinking.add(piece).reasoning, seen + piece
        if not thinking.inside:
            return
        assert "</think>".startswith(seen[len(out) :].lstrip("\n"))


@pytest.mark.parametrize(
    "text, inside, reasoning, content",
    [
        ("Two and two.\n</think>\nFour.\n", True, "Two and two.", "Four.\n"),
        ("Two and two.</think>Four.", True, "Two and two.", "Four."),
        ("cut off in the mid", True, "cut off in the mid", ""),
        ("</think>Four.", True, "", "Four."),
        ("a</think>b</think>c", True, "a", "b</think>c"),
        ("\nFour </think> said", False, "", "\nFour </think> said"),
    ],
)
def test_answers_of_the_released_models_are_split_as_specified(text, inside, reasoning, content):
    assert split_answer(text, inside=inside) == Answer(reasoning=reasoning, content=content)


def test_only_a_prompt_that_ends_in_an_open_block_begins_inside():
    assert opens_thinking("<|im_start|>assistant\n<think>\n")
    assert not opens_thinking("<|im_start|>assistant\n<think></think>")
    assert not opens_thinking("<think>\nHello")
