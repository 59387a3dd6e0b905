"""Answers as conversations, and what is measured of answers."""

import json
from itertools import islice
from types import SimpleNamespace

import pytest

from nautilus.data.conversations import conversations_in
from nautilus.eval.pipeline import gains, stages
from nautilus.posttrain import profile
from nautilus.posttrain.blend import Domain, domain
from nautilus.posttrain.practice import Practice
from nautilus.posttrain.profile import Answered, Score, filed, kept, of_known, score_of
from nautilus.posttrain.rollout import Playing, Rollout, Turn
from nautilus.posttrain.written import conversation
from nautilus.runtime import UserError, read_metrics
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
    found = score_of([Answered(1.0, 5, 5), None, Answered(0.0, 7, 4, {"facts": 0.5})])
    assert found.mean == 0.5 and found.lost == 1 and found.thought == [5, 7] and found.longest == [5, 4]
    assert found.parts == {"facts": [0.5]}


def test_thinking_is_measured_by_turns_and_parts_are_kept(tmp_path, monkeypatch):
    """A budget bounds a turn, and an answer may have several. What a file of before says nothing of is as it was."""
    task = TASKS["store"]()
    problems = [*islice(task.problems("test"), 2)]
    turns = tuple(Turn(begin=1, end=2, reply=Reply(content="x"), thought=thought) for thought in (3, 7, 2))
    one = {"tokens": (1,) * 5, "logprobs": (0.0,) * 5, "turns": turns}
    verdict = Verdict(reward=1.0, parts={"calls": 2, "note": "x"})

    async def asking(model, tokenizer, left, playing, together, seed, told):
        for _, problem, time in left:
            told(problem, time, Rollout(problem=problem, verdict=verdict, **one))

    monkeypatch.setattr(profile, "asking", asking)
    monkeypatch.setattr(profile, "fingerprint", lambda model: "a")
    path = tmp_path / "exam.jsonl"
    path.write_text(
        json.dumps({"step": 0, "model": "a", "problem": problems[0].id, "time": 0, "reward": 0.0, "thought": 9}) + "\n"
    )
    for _ in range(2):
        (old,), (new,) = profile.solved(path, None, None, [(task, problem) for problem in problems], Playing())
        assert new == Answered(1.0, 12, 7, {"calls": 2.0}) and old == Answered(0.0, 9, 9)


def test_rows_that_say_too_little_are_asked_for_again(tmp_path):
    whole = {"step": 0, "model": "a", "problem": "p", "time": 0, "reward": 1.0, "thought": 2}
    rows = [whole, {**whole, "problem": "q", "model": "b"}, {**whole, "problem": "r", "reward": "good"}]
    rows += [{key: value for key, value in whole.items() if key != one} for one in ("problem", "time", "thought")]
    rows += [{**whole, "problem": "s", "reward": None}]
    (path := tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert {*kept(path, "a", "thought", lost=True)} == {("p", 0), ("s", 0)}
    assert kept(path, "a", "thought") == {("p", 0): whole} and len(read_metrics(path)) == 1


def test_no_name_leads_out_of_the_run():
    assert filed("teacher ../../a/b") == "teacher_.._.._a_b"


def test_a_turn_may_think_for_a_budget_and_its_grace(monkeypatch):
    asked = []

    def examined(run, name, model, *, playing, **given):
        asked.append(playing.thinking_budget)
        return {"arithmetic": Score(rewards=[1.0])}

    monkeypatch.setattr(profile, "examined", examined)
    settings = Practice(thinking_grace=3)
    task = SimpleNamespace(task=TASKS["arithmetic"]())
    found = profile.curve(None, None, (0, 8), tasks=[task], count=1, settings=settings, tokenizer=None)
    assert asked == [0, 8] and [by_task["arithmetic"].most for by_task in found.values()] == [3, 11]


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


def test_what_is_kept_of_an_exam_is_of_this_model_and_known(tmp_path):
    path = tmp_path / "state" / "before.jsonl"
    assert kept(path, "a") == {}
    rows = [
        {"model": "a", "problem": "p", "time": 0, "reward": 1.0},
        {"model": "b", "problem": "q", "time": 0, "reward": 1.0},
        {"model": "a", "problem": "q", "time": 0, "reward": None}, {"problem": "r", "time": 0, "reward": 1.0}, {},
        {"model": "a", "problem": "r", "time": 1, "reward": 0.0},
    ]  # fmt: skip
    path.write_text("".join(json.dumps({"step": at, **row}) + "\n" for at, row in enumerate(rows)) + '{"step": 9, "mo')
    assert {*kept(path, "a", lost=True)} == {("p", 0), ("q", 0), ("r", 1)}
    assert {*kept(path, "a")} == {("p", 0), ("r", 1)} == {*kept(path, "a", lost=True)}, "the rest has left the file"
    assert [row["step"] for row in read_metrics(path)] == [0, 1]


def test_problems_of_which_nothing_is_known_are_not_trained_on():
    task = TASKS["sort"]()
    problems = domain(task, 4, levels=[1]).problems
    rates = {one.id: 0.5 for one in problems[:3]}
    found = of_known(Domain(task=task, problems=problems), rates)
    assert [*found.problems] == problems[:3] and found.rates == rates
    with pytest.raises(UserError, match="all answers to the problems of sort"):
        of_known(Domain(task=task, problems=problems[3:]), rates)
