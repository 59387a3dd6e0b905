"""Rewards from comparisons in a circle."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nautilus.tasks import Reply
from nautilus.tasks.judge import (
    Judgement,
    LengthControl,
    base_scores,
    circular,
    judgement_of,
    rewards,
    shortness,
)
from nautilus.tasks.named import TASKS

NONE = LengthControl(thinking=0, answer=0, bonus=0)
SCORES = st.integers(1, 5)
JUDGEMENTS = st.builds(Judgement, score_1=SCORES, score_2=SCORES, ranking=st.integers(1, 6))


@pytest.mark.parametrize("count", [2, 3, 16])
def test_each_answer_is_judged_once_in_either_place(count):
    pairs = circular(count)
    assert len(pairs) == count and sorted(a for a, _ in pairs) == sorted(b for _, b in pairs) == [*range(count)]


def test_one_answer_alone_cannot_be_compared():
    with pytest.raises(ValueError, match="comparisons of 1 answers"):
        circular(1)


@given(JUDGEMENTS)
def test_equal_scores_are_told_apart_by_the_ranking_and_their_sum_stays(one):
    first, second = one.scores
    assert first + second == one.score_1 + one.score_2
    if one.score_1 == one.score_2:
        assert (first > second) == (one.ranking < 3.5)
    else:
        assert (first, second) == (one.score_1, one.score_2)


@given(st.lists(JUDGEMENTS, min_size=2, max_size=9))
def test_what_all_answers_have_together_is_what_was_given(judgements):
    assert sum(base_scores(judgements)) == pytest.approx(sum(one.score_1 + one.score_2 for one in judgements) / 2)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=20))
def test_shortness_sums_to_nothing_and_falls_with_length(lengths):
    found = shortness(lengths)
    assert sum(found) == pytest.approx(0, abs=1e-9)
    for (a, x), (b, y) in itertools.combinations(zip(lengths, found, strict=True), 2):
        assert (a < b) <= (x > y)


def test_rewards_by_hand():
    judgements = [Judgement(score_1=4, score_2=2, ranking=2), Judgement(score_1=3, score_2=3, ranking=3)] + [
        Judgement(score_1=1, score_2=5, ranking=6)
    ]
    replies = [Reply(content="x" * 10), Reply(content="x" * 20), Reply(content="x" * 40)]
    # bases: (4 + 5) / 2, (2 + 3.5) / 2, (2.5 + 1) / 2
    assert rewards(judgements, replies, NONE) == [4.5, 2.75, 1.75]
    # w: 1, 2/3, 0, less 5/9
    found = rewards(judgements, replies, LengthControl(thinking=0.5, answer=0.9, bonus=0))
    assert found == pytest.approx([4.5 + 0.4, 2.75 + 0.1, 1.75 - 0.5])
    assert rewards(judgements, replies, LengthControl(answer=0.9, bonus=1))[0] == pytest.approx(4.5 + 0.4 + 1)
    long_first = [replies[2], replies[1], replies[0]]  # the shortest is the worst: no bonus
    assert rewards(judgements, long_first, LengthControl(answer=0.9, bonus=1))[2] == pytest.approx(1.75 + 0.4)


@pytest.mark.parametrize("wrong", [{"thinking": -1}, {"top": 0}, {"bonus": -0.1}])
def test_controls_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match="were asked for"):
        LengthControl(**wrong)


@given(JUDGEMENTS)
def test_what_a_judge_writes_is_read(one):
    assert judgement_of(f"Let me see {{x}}. {one.text}\n") == one


@pytest.mark.parametrize(
    "text",
    [
        "", "{}", '{"score_1": 9, "score_2": 1, "ranking": 1}', '{"score_1": "a", "score_2": 1, "ranking": 1}', "{" * 9,
        '{"score_1": 1' + "0" * 320 + ', "score_2": 1, "ranking": 1}',
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_the_middle(text):
    one = judgement_of(text)
    assert (one.score_1, one.score_2, one.ranking, one.readable) == (3, 3, 3.5, False)
    assert one.scores == (3, 3)


def test_the_oracle_prefers_its_style_from_either_side():
    task = TASKS["style"]()
    problem = next(task.problems("train", level=1))
    plain, liked = (
        Reply(content=text) for text in (problem.worked[0]["content"], "\n".join(f"- {w}" for w in problem.truth) + "!")
    )
    assert task.grade(problem, plain).reward == 0.25 and task.grade(problem, liked).reward == 1
    for one, other in ((liked, plain), (plain, liked)):
        said = task.compare(problem, one, other)
        assert judgement_of(said.text) == said
        assert (said.score_1 > said.score_2) == (one is liked) == (said.ranking < 3.5)
    alike = task.compare(problem, liked, liked)
    assert alike.score_1 == alike.score_2 and alike.ranking in (3, 4) and json.loads(alike.text)
