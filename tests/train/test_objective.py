import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nautilus.data.batch import Batch
from nautilus.train.loop import fit
from nautilus.train.objective import Objective, depth_weights, next_token, pretrain
from nautilus.train.optim import OptimConfig, adamw


def log_probs(model, hidden):
    return model.head(hidden).log_softmax(-1)


def sum_by_hand(model, hidden, batch, weights, ahead):
    """-sum of w log p over all targets, one by one."""
    logp, total = log_probs(model, hidden), 0.0
    for b in range(batch.tokens.shape[0]):
        for t in range(ahead, batch.tokens.shape[1]):
            total = total - weights[b, t] * logp[b, t - ahead, batch.tokens[b, t]]
    return total


def test_next_token_is_the_weighted_cross_entropy(small_model, random_rows):
    model, batch = small_model(dtype=torch.float64), random_rows(2, 9, documents=True, dtype=torch.float64)
    (total, count), metrics = next_token(model, batch)[0]["next_token"], next_token(model, batch)[1]
    hidden, _ = model.hidden(batch.tokens, document_BT=batch.document)
    want = sum_by_hand(model, hidden, batch, batch.weights["next_token"], ahead=1)
    torch.testing.assert_close(total, want, rtol=1e-12, atol=0)
    assert count == batch.weights["next_token"].sum() and metrics == {}


def allowed(document, b, t, depth):
    """Target t may be predicted from t-1-depth: both exist, and no document begins in between."""
    first = t - 1 - depth
    if first < 0:
        return False
    return document is None or len({document[b][i] for i in range(first, t + 1)}) == 1


@given(st.lists(st.lists(st.integers(0, 2), min_size=6, max_size=6), min_size=1, max_size=3), st.integers(1, 7))
def test_each_depth_keeps_the_targets_whose_whole_past_lies_in_their_document(document, depth):
    shape = (len(document), 6)
    weights = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    for numbers in (None, document):
        held = None if numbers is None else torch.tensor(numbers)
        got = depth_weights(Batch(torch.zeros(shape, dtype=torch.int64), {"next_token": weights}, document=held), depth)
        for b in range(shape[0]):
            for t in range(6):
                assert got[b, t] == (weights[b, t] if allowed(numbers, b, t, depth) else 0)


@pytest.mark.parametrize("documents", [False, True])
def test_the_pretraining_loss_is_main_plus_mean_of_depths_plus_balance(small_model, random_rows, documents):
    model = small_model(dtype=torch.float64).train()
    batch = random_rows(3, 14, documents=documents, dtype=torch.float64)
    objective = pretrain(mtp_depths=2, mtp_weight=0.3, aux_weight=0.02)
    weighed = objective.weigh(batch)
    hidden, _ = model.hidden(batch.tokens, document_BT=batch.document)
    deeper = model.mtp_hidden(hidden, batch.tokens, 2, batch.document)
    parts = [(hidden, "next_token", 1), (deeper[0], "mtp_1", 2), (deeper[1], "mtp_2", 3)]
    means = [
        sum_by_hand(model, h, batch, weighed.weights[name], ahead) / weighed.weights[name].sum()
        for h, name, ahead in parts
    ]
    seen = []
    silent = adamw(model, OptimConfig(lr=0.0, min_lr=0.0, weight_decay=0.0))
    fit(model, [[batch]], objective, silent, steps=1, balance=0.0, log=seen.append)
    line = seen[0]
    assert [line["next_token"], line["mtp_1"], line["mtp_2"]] == pytest.approx([x.item() for x in means], rel=1e-12)
    want = means[0] + 0.3 / 2 * (means[1] + means[2]) + 0.02 * line["balance"]
    assert line["loss"] == pytest.approx(want.item(), rel=1e-12)
    assert line["balance"] >= 1


def test_raw_sums_are_reported_whatever_the_coefficients(small_model, random_rows):
    model, batch = small_model().train(), random_rows()
    light, _ = pretrain(mtp_depths=1, mtp_weight=0.1, aux_weight=1e-4)(model, batch)
    heavy, _ = pretrain(mtp_depths=1, mtp_weight=9.0, aux_weight=5.0)(model, batch)
    assert {name: total.item() for name, (total, _) in light.items()} == {
        name: total.item() for name, (total, _) in heavy.items()
    }


def test_the_count_of_every_term_is_the_sum_of_its_weights(small_model, random_rows):
    objective = pretrain(mtp_depths=3, aux_weight=0.1)
    batch = random_rows(4, 11, documents=True)
    terms, _ = objective(small_model().train(), batch)
    weights = objective.weigh(batch).weights
    assert terms.keys() == {"next_token", "mtp_1", "mtp_2", "mtp_3", "balance"}
    for name, (_, count) in terms.items():
        assert count.item() == pytest.approx(weights[name].sum().item())


def test_rows_of_padding_are_not_counted_as_rows(random_rows):
    batch = random_rows(3, 8, documents=True)
    batch.document[1] = 0
    assert pretrain(aux_weight=0.1).weigh(batch).weights["balance"].sum() == 2


def test_rows_shorter_than_a_depth_reaches_have_no_such_targets(small_model, random_rows):
    objective, batch = pretrain(mtp_depths=3), random_rows(2, 3)
    terms, _ = objective(small_model(), batch)
    assert terms["mtp_1"][1] > 0
    assert terms["mtp_2"][1] == terms["mtp_3"][1] == 0
    assert terms["mtp_3"][0] == 0


def test_a_stack_without_experts_simply_has_no_balance_term(small_model, random_rows):
    model = small_model(pattern_layers=4)
    config = dataclasses.replace(model.config, layers=model.config.layers[:1], mtp=())
    bare = type(model)(config).initialise(0).train()
    terms, _ = pretrain(aux_weight=0.1)(bare, random_rows())
    assert terms.keys() == {"next_token"}


def test_balance_losses_of_an_earlier_forward_are_forgotten(small_model, random_rows):
    model, batch = small_model().train(), random_rows()
    pretrain(mtp_depths=1, aux_weight=1.0)(model, batch)
    alone, _ = pretrain(aux_weight=1.0)(model, batch)
    fresh, _ = pretrain(aux_weight=1.0)(small_model().train(), batch)
    assert alone["balance"][0].item() == fresh["balance"][0].item()


def test_negative_settings_are_refused():
    with pytest.raises(ValueError, match="mtp_weight=-0.3"):
        pretrain(mtp_depths=2, mtp_weight=-0.3)


def test_the_head_that_three_losses_share_sums_its_gradient_in_float32(small_model, random_rows):
    """With bf16 activations and float32 masters a bf16 sum of the three would be off by 2^-9 or so."""
    batch = random_rows(4, 24)

    def head_gradient(term_weights):
        model = small_model()
        model.compute = torch.bfloat16
        objective = pretrain(mtp_depths=2)
        terms, _ = objective(model, batch)
        sum(terms[name][0] * w for name, w in term_weights.items()).backward()
        assert model.lm_head.weight.grad.dtype == torch.float32
        return model.lm_head.weight.grad

    weights = {"next_token": 1.0, "mtp_1": 0.05, "mtp_2": 0.05}
    together = head_gradient(weights)
    apart = sum(head_gradient({name: w}) for name, w in weights.items())
    assert (together - apart).norm() / apart.norm() < 1e-6


def test_a_record_and_the_bare_function_are_the_same_objective(small_model, random_rows):
    def trained(objective):
        model = small_model()
        fit(model, [[random_rows()]] * 2, objective, adamw(model, OptimConfig()), steps=2)
        return model.head_weight

    assert torch.equal(trained(next_token), trained(Objective(next_token)))
