import inspect

import pytest
import torch

from nautilus.ops import attention, balance, conv, experts, loss, ssd
from nautilus.ops.shapes import checked


def join(x_BTD, weight_DV, bias_V=None, *, scale=1.0, names=()):
    """Multiply."""
    return x_BTD @ weight_DV * scale


@pytest.fixture
def watched(monkeypatch):
    monkeypatch.setenv("NAUTILUS_CHECK", "1")
    return checked(join)


X, W = torch.zeros(2, 3, 4), torch.zeros(4, 5)


def test_nothing_is_wrapped_outside_tests(monkeypatch):
    monkeypatch.delenv("NAUTILUS_CHECK", raising=False)
    assert checked(join) is join
    monkeypatch.setenv("NAUTILUS_CHECK", "")
    assert checked(join) is join


def test_shapes_that_agree_pass_and_the_result_is_the_functions_own(watched):
    assert watched(X, W, torch.zeros(5), scale=2.0, names=("B",)).shape == (2, 3, 5)
    assert watched(X, weight_DV=W, bias_V=None).shape == (2, 3, 5)
    assert watched.__name__ == "join" and watched.__doc__ == "Multiply."


def test_a_tuple_counts_as_matrices_of_one_shape(watched):
    three = (torch.zeros(3, 4), torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"join: D is 4 in x_BTD but 6 in weight_DV"):
        watched(three, torch.zeros(6, 5))
    with pytest.raises(ValueError, match=r"join: x_BTD has shape \(2, 4\)"):
        watched((torch.zeros(4), torch.zeros(4)), W)


def test_a_letter_with_two_sizes_is_an_error_that_names_both_tensors(watched):
    with pytest.raises(ValueError, match="join: D is 4 in x_BTD but 6 in weight_DV"):
        watched(X, torch.zeros(6, 5))
    with pytest.raises(ValueError, match="join: V is 5 in weight_DV but 4 in bias_V"):
        watched(X, W, bias_V=torch.zeros(4))


def test_too_few_or_too_many_axes_are_an_error_with_the_shape(watched):
    with pytest.raises(ValueError, match=r"join: x_BTD has shape \(3, 4\)"):
        watched(X[0], W)


def test_one_letter_twice_in_a_name_means_a_square(monkeypatch):
    monkeypatch.setenv("NAUTILUS_CHECK", "1")
    square = checked(lambda gap_QQ: gap_QQ)
    square(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="Q is 3 in gap_QQ but 4 in gap_QQ"):
        square(torch.zeros(3, 4))


def test_the_missing_argument_error_is_pythons_own(watched):
    with pytest.raises(TypeError, match="weight_DV"):
        watched(X)


def zeros(*shape):
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (ssd.ssd, (zeros(2, 3, 4, 5), zeros(2, 3, 4), zeros(4), zeros(2, 3, 1, 6), zeros(2, 3, 1, 7))),
        (conv.causal_conv, (zeros(2, 3, 4), zeros(5, 4), zeros(4))),
        (attention.attention, (zeros(2, 3, 4, 5), zeros(2, 3, 2, 5), zeros(2, 4, 2, 5))),
        (experts.route, (zeros(3, 8), zeros(7), 2)),
        (experts.experts, (zeros(3, 4), zeros(3, 2), zeros(3, 1), zeros(8, 5, 4), zeros(8, 4, 5))),
        (loss.token_logprob, (zeros(3, 4), zeros(9, 4), zeros(2))),
        (loss.weighted_nll, (zeros(3, 4), zeros(9, 5), zeros(3), zeros(3))),
        (balance.sequence_balance_loss, (zeros(2, 3, 4), 1, zeros(2, 4))),
    ],
)
def test_the_ops_argument_names_state_their_shapes(function, arguments, monkeypatch):
    monkeypatch.setenv("NAUTILUS_CHECK", "1")
    with pytest.raises(ValueError, match=" but "):
        checked(inspect.unwrap(function))(*arguments)
