"""The published runs by number, and the same runs at other sizes."""

import dataclasses
import math

import pytest

from nautilus.config import PrecisionTable
from nautilus.presets import PRECISION, preset
from nautilus.train.average import merge_coefficients
from nautilus.train.optim import learning_rate, schedule
from nautilus.train.published import LATER, PUBLISHED, published

NAMES = sorted(PUBLISHED)


@pytest.mark.parametrize(
    "name, steps, warmup", [("nano", 993_411, 334), ("super", 993_411, 7_947), ("ultra", 794_729, 7_947)]
)
def test_tokens_and_batch_give_the_published_numbers_of_updates(name, steps, warmup):
    recipe = published(name)
    assert recipe.batch == 25_165_824 and recipe.steps == steps
    assert recipe.optim(recipe.steps).warmup == warmup


@pytest.mark.parametrize("name", NAMES)
def test_the_rate_at_the_corners_of_the_schedule(name):
    """WSD in tokens: 0 at 0, the peak at W and N - D, half way at a quarter of the decay, the minimum from N on."""
    r = published(name)
    optim = dataclasses.replace(r.optim(r.steps), warmup=r.warmup)  # counted in tokens, as the horizon here
    rate = lambda tokens: learning_rate(tokens, r.tokens, optim)
    assert rate(0) == 0
    assert rate(r.warmup / 2) == pytest.approx(r.lr / 2)
    assert rate(r.warmup) == rate(r.tokens - r.decay) == r.lr
    assert rate(r.tokens - 0.75 * r.decay) == pytest.approx((r.lr + r.min_lr) / 2)
    assert rate(r.tokens) == rate(1.1 * r.tokens) == pytest.approx(r.min_lr)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1, 7, 200, 5000, 993_411])
def test_a_run_of_any_size_keeps_the_shares(name, steps):
    r = published(name)
    found = r.settings(steps, 8)
    rate = schedule(found["optim"], steps)
    assert found["steps"] == steps and rate(steps - 1) == pytest.approx(r.min_lr)
    assert found["optim"].warmup / steps == pytest.approx(r.warmup / r.tokens, abs=0.5 / steps)
    assert found["optim"].decay == r.decay / r.tokens in (0.2, 0.25)
    window = found["average"] * found.get("average_every", 1)
    assert window <= steps and abs(window - r.merge_window / r.tokens * steps) <= found.get("average_every", 1) + 1


def test_the_released_bases_are_made_of_twenty_checkpoints_a_thousand_updates_apart():
    for name, every in (("super", 993), ("ultra", 993)):
        r = published(name)
        assert r.merge(r.steps) == {"average": 20, "average_every": every}
    assert published("nano").merge(993_411) == {"average": 0}


def test_merge_coefficients_of_one_two_and_twenty():
    assert merge_coefficients(1) == [1.0]
    for count in (2, 20):
        c = merge_coefficients(count)
        assert math.fsum(c) == pytest.approx(1, abs=1e-12) and c[0] == pytest.approx(math.sqrt(1 / count))


@pytest.mark.parametrize("name", NAMES)
def test_recipe_and_preset_agree_and_the_spread_follows_its_rule(name):
    r, config = published(name), preset(name)
    assert r.init_std == config.std == pytest.approx(0.9 / math.sqrt(config.width), rel=0.01)
    assert bool(r.mtp_depths) == bool(config.mtp)
    assert r.min_lr == pytest.approx(r.lr / 100) and r.long[0].lr == r.min_lr
    assert r.border <= r.tokens and r.decay <= r.tokens - r.warmup


@pytest.mark.parametrize("name", NAMES)
def test_a_published_model_has_its_published_formats_and_one_running_text(name):
    layers = len(preset(name).layers)
    found = published(name).settings(1000, layers)
    assert published(name).layers == layers
    assert found["precision"] == PRECISION.get(name, PrecisionTable()) and found["reset"] is False
    assert found["precision"].tail(layers) == {"nano": 8, "super": 14, "ultra": 16}[name]
    assert found["precision"].lowered(0, layers) == (name != "nano")


@pytest.mark.parametrize("name, tails", [("super", {1: 1, 6: 1, 8: 2, 44: 7, 88: 14}), ("ultra", {1: 1, 8: 2, 54: 8})])
def test_at_another_depth_the_same_share_of_the_last_layers_stays_in_bf16_rounded_up(name, tails):
    assert {layers: published(name).table(layers).tail(layers) for layers in tails} == tails


def test_every_number_has_a_source_and_doubt_is_marked():
    fields = {field.name for field in dataclasses.fields(PUBLISHED["nano"])} | {"steps"}
    for recipe in PUBLISHED.values():
        assert all(recipe.source_of(name) for name in fields)
        assert not set(recipe.sources) - fields
        assert all("[?]" in recipe.source_of(name) for name in ("eps", "clip", "reset"))
    assert "[?]" in published("nano").source_of("shape") and "[?]" not in published("super").source_of("shape")


def test_the_long_context_phase_keeps_its_share_of_tokens_and_the_ratio_of_lengths():
    for name, (model, stage) in LATER.items():
        found = published(model).long_settings(stage, steps=10_000, length=512, rate=3e-5)
        optim = found["optim"]
        assert {schedule(optim, found["steps"])(step) for step in range(found["steps"])} == {3e-5}, name
        assert found["steps"] == round(published(model).long[stage].tokens / published(model).tokens * 10_000)
    assert published("ultra").long_settings(0, steps=10_000, length=512, rate=1.0)["lengths"] == (
        "0.92*65536",
        "0.08*256",
    )


def test_an_unknown_recipe_names_the_known_ones():
    with pytest.raises(ValueError, match="did you mean 'super'"):
        published("supr")
