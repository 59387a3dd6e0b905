"""Single turns of agents, judged by what they do."""

import itertools

import pytest

from nautilus.runtime import UserError
from nautilus.tasks import Call, Reply
from nautilus.tasks.asked import asked
from nautilus.tasks.named import TASKS
from nautilus.tasks.pivot import Pivot, reply_of


@pytest.mark.parametrize("name", ["store", "repair", "calculator"])
def test_the_worked_turn_is_right_and_others_are_not(name):
    pivot = Pivot(TASKS[name]())
    for problem in itertools.islice(pivot.problems("train", seed=1), 40):
        grade = lambda reply, problem=problem: graded(pivot, problem, reply)
        assert grade(reply_of(problem.worked[0])) == 1
        assert grade(Reply(content="hm", calls=(Call(name="burn", arguments={}),))) == 0
        assert grade(Reply(fault="a call that cannot be read")) == 0
        assert problem.messages[-1]["role"] in ("user", "tool") and problem.task == f"pivot/{name}"


def graded(pivot, problem, reply):
    episode = pivot.episode(problem)
    assert not episode.hear(reply)
    return episode.verdict().reward


def test_what_does_the_same_is_as_good_however_it_is_said():
    pivot = Pivot(TASKS["store"]())
    problem = next(
        one for one in pivot.problems("train", seed=2)
        if any(call["function"]["name"] == "put" for call in one.worked[0].get("tool_calls", ()))
    )  # fmt: skip
    (call,) = reply_of(problem.worked[0]).calls
    assert graded(pivot, problem, Reply(content="I put it there.", thinking="so", calls=(call,))) == 1
    other = Call(name="put", arguments={**call.arguments, "value": "0"})
    assert graded(pivot, problem, Reply(calls=(other,))) == 0
    number = Call(name="put", arguments={**call.arguments, "value": int(call.arguments["value"])})
    assert graded(pivot, problem, Reply(calls=(number,))) == 1
    assert graded(pivot, problem, Reply(content="done")) == 0


def test_pivots_are_asked_for_by_name_and_of_tasks_with_turns_only():
    one = asked("pivot/store:2-3*2")
    assert one.task.name == "pivot/store" and [*one.levels] == [2, 3] and one.share == 2
    with pytest.raises(UserError, match="pivots of sort were asked for.*calculator, store, repair"):
        asked("pivot/sort")


@pytest.mark.parametrize(
    "words", ["sort:3-2", "sort:0", "sort:1-999999999", "sort:x", "", "walk", "rg/", "math@/nowhere"]
)
def test_words_that_name_no_task_are_refused(words):
    with pytest.raises((UserError, ValueError)):
        asked(words)
