"""Which teacher scores what, how far it is from the student, and teachers in other processes, which score alike."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nautilus.posttrain.gaps import Gap, apart, gap_of, gap_table, gaps
from nautilus.posttrain.practice import Practice
from nautilus.posttrain.remote import model_of, parts_of
from nautilus.posttrain.rollout import Dropped
from nautilus.posttrain.teachers import TeacherActors, Teachers
from nautilus.runtime import Run, UserError
from nautilus.tasks.asked import asked as asked_for
from nautilus.train.policy import Mtp, Surrogate
from tests.posttrain.scorers import rollout
from tests.posttrain.test_crew import tiny, words

ROOT = Path(__file__).parents[2]


ROUTES = {"count": "runs/one", "sort": "runs/other", "reverse": "runs/other"}


@pytest.fixture(scope="module")
def models():
    return {"runs/one": tiny(words(), 1), "runs/other": tiny(words(), 2)}


@pytest.fixture(scope="module")
def rows():
    """Three answers to each task; no two have as many tokens."""
    return [(rollout(task, seed), 0.0) for seed, task in enumerate([*ROUTES] * 3)]


def logprobs(model, tokens):
    """Of a row's tokens but the first, by one pass over it alone."""
    row = torch.tensor([tokens])
    return model(row[:, :-1])[0].log_softmax(-1).gather(-1, row[:, 1:, None])[0, :, 0]


def test_every_answer_is_scored_by_the_teacher_of_its_task(models, rows):
    teachers, seen = Teachers(routes=ROUTES, models=models), 0
    by_length = {len(one.tokens): one for one, _ in rows}
    for batch in teachers.batches(rows, tokens=64, pad=0):
        for document, found, drawn in zip(batch.document, batch.teacher_logprob, batch.weights["policy"], strict=True):
            one = by_length.pop(int(document.sum()))
            mine, other = ROUTES[one.problem.task], next(name for name in models if name != batch.teacher)
            at = drawn.nonzero()[:, 0]
            assert batch.teacher == mine and len(at) == sum(one.drawn)
            wanted, wrong = (logprobs(models[name], one.tokens)[at - 1] for name in (mine, other))
            torch.testing.assert_close(found[at], wanted, rtol=1e-4, atol=1e-4)
            assert (found[at] - wrong).abs().max() > 0.1, "these two teachers can be told apart"
            seen += 1
    assert seen == len(rows) and not by_length


@pytest.mark.parametrize("whole", [False, True])
def test_the_lead_of_each_teacher_is_told_apart(models, rows, whole):
    teachers, student = Teachers(routes=ROUTES, models=models), tiny(words(), 3)
    objective = (teachers.distill_whole if whole else teachers.distill)(Surrogate(), Mtp())
    sums: dict[str, float] = {}
    for batch in teachers.batches(rows, tokens=64, pad=0, whole=whole):
        for name, (total, count) in objective(student, batch)[1].items():
            sums[name] = sums.get(name, 0.0) + float(total)
            sums[f"{name} tokens"] = sums.get(f"{name} tokens", 0.0) + float(count)
    wanted = dict.fromkeys(("one", "other"), 0.0)
    for one, _ in rows:
        name = ROUTES[one.problem.task]
        gap = logprobs(models[name], one.tokens) - logprobs(student, one.tokens)
        wanted[Path(name).name] += float(gap[one.turns[0].begin - 1 :].sum())
    for name, total in wanted.items():
        assert sums[f"teacher_gap_{name}"] == pytest.approx(total, rel=1e-3, abs=1e-2)
    assert sums["teacher_gap"] == pytest.approx(sum(wanted.values()), rel=1e-3, abs=1e-2)
    assert sums["teacher_gap_one tokens"] + sums["teacher_gap_other tokens"] == sums["teacher_gap tokens"]


def test_teachers_whose_folders_are_called_alike_keep_the_whole_of_their_names():
    named = {name: None for name in ("runs/sort", "a/model", "b/model")}
    assert Teachers(routes={}, models=named).short == {"runs/sort": "sort", "a/model": "a/model", "b/model": "b/model"}


def test_gaps_are_means_and_percentiles_by_teacher(models, rows):
    found = gap_of(torch.arange(101.0)[torch.randperm(101, generator=torch.Generator().manual_seed(0))] - 50)
    assert found == Gap(0.0, -45.0, 45.0, 101) and gap_of(torch.tensor([2.0])) == Gap(2.0, 2.0, 2.0, 1)
    teachers = Teachers(routes=ROUTES, models=models)
    by_teacher = apart(models["runs/one"], teachers, rows, 64)
    assert by_teacher["runs/one"][:3] == (0, 0, 0), "who is the student is nowhere apart from it"
    other = by_teacher["runs/other"]
    assert other.low < other.mean < other.high
    assert sum(one.tokens for one in by_teacher.values()) == sum(sum(one.drawn) for one, _ in rows)
    title, head, table = gap_table({"before": by_teacher, "after": {"runs/one": found}}, teachers)
    assert [row[:3] for row in table] == [
        ["one", "count", "before"], ["one", "count", "after"], ["other", "sort, reverse", "before"],
    ]  # fmt: skip
    assert table[1][3:] == ["+0.000", "-45.000", "+45.000", "101"] and len(head) == len(table[0]) and title


def test_gaps_of_the_same_models_are_measured_once(models, tmp_path, monkeypatch):
    asked = []

    async def asking(model, tokenizer, left, playing, together, seed, told):
        asked.append(len(left))
        for number, (_, problem, time) in enumerate(left):
            told(problem, time, rollout(problem.task, number) if number else Dropped("time", "it took too long"))

    monkeypatch.setattr("nautilus.posttrain.gaps.asking", asking)
    run, teachers = Run.create(tmp_path / "run", {}), Teachers(routes=ROUTES, models=models)
    run.state.mkdir()
    how = {"tasks": [asked_for(name) for name in ROUTES], "count": 2, "settings": Practice(), "tokenizer": words()}
    first, again = (gaps(run, "before", models["runs/one"], teachers, **how) for _ in range(2))
    assert asked == [6] and first == again and {*first} == {*models}
    assert gaps(run, "before", models["runs/other"], teachers, **how)["runs/other"].mean == 0 and asked == [6, 6]


@pytest.mark.slow
def test_processes_score_as_this_one_does_and_one_that_dies_is_replaced():
    """In a process of its own, as Ray reads the environment when it is imported."""
    pytest.importorskip("ray")
    done = subprocess.run([sys.executable, "-m", "tests.posttrain.scorers"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told.pop("batches") > 3 and all(told.values()), told


def test_a_model_is_made_again_from_its_parts():
    model = tiny(words(), 3)
    again = model_of(parts_of(model))
    assert again.config == model.config and not any(one.requires_grad for one in again.parameters())
    assert all((one == again.state_dict()[name]).all() for name, one in model.state_dict().items())


def test_processes_that_go_on_dying_end_the_run():
    class Dead(Exception):
        pass

    class Ray:
        exceptions = type("exceptions", (), {"RayActorError": Dead})
        put = staticmethod(lambda value: value)
        cluster_resources = staticmethod(dict)

        def remote(self, **_):
            actor = type("Actor", (), {"score": type("Score", (), {"remote": staticmethod(lambda *asked: None)})})
            return lambda kind: type("Kind", (), {"remote": staticmethod(lambda *given: actor())})

        def get(self, _):
            raise Dead

    with pytest.raises(UserError, match="died 3 times in a row"):
        TeacherActors(Ray(), 2, {})([("one", None)])  # type: ignore[list-item]
