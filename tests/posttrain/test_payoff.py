"""A predictor learns what there is to learn, says how sure it is, and answers come faster with it."""

import dataclasses
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nautilus.data.tokenizer import SMALLEST, train_tokenizer
from nautilus.posttrain.judged import calibration, judge, outcomes, qualities, timed
from nautilus.posttrain.payoff import (
    KNOTS,
    PLANS,
    Material,
    calibrated,
    fit,
    isotonic,
    pooled,
    rounds,
    stopping,
    straight,
    train_paper,
)
from nautilus.posttrain.policies import Prices, by_paper, by_rate, by_score
from nautilus.posttrain.rows import MANY, Rows, joined, rows_of, split
from nautilus.posttrain.traces import Trace
from nautilus.runtime import UserError
from nautilus.serve.draft.costs import Costs
from nautilus.serve.draft.features import NAMES, Spelling
from nautilus.serve.draft.predictor import Header, on_line

torch.set_num_threads(1)
SPELLING = Spelling(train_tokenizer([], vocab=SMALLEST))
GRID = (1, 2, 3, 4, 6, 8)


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Small networks and few updates."""
    with pytest.MonkeyPatch.context() as patch:
        for name, plan in PLANS.items():
            patch.setitem(PLANS, name, dataclasses.replace(plan, epochs=12, hidden=24, lr=3e-3))
        yield


def header(mode="survival"):
    return Header(mode=mode, target="m", tokenizer="t", grid=GRID)


def rows_by(rate_of, count, seed, longest=8):
    """Drafts whose tokens come true with a probability that the first feature tells; their lengths vary."""
    draw = np.random.default_rng(seed)
    features = draw.normal(size=(count, len(NAMES))).astype(np.float32)
    length = draw.integers(1, longest + 1, count)
    wrong = draw.random((count, longest)) >= rate_of(features[:, 0])[:, None]
    true = np.minimum(np.where(wrong.any(1), wrong.argmax(1), longest), length)
    return Rows(
        features=features, true=true, length=length, number=np.arange(count) % 7, cycle=draw.random(count) < 0.5,
        weight=np.ones(count, np.float32), positions=2 * count, cycles=count,
    )  # fmt: skip


def steep(first):
    return np.where(first > 0, 0.9, 0.4)


@pytest.fixture(scope="module")
def trained():
    held = rows_by(steep, 3000, 1)
    return calibrated(fit(rows_by(steep, 6000, 0), header(), seed=0, held=held), held)


def survivals(predictor, side, length=8):
    draw, found = np.random.default_rng(5), []
    for _ in range(60):
        features = draw.normal(size=len(NAMES)).astype(np.float32)
        features[0] = side
        found.append(predictor.expected(features, length) if length < 8 else predictor.survival(features, length))
    return np.mean(found, 0)


def test_survival_is_the_one_that_there_is(trained):
    """Although most drafts are too short to show it."""
    for side, rate in ((1.0, 0.9), (-1.0, 0.4)):
        # Between two lengths of the grid it lies on a line, above the curve.
        assert survivals(trained, side) == pytest.approx(rate ** np.arange(1, 9), abs=0.1)


def test_what_is_predicted_stands_for_what_comes_true(trained):
    rows = rows_by(steep, 3000, 2)
    found = calibration(trained, rows)
    assert [size for size, *_ in found] == [*GRID]
    for size, said, true, error in found:
        assert abs(said - true) <= error < 0.06, size
    off = dataclasses.replace(rows, true=np.minimum(rows.true, 1))
    assert calibration(trained, off)[1][3] > 0.3


def test_the_paper_mode_expects_the_mean():
    one = fit(rows_by(steep, 4000, 0, longest=4), header("paper"), seed=0)
    for side, rate in ((1.0, 0.9), (-1.0, 0.4)):
        mean = np.mean([sum(rate**at for at in range(1, size + 1)) for size in range(1, 5)])
        assert survivals(one, side, 4) == pytest.approx(mean, abs=0.35)


def test_training_ends_where_held_rows_get_no_better(monkeypatch):
    few, held = rows_by(steep, 60, 0), rows_by(steep, 2000, 1)
    monkeypatch.setitem(PLANS, "survival", dataclasses.replace(PLANS["survival"], epochs=80))
    kept, whole = (fit(few, header(), seed=0, held=rows) for rows in (held, None))
    true, length, weight = (torch.from_numpy(value) for value in (held.true, held.length, held.weight))
    said = [torch.from_numpy(one.outputs(held.features)) for one in (kept, whole)]
    losses = [float(stopping(some, true, length, weight, GRID)) for some in said]
    assert losses[0] < 0.7 < 2 * losses[0] < losses[1], losses


def test_training_is_the_same_again_and_of_another_seed_another():
    rows = rows_by(steep, 400, 0)
    once, again, other = (fit(rows, header(), seed=seed) for seed in (0, 0, 1))
    same = [np.array_equal(once.tensors[name], again.tensors[name]) for name in once.tensors]
    assert all(same) and not np.array_equal(once.tensors["weight_1"], other.tensors["weight_1"])
    assert np.array_equal(once.tensors["knots"], straight(len(GRID)))


def test_only_lengths_that_a_draft_reaches_count():
    said = torch.zeros(1, len(GRID), requires_grad=True)
    for true, length, stops in (
        (0, 8, [1]),
        (3, 8, [0, 0, 0, 1]),
        (3, 3, [0, 0, 0]),
        (5, 5, [0, 0, 0, 0]),
        (8, 8, [0] * 6),
    ):
        loss = stopping(said, torch.tensor([true]), torch.tensor([length]), torch.tensor([2.0]), GRID)
        (slope,) = torch.autograd.grad(loss, said)
        want = [(0.5 - stop) / len(stops) for stop in stops]
        assert slope[0].tolist() == pytest.approx(want + [0.0] * (len(GRID) - len(stops)))


# ----- calibration ----------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.1, 5)), min_size=1, max_size=9))
def test_pooling_gives_the_nearest_rising_values(pairs):
    """By the formula max over beginnings, min over ends of the weighted means."""
    values, weights = np.array(pairs).T
    mean = lambda a, b: np.average(values[a : b + 1], weights=weights[a : b + 1])
    count = range(len(values))
    want = [max(min(mean(a, b) for b in count if b >= at) for a in count if a <= at) for at in count]
    assert pooled(values.tolist(), weights.tolist()) == pytest.approx(want)


def height(value, knots):
    return on_line(value, knots[:, 0].tolist(), knots[:, 1].tolist())


def test_knots_rise_and_say_what_came_true():
    draw = np.random.default_rng(0)
    said = draw.random(4000)
    true = draw.random(4000) < said**2  # too sure of itself
    knots = isotonic(said, true, np.ones(4000))
    assert knots.shape == (KNOTS, 2) and (np.diff(knots, axis=0) >= 0).all()
    for value in (0.1, 0.5, 0.9):
        assert height(value, knots) == pytest.approx(value**2, abs=0.07)
    heavy = isotonic(said, true, np.where(true, 3.0, 1.0))
    assert height(0.5, heavy) == pytest.approx(0.75 / 1.5, abs=0.1)


def test_few_rows_say_little_and_none_that_nothing_comes_true():
    one = isotonic(np.array([0.5]), np.array([True]), np.ones(1))
    assert height(0.5, one) == pytest.approx((1 + 4 * 0.5) / 5)
    none = isotonic(np.zeros(0), np.zeros(0, bool), np.zeros(0))
    assert none.shape == (KNOTS, 2) and height(0.9, none) == 0


# ----- rows -----------------------------------------------------------------------------------------------------------


def test_of_many_rows_some_without_a_true_token_stand_for_all():
    rows = rows_by(steep, MANY, 0)
    thin = rows.thinned(3)
    assert len(thin) < 0.8 * len(rows) and rows_by(steep, 99, 0).thinned(3).weight.tolist() == [1.0] * 99
    assert (thin.true > 0).sum() == (rows.true > 0).sum() and (thin.weight[thin.true > 0] == 1).all()
    assert thin.weight[thin.true == 0].sum() == pytest.approx((rows.true == 0).sum(), rel=0.03)


def test_rows_are_put_together_and_taken_apart():
    one, other = rows_by(steep, 30, 0), rows_by(steep, 20, 1)
    both = joined([one, other])
    assert len(both) == 50 and both.positions == 100 and both.cycles == 50
    assert set(both.among({2, 3}).number) == {2, 3} and len(both.among({2, 3})) == 14


def test_answers_to_one_prompt_stay_together():
    traces = [Trace(prompt=[1], answer=[2], limit=9, group=str(number // 2)) for number in range(40)]
    parts = split(traces, 0)
    assert (len(parts.train), len(parts.calibrate), len(parts.test)) == (28, 6, 6)
    assert parts.train | parts.calibrate | parts.test == {*range(40)}
    for part in (parts.train, parts.calibrate, parts.test):
        assert {number ^ 1 for number in part} == part
    assert split(traces, 0) == parts != split(traces, 1)
    assert [len(part) for part in vars(split(traces[:6], 0)).values()] == [2, 2, 2]
    with pytest.raises(UserError, match="to 2 different prompts"):
        split(traces[:4], 0)


# ----- the whole ------------------------------------------------------------------------------------------------------


def traces_of(count, seed):
    """Documents to be copied, told by their first token; and noise in which three tokens say nothing of the next."""
    draw, found = random.Random(seed), []
    for number in range(count):
        text = [draw.randrange(80, 130) for _ in range(40)]
        noise = [draw.randrange(30, 33) for _ in range(40)]
        prompt, answer = (text, text) if number % 2 else (noise, [draw.randrange(30, 33) for _ in range(40)])
        found.append(Trace(prompt=prompt, answer=answer, limit=200, tenant=str(number), group=str(number)))
    return found


@pytest.fixture(scope="module")
def material():
    costs, traces = Costs(), traces_of(60, 0)
    costs.seconds = {size: 1.0 + 0.4 * (size - 1) for size in range(1, 18)}
    return Material(
        traces=traces, parts=split(traces, 0), spelling=SPELLING, prices=Prices.of(costs), most=16, target="m",
        tokenizer="t",
    )  # fmt: skip


@pytest.fixture(scope="module")
def predictors(material):
    return [*rounds(material)][-1], train_paper(material)


def test_answers_come_fastest_by_rate_and_no_faster_than_can_be(material, predictors):
    found = {one.name: one for one in outcomes(material, *predictors)}
    rates = {name: one.rate for name, one in found.items()}
    assert rates["plain"] == pytest.approx(1.0)
    assert sorted(rates, key=lambda name: rates[name])[-2:] == ["oracle", "all-knowing"], rates
    assert rates["by rate"] > 1.15 > 1.05 > rates["all copied drafts"], rates
    assert rates["by rate"] > rates["paper"] and rates["by rate"] > 0.85 * rates["oracle"], rates
    assert len({one.tokens.total() for one in found.values()}) == 1
    tested = material.parts.test
    assert found["plain"].tokens.total() == sum(len(material.traces[number].answer) - 1 for number in tested)


def test_looking_costs_what_it_takes_here(material, predictors):
    later = timed(material, by_rate(predictors[0], material.prices))
    assert 0 < later.prices.look < 0.1 and later.prices.passes == material.prices.passes
    dear = dataclasses.replace(material, prices=dataclasses.replace(material.prices, look=1.0))
    free, found = ({one.name: one.rate for one in outcomes(some, *predictors)} for some in (material, dear))
    assert found["plain"] == free["plain"] and found["by rate"] < 0.9 * free["by rate"]
    assert found["oracle"] < free["oracle"]


def test_quality_is_counted_by_place_and_by_cycle(material, predictors):
    survival, paper = predictors
    for predictor, policy in ((survival, by_rate(survival, material.prices)), (paper, by_paper(paper))):
        place, cycle = qualities(material, predictor, policy)
        assert place.counted == "place" and cycle.states < place.states and cycle.rows <= place.rows
        for one in (place, cycle):
            assert one.precision > 0.6 and one.recall > 0.8 and one.error < 4
            assert 0 < one.high < 1 and bool(one.calibration) == (predictor is survival)


def test_quality_is_what_it_says(trained):
    rows = rows_by(steep, 500, 3)
    found = judge(trained, rows, "cycle")
    assert (found.states, found.rows) == (500, int(rows.cycle.sum()))
    some = rows.of(rows.cycle)
    said = np.array([trained.expected(*pair) for pair in zip(some.features, some.length.tolist(), strict=True)])
    assert found.error == pytest.approx(abs(said - some.true).mean())
    assert found.high == (some.true >= 6).sum() / 500 and found.chosen == (said >= 6).sum() / 500
    both = ((some.true >= 6) & (said >= 6)).sum()
    assert found.precision == both / max(1, (said >= 6).sum()) and found.recall == both / (some.true >= 6).sum()


def test_rows_are_those_of_the_policy(material):
    of = material.parts.test
    cycles = rows_of(material.traces, by_score(), SPELLING, most=16, of=of)
    every = rows_of(material.traces, by_score(), SPELLING, most=16, of=of, every=True)
    assert cycles.cycle.all() and every.cycle.sum() == len(cycles) < len(every) and every.cycles == cycles.cycles
    assert every.positions == sum(len(material.traces[number].answer) - 1 for number in of)
    assert np.array_equal(every.of(every.cycle).features, cycles.features) and set(cycles.number) <= of


def test_without_a_draft_to_calibrate_on_nothing_is_tried(material):
    parts = material.parts
    empty = dataclasses.replace(parts, train=parts.train | parts.calibrate, calibrate=frozenset())
    alone = dataclasses.replace(material, parts=empty)
    predictor = [*rounds(alone)][-1]
    assert predictor.survival(np.zeros(len(NAMES), np.float32), 8) == [0.0] * 8


def test_where_nothing_repeats_there_is_nothing_to_learn(material):
    draw = random.Random(0)
    apart = [Trace(prompt=draw.sample(range(200), 9), answer=draw.sample(range(200), 9), limit=20) for _ in range(3)]
    with pytest.raises(UserError, match="nothing is repeated"):
        next(rounds(dataclasses.replace(material, traces=apart, parts=split(apart, 0))))
