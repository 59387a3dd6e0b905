"""What is chosen is what a search through all actions finds."""

import itertools
from fractions import Fraction

import hypothesis.strategies as st
import pytest
from hypothesis import given

from nautilus.serve.draft.choice import GAIN, GRID, Choice, Offer, choose, share_out, whole_or_not

# Whole numbers and halves, so that equal rates occur and are equal.
falling = st.lists(st.sampled_from([1.0, 0.75, 0.5, 0.25, 0.0]), max_size=6).map(lambda row: sorted(row, reverse=True))
costs = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, None]), min_size=40, max_size=40)


def cost_of(steps, first=1.0):
    """Costs that never fall with the number of tokens, some of them unknown."""
    table: dict[int, float | None] = {1: first}
    known = first
    for size, step in enumerate(steps, 2):
        known += step or 0.0
        table[size] = None if step is None else known
    return table.get


def by_search(offers, cost, before):
    plain = (Fraction(1) / Fraction(cost(1)), 0, 0, "plain")
    found: list[tuple[Fraction, int, int, str]] = [plain]
    for at, offer in enumerate(offers):
        for tokens in range(1, len(offer.survival) + 1):
            seconds, drafting = cost(1 + tokens), offer.seconds(tokens)
            if tokens in offer.lengths and seconds is not None and drafting is not None:
                rate = Fraction(1 + sum(offer.survival[:tokens])) / Fraction(seconds + drafting)
                if rate > Fraction(GAIN) * plain[0]:
                    found.append((rate, -tokens, -at, offer.arm))
    best = max(found)
    same = [one for one in found if one[3] == before]
    if same and best[0] <= Fraction(GAIN) * max(same)[0]:
        best = max(same)
    return best[3], -best[1]


@given(falling, falling, costs, st.sampled_from([0.0, 0.25, 1.0]), st.sampled_from(["plain", "cache", "mtp"]))
def test_the_chosen_action_is_the_one_that_a_search_finds(copied, drafted, steps, each, before):
    drafting = lambda tokens: each * tokens if tokens < 4 else None
    offers = [
        Offer(arm="cache", survival=copied),
        Offer(arm="mtp", survival=drafted, lengths=range(1, 6), seconds=drafting),
    ]
    cost = cost_of(steps)
    found = choose(offers, cost, before=before)
    assert (found.arm, found.tokens) == by_search(offers, cost, before)


def test_ties_go_to_fewer_tokens_and_gains_too_small_are_not_worth_a_change():
    steady = lambda tokens: 1.0 + 0.5 * (tokens - 1)
    flat = Offer(arm="cache", survival=[0.8, 0.5 * 1.8, 0.9])  # (1 + .8) / 1.5 = 1.2, then less
    assert choose([Offer(arm="cache", survival=[0.8, 0.6])], steady).tokens == 1, "2.4 / 2 is no more than 1.8 / 1.5"
    assert choose([flat], lambda tokens: None) == Choice(), "nothing is known"
    dear = lambda tokens: 1.0 if tokens == 1 else 1.9
    assert choose([Offer(arm="cache", survival=[0.95])], dear).arm == "plain", "1.95 / 1.9 is 2.6 % more"
    assert choose([Offer(arm="cache", survival=[0.96])], dear).arm == "cache"
    rivals = [Offer(arm="cache", survival=[0.5]), Offer(arm="mtp", survival=[0.53])]
    even = lambda tokens: 1.0
    assert choose(rivals, even, before="cache").arm == "cache" and choose(rivals, even).arm == "mtp"
    assert choose([rivals[0], Offer(arm="mtp", survival=[0.6])], even, before="cache").arm == "mtp"


def test_lengths_are_those_of_the_grid_unless_an_arm_has_others():
    free = lambda tokens: 1.0
    assert choose([Offer(arm="cache", survival=[1.0] * 7)], free).tokens == max(size for size in GRID if size <= 7)
    assert choose([Offer(arm="mtp", survival=[1.0] * 7, lengths=range(1, 8))], free).tokens == 7


def best_shares(survivals, cost, most):
    """The largest rate of all that can be shared out, and with how few tokens."""
    rows, found = len(survivals), []
    for tokens in itertools.product(*(range(len(row) + 1) for row in survivals)):
        seconds = cost(rows + sum(tokens))
        if seconds is not None and sum(tokens) <= most and sum(tokens) in (0, *GRID):
            expected = rows + sum(sum(row[:size]) for row, size in zip(survivals, tokens, strict=True))
            found.append((Fraction(expected) / Fraction(seconds), -sum(tokens)))
    plain = next((one for one in found if not one[1]), None)
    best = max(found)
    return best if plain is None or best[0] > Fraction(GAIN) * plain[0] else plain


@given(st.lists(falling, min_size=1, max_size=4), costs, st.integers(0, 12))
def test_tokens_are_shared_out_as_a_search_through_all_shares_finds(survivals, steps, most):
    cost = cost_of(steps, 2.0)
    found = share_out(survivals, cost, most=most)
    if cost(len(survivals)) is None:
        assert found.tokens == (0,) * len(survivals)
        return
    best = best_shares(survivals, cost, most)
    assert best is not None
    assert sum(found.tokens) == -best[1] and found.rate == pytest.approx(float(best[0]))
    expected = sum(sum(row[:size]) for row, size in zip(survivals, found.tokens, strict=True)) + len(survivals)
    assert expected / (cost(len(survivals) + sum(found.tokens)) or 0.0) == pytest.approx(found.rate)


def test_no_token_is_tried_before_the_one_that_it_follows():
    rising = [[0.1, 0.9, 0.9], [0.5, 0.5]]  # no survival rises: the second cannot come true more often than the first
    assert share_out(rising, lambda tokens: 1.0 + 0.2 * (tokens - 2)).tokens == (0, 2)


def test_the_rule_of_the_paper_takes_all_or_nothing():
    model = Choice(arm="mtp", tokens=3)
    assert whole_or_not(6.1, 40, otherwise=model) == Choice(arm="cache", tokens=40)
    assert whole_or_not(6.0, 40, otherwise=model) == model
    assert whole_or_not(2.5, 4, otherwise=model, tau=2) == Choice(arm="cache", tokens=4)
