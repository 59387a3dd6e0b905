import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nautilus.config import KINDS, Attention, Experts, Linear, Mamba, Mlp, Nothing, Rotary, describe, lay, pattern_of

RECORDS = (
    Mamba(heads=8),
    Attention(heads=4, groups=2),
    Experts(experts=8, active=2, hidden=64),
    Mlp(hidden=32),
    Linear(),
    Nothing(),
)


@given(pattern=st.text(alphabet="".join(KINDS), max_size=30))
def test_a_pattern_is_shorthand_for_a_tuple_of_layers(pattern):
    layers = lay(pattern, *RECORDS)
    assert pattern_of(layers) == pattern
    assert all(layer in RECORDS for layer in layers)


def test_layers_without_sizes_need_no_record():
    assert lay("L_L") == (Linear(), Nothing(), Linear())


def test_every_kind_has_a_letter_of_its_own():
    assert {kind.letter for kind in map(type, RECORDS)} == set(KINDS) == set("M*E-L_")


@pytest.mark.parametrize(
    "pattern,message",
    [
        ("MXE", "'X' at position 1; known letters are M"),
        ("M-", "asks for '-' .Mlp. but no such layer's sizes are known"),
    ],
)
def test_a_wrong_pattern_says_what_is_wrong_with_it(pattern, message):
    with pytest.raises(ValueError, match=message):
        lay(pattern, *RECORDS[:3])


@pytest.mark.parametrize(
    "build,message",
    [
        (lambda: Mamba(heads=0), "mamba.heads=0 must be at least 1"),
        (lambda: Mamba(heads=6, groups=4), "mamba.groups=4 must divide mamba.heads=6"),
        (lambda: Mamba(heads=8, taps=0), "mamba.taps=0"),
        (lambda: Attention(heads=6, groups=4), "attention.groups=4 must divide attention.heads=6"),
        (lambda: Attention(heads=4, groups=2, window=-1), "attention.window=-1"),
        (lambda: Attention(heads=4, groups=2, head_width=15, rotary=Rotary()), "head_width=15 must be even"),
        (lambda: Experts(experts=4, active=5, hidden=8), r"experts.active=5 must lie in 1..experts.experts=4"),
        (lambda: Experts(experts=4, active=0, hidden=8), "experts.active=0"),
        (lambda: Experts(experts=4, active=1, hidden=8, latent=-1), "must be 0 .absent. or positive"),
        (lambda: Experts(experts=4, active=1, hidden=8, score="tanh"), "experts.score='tanh'"),
        (lambda: Experts(experts=4, active=1, hidden=8, expert_groups=3), "expert_groups=3 must divide"),
        (lambda: Experts(experts=4, active=1, hidden=8, active_groups=2), "active_groups=2 must lie in"),
        (lambda: Experts(experts=8, active=5, hidden=8, expert_groups=2), "exceeds the 4 experts of 1 active groups"),
        (lambda: Mlp(hidden=0), "mlp.hidden=0"),
        (lambda: Rotary(theta=1.0), "rotary.theta=1.0"),
        (lambda: Rotary(factor=0.5), "rotary.factor=0.5"),
        (lambda: Rotary(low=4.0), "rotary.high=4.0 must be above rotary.low=4.0"),
    ],
)
def test_contradictions_are_refused_with_the_values_that_clash(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_an_odd_head_is_fine_without_rotary_positions():
    assert Attention(heads=4, groups=2, head_width=15).head_width == 15


def test_sizes_that_follow_from_others_are_properties():
    mamba = Mamba(heads=6, head_width=10, state=16, groups=2)
    assert (mamba.inner, mamba.conv_width) == (60, 60 + 2 * 2 * 16)


def test_records_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RECORDS[0].heads = 3  # type: ignore[misc]


def test_a_description_leaves_defaults_out():
    assert describe(Experts(experts=8, active=2, hidden=64)) == "E(experts=8, active=2, hidden=64)"
    assert describe(Mamba(heads=8, taps=3)) == "M(heads=8, taps=3)"
    assert describe(Linear()) == "L()"
