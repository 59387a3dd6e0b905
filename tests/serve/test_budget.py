import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from nautilus.data.tokenizer import SMALLEST, train_tokenizer
from nautilus.serve.budget import ThinkingBudget, thinking_rules
from nautilus.serve.sampling import Sampling
from tests.serve.drawing import draw_one

torch.set_num_threads(1)
V = 5  # of which 0 to 2 may be in the closing sequence, and 2 and 3 may end lines: everything overlaps
TOKENIZER = train_tokenizer(["one\n\ntwo\n\n"] * 9, vocab=SMALLEST + 12)

endings = st.lists(st.integers(0, 2), min_size=1, max_size=3).map(tuple)
newlines = st.frozensets(st.integers(2, 4), max_size=2)
sizes = st.integers(0, 9)
models = st.integers(0, 10**6)
samplings = st.sampled_from([Sampling(temperature=0), Sampling(seed=3), Sampling(temperature=2.0, top_k=3)])


def logits_after(model, answer):
    """A model: its logits depend on all that it has written."""
    return torch.from_numpy(np.random.default_rng([model, len(answer), *answer[-4:]]).normal(size=V))


def written(model, sampling, rules=(), *, size=20, forks=False):
    """The answer of `size` tokens, and which of them were forced."""
    answer, forced, rules = [], [], list(rules)
    for _ in range(size):
        forced.append(any(rule.forced() is not None for rule in rules))
        token = draw_one(logits_after(model, answer), sampling, len(answer), rules).token
        answer.append(token)
        origins, rules = rules, [rule.fork() for rule in rules] if forks else rules
        for rule in rules:
            rule.add(token)
        if forks:
            [rule.add((token + 1) % V) for rule in origins]  # a draft that was not accepted
    return answer, forced


def closes(answer, end_ids):
    """How many tokens the reasoning has, its end included; all of them if it has no end."""
    found = [
        size for size in range(len(end_ids), len(answer) + 1) if tuple(answer[size - len(end_ids) : size]) == end_ids
    ]
    return found[0] if found else len(answer)


def by_definition(answer, budget, grace, end_ids, newline_ids):
    """The token that must follow, read off the whole answer."""
    closing = False
    for size in range(len(answer) + 1):
        so_far = tuple(answer[:size])
        if size and so_far[-len(end_ids) :] == end_ids:
            return None
        line_ended = size == 0 or so_far[-1] in newline_ids
        closing |= (size >= budget and line_ended) or size >= budget + grace
    begun = [size for size in range(1, len(end_ids)) if tuple(answer[-size:]) == end_ids[:size]]
    return end_ids[max(begun, default=0)] if closing else None


@settings(max_examples=300)
@given(
    answer=st.lists(st.integers(0, V - 1), max_size=25), budget=sizes, grace=sizes, end=endings, newline_ids=newlines
)
def test_every_answer_forces_what_the_definition_says(answer, budget, grace, end, newline_ids):
    rule = ThinkingBudget(budget, grace, end, newline_ids)
    for size in range(len(answer) + 1):
        assert rule.forced() == by_definition(answer[:size], budget, grace, end, newline_ids)
        rule.add(answer[size]) if size < len(answer) else None


@settings(max_examples=100)
@given(
    model=models, sampling=samplings, budget=sizes, grace=sizes, end=endings, newline_ids=newlines, forks=st.booleans()
)
def test_reasoning_is_never_longer_than_budget_grace_and_end(model, sampling, budget, grace, end, newline_ids, forks):
    answer, forced = written(model, sampling, [ThinkingBudget(budget, grace, end, newline_ids)], forks=forks)
    size = closes(answer, end)
    assert size <= budget + grace + len(end)
    assert not any(forced[size:]), "once it is closed nothing is forced"
    assert not any(forced[:budget]), "nor before the budget is out"


@settings(max_examples=100)
@given(model=models, sampling=samplings, budget=sizes, grace=sizes, end=endings, newline_ids=newlines)
def test_forced_tokens_are_what_is_missing_of_the_end_in_its_order(model, sampling, budget, grace, end, newline_ids):
    answer, forced = written(model, sampling, [ThinkingBudget(budget, grace, end, newline_ids)])
    size, count = closes(answer, end), sum(forced)
    free, _ = written(model, sampling)
    assert answer[: size - count] == free[: size - count], "what comes before is what came without a budget"
    if count:
        assert forced[size - count : size] == [True] * count and tuple(answer[size - count : size]) == end[-count:]
        begin = answer[: size - count]
        longer = [k for k in range(len(end) - count + 1, len(end)) if tuple(begin[-k:]) == end[:k]]
        assert not longer, "nothing is written that was there already"
        last, waited = (begin or [None])[-1], size - count - budget
        assert waited == grace or last in newline_ids or budget == 0, "it closes at a line's end or when grace is out"


@settings(max_examples=100)
@given(model=models, sampling=samplings, grace=sizes, end=endings, newline_ids=newlines, forks=st.booleans())
def test_an_answer_that_closes_in_time_is_not_touched(model, sampling, grace, end, newline_ids, forks):
    free, _ = written(model, sampling)
    budget = closes(free, end)  # to the token
    rule = ThinkingBudget(budget, grace, end, newline_ids)
    assert written(model, sampling, [rule], forks=forks) == (free, [False] * len(free))


@given(model=models, sampling=samplings, grace=sizes, end=endings, newline_ids=newlines)
def test_no_budget_closes_at_the_first_token(model, sampling, grace, end, newline_ids):
    answer, forced = written(model, sampling, [ThinkingBudget(0, grace, end, newline_ids)])
    assert tuple(answer[: len(end)]) == end and forced == [True] * len(end) + [False] * (len(answer) - len(end))


def fed(rule, *tokens):
    for token in tokens:
        rule.add(token)
    return rule


def test_the_block_closes_at_the_next_line_end_or_when_grace_is_out():
    rule = lambda: ThinkingBudget(2, 3, (7, 8), {4})
    assert fed(rule(), 4, 1).forced() is None, "a line's end before the budget is out closes nothing"
    assert fed(rule(), 1, 4).forced() == 7, "the last token of the budget may end the line"
    assert fed(rule(), 1, 1, 1, 4).forced() == 7 and fed(rule(), 1, 1, 1, 4, 7).forced() == 8
    assert fed(rule(), 1, 1, 1, 1).forced() is None and fed(rule(), 1, 1, 1, 1, 1).forced() == 7
    assert fed(rule(), 1, 1, 1, 4, 7, 8).forced() is None and fed(rule(), 1, 7, 8, 4, 4, 4, 4).forced() is None


def test_an_end_that_has_begun_is_completed():
    assert fed(ThinkingBudget(2, 0, (7, 8), ()), 1, 7).forced() == 8
    assert fed(ThinkingBudget(3, 0, (7, 7, 8), ()), 7, 7, 7).forced() == 8, "of several beginnings the longest"
    assert fed(ThinkingBudget(1, 9, (4, 8), {4}), 1, 4).forced() == 8, "a line's end may begin it"


def test_a_tool_call_closes_a_block_too():
    assert fed(ThinkingBudget(2, 0, (7,), (), closing_ids={9}), 9, 1, 1, 1).forced() is None


def test_what_ends_a_line_is_read_off_the_vocabulary():
    double = TOKENIZER.encode("\n\n")
    assert len(double) == 1, "a token of its own in this vocabulary"
    assert {*double, *TOKENIZER.encode("\n")} <= TOKENIZER.newline_ids
    for token in range(TOKENIZER.vocab):
        assert (token in TOKENIZER.newline_ids) == TOKENIZER.decode([token]).endswith("\n")


def test_a_sampling_has_a_budget_where_it_asks_for_one_and_there_is_a_block_to_close():
    asked = Sampling(thinking_budget=2, thinking_grace=1)
    assert thinking_rules(Sampling(), TOKENIZER, inside=True) == []
    assert thinking_rules(asked, TOKENIZER, inside=False) == []
    (rule,) = thinking_rules(asked, TOKENIZER, inside=True)
    assert fed(rule, 20, 20).forced() is None and fed(rule, 20).forced() == TOKENIZER.control["</think>"]
    (rule,) = thinking_rules(asked, TOKENIZER, inside=True)
    assert fed(rule, 20, *TOKENIZER.encode("\n")).forced() == TOKENIZER.control["</think>"]
    (rule,) = thinking_rules(asked, TOKENIZER, inside=True)
    assert fed(rule, 20, TOKENIZER.control["<tool_call>"], 20).forced() is None
    (rule,) = thinking_rules(asked, TOKENIZER, inside=True, end_ids=(5, 6))
    assert fed(rule, 20, 20, 20, 5).forced() == 6
    with pytest.raises(ValueError, match="without tokens that close"):
        ThinkingBudget(1, 0, (), ())
