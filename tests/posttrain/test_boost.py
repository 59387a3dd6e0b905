"""Blocks learn what the model would say, from chains of their own; more of their drafts are then accepted."""

import dataclasses

import pytest
import torch

from nautilus.config import Attention, Experts, lay
from nautilus.data.batch import Batch
from nautilus.data.mix import Stream
from nautilus.model.language import Language
from nautilus.model.state import place
from nautilus.posttrain.acceptance import accepted, gain
from nautilus.posttrain.boost import boosting, distillation, drawn, most_used, unrolled
from nautilus.posttrain.drafter import Drafter, mtp_drafter
from nautilus.posttrain.own_text import Answer, rows_of
from nautilus.train.loop import fit
from nautilus.train.optim import OptimConfig, adamw
from tests.posttrain.small import config, counter, greedy

torch.set_num_threads(1)
STEPS = 3


def random_model():
    model = Language(config()).initialise(7).requires_grad_(False).eval()
    model.head_weight.data *= 9
    return model


def packed_rows():
    draw = torch.Generator().manual_seed(2)
    sizes = (3, 6), (4, 9), (2, 5), (5, 4)
    samples = [[torch.randint(90, 140, (n,), generator=draw).tolist() for n in pair] for pair in sizes]
    return rows_of([Answer(prompt=tuple(p), tokens=tuple(a)) for p, a in samples], length=22, pad=0)


def divergence_by_hand(model, batch, coefficients, temperature, feed):
    """Chain by chain, document by document, with the block over sequences that are made anew."""
    total, count = 0.0, 0.0
    for row in range(len(batch)):
        for document in batch.document[row].unique().tolist():
            here = (batch.document[row] == document).nonzero()[:, 0]
            tokens, weights = batch.tokens[row, here], batch.weights["next_token"][row, here]
            hidden = model.hidden(tokens[None])[0][0]
            logp = (model.head(hidden) / temperature).log_softmax(-1)
            embeds = model.embed(tokens)
            for index in range(len(tokens)):
                outs, fed, ahead = [], [*hidden[: index + 1]], [*embeds[1 : index + 2]]
                for k in range(1, len(coefficients) + 1):
                    if index + k + 1 >= len(tokens):
                        break
                    if k > 1:
                        fed.append(feed(outs))
                        ahead.append(embeds[index + k])
                    span = place(None, None, 1, len(fed), "cpu")
                    outs.append(model.mtp(torch.stack(fed)[None], torch.stack(ahead)[None], span)[0, -1])
                    weight = coefficients[k - 1] * weights[index + k + 1]
                    logq = (model.head(outs[-1][None]) / temperature).log_softmax(-1)[0]
                    p = logp[index + k].exp()
                    total, count = total + weight * (p * (logp[index + k] - logq)).sum(), count + weight
    return total, count


@pytest.mark.parametrize("coefficients, temperature", [([1.0] * STEPS, 2.0), ([1.0, 0.8, 0.64], 1.0)])
def test_the_loss_is_the_sum_over_all_chains(coefficients, temperature):
    model, batch = random_model(), packed_rows()
    objective = distillation(coefficients, temperature=temperature, seed=None)
    model.mtp.requires_grad_(True)
    weighed = objective.weigh(batch)
    terms, watched = objective.terms(mtp_drafter(model), weighed)
    (total, count), wanted = (
        terms["divergence"],
        divergence_by_hand(model, batch, coefficients, temperature, lambda o: o[-1]),
    )
    torch.testing.assert_close(total, wanted[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(count, wanted[1])
    torch.testing.assert_close(weighed.weights["divergence"].sum(), count)
    torch.testing.assert_close(sum(part for part, _ in watched.values()), total.detach())
    assert objective.coefficients["divergence"] == temperature**2 and [*watched] == ["step_1", "step_2", "step_3"]
    mine = torch.autograd.grad(total, [*model.mtp.parameters()], allow_unused=True)
    theirs = torch.autograd.grad(wanted[0], [*model.mtp.parameters()], allow_unused=True)
    for own, other in zip(mine, theirs, strict=True):
        if other is not None:
            torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-5)


def test_steps_are_fed_with_any_output_before_them_and_always_the_same():
    index = torch.arange(50.0).expand(40, 50)
    outs = [torch.stack([torch.full((40, 50), float(step)), index + step], dim=-1) for step in range(1, 5)]
    fed = drawn(3)(outs)
    shares = [(fed[:, :46, 0] == step).float().mean().item() for step in range(1, 5)]
    assert all(0.2 < share < 0.3 for share in shares)
    assert torch.equal(fed[:, :46, 1], index[:, :46] + 4), "of the token that the last step is about"
    assert torch.equal(fed, drawn(3)(outs)) and not torch.equal(fed, drawn(4)(outs))
    batch, drafter = packed_rows(), mtp_drafter(random_model())
    one, same, other = (
        boosting(steps=STEPS, seed=seed).terms(drafter, batch)[0]["divergence"][0] for seed in (1, 1, 2)
    )
    assert one == same != other


def test_a_draft_head_learns_less_from_what_is_further_ahead():
    batch = packed_rows()
    weighed, one = unrolled(2).weigh(batch), unrolled(1).weigh(batch)
    plain = weighed.weights["divergence"] - one.weights["divergence"]
    assert {round(float(value), 6) for value in plain.unique()} == {0.0, 0.8}


def test_the_words_that_answers_use_most():
    tokens = torch.tensor([[9, 9, 9, 4, 4, 7, 2, 2, 2]])
    batch = Batch(tokens, {"next_token": torch.tensor([[0.0, 0, 0, 1, 1, 1, 1, 1, 1]])})
    assert most_used(batch, 2, 12).tolist() == [2, 4] and most_used(batch, 4, 12).tolist() == [0, 2, 4, 7]


def learnt(model, drafter, objective, steps, seed=11):
    own = rows_of(greedy(model, count=64, seed=seed), length=48, pad=0)
    drafter.requires_grad_(True)
    stream = Stream({"own": own}, rows=8, micro=8, seed=0)
    optimizer = adamw(drafter, OptimConfig(lr=3e-3, weight_decay=0.0))
    metrics = fit(drafter, stream, objective, optimizer, steps=steps, balance=0)
    drafter.requires_grad_(False).eval()
    return metrics


def test_boosting_has_more_drafts_accepted_and_changes_nothing_but_the_block():
    model, answers = counter(), greedy(counter(), count=12)
    drafter, trunk = mtp_drafter(model), {n: t.clone() for n, t in model.state_dict().items() if "mtp." not in n}
    before = accepted(drafter, answers, 5)
    metrics = learnt(model, drafter, boosting(steps=5), steps=25)
    after = accepted(drafter, answers, 5)
    mean, (low, _) = gain(before, after)
    assert mean > 0.5 and low > 0 and metrics["loss"] > 0 and metrics["step_5"] > 0
    changed = [
        name for name, tensor in model.state_dict().items() if name in trunk and not torch.equal(tensor, trunk[name])
    ]
    assert changed == []
    assert greedy(model, count=12) == answers


def test_a_drafter_shows_fit_no_weight_of_its_model():
    model = counter()
    drafter = mtp_drafter(model)
    assert {*drafter.state_dict()} == {f"block.{name}" for name in model.mtp.state_dict()}
    drafter.train()
    assert not model.backbone.training and model.mtp.training


def test_the_block_of_a_model_in_few_bits_is_not_needed_to_be_in_few_bits(in_few_bits):
    attention, experts = Attention(heads=2, groups=1, head_width=16), Experts(experts=4, active=2, hidden=32)
    small = dataclasses.replace(config(), layers=lay("*E", attention, experts))
    model = Language(small).initialise(7)
    block = {name: weight.clone() for name, weight in model.mtp.state_dict().items()}
    model = in_few_bits(model, "mxfp8")
    model.mtp = Language(small).mtp
    model.mtp.load_state_dict(block)
    drafter = Drafter(model, model.mtp)
    drafter.requires_grad_(True)
    total, _ = boosting(steps=2).terms(drafter, packed_rows())[0]["divergence"]
    total.backward()
    assert all(weight.grad is not None for name, weight in drafter.named_parameters() if "q_proj" in name)
