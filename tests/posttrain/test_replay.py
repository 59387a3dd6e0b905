"""A replay sees what an engine would have seen, and nothing of what came later."""

import random
from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from nautilus.data.tokenizer import SMALLEST, train_tokenizer
from nautilus.posttrain.policies import (
    Prices,
    by_oracle,
    by_precedence,
    by_score,
    by_truth,
    followed,
    model_only,
    plain,
    prompt_lookup,
    simulate,
    suffix_only,
)
from nautilus.posttrain.replay import MODEL, common, replay
from nautilus.posttrain.traces import Trace
from nautilus.serve.draft.choice import Choice
from nautilus.serve.draft.costs import Costs
from nautilus.serve.draft.features import Spelling
from nautilus.serve.draft.suffix import SuffixCache

TOKENIZER = train_tokenizer([], vocab=SMALLEST)
SPELLING, MOST = Spelling(TOKENIZER), 12


def traces_of(seed, count=5, repeats=True, depths=False):
    """Answers that repeat parts of their prompts and of each other."""
    draw, found = random.Random(seed), []
    pool = [[draw.randrange(30, 200) for _ in range(draw.randint(4, 14))] for _ in range(6)]
    for number in range(count):
        prompt = [token for _ in range(3) for token in draw.choice(pool)]
        answer = [token for _ in range(4) for token in (draw.choice(pool) if repeats else [draw.randrange(200)] * 1)]
        tall = [draw.randrange(4) for _ in answer] if depths else []
        depth = [min(deep, len(answer) - at) for at, deep in enumerate(tall)]
        limit = len(prompt) + len(answer) + draw.choice([0, 0, 40])
        tenant = draw.choice("ab")
        found.append(Trace(prompt=prompt, answer=answer, limit=limit, tenant=tenant, group=str(number), depths=depth))
    return found


def prices_of(seed, most=MOST):
    draw, seconds, costs = random.Random(seed), 1.0, Costs()
    for size in range(1, most + 2):
        costs.seconds[size] = seconds
        seconds += draw.choice([0.0, 0.05, 0.2, 0.6])
    return Prices.of(costs, look=draw.choice([0.0, 0.01]), model=draw.choice([0.0, 0.1, 0.4]))


POLICIES = {
    "plain": (plain, False),
    "lookup": (prompt_lookup, True),
    "suffix": (suffix_only, True),
    "score": (by_score(3.0, 2), True),
    "model": (model_only(3), False),
}


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=20)
@given(seed=st.integers(0, 99))
def test_whatever_is_chosen_the_tokens_are_those_of_the_traces(name, seed):
    traces, (policy, look) = traces_of(seed, depths=seed % 2 == 0), POLICIES[name]
    found = simulate(name, traces, policy, prices_of(seed), SPELLING, most=MOST, look=look)
    assert found.tokens.total() == sum(len(trace.answer) - 1 for trace in traces), "all but each first one"
    assert found.accepted.total() <= found.drafted.total() and found.rate > 0
    cycles = found.tokens.total() - found.accepted.total()
    assert cycles <= found.cycles.total() <= cycles + len(traces), "the last draft of an answer may reach its end"
    assert name not in ("plain", "model") or not found.cycles["cache"]


def test_drafts_are_those_of_a_cache_that_knows_the_past_only():
    traces = traces_of(4, count=6)
    seen = 0
    for moment, _ in replay(traces, plain, SPELLING, most=MOST):
        trace, text = moment.trace, [*moment.trace.prompt, *moment.trace.answer[: moment.at]]
        assert moment.situation.length == len(text) and moment.room == min(MOST, trace.limit - len(text) - 1)
        own, shared = SuffixCache(), SuffixCache()
        own.extend(text)
        for earlier in traces[: moment.number]:
            if earlier.tenant == trace.tenant:
                shared.begin()
                shared.extend(earlier.answer)
        both = [own.draft(own.tokens, moment.room), shared.draft(text, moment.room)] if moment.room else []
        best = max((draft for draft in both if draft), key=lambda draft: draft.score, default=None)
        assert (moment.copied and moment.copied.draft) == best
        if moment.copied:
            seen += 1
            tokens = moment.copied.draft.tokens
            assert (moment.copied.origin == "tenant") == (best is not both[0])
            follows = trace.answer[moment.at : moment.at + len(tokens)]
            assert tuple(follows[: moment.true]) == tokens[: moment.true]
            assert (
                moment.true == len(tokens) or moment.true == len(follows) or follows[moment.true] != tokens[moment.true]
            )
    assert seen > 40


def test_requests_that_are_not_gone_through_are_still_copied_from():
    traces = traces_of(3)
    alone = [moment for moment, _ in replay(traces, plain, SPELLING, most=MOST, of={4})]
    together = [moment for moment, _ in replay(traces, plain, SPELLING, most=MOST) if moment.number == 4]
    assert [moment.copied for moment in alone] == [moment.copied for moment in together] and len(alone) > 9
    assert any(moment.copied and moment.copied.origin == "tenant" for moment in alone)


def test_moments_between_cycles_change_no_cycle():
    traces = traces_of(6)
    told = lambda pairs: [(m.number, m.at, choice, m.features().tolist() if m.copied else None) for m, choice in pairs]
    cycles = told(replay(traces, suffix_only, SPELLING, most=MOST))
    every = told(replay(traces, suffix_only, SPELLING, most=MOST, every=True))
    assert [one[:3] for one in every if one[2] is not None] == [one[:3] for one in cycles]
    assert len(every) == sum(len(trace.answer) - 1 for trace in traces) > len(cycles)
    assert [one[3] for one in every if one[2] is not None] == [one[3] for one in cycles]


def test_history_is_that_of_the_cycles():
    text = [*range(40, 60)]
    trace = Trace(prompt=text + text[:4], answer=[*text[4:12], 99, 98, 97], limit=60)
    choices = iter([Choice(arm="cache", tokens=3), Choice(arm="cache", tokens=9)])
    policy = lambda moment: next(choices, Choice())
    found = []
    for moment, _ in replay([trace], policy, SPELLING, most=16):
        history = moment.history
        found.append((moment.at, moment.before, history.accepted[0], history.since, history.trimmed))
    assert found == [
        (1, "plain", 0, 0, False), (5, "cache", 3, 4, True), (9, "cache", 3, 0, True), (10, "plain", 0, 1, False),
    ]  # fmt: skip


def test_a_model_counts_what_it_has_right():
    trace = Trace(prompt=[1], answer=[5, 6, 7, 8, 9], limit=99, depths=[2, 1, 0, 2, 1])
    found = simulate("model", [trace], model_only(2), prices_of(1), SPELLING, most=4, look=False)
    # After 5: one of two; after 7: two of two.
    assert dict(found.cycles) == {MODEL: 2} and found.accepted[MODEL] == 3 and found.tokens[MODEL] == 4
    prices = prices_of(1)
    assert found.seconds == pytest.approx(2 * prices.passes[3] + 4 * prices.model)


def test_prompt_lookup_copies_ten_tokens_from_the_latest_place():
    text = [1, 2, 3, *range(40, 60), 1, 2, 3, *range(60, 80)]
    trace = Trace(prompt=text, answer=[1, 2, 3, *range(60, 75)], limit=99)
    drafts = {}
    for moment, _ in replay([trace], plain, SPELLING, most=30):
        drafts[moment.at] = [*moment.looked_up("lookup")]
        if moment.at == 3:
            assert [moment.accepted(Choice(arm="lookup", tokens=size)) for size in (10, 4)] == [10, 4]
    assert drafts[1] == drafts[2] == [] and drafts[3] == [*range(60, 70)]


@settings(max_examples=20)
@given(seed=st.integers(0, 200))
def test_nothing_is_faster_than_who_knows_what_comes_true(seed):
    traces, prices = traces_of(seed, depths=seed % 3 > 0), prices_of(seed)
    oracle = by_oracle(traces, prices, SPELLING, most=MOST, depth=3)
    best = simulate("oracle", traces, oracle, prices, SPELLING, most=MOST, look=False)
    best.seconds += prices.look * best.cycles["cache"]
    assert best.accepted == best.drafted
    for name, (policy, look) in POLICIES.items():
        if name != "lookup":  # whose drafts are others
            found = simulate(name, traces, policy, prices, SPELLING, most=MOST, look=look)
            assert best.seconds <= found.seconds * (1 + 1e-9), name


def test_common_beginnings():
    assert common((1, 2, 3), (9, 1, 2, 4), 1) == 2 and common((1,), (1,), 1) == 0 and common((), (1,), 0) == 0


@pytest.mark.parametrize("seed", range(4))
def test_who_knows_of_copied_drafts_alone_tries_no_token_of_them_in_vain(seed):
    traces, prices = traces_of(seed, depths=seed % 2 > 0), prices_of(seed)
    found = simulate("oracle", traces, by_truth(prices, 3), prices, SPELLING, most=MOST, look=False)
    assert found.accepted["cache"] == found.drafted["cache"] > 0
    assert found.accepted[MODEL] <= found.drafted[MODEL] and (found.drafted[MODEL] > 0) == (seed % 2 > 0)
    planned = followed(traces, by_truth(prices, 3), SPELLING, most=MOST)
    chosen = Counter(choice.arm for plan in planned.values() for choice in plan)
    assert {arm: chosen[arm] for arm in ("cache", MODEL)} == {arm: found.cycles[arm] for arm in ("cache", MODEL)}
    assert [len(plan) for plan in planned.values()] == [len(trace.answer) for trace in traces]


def test_a_fixed_precedence_copies_after_twelve_tokens_and_else_asks_the_model():
    text = [*range(40, 60), 7, 7, *range(40, 52)]
    trace = Trace(prompt=text, answer=[52, 53, 54, 55, 9, 9, 9, 9], limit=99, depths=[0, 0, 0, 0, 0, 2, 1, 0])
    chosen = {moment.at: choice for moment, choice in replay([trace], by_precedence(2), SPELLING, most=30)}
    assert chosen[1].arm == "ngram" and chosen[1].tokens == len(text) + 1 - text.index(53), "all that stands behind it"
    assert chosen[5].arm == MODEL and chosen[5].tokens == 2
