"""Advantages within a group, and rewards before them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nautilus.posttrain.credit import Effort, form_fault, leave_one_out, tag_fault
from nautilus.tasks import Call, Reply

REWARDS = st.lists(st.integers(0, 10).map(lambda tenths: tenths / 10), min_size=3, max_size=16)


def test_one_success_among_failures():
    spread = math.sqrt(1 / 3)
    assert leave_one_out([1, 0, 0, 0]) == pytest.approx([1] + [-(1 / 3) / (spread + 1e-6)] * 3)
    assert leave_one_out([1, 0, 0, 0])[1] == pytest.approx(-0.577, abs=1e-3)


@given(REWARDS)
def test_by_the_published_formula(rewards):
    count = len(rewards)
    for number, found in enumerate(leave_one_out(rewards)):
        others = [reward for at, reward in enumerate(rewards) if at != number]
        mean = sum(others) / (count - 1)
        spread = (sum(reward**2 for reward in others) / (count - 1) - mean**2) * (count - 1) / (count - 2)
        if spread > 1e-9:
            assert found == pytest.approx((rewards[number] - mean) / (math.sqrt(spread) + 1e-6), rel=1e-6)
        else:
            assert found == pytest.approx(rewards[number] - mean)


def test_rounding_makes_no_spread():
    """The sum of 84 times 0.9, through 84, is not 0.9 in floats."""
    for same, count in ((0.2, 3), (0.9, 84), (1.1, 15)):
        assert leave_one_out([1, *[same] * count], most=20)[0] == 1 - same
        assert leave_one_out([same] * count) == [0] * count


@given(REWARDS, st.integers(1, 8), st.integers(-8, 8))
def test_units_and_offsets_of_rewards_do_not_matter_and_all_alike_say_nothing(rewards, scale, offset):
    base = leave_one_out(rewards)
    moved = leave_one_out([offset + reward for reward in rewards])
    assert moved == pytest.approx(base, abs=1e-6)
    assert leave_one_out([rewards[0]] * 4) == [0] * 4
    assert all(abs(one) <= 0.5 for one in leave_one_out([scale * reward for reward in rewards], most=0.5))


def test_two_answers_are_told_apart_and_one_is_not():
    assert leave_one_out([1, 0]) == [1, -1]
    for rewards in ([], [1]):
        with pytest.raises(ValueError, match=f"a group of {len(rewards)} answers"):
            leave_one_out(rewards)
    with pytest.raises(ValueError, match="within 0"):
        leave_one_out([1, 0], most=0)


def test_less_effort_gains_with_right_answers_only_and_loses_with_any():
    effort = Effort(weight=0.5, upper=100, penalty=2)
    assert effort.reward(1, 0) == 1.5 and effort.reward(0, 0) == 0
    assert effort.reward(1, 100) == 1 and effort.reward(0, 100) == 0
    assert effort.reward(1, 200) == 0 and effort.reward(0, 200) == -1
    assert Effort(weight=9, upper=100).reward(1, 0) == 2  # at most doubled
    assert Effort().reward(1, 0) == pytest.approx(1.1)
    for wrong in ({"weight": -1}, {"upper": 0}, {"penalty": -1}):
        with pytest.raises(ValueError, match="were asked for"):
            Effort(**wrong)


@pytest.mark.parametrize(
    "reply, words",
    [
        (Reply(content="4"), ""), (Reply(content="4", thinking="2+2"), ""), (Reply(), "empty"),
        (Reply(calls=(Call(name="a", arguments={}),)), ""), (Reply(content="4 ", thinking=" 4"), "word for word"),
        (Reply(content="</think>4"), "opens or closes"), (Reply(content="4", fault="no such call"), "no such call"),
        (Reply(content="4", thinking="<think>2"), "opens or closes"), (Reply(content=" \n", thinking="2"), "empty"),
    ],
)  # fmt: skip
def test_broken_forms_earn_nothing(reply, words):
    assert words in form_fault(reply, thinks=True) and bool(words) == bool(form_fault(reply, thinks=True))


@pytest.mark.parametrize(
    "reply, malformed",
    [
        (Reply(content="<think>4"), True), (Reply(content="4</think>"), True), (Reply(thinking="<think>2"), True),
        (Reply(content="4", thinking="2"), False), (Reply(), False), (Reply(fault="no such call"), False),
    ],
)  # fmt: skip
def test_thinking_that_is_malformed_is_told_from_other_faults(reply, malformed):
    assert bool(tag_fault(reply)) == malformed


def test_thinking_that_was_switched_off():
    assert form_fault(Reply(content="4", thinking="2+2"), thinks=False) and not form_fault(
        Reply(content="4"), thinks=False
    )
