"""From plain text to a student of several teachers, by the commands, on a model of some thousand weights."""

import json
import math
import shutil
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

import nautilus
from nautilus.config import Attention, Config, Experts, Mamba, lay
from nautilus.data.pack import pack_best_fit
from nautilus.data.template import template_text
from nautilus.data.tokenizer import SMALLEST, Tokenizer, train_tokenizer
from nautilus.model.language import Language
from nautilus.posttrain import crew
from nautilus.posttrain.blend import Blend
from nautilus.posttrain.credit import Effort
from nautilus.posttrain.crew import routed
from nautilus.posttrain.stream import Group, batches_of
from nautilus.recipes import dpo, mopd, rlvr, sft
from nautilus.runtime import Run, UserError, read_metrics
from nautilus.tasks import distinct
from nautilus.tasks.agents import Keeping, Store
from nautilus.tasks.letters import Count
from nautilus.tasks.named import TASKS
from nautilus.tasks.pivot import OneTurn
from nautilus.tasks.rows import row_of
from nautilus.tasks.task import Asked, Problem, Verdict, told
from nautilus.train.optim import OptimConfig
from nautilus.train.policy import Mtp, drawn_logprob
from tests.posttrain.test_stream import group, rollout

LAYERS = lay(
    "M*E", Mamba(heads=2, head_width=16, state=16, groups=1), Attention(heads=2, groups=1, head_width=16),
    Experts(experts=4, active=2, hidden=32, shared=32, scale=1.0),
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint folder whose model says anything."""
    plain = train_tokenizer([], vocab=SMALLEST)
    tokenizer = Tokenizer(plain.core, bos="<s>", eos="<|im_end|>", template=template_text("spaced"))
    model = Language(Config(vocab=tokenizer.vocab, width=32, layers=LAYERS, eos=tokenizer.stop)).initialise(1)
    folder = tmp_path_factory.mktemp("base") / "model"
    model.save(folder, tokenizer=tokenizer)
    return str(folder)


@pytest.fixture(scope="module")
def taught(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("sft") / "run"
    sft.main(sft.Settings(
        model=base, tasks=("count:3", "choice:1"), problems=300, out=out, steps=60, rows=8, length=256,
        optim=OptimConfig(lr=5e-3, min_lr=1e-4, warmup=5),
    ))  # fmt: skip
    return out


SMALL = {
    "tasks": ("count:3",), "prompts": 4, "group": 4, "problems": 40, "tokens": 200, "turn_tokens": 12, "steps": 3,
    "measured": 16, "save_every": 1,
}  # fmt: skip


def test_supervised_training_learns_the_form_of_answers(taught):
    rows = read_metrics(Run(taught).metrics)
    assert rows[-1]["next_token"] < 0.5 * rows[0]["next_token"]
    assert (taught / "report.html").is_file() and nautilus.load(taught)[1].template


def test_without_a_number_of_steps_every_sample_is_learnt_once(base, tmp_path, monkeypatch):
    packed = []

    def pack(*given, **more):
        packed.append(pack_best_fit(*given, **more))
        return packed[0]

    monkeypatch.setattr(sft, "pack_best_fit", pack)
    sft.main(sft.Settings(
        model=base, tasks=("count:3",), problems=30, out=tmp_path / "run", steps=0, rows=2, length=512,
        optim=OptimConfig(lr=1e-3, min_lr=1e-4),
    ))  # fmt: skip
    steps = len(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert steps == math.ceil(len(packed[0]) / 2) > 1


def test_reinforcement_end_to_end_and_what_it_tells(taught, tmp_path):
    settings = rlvr.Settings(model=str(taught), out=tmp_path / "run", **SMALL)
    rlvr.main(settings)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert row["mismatch"] == row["left_out"] == row["lost"] == 0, "engine and trainer are the same, bit for bit"
        assert 0 <= row["reward"] <= 1 and row["answer_tokens"] > 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert len(lines) == 3 * 4 * 4 and {line["task"] for line in lines} == {"count"}
    assert all(line["text"].count("<|im_start|>assistant") == 1 and line["version"] == line["step"] for line in lines)
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {*found["scores"]} == {"before", "after"} and found["scores"]["after"]["count"]["answers"] == 16
    old, new = (nautilus.load(place)[0].state_dict() for place in (taught, tmp_path / "run"))
    same = {name for name in old if torch.equal(old[name].float(), new[name].float())}
    routers, biases = ({name for name in old if name.endswith(end)} for end in ("gate.weight", "correction_bias"))
    assert routers and routers <= same, "routers stay"
    assert biases and not biases & same, "and are balanced on"
    assert not any("embeddings" in name for name in same)


def test_a_judge_is_trained_and_then_judges(base, taught, tmp_path):
    """Both stages of its training, and a step of a model whose answers it compares; nothing it says can be read yet."""
    optim = OptimConfig(lr=5e-3, min_lr=1e-4, warmup=1)
    more = {"tasks": ("judge:1",), "length": 768, "rows": 2, "problems": 60, "steps": 3, "optim": optim}
    sft.main(sft.Settings(model=base, out=tmp_path / "taught", **more))
    small = {**SMALL, "prompts": 1, "group": 2, "steps": 1, "measured": 2, "problems": 4}
    judging = {"tasks": ("judge:1",), "tokens": 800, "thinking": False}
    rlvr.main(rlvr.Settings(model=str(tmp_path / "taught"), out=tmp_path / "judge", **{**small, **judging}))
    lines = [json.loads(line) for line in (tmp_path / "judge" / "rollouts.jsonl").read_text().splitlines()]
    assert [line["parts"] for line in lines] == [{"readable": 0.0, "raw": -10.0}] * 2
    words = f"style={tmp_path / 'judge'}"
    rlvr.main(rlvr.Settings(
        model=str(taught), out=tmp_path / "style", judges=(words,), **{**small, "tasks": ("style:1",)},
    ))  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "style" / "rollouts.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(line["parts"]["unread"] == 1 for line in lines)


def answers_of(folder):
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]


def weights(folder):
    return nautilus.load(folder)[0].state_dict()


def test_several_updates_of_a_step_stay_near_where_it_began(taught, tmp_path):
    how = {**SMALL, "prompts": 8, "optim": OptimConfig(lr=1e-3, min_lr=1e-3, warmup=-1), "low": 0.01, "high": 0.01}
    for updates in (1, 2):
        out = tmp_path / str(updates)
        rlvr.main(rlvr.Settings(model=str(taught), out=out, updates=updates, **how))
        rows = read_metrics(out / "metrics.jsonl")
        assert [row["step"] for row in rows] == [0, 1, 2]
        assert all(row["mismatch"] == 0 for row in rows), "what drew it is what was before the first of them"
        assert all((row["clipped"] > 0) == (updates > 1) for row in rows)


def test_each_update_has_a_part_of_every_tasks_problems(base):
    model, seen = nautilus.load(base)[0], []
    groups = [group(rollout(asked=f"{task}{number}")) for task in "ab" for number in range(4)]

    def learnt(some):
        seen.append([one.problem.messages[-1]["content"] for one in some])
        return [] if "a0" in seen[-1] and silent else batches_of(
            [(one, 1.0) for each in some for one in each.rollouts], tokens=1000, pad=0
        )  # fmt: skip

    silent = False
    first, later = rlvr.in_parts(model, 2, learnt)(groups)
    assert seen == [["a0", "a2", "b0", "b2"], ["a1", "a3", "b1", "b3"]]
    assert first.update == 0 and first.proximal_logprob is None
    assert later.update == 1 and torch.equal(later.proximal_logprob, drawn_logprob(model, later, "policy"))
    silent = True
    (alone,) = rlvr.in_parts(model, 2, learnt)(groups)
    assert alone.update == 0 and alone.proximal_logprob is None, "of the first part nothing could be learnt"


@pytest.mark.parametrize("updates", [1, 2])
def test_a_run_that_was_stopped_goes_on_exactly(taught, tmp_path, monkeypatch, updates):
    how = {"model": str(taught), "updates": updates, **SMALL}
    whole, halves = (rlvr.Settings(out=tmp_path / name, **how) for name in ("whole", "halves"))
    rlvr.main(whole)
    from nautilus.posttrain.onpolicy import Fresh

    play, count = Fresh.play, []

    async def interrupted(self):
        count.append(self.step)
        if len(count) == 3:
            raise KeyboardInterrupt
        return await play(self)

    monkeypatch.setattr(Fresh, "play", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rlvr.main(halves)
    monkeypatch.setattr(Fresh, "play", play)
    rlvr.main(halves)
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "halves")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("age", [1, 2, 4])
def test_answers_drawn_ahead_are_of_weights_that_are_new_enough(taught, tmp_path, age):
    how = {**SMALL, "steps": 6, "measured": 1, "save_every": 0, "together": 128}
    rlvr.main(rlvr.Settings(model=str(taught), out=tmp_path / "run", age=age, **how))
    lines = answers_of(tmp_path / "run")
    assert len(lines) == 6 * 16
    assert all(0 <= line["step"] - line["version"] <= age for line in lines)
    assert any(line["step"] - line["version"] == age for line in lines)
    stale = {line["step"] for line in lines if line["version"] < line["step"]}
    for row in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        assert row["mismatch"] < 1 and (row["step"] not in stale or row["mismatch"] > 0), "log-probs are of who drew it"


def test_the_order_is_from_easy_to_hard_where_rates_are_measured(taught, tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(rlvr, "Blend", lambda **how: asked.update(how) or Blend(**how))
    rlvr.main(rlvr.Settings(model=str(taught), out=tmp_path / "run", profile=2, **{**SMALL, "steps": 1}))
    rows = read_metrics(tmp_path / "run" / "state" / "profile.jsonl")
    assert len(rows) == 80 and len({row["problem"] for row in rows}) == 40
    (domain,) = asked["domains"]
    assert {one.id for one in domain.problems} == {row["problem"] for row in rows}
    found = {name: [row["reward"] for row in rows if row["problem"] == name] for name in domain.rates}
    assert domain.rates == {name: sum(rewards) / 2 for name, rewards in found.items()}
    assert {*domain.rates.values()} >= {0.0, 0.5}, "they differ"


def test_single_turns_of_a_task_are_profiled_and_trained_on(taught, tmp_path, monkeypatch):
    """The model calls nothing yet: in place of the same effect some answers are right by chance."""
    judged, right = OneTurn.judged, lambda last: float(len(last.content) % 2)
    monkeypatch.setattr(OneTurn, "judged", lambda self, last: replace(judged(self, last), reward=right(last)))
    how = {**SMALL, "tasks": ("pivot/store:1",), "tokens": 4096, "problems": 6, "prompts": 2, "group": 2, "measured": 1}
    rlvr.main(rlvr.Settings(model=str(taught), out=tmp_path / "run", profile=4, **{**how, "steps": 1}))
    rows = read_metrics(tmp_path / "run" / "state" / "profile.jsonl")
    rates = Counter(row["problem"] for row in rows if row["reward"])
    assert len(rows) == 24 and len({*rates.values()}) > 1
    (row,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert row["mismatch"] == row["lost"] == 0 and "reward_pivot/store" in row
    lines = answers_of(tmp_path / "run")
    assert len(lines) == 4 and {line["why"] for line in lines} <= {"the same effect", "another effect"}
    assert all("<function>" in line["text"] and 0 < rates[line["problem"]] < 4 for line in lines), "solved now and then"


class Insisting(Keeping):
    """Whoever calls nothing is told to do so."""

    def answer(self, reply):
        return super().answer(reply) or [told("error: call a function")]


class Patient(Store):
    turns = 3

    def episode(self, problem):
        return Insisting(problem)


def test_turns_with_tools_are_what_the_trainer_computes(taught, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "store", Patient)
    how = {**SMALL, "tasks": ("store:1",), "tokens": 4096, "prompts": 2, "steps": 2, "measured": 1}
    rlvr.main(rlvr.Settings(model=str(taught), out=tmp_path / "run", **how))
    for row in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        assert row["mismatch"] == row["left_out"] == row["lost"] == 0
    turns = [line["text"].count("error: call a function") for line in answers_of(tmp_path / "run")]
    assert len(turns) == 16 and max(turns) == 2 and sum(turns) > 16, "nothing is told after the last turn"


def test_thinking_on_a_budget_is_trained_and_its_curve_measured(base, tmp_path):
    """By a model that never ends a thought itself."""
    budgets = {"thinking_budget": 6, "budgeted": 0.5, "train_budgets": (1, 3), "budgets": (0, 4)}
    how = {**SMALL, "tasks": ("arithmetic:1", "choice:1"), "turn_tokens": 24, "prompts": 8, "steps": 2, "measured": 4}
    rlvr.main(rlvr.Settings(model=base, out=tmp_path / "run", **how, **budgets))
    for row in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        assert row["mismatch"] == row["left_out"] == row["lost"] == 0
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    curve = {budget: {name: one["longest"] for name, one in rows.items()} for budget, rows in found["curve"].items()}
    assert curve == {"0": {"arithmetic": 0}, "4": {"arithmetic": 4}}, "choice is answered without"
    assert {name: one["longest"] for name, one in found["scores"]["after"].items()} == {"arithmetic": 6, "choice": 0}


def test_experts_that_wrote_an_answer_learn_from_it(taught, tmp_path, monkeypatch):
    """With weights that are as new they are those that the trainer would choose: nothing changes."""
    given = []
    monkeypatch.setattr(crew, "routed", lambda model, group: given.append(group) or routed(model, group))
    for name in ("plain", "replayed"):
        how = {**SMALL, "steps": 2, "measured": 1, "replay": name == "replayed"}
        rlvr.main(rlvr.Settings(model=str(taught), out=tmp_path / name, **how))
        assert len(given) == 8 * (name == "replayed")
    assert all(row["mismatch"] == 0 for row in read_metrics(tmp_path / "replayed" / "metrics.jsonl"))
    one, other = weights(tmp_path / "plain"), weights(tmp_path / "replayed")
    assert all(torch.equal(one[name], other[name]) for name in one)


class Odd(Count):
    """In training a third of its environments hang, and a third of its graders break."""

    name = "odd"

    def episode(self, problem):
        return OddEpisode(self, problem)


def fate(problem):
    return ("hangs", "breaks", "well")[int(problem.id, 16) % 3] if problem.split == "train" else "well"


class OddEpisode(Asked):
    def answer(self, reply):
        if fate(self.problem) == "hangs":
            threading.Event().wait(4)
        return ()

    def judged(self, last):
        return 1 / 0 if fate(self.problem) == "breaks" else super().judged(last)


def test_environments_that_hang_and_graders_that_break_cost_their_own_answers(taught, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "odd", Odd)
    how = {**SMALL, "tasks": ("count:3", "odd:3"), "measured": 4, "seconds": 1.0}
    rlvr.main(rlvr.Settings(model=str(taught), out=tmp_path / "run", **how))
    fates = {one.id: fate(one) for one in distinct(Odd(), "train", 40, levels=[3])}
    counts, lost = Counter(), Counter()
    for line in answers_of(tmp_path / "run"):
        meant = {"hangs": "time", "breaks": "task"}.get(fates.get(line["problem"], "well"))
        assert line.get("to") == meant
        counts[line["step"], line["problem"]] += line.get("lost", 1)
        lost[line["step"]] += line.get("lost", 0)
        lost[meant] += 1
    assert counts.total() == 3 * 16 and all(count % 4 == 0 for count in counts.values()), "every answer is somewhere"
    assert lost["time"] and lost["task"]
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["lost"] * 16 for row in rows] == [lost[step] for step in range(3)]
    found = json.loads((tmp_path / "run" / "results.json").read_text())["scores"]
    assert all(one["answers"] == 4 and one["lost"] == 0 for by_task in found.values() for one in by_task.values())


def test_distillation_from_two_teachers(taught, tmp_path):
    rlvr.main(rlvr.Settings(model=str(taught), out=tmp_path / "count", **SMALL))
    both = {**SMALL, "tasks": ("count:3", "choice:1"), "prompts": 12, "group": 1}
    teachers = (f"count={tmp_path / 'count'}", f"choice={taught}")
    mopd.main(mopd.Settings(model=str(taught), out=tmp_path / "run", teachers=teachers, **both))
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 3 and all("teacher_gap" in row and row["mismatch"] == 0 for row in rows)
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert len(found["scores"]) == 4
    gap = {(row["teacher"], row["when"]): row for row in found["gap to the teachers"]}
    assert {*gap} == {(name, when) for name in ("count", "run") for when in ("before", "after")}
    same = [float(gap["run", "before"][key]) for key in ("mean", "5 %", "95 %")]
    assert same == [0, 0, 0], "the student begins as this one"
    assert float(gap["count", "before"]["5 %"]) < float(gap["count", "before"]["95 %"])
    assert rows[0]["teacher_gap_run"] == pytest.approx(0, abs=1e-5) and rows[0]["teacher_gap_count"] != 0
    assert "Gap to the teachers" in (tmp_path / "run" / "report.html").read_text()


def test_a_teacher_that_is_another_by_now_is_refused(taught, tmp_path):
    shutil.copytree(taught, tmp_path / "teacher")
    how = {**SMALL, "prompts": 8, "group": 1, "steps": 1, "teachers": (f"count={tmp_path / 'teacher'}",)}
    settings = mopd.Settings(model=str(taught), out=tmp_path / "run", **how)
    mopd.main(settings)
    shutil.rmtree(tmp_path / "teacher")
    model, tokenizer = nautilus.load(taught)
    model.lm_head.weight.data *= 2
    model.save(tmp_path / "teacher", tokenizer=tokenizer)
    with pytest.raises(UserError, match="these settings differ: teaching"):
        mopd.main(settings)


def test_distillation_by_all_words(taught, tmp_path):
    """A student that is its own teacher has nothing to learn: no gradient, whatever it draws."""
    how = {**SMALL, "prompts": 8, "group": 1, "compute": "fp32"}
    mopd.main(mopd.Settings(model=str(taught), out=tmp_path / "run", teachers=(f"count={taught}",), whole=True, **how))
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert rows[0]["policy"] == pytest.approx(0, abs=1e-5) and rows[0]["grad_norm"] < 1e-3 and rows[0]["mismatch"] == 0


@pytest.mark.parametrize("whole", [False, True])
def test_a_student_may_learn_from_rewards_beside_its_teacher(taught, tmp_path, whole):
    """From a teacher that is itself there is nothing to learn, from rewards there is."""
    how = {**SMALL, "compute": "fp32", "reward": 0.5, "whole": whole, "teachers": (f"count={taught}",)}
    mopd.main(mopd.Settings(model=str(taught), out=tmp_path / "run", **how))
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert rows[0]["teacher_gap"] == pytest.approx(0, abs=1e-5) and rows[0]["grad_norm"] > 1e-3
    for bad in (-1, float("nan"), float("inf")):
        with pytest.raises(UserError, match="reward="):
            mopd.Settings(reward=bad)


def test_answers_of_a_student_are_compared_by_problem_or_where_there_is_one_of_each_by_task():
    class One:
        def __init__(self, reward: float):
            self.verdict = Verdict(reward=reward)

    def group(task: str, *rewards: float) -> Group:
        problem = Problem(task=task, level=1, messages=(), truth="", worked=())
        return Group(problem=problem, rollouts=[One(reward) for reward in rewards])

    def advantages(settings: mopd.Settings, *groups: Group) -> list[tuple[float, float]]:
        return [(one.verdict.reward, advantage) for one, advantage in mopd.compared(settings, groups)]

    lone = group("a", 1), group("b", 0), group("a", 0), group("b", 0), group("a", 0), group("c", 1), group("a")
    once = mopd.Settings(reward=0.1)
    assert advantages(once, *lone) == [
        (1, 1.0), *[(0, pytest.approx(-0.7071, abs=1e-3))] * 2, (0, 0.0), (0, 0.0), (1, 0.0),
    ]  # fmt: skip
    with pytest.raises(UserError, match="prompts=3 a task has one answer in a step"):
        mopd.students(replace(once, prompts=3, tasks=("sort", "count")))
    several = mopd.Settings(reward=0.1, group=2)
    assert advantages(several, group("a", 1, 0), group("a", 1, 1)) == [(1, 1.0), (0, -1.0), (1, 0.0), (1, 0.0)]
    assert {advantage for _, advantage in advantages(mopd.Settings(group=2), group("a", 1, 0))} == {0.0}


def test_the_distance_from_the_model_as_it_was_grows_from_nothing(taught, tmp_path):
    optim = OptimConfig(lr=1e-2, min_lr=1e-2, warmup=0)
    rlvr.main(rlvr.Settings(model=str(taught), out=tmp_path / "run", kl=0.1, optim=optim, **SMALL))
    first, *_, last = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert first["kl"] == pytest.approx(0, abs=1e-6) and last["kl"] > 1e-4


def test_preferences_end_to_end(taught, tmp_path):
    settings = dpo.Settings(model=str(taught), out=tmp_path / "run", **{**SMALL, "group": 8, "prompts": 8})
    dpo.main(settings)
    for bad in ({"replay": True}, {"mtp": Mtp(depths=1)}):
        with pytest.raises(UserError, match="preferences are learnt without"):
            replace(settings, **bad)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 3 and rows[0]["preference"] == pytest.approx(math.log(2), rel=0.05)
    assert set(json.loads((tmp_path / "run" / "results.json").read_text())["scores"]) == {"before", "after"}


def test_tasks_without_a_teacher_and_teachers_with_other_words_are_refused(taught, base, tmp_path):
    how = {**SMALL, "out": tmp_path / "run", "group": 1, "model": str(taught)}
    with pytest.raises(UserError, match="count has no teacher"):
        mopd.main(mopd.Settings(**how))
    with pytest.raises(UserError, match="'count' was asked for; write task=RUN"):
        mopd.main(mopd.Settings(teachers=("count",), **how))
    with pytest.raises(UserError, match="whole=true .* teacher_actors=2"):
        mopd.Settings(teachers=(f"count={taught}",), whole=True, teacher_actors=2, **how)
    with pytest.raises(UserError, match="a teacher of sort was named, which is not asked; there is count"):
        mopd.main(mopd.Settings(teachers=(f"count={taught}", f"sort={taught}"), **how))
    with pytest.raises(UserError, match="count has two teachers"):
        mopd.main(mopd.Settings(teachers=(f"count={taught}", f"count={base}"), **how))
    for wrong, words in (({"advantage": -1.0}, "advantage=-1"), ({"least": 7.0}, r"\[7.0, 5.0\]")):
        with pytest.raises(ValueError, match=words):
            mopd.Settings(**how, **wrong)


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"tasks": ()}, "no task was named"), ({"tasks": ("walk",)}, "there is no task 'walk'"),
        ({"tasks": ("sort:9",)}, "levels 1 to 8"), ({"tasks": ("math@nowhere.jsonl",)}, "is not there"),
        ({"tasks": ("sort:1", "sort:2")}, "sort was named twice"),
        ({"tokens": 1 << 20}, "positions"), ({"group": 1}, "group=1"), ({"model": ""}, "no model"),
        ({"tasks": ("sort", "count", "reverse"), "prompts": 2}, "prompts=2 of a step for 3 tasks"),
        ({"tasks": ("sort:2*0", "count")}, "a share of 0"), ({"tasks": ("walk@rows.jsonl",)}, "rows of the task"),
        ({"correction": "trunc"}, "'trunc' was asked for"), ({"apart": 0.0}, "apart=0"),
        ({"correction": "none", "age": 1}, "age=1 with correction=none .* take correction=truncate"),
        ({"kl": -1.0}, "kl=-1"), ({"advantage": 0.0}, "advantage="),
        ({"least": 2.0}, r"\[2.0, 5.0\]"), ({"balance": -1.0}, "balance=-1"), ({"budgets": (0, -3)}, "budgets=0,-3"),
        ({"budgets": (8, 8)}, "budgets=8,8"), ({"tasks": ("sort:3",), "budgets": (0, 8)}, "sort are answered without"),
        ({"budgeted": 0.5}, "budgeted=0.5"), ({"budgeted": 0.5, "train_budgets": (-1,)}, "train_budgets="),
        ({"less_effort": 2.0}, "less_effort=2"), ({"silence": 0.0}, "silence=0"),
        ({"mtp": Mtp(depths=200)}, "mtp.depths=200"), ({"judges": ("count=nowhere",)}, "nowhere"),
        ({"judges": ("count=a", "count=b")}, "two judges"),
        ({"updates": 0}, "updates=0"), ({"updates": 5}, "updates=5 of a step were asked for, with prompts=4"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused_at_once(taught, tmp_path, wrong, words):
    how = {**SMALL, "model": str(taught), "out": tmp_path / "run"} | wrong
    with pytest.raises(ValueError, match=words):
        rlvr.main(rlvr.Settings(**how))
    assert not (tmp_path / "run").exists(), "nothing is in the way of the right ones"


def test_rows_that_no_model_can_be_asked_cost_their_own_answers_and_say_why(taught, tmp_path):
    """What is broken shows only when the row is put to the model: its role, or what its message holds."""
    rows = [row_of(problem) for problem in islice(Count().problems("train"), 80)]
    bad = {"wizard": {"role": "wizard", "content": "a"}, "number": {"role": "user", "content": 4}}
    rows += [{**rows[0], "responses_create_params": {"input": [{**message, "name": f"{name} {at}"}]}}
             for name, message in bad.items() for at in range(6)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    how = {**SMALL, "tasks": (f"exact@{tmp_path / 'rows.jsonl'}",), "prompts": 12, "steps": 2}
    rlvr.main(rlvr.Settings(model=str(taught), out=tmp_path / "run", kl=0.1, **how))
    lines = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    lost = [line for line in lines if "lost" in line]
    assert lost and {line["to"] for line in lost} == {"problem"}
    assert all("wizard" in line["why"] or "content" in line["why"] for line in lost)
    assert len(lines) - len(lost) + sum(line["lost"] for line in lost) == 2 * 12 * 4, "every answer is somewhere"
    assert any(row["lost"] > 0 for row in read_metrics(tmp_path / "run" / "metrics.jsonl"))


def test_where_every_answer_is_lost_the_exam_says_why(taught, tmp_path):
    rows = (row_of(problem) for problem in islice(Count().problems("train"), 400))  # of few none may be to be measured
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    how = {**SMALL, "tasks": (f"gym@http://127.0.0.1:1#{tmp_path / 'rows.jsonl'}",), "measured": 2}
    with pytest.raises(UserError, match="all 2 answers to gym@.* were lost; the first: .*127.0.0.1:1"):
        rlvr.main(rlvr.Settings(model=str(taught), out=tmp_path / "run", **how))
    with pytest.raises(UserError, match="all 16 answers to count .* tokens=8 are too few for a prompt of"):
        rlvr.main(rlvr.Settings(model=str(taught), out=tmp_path / "short", **{**SMALL, "tokens": 8}))


@pytest.mark.slow
def test_processes_draw_what_this_one_would_and_a_killed_one_ends_nothing(taught, tmp_path):
    """In a process of its own, as Ray reads the environment when it is imported."""
    command = [sys.executable, "-m", "tests.recipes.processes", str(taught), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["same"] and found["weights"] and found["mismatch"] == [0, 0], "two steps of 16 answers each"
    assert found["to"] == ["actor"] and found["lost"] == 8, "those of the two groups that the process was at"
    assert found["shares"] == [pytest.approx(8 / 24), 0]
    assert len(found["ages"]) == 32 and {*found["ages"]} <= {0, 1} and 1 in found["ages"] and found["steps"] == [0, 1]


def test_supervised_settings_that_cannot_be_are_refused_at_once(base, tmp_path):
    for wrong, words in (
        ({"problems": 0}, "problems=0"), ({"steps": -1}, "steps=-1"), ({"rows": 0}, "rows=0"),
        ({"length": 1}, "length=1"), ({"mtp_depths": 64, "length": 64}, "mtp_depths=64"),
        ({"loss": "word"}, "'word'"), ({"balance": -1.0}, "balance="), ({"seed": -1}, "seed=-1"),
        ({"length": 1 << 21}, "positions="), ({"tasks": ("sort:3*0",)}, "a share of 0"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            sft.main(sft.Settings(**{"model": base, "tasks": ("count:3",), "out": tmp_path / "run"} | wrong))
        assert not (tmp_path / "run").exists()


def test_models_without_a_chat_template_are_told_so(base, tmp_path):
    model, tokenizer = nautilus.load(base)
    tokenizer.template = None
    model.save(tmp_path / "plain", tokenizer=tokenizer)
    with pytest.raises(UserError, match="no chat template"):
        rlvr.main(rlvr.Settings(model=str(tmp_path / "plain"), out=tmp_path / "run", **SMALL))
    tokenizer.template = template_text("spaced").replace("low_effort", "x").replace("medium_effort", "y")
    model.save(tmp_path / "full", tokenizer=tokenizer)
    with pytest.raises(UserError, match="less_effort=0.5 was asked for, but .* no words for less effort"):
        rlvr.main(rlvr.Settings(model=str(tmp_path / "full"), out=tmp_path / "run", less_effort=0.5, **SMALL))
    assert replace(rlvr.Settings(), steps=2).steps == 2


@pytest.mark.parametrize("less", [True, False])
def test_shorter_answers_earn_more_where_less_effort_is_asked_for_and_no_words_are_told(less):
    how = rlvr.Settings(tasks=("sort",), less_effort=0.5, effort=Effort(weight=1.0, upper=8))
    asked = replace(group(rollout(answer=2), rollout(answer=6)), less=less)
    (batch,) = rlvr.rows(how, 0, [asked])
    assert batch.advantage.any().item() == less
