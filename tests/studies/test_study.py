"""Studies are read strictly, and those that come along compare equal with equal."""

import dataclasses

import pytest

from nautilus.recipes.pretrain import Settings
from nautilus.runtime import UserError
from nautilus.studies.named import NAMED
from nautilus.studies.study import Study, open_study, refuse_unequal, work_of
from nautilus.train.optim import schedule

GOOD = """
about = "x"
base = ["steps=400", "model.vocab=400"]
equal = ["tokens", "parameters"]

[variants]
one = []
two = ["optim.lr=1e-3"]
"""


def opened(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return open_study(str(path), NAMED)


def test_a_file_gives_a_study_whose_first_variant_is_the_control(tmp_path):
    study = opened(tmp_path, GOOD)
    assert study.name == "mine" and study.control == "one" and study.equal == ("tokens", "parameters")
    found = study.settings(Settings, "two", "seed=7")
    assert (found.steps, found.optim.lr, found.seed, found.model.vocab) == (400, 1e-3, 7, 400)
    assert study.settings(Settings, "one") == dataclasses.replace(found, seed=0, optim=Settings().optim)


@pytest.mark.parametrize(
    "text,words",
    [
        ("[variants", "is no TOML"),
        ("base = []", "has no variants"),
        ("[variants]\none = []", "has 1 variants; give a control"),
        (GOOD + "three = 'optim.lr=1'", "variants.three must be a list of settings"),
        ("seed = 3\n" + GOOD, "has 'seed'; it may have about, base"),
        ("measure = 'luck'\n" + GOOD, "measure='luck' is unknown; have held_out, needle"),
        ("needles = 'x'\n" + GOOD, "needles='x' must be of type int"),
        (GOOD.replace('"parameters"', '"time"'), "equal=time is unknown"),
        (GOOD + "'a/b' = []", "names a folder"),
        (GOOD + "three = ['seed=3']", "'seed=3' is the study's own"),
    ],
)
def test_a_bad_file_says_what_is_wrong(tmp_path, text, words):
    with pytest.raises(UserError) as bad:
        opened(tmp_path, text)
    assert words in str(bad.value)


def test_a_bad_setting_names_its_variant(tmp_path):
    study = opened(tmp_path, GOOD + "three = ['precision.rotat=false']")
    with pytest.raises(UserError, match="variant three: no setting 'precision.rotat'; did you mean 'precision.rotate'"):
        study.settings(Settings, "three")


def test_no_such_study():
    with pytest.raises(UserError, match="did you mean 'nvfp4'"):
        open_study("nvpf4", NAMED)


def test_narrowing_keeps_the_control_and_refuses_the_unknown():
    narrow = NAMED["nvfp4"].narrowed(("steps=8",), ("none",))
    assert [*narrow.variants] == ["bf16", "none"] and narrow.base[-1] == "steps=8"
    with pytest.raises(UserError, match="no variant 'nothing'"):
        NAMED["nvfp4"].narrowed((), ("nothing",))


@pytest.mark.parametrize("name", NAMED)
def test_a_named_study_compares_equal_work(name):
    study = NAMED[name]
    assert study.name == name and study.about
    records = {variant: study.settings(Settings, variant) for variant in study.variants}
    refuse_unequal(study, records)
    assert all(200_000 < work_of(found)["parameters"] < 12_000_000 for found in records.values())


def test_unequal_work_is_refused():
    study = Study(name="s", variants={"one": (), "two": ("rows=32",)})
    with pytest.raises(UserError, match="two has tokens=16,384,000, one has 8,192,000"):
        refuse_unequal(study, {name: study.settings(Settings, name) for name in study.variants})


def test_the_decay_study_parts_where_the_decay_begins():
    """Up to there all variants have the same rates, and the average is over as many updates as the decay has."""
    study = NAMED["decay"]
    decay, plateau, averaged = (study.settings(Settings, name) for name in ("decay", "plateau", "averaged"))
    begin = round(decay.steps * (1 - decay.optim.decay))
    one, other = schedule(decay.optim, decay.steps), schedule(plateau.optim, plateau.steps)
    assert [one(i) for i in range(begin)] == [other(i) for i in range(begin)]
    assert one(begin) < other(begin)
    assert averaged.average * averaged.average_every == decay.steps - begin and averaged.optim == plateau.optim


def test_the_last_fifth_of_the_nvfp4_study_may_be_bf16():
    found = NAMED["nvfp4"].settings(Settings, "bf16_at_the_end")
    tokens = work_of(found)["tokens"]
    assert [found.precision.recipe_at(round(share * tokens)) for share in (0.0, 0.79, 0.81)] == ["table"] * 2 + ["bf16"]
