import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from nautilus.ops.balance import sequence_balance_loss


def scores(batch, time, count, seed=0):
    return torch.rand(batch, time, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(score_BTE, active, valid_BT):
    """One sequence after another, its valid tokens only: E * sum_i f_i P_i."""
    total, sequences = 0.0, 0
    for score_TE, valid_T in zip(score_BTE, valid_BT, strict=True):
        rows = [row.tolist() for row, valid in zip(score_TE, valid_T, strict=True) if valid]
        if not rows:
            continue
        sequences += 1
        count = len(rows[0])
        f, p = [0.0] * count, [0.0] * count
        for row in rows:
            for e in sorted(range(count), key=lambda e: row[e])[-active:]:
                f[e] += 1 / (len(rows) * active)
            for e in range(count):
                p[e] += row[e] / sum(row) / len(rows)
        total += count * sum(a * b for a, b in zip(f, p, strict=True))
    return total, sequences


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3), time=st.integers(1, 6), count=st.integers(1, 5), data=st.data(), seed=st.integers(0, 99)
)
def test_the_loss_is_its_definition_over_the_valid_tokens(batch, time, count, data, seed):
    active = data.draw(st.integers(1, count))
    score_BTE = scores(batch, time, count, seed)
    every = torch.ones(batch, time, dtype=torch.bool)
    valid_BT = torch.tensor(data.draw(st.lists(st.booleans(), min_size=batch * time, max_size=batch * time)))
    for valid in (None, valid_BT.view(batch, time)):
        total, sequences = sequence_balance_loss(score_BTE, active, valid)
        want_total, want_sequences = by_hand(score_BTE, active, every if valid is None else valid)
        assert total.item() == pytest.approx(want_total, abs=1e-12) and sequences.item() == want_sequences


def test_equal_scores_cost_one_a_sequence_however_the_ties_fall():
    for active in (1, 3, 8):
        total, sequences = sequence_balance_loss(torch.full((4, 5, 8), 0.3), active)
        assert total.item() == pytest.approx(4, rel=1e-6) and sequences == 4


def test_a_router_that_always_picks_the_same_experts_costs_experts_over_active():
    score_BTE = torch.full((1, 6, 8), 0.0).double()
    score_BTE[..., [2, 5]] = 1.0
    assert sequence_balance_loss(score_BTE, 2)[0].item() == pytest.approx(8 / 2)


def test_scores_may_be_scaled_token_by_token():
    score_BTE, factor = scores(2, 5, 4), scores(2, 5, 1, seed=3)
    torch.testing.assert_close(sequence_balance_loss(score_BTE * factor, 2), sequence_balance_loss(score_BTE, 2))


def test_padding_counts_for_nothing_and_a_row_of_padding_is_no_sequence(pushed):
    score_BTE = scores(3, 6, 4)
    valid_BT = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    total, sequences = sequence_balance_loss(score_BTE, 2, valid_BT)
    trimmed = sum(sequence_balance_loss(part, 2)[0] for part in (score_BTE[:1, 2:], score_BTE[2:]))
    torch.testing.assert_close(total, trimmed)
    assert sequences == 2
    _, grads = pushed(lambda score_BTE: sequence_balance_loss(score_BTE, 2, valid_BT)[0], {"score_BTE": score_BTE})
    assert not grads["score_BTE"][~valid_BT].any()


def test_the_gradient_flows_through_the_mean_scores_and_the_counts_are_constants(close):
    score_BTE = scores(2, 5, 4).requires_grad_()
    got = torch.autograd.grad(sequence_balance_loss(score_BTE, 2)[0], score_BTE)[0]
    counts = torch.zeros_like(score_BTE).scatter(-1, score_BTE.topk(2).indices, 1.0).mean(1) / 2
    mean = (score_BTE / score_BTE.sum(-1, keepdim=True)).mean(1)
    want = torch.autograd.grad(4 * (counts.detach() * mean).sum(), score_BTE)[0]
    close("dscore", got, want, 1e-12)
    assert torch.autograd.gradcheck(lambda s: sequence_balance_loss(s, 2)[0], [score_BTE])


def test_scores_of_zero_give_no_nan():
    score_BTE = torch.zeros(1, 3, 4, requires_grad=True)
    total, _ = sequence_balance_loss(score_BTE, 2)
    assert total == 0 and torch.autograd.grad(total, score_BTE)[0].isfinite().all()
