import itertools

import hypothesis.strategies as st
from hypothesis import given, settings

from nautilus.data.tokenizer import SMALLEST, train_tokenizer
from nautilus.serve.control import StopStrings, opens_thinking

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
            longest = max(ended, key=len)
            return text[: end - len(longest)], longest
    return text, None


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


TOKENIZER = train_tokenizer([], vocab=SMALLEST)


def opens(prompt):
    return opens_thinking(TOKENIZER.encode(prompt, control=True), TOKENIZER)


def test_a_prompt_begins_inside_if_the_last_tag_of_its_last_turn_is_open():
    assert opens("<|im_start|>assistant\n<think>\n")
    assert opens("<|im_start|>assistant\n<think>\nFirst, ")
    assert opens("</think>\nNo.<|im_end|>\n<|im_start|>assistant\n<think>\n")
    assert not opens("<|im_start|>assistant\n<think></think>")
    assert not opens("<|im_start|>assistant\n<think>\na</think>b")
    assert not opens("<|im_start|>user\nWhat is <think>?<|im_end|>\n<|im_start|>assistant\n")
    assert not opens("plain text")
