"""What each technique of NVFP4 is for, and that the switches of the table reach the products."""

import dataclasses

import pytest
import torch

from nautilus.eval.techniques import SIZES, bias, copies_apart, demonstrations, gradient_error
from nautilus.ops.low_precision import How, low_linear


def test_rotation_lowers_the_error_where_activations_have_outliers(level):
    """And changes little where they have none."""
    found = {size: (gradient_error(size, rotate=True), gradient_error(size, rotate=False)) for size in SIZES}
    for size in (32.0, 64.0):
        with_it, without = found[size]
        assert with_it < 0.7 * without, found
    assert found[1.0][0] == pytest.approx(found[1.0][1], rel=0.1) and found[1.0][0] < 0.02


def test_stochastic_rounding_is_unbiased_and_rounding_to_the_nearest_is_not(level):
    largest, mean = bias(stochastic=True)
    assert largest < 1 / 256 and mean < 1 / 512
    largest, mean = bias(stochastic=False)
    assert largest == pytest.approx(0.5, abs=1e-6) and mean > 0.2


def test_square_blocks_are_the_same_turned_over_and_rows_are_not(level):
    assert copies_apart(square=True) == (0.0, 0.0)
    share, apart = copies_apart(square=False)
    assert share > 0.1 and apart > 0.02


def test_the_tables_have_every_technique():
    found = demonstrations()
    assert [each.title for each in found] == ["Rotation", "Stochastic rounding", "Square blocks"]
    assert all(len(row) == len(each.head) for each in found for row in each.rows)


@pytest.mark.parametrize("switch", ["rotate", "stochastic", "square"])
def test_a_switch_changes_what_it_should_and_nothing_else(level, switch):
    """Forward, gradient of x, gradient of W: which of them a switch may touch."""
    touched = {"rotate": (False, False, True), "stochastic": (False, True, True), "square": (True, True, False)}[switch]
    draw = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(64, 48, generator=draw).bfloat16() for _ in range(2))
    weight = torch.randn(48, 48, generator=draw)
    how = How(format="nvfp4", seed=3)

    def three(how):
        mine, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = low_linear(mine, w, how)
        y.backward(dy)
        return y.detach(), mine.grad, w.grad

    pairs = zip(three(how), three(dataclasses.replace(how, **{switch: False})), strict=True)
    assert tuple(not torch.equal(a, b) for a, b in pairs) == touched
