"""The pipeline's stages and what each is told."""

import json
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import nautilus
from nautilus.config import to_dict
from nautilus.posttrain.pipeline import Exam, Stages, alone, averaged, unsuited
from nautilus.posttrain.profile import Score
from nautilus.recipes import mopd, posttrain, rlvr, sft
from nautilus.runtime import Run, UserError, continue_or_create
from nautilus.tasks.asked import asked as asked_of
from nautilus.train.optim import OptimConfig
from tests.posttrain.test_crew import tiny, words

SLOW = OptimConfig(warmup=10, decay=0.5)


def done(settings):
    """A recipe."""
    run = continue_or_create(settings.out, {**to_dict(settings), "weights": "those of the model"})
    run.report.write_text("done")
    run.model.mkdir(exist_ok=True)


class Told:
    """An exam in which every student has caught up."""

    def caught_up(self, task, models, *names, share):
        return True


def test_later_specialists_begin_from_the_student_and_may_be_shorter(tmp_path):
    asked = {}

    def do(name, recipe, settings, *, of=(), **given):
        asked[name] = settings.steps, given["model"]
        return tmp_path / name

    settings = posttrain.Settings(
        model="base", tasks=("sort:3", "count:3"), again=0.5, specialist=rlvr.Settings(steps=9),
        student=mopd.Settings(steps=4),
    )  # fmt: skip
    models = posttrain.trained(settings, do, {"sort": "sort:3", "count": "count:3"}, Told())
    first, second = str(tmp_path / "sft"), str(tmp_path / "1-student")
    assert asked["sft"][1] == "base"
    assert {asked[name] for name in ("1-sort", "1-count")} == {(9, first)} and asked["1-student"] == (4, first)
    assert {asked[name] for name in ("2-sort", "2-count")} == {(4, second)} and asked["2-student"] == (4, second)
    assert [*models][-1] == "student 2"
    for again in (0, 1.5):
        with pytest.raises(UserError, match="again="):
            posttrain.Settings(again=again)


def test_a_teacher_stays_until_the_student_has_caught_up_with_it(tmp_path):
    """Of three times the sort specialist is new the first and the third, the other one every time."""
    asked = {}

    def do(name, recipe, settings, *, of=(), **given):
        asked[name] = given
        return tmp_path / name

    class Points(Exam):
        def __call__(self, name, place):
            sort = {"sft": 0.2, "sort specialist 1": 0.7, "student 1": 0.65, "student 2": 0.69}
            count = {"sft": 0.2, "count specialist 1": 0.7, "student 1": 0.7, "count specialist 2": 0.9}
            of, task = name.split(" on ")
            assert self.split == "valid" and [one.task.name for one in self.tasks] == [task]
            return {task: Score(rewards=[{"sort": sort, "count": count | {"student 2": second}}[task].get(of, 0)])}

    named, second = {"sort": "sort:3", "count": "count:3"}, 0.9
    of = [asked_of(words) for words in named.values()]
    exam = Points(run=Run(tmp_path), tasks=of, count=1, settings=rlvr.Settings(), load=nautilus.load)
    settings = posttrain.Settings(model="base", tasks=(*named.values(),), iterations=3, caught_up=0.95)
    models = posttrain.trained(settings, do, named, exam)
    assert [*models] == [
        "sft", "sort specialist 1", "count specialist 1", "student 1", "count specialist 2", "student 2",
        "sort specialist 3", "count specialist 3", "student 3",
    ]  # fmt: skip
    assert asked["2-student"]["teachers"] == (f"sort={tmp_path / '1-sort'}", f"count={tmp_path / '2-count'}")
    assert asked["3-sort"]["model"] == str(tmp_path / "2-student")
    second = 0.88  # most of what was gained since sft, and too little of the 0.2 of the second specialist
    assert "count specialist 3" not in posttrain.trained(settings, do, named, exam)
    again = posttrain.trained(replace(settings, iterations=2, caught_up=0), do, named, exam)
    assert "sort specialist 2" in again
    with pytest.raises(UserError, match="caught_up=-1"):
        posttrain.Settings(caught_up=-1)


def test_a_student_may_begin_warm_on_what_its_teachers_answer(tmp_path):
    """Between the specialists and each student; the next specialists begin from the student as ever."""
    asked, written = {}, []

    class Do:
        run = Run(tmp_path)

        def __call__(self, name, recipe, settings, *, of=(), **given):
            asked[name] = recipe, settings, of, given
            return tmp_path / name

        def lesson(self, name, teachers, tasks, settings, count, folder, load):
            written.append((name, [*teachers.values()], tasks, count, folder))
            return folder / "conversations.jsonl"

    named = {"sort": "sort:3", "count": "count:3"}
    taught = sft.Settings(steps=9, rows=3, problems=50, length=128)
    settings = posttrain.Settings(model="base", tasks=(*named.values(),), warm=5, supervised=taught, seed=4)
    models = posttrain.trained(settings, Do(), named, Told())
    for number, base in (("1", "sft"), ("2", "1-student")):
        specialists = tuple(tmp_path / f"{number}-{name}" for name in named)
        recipe, told, of, given = asked[f"{number}-warm"]
        assert (recipe, told.steps, told.tasks, told.length) == (sft, 5, (), 128)
        assert of == (tmp_path / base, *specialists)
        folder = tmp_path / "state" / f"{number}-written"
        assert given == {"model": str(tmp_path / base), "data": (folder / "conversations.jsonl",)}
        recipe, _, of, given = asked[f"{number}-student"]
        assert recipe is mopd and given["model"] == str(tmp_path / f"{number}-warm")
        assert of == (tmp_path / f"{number}-warm", *specialists)
        assert {asked[one.name][3]["model"] for one in specialists} == {str(tmp_path / base)}
        assert written.pop(0) == (f"{number}-warm", [*specialists], named, 8, folder)
    assert [*models][-2:] == ["warm 2", "student 2"]
    with pytest.raises(UserError, match="warm=-1"):
        posttrain.Settings(warm=-1)


def test_a_student_made_another_way_is_not_taken_for_the_one_that_is_asked_for(tmp_path):
    run = Run.create(tmp_path / "run", {})
    recipe = SimpleNamespace(main=done)
    do, settings = Stages(run=run, seed=0), rlvr.Settings()
    base = do("sft", recipe, settings)
    do("1-student", recipe, settings, of=(do("1-warm", recipe, settings, of=(base,)),))
    with pytest.raises(UserError, match="1-student was made of 1-warm, and is now to be made of sft; remove it"):
        do("1-student", recipe, settings, of=(base,))
    known = do.known
    del known["1-student"]["of"]  # as in a run of before
    do.file.write_text(json.dumps(known))
    do("1-student", recipe, settings, of=(base,))


def test_a_specialist_has_its_own_judge_and_a_share_of_the_steps():
    given = rlvr.Settings(judges=("style=oracle", "styled=runs/judge"), steps=9)
    told = alone(given, "style", "style:1", share=0.5)
    assert (told.tasks, told.judges, told.steps) == (("style:1",), ("style=oracle",), 4)
    assert alone(given, "sort", "sort", share=1) == replace(given, tasks=("sort",), judges=())
    of = [asked_of(words) for words in ("style", "sort")]
    for judges, told in (("styled=runs/judge", "judge of styled"), ("sort=oracle", "sort has no oracle")):
        with pytest.raises(UserError, match=told):
            unsuited(replace(given, judges=(judges,)), of, nautilus.load, together=False)
    few = rlvr.Settings(tasks=("style", "sort"), prompts=1)  # which is enough for either alone
    unsuited(few, of, nautilus.load, together=False)
    with pytest.raises(UserError, match="prompts=1"):
        unsuited(few, of, nautilus.load, together=True)


@pytest.mark.parametrize(
    "given",
    [
        {"specialist": rlvr.Settings(steps=100, optim=SLOW), "again": 0.1},
        {"student": mopd.Settings(optim=OptimConfig(warmup=0, decay=1.0)), "warm": 40},
    ],
)  # fmt: skip
def test_what_would_not_fit_later_is_refused_at_once(given):
    with pytest.raises(ValueError, match="do not fit"):
        posttrain.Settings(**given)


def test_a_pipeline_is_no_model_and_says_where_some_are(tmp_path):
    run = Run.create(tmp_path / "run", {})
    Stages(run=run, seed=0)("sft", SimpleNamespace(main=done), rlvr.Settings())
    with pytest.raises(UserError, match="holds stages of a pipeline; name one of them, such as .*1-student"):
        nautilus.load(run.folder)


def test_names_with_slashes_are_stages_and_exams_like_others(tmp_path):
    run = Run.create(tmp_path / "run", {})
    recipe = SimpleNamespace(main=done)
    do, settings = Stages(run=run, seed=0), rlvr.Settings()
    teacher = do("1-pivot/store", recipe, settings)
    assert teacher == run.folder / "1-pivot_store"
    for _ in range(2):  # the second time with what is known of it
        do("1-student", recipe, settings, of=(teacher,))
    do.forget_older([teacher], tmp_path / "mean")


def test_answers_of_other_teachers_are_written_once_more(tmp_path):
    tokenizer, places = words(), [tmp_path / "one", tmp_path / "two"]
    for seed, place in enumerate(places):
        model = tiny(tokenizer, seed)
        model.lm_head.weight.data *= 1e-3  # any word is as likely, an end too
        model.save(place, tokenizer=tokenizer)
    do = Stages(run=Run.create(tmp_path / "run", {}), seed=0)
    settings, folder = rlvr.Settings(tokens=400, turn_tokens=300, together=16), tmp_path / "written"

    def of(place, count=8):
        file = do.lesson("warm", {"sort": place}, {"sort": "sort:3"}, settings, count, folder, nautilus.load)
        assert file == folder / "conversations.jsonl"
        return (folder / "sort" / "answers.jsonl").read_text()

    first = of(places[0])
    assert of(places[0]) == first and of(places[1]) != first and of(places[0], 9).count("\n") == 9
    do("warm", SimpleNamespace(main=done), settings)
    assert of(places[1], 3).count("\n") == 9, "what was learnt from stays"


def test_what_a_stage_lacks_is_made_again_and_what_came_after_stays(tmp_path):
    run = Run.create(tmp_path / "run", {})
    do, recipe, settings = Stages(run=run, seed=0), SimpleNamespace(main=done), rlvr.Settings()
    student = do("student", recipe, settings, of=(base := do("sft", recipe, settings),))
    Run(base).report.unlink()
    Run(student).model.rmdir()
    assert do("student", recipe, settings, of=(do("sft", recipe, settings),)) == student
    assert Run(base).report.is_file() and Run(student).model.is_dir()
    for damaged in ("[]", '{"sft": 3}', '{"sft": {}}', '{"sft": {"minutes": 1, "done": null}}'):
        do.file.write_text(damaged)
        with pytest.raises(UserError, match="stages.json .*; remove it"):
            do("sft", recipe, settings)


def test_the_mean_of_specialists_has_the_mean_of_their_weights(tmp_path):
    tokenizer, places = words(), []
    for seed in range(3):
        places.append(tmp_path / f"1-{seed}")
        tiny(tokenizer, seed).save(places[-1], tokenizer=tokenizer)
    folder = averaged(places, tmp_path / "mean", nautilus.load)
    found, parts = nautilus.load(folder)[0].state_dict(), [nautilus.load(place)[0].state_dict() for place in places]
    assert found.keys() == parts[0].keys()
    for name, weight in found.items():
        mean = torch.stack([part[name].double() for part in parts]).mean(0)
        torch.testing.assert_close(weight, mean.to(weight.dtype), rtol=0, atol=0)
    assert all(any(not torch.equal(found[name], part[name]) for name in found) for part in parts)


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"specialist": rlvr.Settings(tasks=("sort",))}, "specialist.tasks="),
        ({"student": mopd.Settings(teachers=("sort=x",))}, "student.teachers="),
        ({"supervised": sft.Settings(model="x")}, "supervised.model=x"), ({"budgets": (0, -4)}, "budgets=0,-4"),
    ],
)  # fmt: skip
def test_what_the_pipeline_gives_itself_is_not_to_be_given(wrong, words):
    with pytest.raises(UserError, match=words):
        posttrain.Settings(**wrong)


def test_a_stage_is_done_once_and_must_be_told_the_same_then(tmp_path):
    run, told = Run.create(tmp_path / "run", {}), []

    def main(settings):
        done(settings)
        told.append(settings)

    recipe, settings = SimpleNamespace(main=main), rlvr.Settings(steps=3)
    do = Stages(run=run, seed=7)
    assert do("one", recipe, settings, model="base") == do("one", recipe, settings, model="moved") == run.folder / "one"
    assert len(told) == 1 and told[0].seed == 7 and told[0].model == "base" and [*do.minutes] == ["one"]
    do("one", recipe, replace(settings, together=3, actors=2), model="base")
    with pytest.raises(UserError, match=r"steps \(begun with 3, now 4\)"):
        do("one", recipe, replace(settings, steps=4), model="base")
    with pytest.raises(UserError, match="tasks.0"):
        do("one", recipe, settings, model="base", tasks=("sort",))
    one = run.folder / "one"
    do("two", recipe, replace(settings, steps=4), of=(one,), model="base")
    assert [each.steps for each in told] == [3, 4]
    mean = tmp_path / "mean"
    mean.mkdir()
    do.forget_older([one], mean)
    assert mean.is_dir()
    shutil.rmtree(one)
    do("one", recipe, settings, model="base")
    with pytest.raises(UserError, match="two was made before one was made again; remove it"):
        do("two", recipe, replace(settings, steps=4), of=(one,), model="base")
    os.utime(mean, (1, 1))
    do.forget_older([one], mean)
    assert not mean.exists()
