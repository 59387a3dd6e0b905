"""Copied drafts, compared with a search through all of the text."""

import math
import random
from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import given

from nautilus.serve.draft.suffix import BETWEEN, LEAST, MANY, MATCH, PLACES, WIDTHS, Rows, SuffixCache

few = st.integers(0, 2)
texts = st.lists(st.lists(few, max_size=40), min_size=1, max_size=5)


def by_search(tokens, context, most, own):
    """The definition: every place is compared with the context, every length of a match is tried."""

    def common(place):
        length = 0
        while (
            length < min(MATCH, len(context), place + 1)
            and tokens[place - length] == context[len(context) - 1 - length]
        ):
            length += 1
        return length

    lengths = {place: common(place) for place in range(len(tokens)) if place != own}
    found = {}
    for width in WIDTHS:
        latest = sorted((place for place in lengths if lengths[place] >= width), reverse=True)[:PLACES]
        found |= {place: lengths[place] for place in latest}
    best = None
    for match in range(MATCH, 0, -1):
        if match not in found.values():
            continue
        live = count = [place for place in sorted(found, reverse=True) if found[place] >= match]
        chosen, probs = [], []
        while len(chosen) < most:
            nexts = [
                (place, tokens[place + len(chosen) + 1]) for place in live if place + len(chosen) + 1 < len(tokens)
            ]
            nexts = [(place, token) for place, token in nexts if token != BETWEEN]
            votes = Counter(token for _, token in nexts)
            if not votes or max(votes.values()) / len(count) < LEAST:
                break
            chosen.append(next(token for _, token in nexts if votes[token] == max(votes.values())))
            probs.append(votes[chosen[-1]] / len(count))
            live = [place for place, token in nexts if token == chosen[-1]]
        if chosen and (best is None or sum(probs) > sum(best[1])):
            best = tuple(chosen), tuple(probs), match, len(count)
    return best


def told(draft):
    return draft and (draft.tokens, draft.probs, draft.match, draft.places)


@given(texts, st.lists(few, max_size=12), st.integers(1, 9), st.booleans())
def test_a_draft_is_what_a_search_through_all_of_the_text_finds(texts, context, most, own):
    copies = SuffixCache()
    for text in texts:
        copies.begin()
        for cut in range(0, len(text), 7):
            copies.extend(text[cut : cut + 7])
    context = copies.tokens if own else context
    place = len(copies.tokens) - 1 if own else None
    assert told(copies.draft(context, most)) == by_search(copies.tokens, context, most, place)


def test_the_latest_of_many_places_are_looked_at():
    draw, copies = random.Random(0), SuffixCache()
    for _ in range(3 * PLACES):
        copies.extend([1, 2, 3, draw.randrange(4, 40)])
    copies.extend([1, 2, 3])
    found = copies.draft(copies.tokens, 5)
    assert told(found) == by_search(copies.tokens, copies.tokens, 5, len(copies.tokens) - 1)
    assert found.places <= PLACES * len(WIDTHS)


def test_what_a_draft_says_of_itself():
    copies = SuffixCache()
    copies.extend([1, 2, 3, 4, 5, BETWEEN, 1, 2, 3, 4, 6, BETWEEN, 1, 2, 3, 7])
    found = copies.draft([9, 1, 2, 3], 4)
    assert found.tokens == (4, 6) and found.probs == (2 / 3, 1 / 3), "of 5 and 6 the later one"
    assert found.score == pytest.approx(1.0) and (found.match, found.places, found.kinds, found.age) == (3, 3, 2, 1)
    assert found.entropy == pytest.approx(-(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)))


def test_nothing_is_drafted_from_what_is_not_known():
    copies = SuffixCache()
    assert copies.draft([1, 2, 3], 4) is None
    copies.extend([1, 2, 3, 4])
    assert copies.draft([2, 3], 4) is None, "shorter than any width"
    assert copies.draft([4, 3, 2], 4) is None
    assert copies.draft(copies.tokens, 4) is None, "it does not match itself"
    assert copies.draft([1, 2, 3], 4).tokens == (4,)


def test_no_match_and_no_draft_crosses_from_one_text_into_another():
    copies = SuffixCache()
    copies.extend([1, 2, 3])
    copies.begin()
    copies.extend([4, 5, 6])
    assert copies.draft([1, 2, 3], 4) is None
    assert copies.draft([2, 3, 4], 4) is None


@given(texts, st.integers(5, 30))
def test_only_the_latest_texts_are_kept_and_they_are_found_as_ever(texts, most):
    bounded, whole = SuffixCache(most=most), SuffixCache()
    for text in texts * 3:
        bounded.begin()
        bounded.extend(text)
        assert len(bounded.tokens) <= 2 * most + 1
    whole.extend(bounded.tokens)
    for context in ([0, 1, 2], [0, 0, 0, 0], bounded.tokens[-9:]):
        assert told(bounded.draft(context, 6)) == told(whole.draft(context, 6))


@pytest.mark.parametrize("width", [3, 8])
def test_many_tokens_at_once_are_known_as_if_they_had_come_one_by_one(width):
    draw = random.Random(width)
    text = [draw.choice([0, 1, 2, 131_071, BETWEEN]) for _ in range(400)]
    slow, fast, at = Rows(width), Rows(width), 0
    for size in range(1, len(text) + 1):
        slow.add(text[:size], size - 1)
    while at < len(text):
        size = min(len(text), at + draw.choice([1, 2, MANY - 1, MANY, 90]))
        fast.add(text[:size], at)
        at = size
    assert (fast.before, fast.latest, fast.key) == (slow.before, slow.latest, slow.key)
