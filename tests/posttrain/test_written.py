"""Answers as conversations, and what is measured of answers."""

import json

import pytest

from nautilus.data.conversations import conversations_in
from nautilus.eval.pipeline import gains, stages
from nautilus.posttrain.profile import Score, score_of
from nautilus.posttrain.rollout import Rollout, Turn
from nautilus.posttrain.written import conversation
from nautilus.tasks import Call, Reply, Verdict
from nautilus.tasks.named import TASKS
from nautilus.tasks.task import told


def test_a_rollout_as_a_conversation_has_its_turns_and_what_was_told(tmp_path):
    problem = next(TASKS["store"]().problems("train"))
    call = Call(name="get", arguments={"key": "a"})
    turns = (
        Turn(begin=1, end=2, reply=Reply(thinking="look", calls=(call,)), told=(told("7"),)),
        Turn(begin=3, end=4, reply=Reply(content="done")),
    )
    one = Rollout(problem=problem, tokens=(1,) * 5, logprobs=(0.0,) * 5, turns=turns, verdict=Verdict(reward=1.0))
    row = conversation(one)
    before = len(problem.messages)
    assert [message["role"] for message in row["messages"][before:]] == ["assistant", "tool", "assistant"]
    assert row["messages"][before]["reasoning_content"] == "look" and row["messages"][-1]["content"] == "done"
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (read,) = conversations_in(path)
    assert read.messages == json.loads(json.dumps(row["messages"])) and read.tools


def test_lost_answers_are_counted_and_not_averaged():
    found = score_of([(1.0, 5), None, (0.0, 7)])
    assert found.mean == 0.5 and found.lost == 1 and found.thought == [5, 7]


def test_what_a_student_recovers_is_of_what_the_first_specialist_gained():
    def scores(value):
        return {"sort": Score(rewards=[value] * 10)}

    found = {"sft": scores(0.4), "sort specialist 1": scores(0.8), "student 1": scores(0.6), "student 2": scores(0.76)}
    title, head, rows = gains(found, ["sort"], 2)
    assert rows == [["sort", "40.0", "80.0", "+40.0", "60.0", "76.0", "90%"]] and len(head) == len(rows[0])
    assert gains({**found, "sort specialist 1": scores(0.3)}, ["sort"], 2)[2][0][-1] == "–"
    assert stages({"sft": 1.25, "boost": 0.5})[2][-1] == ["together", "1.8"]


@pytest.mark.parametrize("name", TASKS)
def test_worked_answers_think_where_their_task_says_so(name):
    task = TASKS[name]()
    worked = next(task.problems("train")).worked
    assert any("reasoning_content" in message for message in worked) == task.thinks
