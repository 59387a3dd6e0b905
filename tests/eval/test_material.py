import dataclasses
import math

import hypothesis.strategies as st
import pytest
from hypothesis import given

from nautilus.eval.charts import Line
from nautilus.eval.material import family, last_loss, series, smooth, thin

values = st.lists(st.floats(-100, 100), min_size=1, max_size=300)


def line_of(found):
    return Line("loss", list(range(len(found))), list(found))


@given(found=values)
def test_smoothing_keeps_the_length_the_range_and_the_original(found):
    line = smooth(line_of(found))
    assert line.faint == found and len(line.values) == len(found)
    assert min(found) - 1e-9 <= min(line.values) and max(line.values) <= max(found) + 1e-9


@given(slope=st.floats(-5, 5), length=st.integers(2, 400))
def test_smoothing_does_not_delay_a_straight_line(slope, length):
    found = [slope * i for i in range(length)]
    reach = math.ceil(length / 80)
    assert smooth(line_of(found)).values[: length - reach] == pytest.approx(found[: length - reach], abs=1e-6)


def test_the_end_of_a_smoothed_line_is_a_mean_of_what_came_before():
    line = smooth(line_of([0.0] * 158 + [3.0, 9.0]))
    assert line.values[-1] == pytest.approx(12 / 3), "two points back and the last itself"


@given(found=values, points=st.integers(2, 60))
def test_a_thinned_line_is_short_and_keeps_its_ends_and_its_mean(found, points):
    line = thin(line_of(found)._replace(faint=[-value for value in found]), points)
    assert len(line.steps) == len(line.values) == len(line.faint) <= max(points, 3)
    assert (line.values[0], line.values[-1]) == (found[0], found[-1])
    assert line.faint == pytest.approx([-value for value in line.values])
    assert all(early < late for early, late in zip(line.steps, line.steps[1:], strict=False))
    assert min(found) - 1e-9 <= min(line.values) and max(line.values) <= max(found) + 1e-9


def test_a_line_of_few_points_is_not_thinned():
    assert thin(line_of([3.0, 1.0, 2.0])) == line_of([3.0, 1.0, 2.0])


def test_a_series_leaves_out_steps_without_a_number():
    rows = [
        {"step": 0, "loss": 2.0},
        {"step": 1, "loss": None},
        {"step": 2},
        {"step": 3, "loss": math.inf},
        {"loss": 1.0},
    ]
    assert series(rows, "loss") == Line("loss", [0], [2.0])
    assert series(rows, "lr") is None and series([], "loss") is None


def test_a_family_holds_its_members_in_the_order_of_the_file():
    rows = [{"step": 0, "vio.10": 3.0, "vio.2": 1.0, "violence": 7.0}, {"step": 5, "vio.2": 2.0, "vio.mtp.1": None}]
    assert family(rows, "vio.") == [Line("10", [0], [3.0]), Line("2", [0, 5], [1.0, 2.0])]


def test_time_is_that_of_the_steps_alone(report):
    rows = [{"step": i, "tokens": 100 * (i + 1), "tokens_per_s": rate} for i, rate in enumerate([50.0, 100.0, 25.0])]
    measured = dataclasses.replace(report, rows=rows)
    assert (measured.tokens, measured.seconds, measured.memory_gb) == (300, 2 + 1 + 4, 0.0)
    empty = dataclasses.replace(report, rows=())
    assert (empty.tokens, empty.seconds, empty.memory_gb) == (0, 0.0, 0.0)


def test_the_last_loss_is_the_mean_of_the_last_fifth():
    steps = [*range(100)]
    assert last_loss(Line("", steps, [float(step >= 80) for step in steps])) == 1.0
    assert last_loss(Line("", steps, [float(step >= 90) for step in steps])) == 0.5
    assert last_loss(Line("", [0], [3.0])) == 3.0
