"""Which problems a step has: shares of tasks, and pass rates within them."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nautilus.posttrain.blend import Blend, Curriculum, Domain, counts, domain
from nautilus.runtime import UserError
from nautilus.tasks.asked import asked
from nautilus.tasks.named import TASKS

SORT = domain(TASKS["sort"](), 40, levels=[1, 2], seed=1)


def with_rates(rate_of) -> Domain:
    return Domain(
        task=SORT.task, problems=SORT.problems,
        rates={one.id: rate_of(number) for number, one in enumerate(SORT.problems)},
    )  # fmt: skip


def test_problems_of_a_domain_are_different_of_its_levels_and_trained_on():
    assert len({one.id for one in SORT.problems}) == 40
    assert {one.level for one in SORT.problems} == {1, 2} and {one.split for one in SORT.problems} == {"train"}
    assert domain(TASKS["sort"](), 40, levels=[1, 2], seed=1).problems == SORT.problems
    assert 0 < len(domain(TASKS["arithmetic"](), 5000, levels=[1]).problems) < 5000  # there are no more


def test_problems_that_are_not_there_are_not_looked_for_without_end():
    few, others = (domain(TASKS["arithmetic"](), 10**9, levels=[1], seed=seed).problems for seed in (0, 1))
    assert {one.id for one in few} == {one.id for one in others} and 0 < len(few) < 5000


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(0, 50))
def test_shares_are_held_to_a_prompt_and_nobody_gets_nothing(shares, more):
    prompts = len(shares) + more
    found = counts(prompts, shares)
    assert sum(found) == prompts and min(found) >= 1
    if len(shares) == 1:
        assert found == [prompts]
    exact = [prompts * one / sum(shares) for one in shares]
    if min(exact) >= 1:
        assert all(abs(count - value) < 1 for count, value in zip(found, exact, strict=True))


def test_a_step_is_the_same_whenever_it_is_asked_for_and_others_are_not():
    blend = Blend(domains=[SORT], prompts=8, steps=10, seed=3)
    again = Blend(domains=[SORT], prompts=8, steps=10, seed=3)
    ids = lambda step: [problem.id for _, problem in step]
    assert ids(blend.step(4)) == ids(again.step(4)) != ids(blend.step(5))
    assert ids(Blend(domains=[SORT], prompts=8, steps=10, seed=4).step(4)) != ids(blend.step(4))


def test_what_is_easy_comes_first_and_what_is_always_solved_never():
    found = with_rates(lambda number: number % 5 / 4)  # 0, 0.25, 0.5, 0.75, 1
    blend = Blend(domains=[found], prompts=200, steps=11, curriculum=Curriculum(spread=0.1))
    seen = [Counter(found.rates[problem.id] for _, problem in blend.step(step)) for step in (0, 5, 10)]
    assert [most.most_common(1)[0][0] for most in seen] == [0.75, 0.5, 0.25]
    assert not any(1 in one for one in seen)


def test_pivots_that_are_never_solved_are_left_out_and_other_problems_are_not():
    task = asked("pivot/store").task
    found = domain(task, 40, levels=[1, 2], seed=1)
    rates = {one.id: number % 3 / 2 for number, one in enumerate(found.problems)}  # 0, 0.5, 1
    curriculum = Curriculum(begin=0.0, end=0.0, spread=0.5)
    seen = lambda one: {rates[problem.id] for _, problem in Blend(
        domains=[one], prompts=200, steps=1, curriculum=curriculum).step(0)}  # fmt: skip
    assert seen(replace(found, rates=rates)) == {0.5}
    assert seen(replace(found, task=SORT.task, rates=rates)) == {0, 0.5}
    with pytest.raises(UserError, match="none of 40 problems of pivot/store is solved now and then"):
        Blend(domains=[replace(found, rates=dict.fromkeys(rates, 0.0))], prompts=1, steps=1).step(0)


def test_bad_blends_are_refused():
    with pytest.raises(UserError, match="a step of 1 prompts of 2 tasks"):
        Blend(domains=[SORT, SORT], prompts=1, steps=1)
    with pytest.raises(UserError, match="share"):
        Blend(domains=[Domain(task=SORT.task, problems=SORT.problems, share=0)], prompts=1, steps=1)
    with pytest.raises(UserError, match="none of 40 problems of sort is solved now and then"):
        Blend(domains=[with_rates(lambda _: 1.0)], prompts=1, steps=1).step(0)
    for wrong in ({"begin": 2}, {"spread": 0}, {"least": 0.5, "most": 0.5}):
        with pytest.raises(UserError, match="a curriculum from"):
            Curriculum(**wrong)
