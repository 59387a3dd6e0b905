import pytest
import torch

from nautilus.ops.cpu.route import route_native, route_refuses
from nautilus.ops.experts import route_torch

# tokens, experts, active, groups, groups that may be chosen from
SIZES = [(1, 3, 1, 1, 1), (5, 16, 4, 1, 1), (9, 17, 17, 1, 1), (20, 24, 3, 6, 2), (7, 8, 2, 8, 3), (3, 128, 6, 1, 1)]


def call(function, size, t, score, normalise=True):
    named = {"scale": 2.5, "score": score, "normalise": normalise}
    return function(**t, active=size[2], **named, expert_groups=size[3], active_groups=size[4])


def inputs(size, biased=True, seed=0):
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(size[0], size[1], generator=draw)
    return {"logits_RE": logits, "bias_E": torch.randn(size[1], generator=draw) / 4 if biased else None}


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_native_chooses_and_weighs_as_torch_does_with_gradients(level, size, score):
    for biased in (False, True):
        for normalise in (False, True):
            t, grads = inputs(size, biased), []
            for function in (route_native, route_torch):
                logits = t["logits_RE"].clone().requires_grad_()
                index, weight, scores = call(function, size, t | {"logits_RE": logits}, score, normalise)
                push = torch.arange(weight.numel()).view_as(weight) * 0.1
                ((weight * push).sum() + scores.square().sum()).backward()
                grads.append((index, weight, scores, logits.grad))
            got, want = grads
            assert torch.equal(got[0], want[0])
            for g, w in zip(got[1:], want[1:], strict=True):
                torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6)
            assert all(
                torch.equal(a, b) for a, b in zip(call(route_native, size, t, score, normalise), got[:3], strict=True)
            )


def test_a_token_is_routed_alike_in_any_company(level):
    size = (50, 24, 3, 6, 2)
    t = inputs(size)
    want = call(route_native, size, t, "sigmoid")
    some = call(route_native, size, t | {"logits_RE": t["logits_RE"][33:36]}, "sigmoid")
    assert all(torch.equal(a, b[33:36]) for a, b in zip(some, want, strict=True))


def test_equals_and_broken_scores_still_give_different_experts_in_order(level):
    size = (3, 16, 5, 1, 1)
    logits = torch.zeros(3, 16)
    logits[1] = float("nan")
    logits[2, ::2] = float("nan")
    index, weight, _ = call(route_native, size, {"logits_RE": logits, "bias_E": None}, "sigmoid")
    assert index[0].tolist() == [0, 1, 2, 3, 4] and index[1].tolist() == [0, 1, 2, 3, 4]
    assert index[2].tolist() == [1, 3, 5, 7, 9] and torch.equal(weight[0], torch.full((5,), 0.5))


def test_what_native_refuses(built):
    named = {"scale": 1.0, "score": "sigmoid", "normalise": True, "expert_groups": 1, "active_groups": 1}
    logits = torch.zeros(2, 8)
    assert route_refuses(logits, None, 2, **named) is None
    assert "float64" in route_refuses(logits.double(), None, 2, **named)
    assert "9 of 8 experts" in route_refuses(logits, None, 9, **named)
    assert "3 of 8 experts" in route_refuses(logits, None, 3, **named | {"expert_groups": 4})
