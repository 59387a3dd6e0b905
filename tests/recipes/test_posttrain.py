"""The pipeline's stages and what each is told."""

import pytest

from nautilus.recipes import mopd, posttrain, rlvr
from nautilus.runtime import Run, UserError


def test_later_specialists_begin_from_the_student_and_may_be_shorter(monkeypatch, tmp_path):
    asked = {}

    def stage(run, whole, name, recipe, settings, **given):
        asked[name] = settings.steps, given["model"]
        return run.folder / name

    monkeypatch.setattr(posttrain, "stage", stage)
    settings = posttrain.Settings(
        model="base", tasks=("sort:3", "count:3"), again=0.5, specialist=rlvr.Settings(steps=9),
        student=mopd.Settings(steps=4),
    )  # fmt: skip
    models = posttrain.trained(settings, Run(tmp_path), {"sort": "sort:3", "count": "count:3"})
    first, second = str(tmp_path / "sft"), str(tmp_path / "1-student")
    assert asked["sft"][1] == "base"
    assert {asked[name] for name in ("1-sort", "1-count")} == {(9, first)} and asked["1-student"] == (4, first)
    assert {asked[name] for name in ("2-sort", "2-count")} == {(4, second)} and asked["2-student"] == (4, second)
    assert [*models][-1] == "student 2"
    for again in (0, 1.5):
        with pytest.raises(UserError, match="again="):
            posttrain.Settings(again=again)
