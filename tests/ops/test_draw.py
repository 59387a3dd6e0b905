"""Draws from whole rows: the native path and the other one, the random numbers, the borders."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nautilus.ops.cpu.draw import draw_native, draw_refuses
from nautilus.ops.cpu.library import native
from nautilus.ops.draw import draw, draw_torch, place, uniform, weights

needs_native = pytest.mark.skipif(native().functions is None, reason="the native library is not here")


def given_rows(count, vocab, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(count, vocab, generator=generator)
    logits[:, torch.randperm(vocab, generator=generator)[: vocab // 3]] = -math.inf
    heats = [0.05 + 2 * at / count for at in range(count)]
    seeds = [at * 0x9E3779B97F4A7C15 % 2**64 for at in range(count)]
    return [*logits.unbind()], logits.argmax(1).tolist(), heats, seeds, [7919 * at for at in range(count)]


@needs_native
@pytest.mark.parametrize("vocab", [1, 3, 16, 17, 1023, 1025, 5000, 600_001])
def test_the_native_draw_is_that_of_the_formula(vocab):
    given = given_rows(300 if vocab < 10_000 else 4, vocab)
    assert draw_refuses(*given) is None
    assert draw_native(*given) == draw_torch(*given)


@needs_native
@settings(deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 2))
def test_the_native_random_numbers_are_those_of_numpy(seed, position):
    """Among 512 equal weights the token tells 9 bits of the number."""
    (token,) = draw_native([torch.zeros(512)], [0], [1.0], [seed], [position])
    assert token == int(uniform(seed, position) * 512)
    assert (
        uniform(seed, position) == (np.random.Philox(key=seed, counter=position).random_raw() >> np.uint64(12)) / 2**52
    )


def test_what_is_drawn_has_the_probabilities_of_the_logits():
    """A chi-square of 4 degrees of freedom, at its 0.1 % point."""
    logits = torch.tensor([1.0, 0.0, -math.inf, 2.0, -1.0, 0.5])
    drawn = draw([logits] * 20_000, [3] * 20_000, [1.5] * 20_000, [11] * 20_000, range(20_000))
    expected = 20_000 * weights(logits, 1.5)
    counts = torch.bincount(torch.tensor(drawn), minlength=6)
    assert counts[2] == 0
    assert float(((counts - expected)[expected > 0] ** 2 / expected[expected > 0]).sum()) < 18.5


@pytest.mark.parametrize("u, token", [(0.0, 1), (1 - 2.0**-52, 3)])
def test_the_smallest_and_the_largest_random_number_give_what_is_possible(u, token):
    assert place(weights(torch.tensor([-torch.inf, 0.3, 0.2, 0.1, -torch.inf]), 1.0), u) == token


@needs_native
def test_a_row_is_drawn_the_same_beside_others():
    given = given_rows(9, 3000, seed=4)
    alone = [draw_native(*([part[at]] for part in given))[0] for at in range(9)]
    assert draw_native(*given) == alone


def test_rows_that_the_native_path_cannot_take_are_drawn_all_the_same():
    logits = torch.randn(4, 50, dtype=torch.float64)
    rows = [*logits.unbind()]
    given = rows, logits.argmax(1).tolist(), [1.0, 0.7, 1e-300, 1.0], [1, 2, 3, 4], [5, 6, 7, 8]
    assert "float64" in (draw_refuses(*given) or "")
    assert "temperature" in (draw_refuses([row.float() for row in rows], *given[1:]) or "")
    assert draw(*given)[2] == int(logits[2].argmax())
