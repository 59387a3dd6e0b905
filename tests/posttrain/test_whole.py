"""Distillation by all words of the vocabulary, held against the formula."""

import dataclasses
import math

import pytest
import torch

from nautilus.config import Attention, Config, Experts, Mamba, lay
from nautilus.data.batch import Batch
from nautilus.model.language import Language
from nautilus.posttrain.teachers import Teachers
from nautilus.train.objective import Objective
from nautilus.train.policy import Correction, Mtp, Surrogate, drawn_logprob, policy

LAYERS = lay(
    "M*E", Mamba(heads=2, head_width=8, state=8, groups=1), Attention(heads=2, groups=1, head_width=8),
    Experts(experts=4, active=2, hidden=16, shared=16, scale=1.0),
)  # fmt: skip
FREE = Surrogate(correction=Correction(kind="none", apart=math.inf))


def tiny(seed: int) -> Language:
    model = Language(Config(vocab=11, width=16, layers=LAYERS)).initialise(seed)
    model.lm_head.weight.data *= 20
    return model


def batch() -> Batch:
    rng = torch.Generator().manual_seed(0)
    mask_BT = (torch.rand(4, 9, generator=rng) < 0.6).float()
    mask_BT[:, 0] = 0
    zeros_BT = torch.zeros(4, 9)
    tokens_BT = torch.randint(11, (4, 9), generator=rng)
    return Batch(
        tokens_BT, {"policy": mask_BT}, sampled_logprob=zeros_BT, teacher="one",
    )  # fmt: skip


def logits(model: Language, given: Batch) -> torch.Tensor:
    return model(given.tokens[:, :-1])[0].log_softmax(-1)


def test_the_loss_and_its_gradient_are_those_of_the_reverse_divergence():
    student, teacher, given = tiny(1), tiny(2).requires_grad_(False), batch()
    teachers = Teachers(routes={"count": "one"}, models={"one": teacher})
    terms, watched = teachers.distill_whole(FREE, Mtp())(student, given)
    log_q, log_p, mask_BT = logits(student, given), logits(teacher, given), given.weights["policy"][:, 1:]
    wanted = ((log_q.exp() * (log_q - log_p)).sum(-1) * mask_BT).sum()
    torch.testing.assert_close(terms["policy"][0], wanted, rtol=1e-4, atol=1e-5)
    assert terms["policy"][1] == given.weights["policy"].sum()
    apart = (drawn_logprob(teacher, given, "policy") - drawn_logprob(student, given, "policy")).sum()
    torch.testing.assert_close(watched["teacher_gap"][0], apart.detach())
    weights = [*student.parameters()]
    mine, own = (torch.autograd.grad(loss, weights, allow_unused=True) for loss in (terms["policy"][0], wanted))
    for a, b in zip(mine, own, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_reward_pushes_beside_the_teacher_as_in_reinforcement():
    student, given = tiny(1), batch()
    given = dataclasses.replace(given, advantage=torch.randn(4, 9, generator=torch.Generator().manual_seed(1)))
    teachers = Teachers(routes={"count": "one"}, models={"one": tiny(2).requires_grad_(False)})
    weights = [*student.parameters()]

    def gradient(objective: Objective) -> list[torch.Tensor | None]:
        return [*torch.autograd.grad(objective(student, given)[0]["policy"][0], weights, allow_unused=True)]

    alone, pushed = gradient(policy(FREE)), gradient(teachers.distill_whole(FREE, Mtp(), reward=0.25))
    taught = gradient(teachers.distill_whole(FREE, Mtp()))
    for both, one, other in zip(pushed, taught, alone, strict=True):
        assert (both is None) == (one is None)
        if both is not None and one is not None:
            torch.testing.assert_close(both, one + 0.25 * other if other is not None else one, rtol=1e-3, atol=1e-4)
    assert any(one is not None and one.abs().max() > 0.01 for one in alone)


def test_a_step_is_the_same_however_it_is_cut():
    """With two teachers, of unequal parts: both terms are sums, divided by the tokens of the whole step."""
    student, models = tiny(1), {name: tiny(seed).requires_grad_(False) for name, seed in (("one", 2), ("two", 3))}
    given = dataclasses.replace(batch(), advantage=torch.randn(4, 9, generator=torch.Generator().manual_seed(1)))
    objective = Teachers(routes={}, models=models).distill_whole(FREE, Mtp(), reward=0.25)

    def gradient(*parts: tuple[str, list[int]]) -> torch.Tensor:
        cut = [dataclasses.replace(given.take(rows), teacher=name) for name, rows in parts]
        pairs = [objective(student, part)[0]["policy"] for part in cut]
        loss = sum(total for total, _ in pairs) / sum(count for _, count in pairs)
        return torch.autograd.grad(loss, [student.lm_head.weight])[0]

    want = gradient(("one", [0, 1, 2]), ("two", [3]))
    torch.testing.assert_close(gradient(("two", [3]), ("one", [2]), ("one", [0, 1])), want, rtol=1e-4, atol=1e-6)
    assert want.abs().max() > 1e-3


def test_drawn_tokens_push_in_the_mean_as_all_words_do():
    """The sampled estimate at one place, over all words in proportion to their probability, has the same gradient."""
    student, teacher = tiny(3), tiny(4).requires_grad_(False)
    start = torch.tensor([[5, 0]])
    given = Batch(
        start, {"policy": torch.tensor([[0.0, 1.0]])}, sampled_logprob=torch.zeros(1, 2), teacher="one",
    )  # fmt: skip
    teachers = Teachers(routes={"count": "one"}, models={"one": teacher})
    (loss, _), head = teachers.distill_whole(FREE, Mtp())(student, given)[0]["policy"], student.lm_head.weight
    (whole,) = torch.autograd.grad(loss, [head])
    log_q, log_p = logits(student, given)[0, 0], logits(teacher, given)[0, 0]
    drawn = -(log_q.exp().detach() * (log_p - log_q).detach() * log_q).sum()
    (sampled,) = torch.autograd.grad(drawn, [head])
    torch.testing.assert_close(whole, sampled, rtol=1e-3, atol=1e-5)


def test_answers_of_other_weights_are_weighed_and_left_out():
    student, given = tiny(1), batch()
    lp_BT = drawn_logprob(student, given, "policy").detach()
    far = dataclasses.replace(given, sampled_logprob=lp_BT - 3.0)
    teachers = Teachers(routes={"count": "one"}, models={"one": tiny(2).requires_grad_(False)})
    masked = Surrogate(correction=Correction(kind="mask", least=0.5, most=5.0))
    terms, watched = teachers.distill_whole(masked, Mtp())(student, far)
    assert float(terms["policy"][0].detach()) == 0 and float(watched["left_out"][0]) == float(
        given.weights["policy"].sum()
    )
    one_row = dataclasses.replace(given, sampled_logprob=lp_BT - torch.tensor([[0.5], [0.5], [0.5], [0.8]]))
    _, watched = teachers.distill_whole(masked, Mtp())(student, one_row)
    assert float(watched["left_out"][0]) == float(given.weights["policy"][3].sum()), "exp(0.8) is over `apart`"
    near = dataclasses.replace(given, sampled_logprob=lp_BT - 0.5)
    (mine, _), (free, _) = (teachers.distill_whole(how, Mtp())(student, near)[0]["policy"] for how in (masked, FREE))
    assert float(mine.detach()) == pytest.approx(float(free.detach()) * math.exp(0.5), rel=1e-3)
