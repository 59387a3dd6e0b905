from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nautilus.config import Attention, Config, Experts, Mamba, Mlp, Rotary, apply_overrides, lay

ATTENTION = Attention(heads=4, groups=2, head_width=16)
CONFIG = Config(
    vocab=100,
    width=32,
    layers=lay("ME*-M", Mamba(heads=8), Experts(experts=8, active=2, hidden=64), ATTENTION, Mlp(hidden=48)),
    mtp=lay("*E", ATTENTION, Experts(experts=8, active=2, hidden=64)),
)


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.1
    warm_up: int = 5


@dataclass(frozen=True, kw_only=True)
class Settings:
    steps: int = 10
    verbose: bool = False
    name: str = "x"
    out: Path = Path("runs")
    limit: int | None = None
    sizes: tuple[int, ...] = (1, 2)
    words: tuple[str, ...] = ()
    inner: Inner = Inner()
    model: Config = field(default=CONFIG)


def changed(*texts: str) -> Settings:
    return apply_overrides(Settings(), texts)


FINITE = st.floats(allow_nan=False, allow_infinity=False)


@given(steps=st.integers(-(10**12), 10**12), rate=FINITE, name=st.text(max_size=20))
def test_a_value_arrives_as_it_was_written(steps, rate, name):
    got = changed(f"steps={steps}", f"inner.rate={rate!r}", f"name={name}")
    assert (got.steps, got.inner.rate, got.name) == (steps, rate, name)
    assert replace(got, steps=10, inner=Inner(), name="x") == Settings()


@pytest.mark.parametrize(
    "text,want",
    [
        ("steps=1_000", Settings(steps=1000)),
        ("steps=2e6", Settings(steps=2_000_000)),
        ("verbose=on", Settings(verbose=True)),
        ("out=a=b/c", Settings(out=Path("a=b/c"))),
        ("limit=3", Settings(limit=3)),
        ("sizes=3,4,5", Settings(sizes=(3, 4, 5))),
        ("sizes=(3,)", Settings(sizes=(3,))),
        ("sizes=", Settings(sizes=())),
        ("words=a, b", Settings(words=("a", "b"))),
        ("inner.warm-up=7", Settings(inner=Inner(warm_up=7))),
        ("model.width=64", Settings(model=replace(CONFIG, width=64))),
    ],
)
def test_values_of_every_type(text, want):
    assert changed(text) == want


def test_none_switches_an_optional_setting_off():
    assert apply_overrides(Settings(limit=4), ["limit=none"]).limit is None


def test_later_settings_win_and_the_original_stays():
    before = Settings()
    assert changed("steps=1", "steps=2").steps == 2
    assert before == Settings()


def test_a_new_pattern_keeps_the_sizes_of_each_kind():
    got = apply_overrides(CONFIG, ["layers=M*M*-E"])
    assert got.pattern == "M*M*-E"
    assert set(got.layers) == set(CONFIG.layers)


def test_one_setting_of_a_kind_of_one_layer_and_of_a_record_inside():
    got = apply_overrides(CONFIG, ["layers.M.heads=16", "layers.4.groups=4", "layers.*.rotary.theta=500000"])
    assert [layer.heads for layer in got.layers if isinstance(layer, Mamba)] == [16, 16]
    assert [layer.groups for layer in got.layers if isinstance(layer, Mamba)] == [8, 4]
    assert got.layers[2] == replace(ATTENTION, rotary=Rotary(theta=5e5))
    assert got.mtp == CONFIG.mtp


def test_the_letter_of_an_mlp_layer_is_not_taken_for_an_underscore():
    assert apply_overrides(CONFIG, ["layers.-.hidden=99"]).layers[3] == Mlp(hidden=99)


@pytest.mark.parametrize(
    "text,message",
    [
        ("step=3", "no setting 'step'; did you mean 'steps'"),
        ("inner.wram_up=3", "no setting 'inner.wram_up'; did you mean 'inner.warm_up'"),
        ("model.widht=3", "did you mean 'model.width'"),
        ("model.layers.E.activ=3", "no setting 'model.layers.E.activ'; did you mean 'model.layers.E.active'"),
        ("qqq=3", "no setting 'qqq'; have .*steps, "),
        ("width=3", "no setting 'width'; did you mean 'model.width'"),
        ("warm-up=3", "no setting 'warm-up'; did you mean 'inner.warm_up'"),
        ("steps", "'steps' is not of the form name=value"),
        ("=3", "is not of the form name=value"),
        ("steps=three", "steps='three' is not a whole number"),
        ("steps=2.5", "steps='2.5' is not a whole number"),
        ("steps=inf", "steps='inf' is not a whole number"),
        ("inner.rate=nan", "inner.rate='nan' is not a finite number"),
        ("inner.rate=-inf", "inner.rate='-inf' is not a finite number"),
        ("verbose=maybe", "is not of type bool"),
        ("sizes=1,x", "is not a whole number"),
        ("steps.x=3", "'steps' is a plain value"),
        ("inner=3", "'inner' is a group of settings; set one of its fields, such as inner.rate"),
        ("model.layers=MQ", "'Q' at position 1"),
        ("model.layers=ML_Z", "'Z' at position 3"),
        ("model.layers.E=3", "name the setting too"),
        ("model.layers.9.heads=3", "layer 9 does not exist, the model has 0..4"),
        ("model.layers.L.x=3", "the model has no layer of kind 'L'"),
        ("model.layers.E.active=9", "experts.active=9 must lie in 1..experts.experts=8"),
        ("model.layers.M.hidden=9", "no setting 'model.layers.M.hidden'"),
    ],
)
def test_a_wrong_setting_says_what_is_wrong_with_it(text, message):
    with pytest.raises(ValueError, match=message):
        changed(text)


def test_settings_that_depend_on_one_another_may_come_in_any_order():
    for pair in (["layers.E.experts=2", "layers.E.active=1"], ["layers.E.active=1", "layers.E.experts=2"]):
        (layer,) = {layer for layer in apply_overrides(CONFIG, pair).layers if layer.letter == "E"}
        assert (layer.experts, layer.active) == (2, 1)
    for pair in (["layers=MM", "layers.1.heads=16"], ["layers.1.heads=16", "layers=MM"]):
        assert [layer.heads for layer in apply_overrides(CONFIG, pair).layers] == [8, 16]


def test_the_later_of_two_values_counts():
    assert apply_overrides(CONFIG, ["width=64", "width=128"]).width == 128


@dataclass(frozen=True)
class Few:
    rows: int = 1

    def __post_init__(self):
        if self.rows < 1:
            raise ValueError(f"rows={self.rows} must be at least 1")


@dataclass(frozen=True)
class Whole:
    first: Few = Few()
    second: Few = Few()


def test_a_mistake_in_settings_inside_says_where():
    with pytest.raises(ValueError, match="^second: rows=0 must be at least 1"):
        apply_overrides(Whole(), ["first.rows=2", "second.rows=0"])
    with pytest.raises(ValueError, match="^rows=0"):
        apply_overrides(Few(), ["rows=0"])
