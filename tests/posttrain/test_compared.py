"""Rewards from comparisons, whoever compares."""

import asyncio
from collections import Counter

import pytest

from nautilus.posttrain.compared import Judges, compared, oracle
from nautilus.posttrain.pairs import pair_batches, pairs_of
from nautilus.posttrain.rollout import Dropped, Rollout, Turn
from nautilus.posttrain.stream import Group
from nautilus.runtime import UserError
from nautilus.tasks import Reply, Verdict
from nautilus.tasks.judge import Judgement, LengthControl
from nautilus.tasks.named import TASKS

STYLE = TASKS["style"]()
PROBLEM = next(STYLE.problems("train", level=1))
NONE = LengthControl(thinking=0, answer=0, bonus=0)


def rollout(content, reward=0.0):
    turn = Turn(begin=2, end=4, reply=Reply(content=content))
    return Rollout(
        problem=PROBLEM,
        tokens=(1, 2, 3, 4),
        logprobs=(0.0, 0.0, -1.0, -1.0),
        turns=(turn,),
        verdict=Verdict(reward=reward),
    )


def group(*contents, **more):
    return Group(problem=PROBLEM, rollouts=[rollout(content) for content in contents], **more)


def done(given, judge, seconds=1.0):
    return asyncio.run(compared(given, judge, NONE, seconds=seconds, seed=3))


def test_an_oracle_ranks_a_group():
    listed = "\n".join(f"- {word}" for word in PROBLEM.truth)
    found = done(group("nothing", ", ".join(PROBLEM.truth), listed, listed + "!"), oracle(STYLE))
    rewards = [one.verdict.reward for one in found.rollouts]
    assert rewards == sorted(rewards) and rewards[-1] > rewards[0] + 1
    assert all(one.verdict.parts["unread"] == 0 for one in found.rollouts)


def test_there_are_as_many_comparisons_as_answers_with_seeds_of_their_own():
    seen = []

    async def judge(problem, first, second, seed):
        seen.append((first.content, second.content, seed))
        return Judgement()

    done(group("a", "b", "c"), judge)
    assert [pair[:2] for pair in seen] == [("a", "b"), ("b", "c"), ("c", "a")] and len({pair[2] for pair in seen}) == 3


@pytest.mark.parametrize("fault", ["hangs", "is lost"])
def test_a_judge_that_fails_holds_nobody_up_and_its_comparisons_are_undecided(fault):
    async def judge(problem, first, second, seed):
        if first.content == "b":
            if fault == "hangs":
                await asyncio.sleep(60)
            raise Dropped("engine", "gone")
        return Judgement(score_1=5, score_2=1, ranking=1)

    found = done(group("a", "b", "c"), judge, seconds=0.2)
    assert [one.verdict.reward for one in found.rollouts] == [(5 + 1) / 2, (1 + 3) / 2, (3 + 5) / 2]
    assert found.rollouts[0].verdict.parts["unread"] == pytest.approx(1 / 3)


def test_an_answer_alone_is_lost_and_counted():
    found = done(group("a", lost=Counter({"time": 3})), oracle(STYLE))
    assert not found.rollouts and found.lost == {"time": 3, "alone": 1}
    assert done(group(), oracle(STYLE)).lost == {}


def test_only_tasks_with_a_judge_are_compared():
    judges = Judges({"style": "oracle"}, [STYLE, TASKS["sort"]()], NONE, None, seconds=1)
    assert asyncio.run(judges(group("a", "b"), 0)).rollouts[0].verdict.why.startswith("compared")
    short = LengthControl(thinking=0, answer=0.8, bonus=0)
    given, how = group("a", "b" * 9), {"seconds": 1}
    plain, short = (
        asyncio.run(Judges({"style": "oracle"}, [STYLE], control, None, **how)(given, 0)) for control in (NONE, short)
    )
    gained = [b.verdict.reward - a.verdict.reward for a, b in zip(plain.rollouts, short.rollouts, strict=True)]
    assert gained == pytest.approx([0.4, -0.4]), "the shorter one gains by the control that was asked for"
    sort = next(TASKS["sort"]().problems("train"))
    other = Group(problem=sort, rollouts=[rollout("a")])
    assert asyncio.run(judges(other, 0)) is other
    with pytest.raises(UserError, match="a judge of walk was named"):
        Judges({"walk": "oracle"}, [STYLE], NONE, None, seconds=1)
    with pytest.raises(UserError, match="sort has no oracle"):
        Judges({"sort": "oracle"}, [TASKS["sort"]()], NONE, None, seconds=1)


def test_pairs_are_the_best_and_the_worst_where_they_differ():
    low, middle, high = (rollout(str(reward), reward) for reward in (0.0, 0.5, 1.0))
    groups = [Group(problem=PROBLEM, rollouts=some) for some in ([middle, high, low], [low, low], [high])]
    assert pairs_of(groups) == [(high, low)]


def test_pairs_stay_together_in_rows():
    from tests.train.test_policy import tiny

    model = tiny(1)
    pairs = [(rollout("good"), rollout("bad"))] * 5
    found = pair_batches(pairs, model, tokens=16, pad=0)
    assert [len(batch) for batch in found] == [4, 4, 2]
    for batch in found:
        assert batch.advantage[0::2].min() >= 0 >= batch.advantage[
            1::2
        ].max() and batch.advantage.abs().sum() == 2 * len(batch)
        assert batch.weights["preference"].sum() == len(batch) / 2 and batch.weights["next_token"][1::2].sum() == 0
        assert (batch.teacher_logprob[:, 2:] < 0).all() and (batch.teacher_logprob[:, :2] == 0).all()
