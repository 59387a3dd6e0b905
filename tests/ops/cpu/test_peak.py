import math

import pytest
import torch

from nautilus.ops.cpu.peak import peak_native, peak_refuses
from nautilus.ops.peak import peak_torch

SIZES = [(1, 1), (3, 7), (2, 16), (4, 33), (2, 1023), (2, 1025), (3, 5000), (1, 131072)]


def logits(size, seed=0, spread=3.0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread


@pytest.mark.parametrize("spread", [0.01, 3.0, 60.0])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_native_equals_the_formula(level, size, spread):
    """Exponentials and sums of at most 1,024 / 4 of them in float32, then float64."""
    logits_BV = logits(size, spread=spread)
    best_B, total_B = peak_native(logits_BV)
    want_B, wanted_B = peak_torch(logits_BV)
    assert torch.equal(best_B, want_B)
    assert total_B.dtype == torch.float64 and (total_B - wanted_B).abs().max() < 2.0**-24 * 32


def test_of_equal_logits_the_first_is_the_best(level):
    logits_BV = torch.zeros(4, 3000)
    logits_BV[1, [2999, 1500, 40]] = 2.0
    logits_BV[2, 2999] = 1e-30
    logits_BV[3] = -5.0
    best_B, total_B = peak_native(logits_BV)
    assert best_B.tolist() == [0, 40, 2999, 0]
    assert total_B[0].item() == pytest.approx(math.log(3000), abs=1e-6)


def test_a_row_has_the_same_bits_in_any_company(level):
    logits_BV = logits((9, 3001))
    best_B, total_B = peak_native(logits_BV)
    for row in range(9):
        best, total = peak_native(logits_BV[row : row + 1])
        assert best.item() == best_B[row] and total.item() == total_B[row].item()
    assert all(map(torch.equal, peak_native(logits_BV.T.contiguous().T), (best_B, total_B)))


@pytest.mark.parametrize("place", [0, 500, 1024, 1040])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("both", [peak_native, peak_torch])
def test_what_is_no_number_is_told_and_harms_no_other_row(level, both, value, place):
    logits_BV = logits((3, 1041))
    clean = peak_native(logits_BV)
    logits_BV[1, place] = value
    best_B, total_B = both(logits_BV)
    assert math.isnan(total_B[1]) and best_B[0] == clean[0][0] and best_B[2] == clean[0][2]
    assert torch.allclose(total_B[[0, 2]], clean[1][[0, 2]], rtol=0, atol=2e-6)


@pytest.mark.parametrize("both", [peak_native, peak_torch])
def test_tokens_that_may_not_come_do_not_count(level, both):
    logits_BV = torch.full((2, 1100), -math.inf)
    logits_BV[0, [3, 1099]] = torch.tensor([0.5, 1.5])
    best_B, total_B = both(logits_BV)
    assert best_B[0] == 1099 and math.isnan(total_B[1])
    assert total_B[0].item() == pytest.approx(math.log(math.exp(0.5) + math.exp(1.5)), abs=1e-6)


def test_what_native_refuses(built):
    assert peak_refuses(logits((2, 3))) is None
    assert "float64" in peak_refuses(logits((2, 3)).double())
    assert "no logits" in peak_refuses(logits((2, 0)))
