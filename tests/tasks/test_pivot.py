"""Single turns of agents, judged by what they do."""

import itertools
import json

import pytest

from nautilus.runtime import UserError
from nautilus.tasks import Call, Reply
from nautilus.tasks.asked import asked
from nautilus.tasks.named import TASKS
from nautilus.tasks.pivot import Pivot, Recorded, reply_of, turns_in


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


@pytest.mark.parametrize("name, other", [("store", 1), ("calculator", 0)])
def test_the_last_turn_is_right_where_the_episode_ends_as_well(name, other):
    pivot = Pivot(TASKS[name]())
    problem = next(one for one in pivot.problems("train", seed=3) if not one.worked[0].get("tool_calls"))
    assert graded(pivot, problem, Reply(content=problem.worked[0]["content"])) == 1
    assert graded(pivot, problem, Reply(content="-1")) == other, "the state of a store is the same whatever is said"


# ----- of recorded conversations --------------------------------------------------------------------------------------


def told_in(name: str, **more) -> dict:
    """A conversation as it is recorded."""
    problem = next(TASKS[name]().problems("train", level=2, seed=5))
    return {"messages": [*problem.messages, *problem.worked], "tools": [*problem.tools], **more}


def written(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"pivot@{path}"


def test_recorded_turns_that_call_tools_are_pivots(tmp_path):
    rows = [told_in("store"), told_in("calculator"), told_in("sort")]
    task = asked(written(tmp_path / "chats.jsonl", *rows)).task
    calling = [(row, at) for row in rows for at, one in enumerate(row["messages"]) if one.get("tool_calls")]
    assert isinstance(task, Recorded) and task.name == "pivot" and task.pivotal and not task.thinks
    assert len(task.rows) == len(calling) > 4
    for problem, (row, at) in zip(task.rows, calling, strict=True):
        assert [*problem.messages] == row["messages"][:at] and [*problem.tools] == row["tools"]
        assert graded(task, problem, reply_of(problem.worked[0])) == 1
        (call,) = reply_of(problem.worked[0]).calls
        same = Call(name=call.name, arguments=dict(reversed([*call.arguments.items()])))
        assert graded(task, problem, Reply(content="I do it.", thinking="so", calls=(same,))) == 1
        for calls in (
            (),
            (call, call),
            (Call(name="burn", arguments=call.arguments),),
            (Call(name=call.name, arguments={}),),
        ):
            assert graded(task, problem, Reply(content="done", calls=calls)) == 0


def test_calls_are_read_as_they_are_recorded_and_thinking_is_told_of():
    call = {"name": "get", "arguments": '{"key": "sun"}'}
    tools = [{"type": "function", "function": {"name": "get", "parameters": {}}}]
    before = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "what?"},
        {"role": "user", "content": "!"},
    ]
    turn = {"role": "assistant", "content": "", "reasoning_content": "so"}
    for calls in ([call], [{"type": "function", "id": "1", "function": call}]):
        task = Recorded([{"messages": [*before, {**turn, "tool_calls": calls}], "tools": tools}])
        (problem,) = task.rows
        assert task.thinks and [*problem.messages] == before
        assert graded(task, problem, Reply(calls=(Call(name="get", arguments={"key": "sun"}),))) == 1


@pytest.mark.parametrize(
    "row, why",
    [
        ({"input": "?"}, "has no messages"), ({"messages": ["?"]}, "TypeError"), ({"messages": [{}]}, "role"),
        (told_in("store", tools=[]), "calls and no tools"), (told_in("store", tools=[{}]), "tool without a name"),
        ({"messages": told_in("store")["messages"][1:], "tools": [{"name": "get"}]}, "no messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"name": "a", "arguments": "{"}]}], "tools": [1]}, "Exp"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_named_by_file_and_line(tmp_path, row, why):
    with pytest.raises(UserError, match=f"chats.jsonl, line 2: .*{why}"):
        asked(written(tmp_path / "chats.jsonl", told_in("store"), row))


def test_conversations_without_calls_have_no_pivots(tmp_path):
    assert not [*turns_in(told_in("sort"))]
    with pytest.raises(UserError, match="no turn of 1 conversations calls a tool"):
        asked(written(tmp_path / "chats.jsonl", told_in("sort")))


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
