import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nautilus.ops import loss
from nautilus.ops.encode import encode
from nautilus.ops.loss import (
    Words,
    token_logprob,
    token_logprob_chunked,
    token_logprob_reference,
    weighted_nll,
    weighted_nll_chunked,
    weighted_nll_reference,
)

WIDTH, VOCAB = 5, 12


@pytest.fixture(autouse=True, scope="module")
def few_rows_at_a_time():
    """Chunks of 16 rows and blocks of 32, so that small tests cross the borders of both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "ELEMENTS", 1)
        patch.setattr(loss, "HELD", 32 * VOCAB)
        yield


def inputs(rows, *, weights=False, seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)
    tensors = {
        "hidden_RD": normal(rows, WIDTH),
        "weight_VD": normal(VOCAB, WIDTH),
        "target_R": torch.randint(0, VOCAB, (rows,), generator=draw),
    }
    return tensors | ({"weight_R": torch.rand(rows, generator=draw, dtype=torch.float64)} if weights else {})


@pytest.mark.parametrize("function", [token_logprob_reference, token_logprob_chunked])
def test_log_probs_are_those_of_the_softmax(function):
    t = inputs(7)
    odds = (t["hidden_RD"] @ t["weight_VD"].T).exp()
    want = torch.stack([(odds[r, v] / odds[r].sum()).log() for r, v in enumerate(t["target_R"].tolist())])
    torch.testing.assert_close(function(**t), want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 32, 33, 50])
def test_log_probs_in_chunks_equal_those_at_once_with_every_gradient(rows, same):
    same(token_logprob_chunked, token_logprob_reference, inputs(rows))


ZEROS = {"none": [], "some": [0, 4, 40], "a whole chunk": range(16, 32), "all": range(70)}


@pytest.mark.parametrize("zeros", ZEROS.values(), ids=ZEROS)
@pytest.mark.parametrize("rows", [0, 1, 16, 33, 70])
def test_the_weighted_loss_in_chunks_equals_that_at_once_with_every_gradient(rows, zeros, same):
    t = inputs(rows, weights=True)
    weight_R = t.pop("weight_R")
    weight_R[[r for r in zeros if r < rows]] = 0
    weight_R[1:2] *= -1  # advantages may be negative
    same(partial(weighted_nll_chunked, weight_R=weight_R), partial(weighted_nll_reference, weight_R=weight_R), t)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(weights=st.lists(st.floats(-3, 3) | st.just(0.0), max_size=40), seed=st.integers(0, 99))
def test_the_weighted_loss_is_minus_the_weighted_sum_of_log_probs(weights, seed, pushed):
    t, weight_R = inputs(len(weights), seed=seed), torch.tensor(weights, dtype=torch.float64)
    (got,), grads = pushed(partial(weighted_nll, weight_R=weight_R), t)
    (want,), want_grads = pushed(lambda **z: -(weight_R * token_logprob(**z)).sum(), t)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, want_grads[name], rtol=1e-10, atol=1e-10)


def test_nan_in_a_row_of_weight_zero_is_harmless(pushed):
    t = inputs(8)
    weight_R = torch.tensor([1.0, 0.0, 2.0, 0.5, 0.0, 0.0, 0.0, 1.0]).double()
    (want,), want_grads = pushed(partial(weighted_nll, weight_R=weight_R), t)
    t["hidden_RD"][weight_R == 0] = float("nan")
    t["target_R"][weight_R == 0] = -100  # no word at all
    (got,), grads = pushed(partial(weighted_nll, weight_R=weight_R), t)
    assert torch.equal(got, want) and torch.equal(grads["weight_VD"], want_grads["weight_VD"])
    assert torch.equal(grads["hidden_RD"], want_grads["hidden_RD"])
    assert not grads["hidden_RD"][weight_R == 0].any()


def test_no_weight_at_all_costs_nothing_and_has_gradients_of_zero(pushed):
    for rows in (0, 5):
        (got,), grads = pushed(partial(weighted_nll, weight_R=torch.zeros(rows, dtype=torch.float64)), inputs(rows))
        assert got == 0 and not any(g.any() for g in grads.values())


class Sizes(TorchDispatchMode):
    """The largest tensor that any operation made, and how many logits were computed."""

    largest, logits = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.largest = max([self.largest, *(t.numel() for t in made)])
        self.logits += sum(t.numel() for t in made if func is torch.ops.aten.mm.default and t.shape[-1] == VOCAB)
        return result


@pytest.mark.parametrize("function", [token_logprob, weighted_nll])
def test_the_logits_of_a_whole_batch_never_exist(function):
    t = inputs(120, weights=function is weighted_nll)
    leaves = [t[name].requires_grad_() for name in ("hidden_RD", "weight_VD")]
    with Sizes() as sizes:
        torch.autograd.grad(function(**t).sum(), leaves)
    assert sizes.largest <= 120 * WIDTH, "nothing larger than the hidden states themselves"
    assert sizes.largest < 120 * VOCAB


def test_rows_of_weight_zero_have_no_logits_and_the_others_one_each():
    t = inputs(12, weights=True)
    t["weight_R"][[0, 1, 2, 5, 11]] = 0
    leaves = [t[name].requires_grad_() for name in ("hidden_RD", "weight_VD")]
    with Sizes() as sizes:
        torch.autograd.grad(weighted_nll(**t), leaves)
    assert sizes.logits == 7 * VOCAB


@pytest.mark.parametrize("function", [token_logprob_chunked, weighted_nll_chunked, token_logprob_reference])
def test_gradients_are_those_of_finite_differences(function):
    t = inputs(5, weights=function is weighted_nll_chunked)
    leaves = {name: t[name].requires_grad_() for name in ("hidden_RD", "weight_VD")}
    call = lambda *v: function(**t | dict(zip(leaves, v, strict=True)))
    assert torch.autograd.gradcheck(call, list(leaves.values()))


def test_a_weight_that_asks_for_a_gradient_gets_one_or_an_error(pushed):
    t = inputs(5, weights=True)
    _, want = pushed(weighted_nll_reference, t)
    try:
        _, got = pushed(weighted_nll, t)
    except ValueError:
        return
    torch.testing.assert_close(got["weight_R"], want["weight_R"])


def test_a_second_derivative_is_right_or_refused():
    t, found = inputs(5, weights=True), []
    hidden_RD = t.pop("hidden_RD").requires_grad_()
    for function in (weighted_nll, weighted_nll_reference):
        (slope,) = torch.autograd.grad(function(hidden_RD, **t).square(), hidden_RD, create_graph=True)
        try:
            found.append(torch.autograd.grad(slope.square().sum(), hidden_RD)[0])
        except RuntimeError:
            return
    torch.testing.assert_close(*found)


def test_the_probabilities_of_all_words_add_up_to_one():
    t = inputs(1)
    every = torch.arange(VOCAB)
    total = token_logprob(t["hidden_RD"].expand(VOCAB, -1), t["weight_VD"], every).exp().sum()
    assert total.item() == pytest.approx(1, abs=1e-13)


@pytest.mark.parametrize("size", [1e3, 1e30])
def test_logits_however_large_give_finite_results(size):
    t = {n: v.float() if v.is_floating_point() else v for n, v in inputs(4).items()}
    t["hidden_RD"] *= size
    leaves = [t[name].requires_grad_() for name in ("hidden_RD", "weight_VD")]
    out = token_logprob(**t)
    assert (out <= 0).all() and all(g.isfinite().all() for g in (out, *torch.autograd.grad(out.sum(), leaves)))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_loses_no_more_than_its_format(dtype, weighted):
    """A logit is rounded once, by at most its size times u; a log-prob is off by at most twice the largest such error.

    The gradient of a logit is p or p - 1, off by p times that error; it, the weight and their product are rounded too.
    """
    t, unit = inputs(40, dtype=dtype), 2.0**-24 * (WIDTH + 1) if dtype == torch.float32 else 2.0**-8
    exact = {n: v.double() if v.is_floating_point() else v for n, v in t.items()}
    error = unit * (exact["hidden_RD"] @ exact["weight_VD"].T).abs().max()
    weight_R = torch.linspace(-1.1, 2.3, 40)
    leaves, exact_leaves = ([z[n].requires_grad_() for n in ("hidden_RD", "weight_VD")] for z in (t, exact))
    got, want = token_logprob(**t), token_logprob_reference(**exact)
    if weighted:
        got, want = weighted_nll(**t, weight_R=weight_R), -(want * weight_R).sum()
    assert got.dtype == torch.float32
    terms = weight_R.abs().sum() if weighted else 1
    assert (got - want).abs().max() <= terms * 2 * error + 2.0**-20 * want.abs().max()
    for g, w in zip(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), exact_leaves), strict=True):
        assert g.dtype == dtype
        assert (g - w).norm() <= (2 * error + 4 * unit) * w.norm()


def test_float32_masters_get_float32_gradients_from_bf16_hidden(pushed):
    t = inputs(8)
    t |= {"hidden_RD": t["hidden_RD"].bfloat16(), "weight_VD": t["weight_VD"].float()}
    for function in (token_logprob, partial(weighted_nll, weight_R=torch.ones(8))):
        (out,), grads = pushed(function, t)
        assert out.dtype == torch.float32
        assert grads["weight_VD"].dtype == torch.float32 and grads["hidden_RD"].dtype == torch.bfloat16


def test_the_matrix_may_be_in_few_bits():
    t = inputs(40, weights=True, dtype=torch.float32)
    packed = encode(t["weight_VD"], "fp8_e4m3")
    weights = t.pop("weight_R").float()
    numbers = t | {"weight_VD": packed.decode()}
    assert torch.equal(token_logprob(**t | {"weight_VD": packed}), token_logprob(**numbers))
    found = weighted_nll(**t | {"weight_VD": packed}, weight_R=weights)
    assert torch.equal(found, weighted_nll(**numbers, weight_R=weights))


# ----- a vocabulary in pieces ----------------------------------------------------------------------------------------


class Sum(torch.autograd.Function):
    """What all holders give, added up; gradients pass as they are."""

    @staticmethod
    def forward(ctx, own, meet):
        return torch.stack(meet(own)).sum(0)

    @staticmethod
    def backward(ctx, push):
        return push, None


def held_by_three(function, t, *, grad=True):
    """The value that each of three holders of some words gets, and the gradients that they give together."""
    barrier, given = threading.Barrier(3, timeout=60), [None] * 3
    pieces = t["weight_VD"].chunk(3)

    def work(holder):
        def meet(tensor):
            given[holder] = tensor.detach().clone()
            barrier.wait()
            found = list(given)
            barrier.wait()
            return found

        largest = lambda tensor: torch.stack(meet(tensor)).amax(0)
        words = Words(holder * len(pieces[0]), largest, lambda tensor: Sum.apply(tensor, meet))
        hidden, weight = (x.detach().clone().requires_grad_(grad) for x in (t["hidden_RD"], pieces[holder]))
        loss = function(hidden, weight, t["target_R"], t["weight_R"], words)
        return loss.detach(), torch.autograd.grad(loss * 3, [hidden, weight]) if grad else None

    with ThreadPoolExecutor(3) as pool:
        losses, grads = zip(*pool.map(work, range(3)), strict=True)
    return losses, grads


@pytest.mark.parametrize("shift", [0.0, 800.0], ids=["near", "far"])
@pytest.mark.parametrize("function", [weighted_nll_chunked, weighted_nll_reference])
def test_holders_of_some_words_each_get_the_whole_loss_and_their_part_of_its_gradient(function, shift):
    t = inputs(40, weights=True)
    t["weight_R"][[3, 17, 39]] = 0
    t["hidden_RD"][5:9] *= 1 + shift  # where one word has all probability, or next to none
    whole = {name: t[name].clone().requires_grad_() for name in ("hidden_RD", "weight_VD")}
    want = weighted_nll_reference(**(t | whole))
    want_hidden, want_weight = torch.autograd.grad(want * 3, list(whole.values()))
    losses, grads = held_by_three(function, t)
    for got in losses:
        torch.testing.assert_close(got, want.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sum(hidden for hidden, _ in grads), want_hidden, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.cat([weight for _, weight in grads]), want_weight, rtol=1e-10, atol=1e-10)


def test_holders_of_some_words_get_the_whole_loss_without_gradients_too():
    t = inputs(40, weights=True)
    with torch.no_grad():
        losses, _ = held_by_three(weighted_nll_chunked, t, grad=False)
    torch.testing.assert_close(losses[0], weighted_nll_reference(**t), rtol=1e-12, atol=1e-12)
    assert losses[0] == losses[1] == losses[2]
