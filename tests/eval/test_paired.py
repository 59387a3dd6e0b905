"""Intervals against numbers worked by hand and printed tables."""

import math

import pytest

from nautilus.eval.paired import paired, t_quantile, t_within

# Student's distribution, two-sided 95 % and 99 %, as every table has it.
TABLE = {
    1: (12.706, 63.657),
    2: (4.303, 9.925),
    3: (3.182, 5.841),
    4: (2.776, 4.604),
    9: (2.262, 3.250),
    30: (2.042, 2.750),
}


@pytest.mark.parametrize("freedom", TABLE)
def test_quantiles_are_those_of_the_table(freedom):
    assert [round(t_quantile(level, freedom), 3) for level in (0.95, 0.99)] == list(TABLE[freedom])


def test_one_degree_of_freedom_is_cauchy_and_two_have_a_closed_form():
    for t in (0.1, 1.0, 7.0):
        assert t_within(t, 1) == pytest.approx(2 / math.pi * math.atan(t))
        assert t_within(t, 2) == pytest.approx(t / math.sqrt(2 + t * t))


def test_an_interval_worked_by_hand():
    """Differences 1, 2, 3: mean 2, standard deviation 1, half width 4.302653 / sqrt 3 = 2.484."""
    found = paired({0: 11, 1: 22, 2: 33}, {0: 10, 1: 20, 2: 30})
    assert found.by_seed == {0: 1, 1: 2, 2: 3} and found.mean == 2 and found.control == 20
    assert found.half == pytest.approx(2.484138, abs=1e-6) and found.percent == pytest.approx(10)
    assert found.verdict == "inside noise"


def test_what_pairs_share_is_no_difference():
    """Seeds that move both by 10 leave an interval of nothing; unpaired, the same numbers would say nothing."""
    found = paired({0: 1.5, 1: 11.5, 2: 21.5}, {0: 1, 1: 11, 2: 21})
    assert found.half == pytest.approx(0) and found.verdict == "higher"
    assert paired({0: 1, 1: 2}, {0: 2, 1: 3.001}).verdict == "lower"


def test_only_seeds_of_both_count_and_one_has_no_interval():
    found = paired({0: 3.0, 5: 9.0}, {0: 2.0, 1: 7.0})
    assert found.by_seed == {0: 1.0} and math.isnan(found.half) and found.verdict == "no interval"
    assert paired({}, {0: 1.0}).verdict == "no pair" and math.isnan(paired({}, {0: 1.0}).mean)


def test_an_interval_of_nothing_is_refused():
    for level, freedom in ((0.95, 0), (1.0, 3), (0.0, 3)):
        with pytest.raises(ValueError, match="t-interval"):
            t_quantile(level, freedom)
