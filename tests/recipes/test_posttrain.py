"""The pipeline's stages and what each is told."""

import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest

from nautilus.config import to_dict
from nautilus.posttrain.pipeline import Stages
from nautilus.recipes import mopd, posttrain, rlvr, sft
from nautilus.runtime import Run, UserError


def test_later_specialists_begin_from_the_student_and_may_be_shorter(tmp_path):
    asked = {}

    def do(name, recipe, settings, *, of=(), **given):
        asked[name] = settings.steps, given["model"]
        return tmp_path / name

    settings = posttrain.Settings(
        model="base", tasks=("sort:3", "count:3"), again=0.5, specialist=rlvr.Settings(steps=9),
        student=mopd.Settings(steps=4),
    )  # fmt: skip
    models = posttrain.trained(settings, do, {"sort": "sort:3", "count": "count:3"})
    first, second = str(tmp_path / "sft"), str(tmp_path / "1-student")
    assert asked["sft"][1] == "base"
    assert {asked[name] for name in ("1-sort", "1-count")} == {(9, first)} and asked["1-student"] == (4, first)
    assert {asked[name] for name in ("2-sort", "2-count")} == {(4, second)} and asked["2-student"] == (4, second)
    assert [*models][-1] == "student 2"
    for again in (0, 1.5):
        with pytest.raises(UserError, match="again="):
            posttrain.Settings(again=again)


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
        done = Run.create(settings.out, {**to_dict(settings), "weights": "those of the model"})
        done.report.write_text("done")
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
    do("two", recipe, replace(settings, steps=4), of=("one",), model="base")
    assert [one.steps for one in told] == [3, 4]
    mean = tmp_path / "mean"
    mean.mkdir()
    do.forget_older(["one"], mean)
    assert mean.is_dir()
    shutil.rmtree(run.folder / "one")
    do("one", recipe, settings, model="base")
    with pytest.raises(UserError, match="two was made before one was made again; remove it"):
        do("two", recipe, replace(settings, steps=4), of=("one",), model="base")
    os.utime(mean, (1, 1))
    do.forget_older(["one"], mean)
    assert not mean.exists()
