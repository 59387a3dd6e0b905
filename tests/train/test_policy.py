"""What is minimised on a model's own tokens, held against plain loops and against sums over all that can happen."""

import dataclasses
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from nautilus.config import Attention, Config, Experts, Mamba, Mlp, lay
from nautilus.data.batch import Batch
from nautilus.data.tokenizer import SMALLEST, train_tokenizer
from nautilus.model.language import Language
from nautilus.recipes import mopd, rlvr
from nautilus.serve import Engine, Sampling
from nautilus.train.policy import Correction, Surrogate, distill, drawn_logprob, policy, preference
from tests.test_same_numbers import LAYERS as EVERY_KIND

LAYERS = lay(
    "M*E-", Mamba(heads=2, head_width=16, state=8, groups=1), Attention(heads=2, groups=1, head_width=16),
    Experts(experts=4, active=2, hidden=16, shared=16), Mlp(hidden=24),
)  # fmt: skip


def tiny(seed: int, vocab: int = 7, layers=LAYERS) -> Language:
    model = Language(Config(vocab=vocab, width=16, layers=layers)).initialise(seed)
    model.lm_head.weight.data *= 20  # or all tokens are as likely as any
    return model


def batch(seed: int = 0, rows: int = 4, time: int = 9) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(rows, time, generator=rng)
    mask_BT = (torch.rand(rows, time, generator=rng) < 0.6).float()
    mask_BT[:, 0] = 0
    return Batch(
        torch.randint(7, (rows, time), generator=rng), {"policy": mask_BT}, advantage=draw(),
        sampled_logprob=-draw().abs() - 1, proximal_logprob=-draw().abs() - 1, teacher_logprob=-draw().abs() - 1,
    )  # fmt: skip


def logprobs(model: Language, tokens_BT: torch.Tensor) -> torch.Tensor:
    logits_BTV, _ = model(tokens_BT[:, :-1])
    lp_BT = logits_BTV.log_softmax(-1).gather(-1, tokens_BT[:, 1:, None])[..., 0]
    return torch.nn.functional.pad(lp_BT, (1, 0))


def near(model: Language, *, first_update: bool = False) -> Batch:
    """A batch whose log-probs are around the model's own, so that every clip and bound holds some of its tokens."""
    given_batch, rng = batch(), torch.Generator().manual_seed(9)
    lp_BT = logprobs(model, given_batch.tokens).detach()
    prox_BT = lp_BT if first_update else lp_BT + 0.3 * torch.randn(lp_BT.shape, generator=rng)
    apart_BT = given_batch.proximal_logprob - given_batch.sampled_logprob
    return dataclasses.replace(
        given_batch, sampled_logprob=prox_BT - apart_BT, proximal_logprob=None if first_update else prox_BT,
        teacher_logprob=lp_BT + 2 * torch.randn(lp_BT.shape, generator=rng),
    )  # fmt: skip


def weight_of(log_weight: float, row: list[float], how: Correction) -> float:
    if sum(math.exp(abs(one)) for one in row) / len(row) > how.apart:
        return 0.0
    weight = math.exp(log_weight)
    if how.kind == "none":
        return 1.0
    if how.kind == "truncate":
        return min(how.most, max(how.least, weight))
    judged = math.exp(sum(row) / len(row)) if how.kind == "sequence" else weight
    return weight if how.least <= judged <= how.most else 0.0


def plain_loop(how: Surrogate, given_batch: Batch, lp_BT: torch.Tensor, advantage) -> tuple[float, float]:
    """The term "policy" and how many tokens are left out. advantage: a function of row, place and lp_prox."""
    prox_BT = lp_BT if given_batch.proximal_logprob is None else given_batch.proximal_logprob
    loss, left_out = 0.0, 0.0
    for row, mask_T in enumerate(given_batch.weights["policy"].tolist()):
        own = [at for at, mask in enumerate(mask_T) if mask]
        logs = [float(prox_BT[row, at] - given_batch.sampled_logprob[row, at]) for at in own]
        for at, log_weight in zip(own, logs, strict=True):
            weight, ratio = weight_of(log_weight, logs, how.correction), float((lp_BT - prox_BT)[row, at].exp())
            gain = advantage(row, at, float(prox_BT[row, at]))
            loss -= weight * min(ratio * gain, min(1.28, max(0.8, ratio)) * gain)
            left_out += weight == 0
    return loss, left_out


@pytest.mark.parametrize("apart", [2.0, math.inf])
@pytest.mark.parametrize("kind", ["none", "truncate", "mask", "sequence"])
@pytest.mark.parametrize("first_update", [True, False])
@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_the_loss_is_that_of_a_plain_loop(kind, first_update, kl, apart):
    model = tiny(1)
    given_batch = near(model, first_update=first_update)
    how = Surrogate(correction=Correction(kind=kind, least=0.62, most=1.4, apart=apart), kl=kl)
    objective = policy(how)
    weighed = objective.weigh(given_batch)
    terms, watched = objective(model, given_batch)
    lp_BT, mask_BT = logprobs(model, given_batch.tokens).detach(), given_batch.weights["policy"]
    loss, left_out = plain_loop(how, given_batch, lp_BT, lambda row, at, _: float(given_batch.advantage[row, at]))
    assert terms["policy"][0].item() == pytest.approx(loss, rel=1e-4) and float(watched["left_out"][0]) == left_out
    if kind in ("none", "truncate"):
        assert left_out == (0 if apart == math.inf else mask_BT[3].sum()), "the last row is too far off as a whole"
    assert terms["policy"][1] == mask_BT.sum() == watched["mismatch"][1]
    assert (float(watched["clipped"][0]) == 0) == first_update
    assert ("kl" in terms) == ("kl" in weighed.weights) == bool(kl)
    if kl:
        d_N = (given_batch.teacher_logprob - lp_BT)[mask_BT > 0]
        distance = sum(math.exp(d) - d - 1 for d in d_N.tolist())
        assert terms["kl"][0].item() == pytest.approx(distance, rel=1e-4) and objective.coefficients["kl"] == kl


@pytest.mark.parametrize("reward", [0.0, 0.5])
@pytest.mark.parametrize("first_update", [True, False])
@pytest.mark.parametrize("most", [1.0, math.inf])
def test_distillation_is_that_of_a_plain_loop(most, first_update, reward):
    model = tiny(1)
    given_batch = near(model, first_update=first_update)
    how = Surrogate(correction=Correction(kind="mask", least=0.5, most=2.0), most=most)
    gaps = list[float]()

    def advantage(row: int, at: int, prox: float) -> float:
        gaps.append(float(given_batch.teacher_logprob[row, at]) - prox)
        return min(most, max(-most, gaps[-1])) + reward * float(given_batch.advantage[row, at])

    loss, left_out = plain_loop(how, given_batch, logprobs(model, given_batch.tokens).detach(), advantage)
    terms, watched = distill(how, reward=reward)(model, given_batch)
    assert terms["policy"][0].item() == pytest.approx(loss, rel=1e-4) and float(watched["left_out"][0]) == left_out
    assert float(watched["teacher_gap"][0]) == pytest.approx(sum(gaps), rel=1e-4), "what is watched is not clipped"
    assert min(gaps) < -1 and max(gaps) > 1 and min(map(abs, gaps)) < 1


def gradient(model: Language, objective, parts: list[Batch]) -> list[torch.Tensor]:
    weighed = [objective.weigh(part) for part in parts]
    counts = {name: sum(part.weights[name].sum() for part in weighed) for name in weighed[0].weights}
    model.zero_grad(set_to_none=True)
    for part in parts:
        terms, _ = objective(model, part)
        sum(
            objective.coefficients.get(name, 1.0) * total / counts[name] for name, (total, _) in terms.items()
        ).backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize(
    "objective", [policy(Surrogate(kl=0.1)), distill(), preference()], ids=["policy", "distill", "dpo"]
)
def test_a_step_is_the_same_however_it_is_cut(objective):
    model = tiny(2)
    whole = near(model)
    if "next_token" in objective.coefficients:
        sign_B1 = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None]
        mask_BT = whole.weights["policy"]
        first_BT = torch.zeros(4, 9)
        first_BT[0::2, 1] = 1
        whole = dataclasses.replace(
            whole, weights={"preference": first_BT, "next_token": mask_BT * (sign_B1 > 0)}, advantage=mask_BT * sign_B1
        )
    want = gradient(model, objective, [whole])
    assert any(one.abs().max() > 1e-4 for one in want)
    got = gradient(model, objective, [whole.take([0, 1]), whole.take([2, 3])])
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_an_engine_that_agrees_leaves_reinforce():
    model, given_batch = tiny(3), batch()
    lp_BT = drawn_logprob(model, given_batch, "policy")
    agreed = dataclasses.replace(given_batch, sampled_logprob=lp_BT.detach(), proximal_logprob=None)
    mask_BT = given_batch.weights["policy"]
    want = torch.autograd.grad(
        -(lp_BT * given_batch.advantage * mask_BT).sum() / mask_BT.sum(), [*model.parameters()], allow_unused=True
    )
    got = gradient(model, policy(), [agreed])
    for a, b in zip((one for one in want if one is not None), got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    _, watched = policy()(model, agreed)
    assert watched["mismatch"][0] == watched["left_out"][0] == watched["clipped"][0] == 0


def test_distillation_pulls_along_the_reverse_kl_in_the_mean():
    """One token of seven: the gradient's mean over all that can be drawn is that of the closed form."""
    student, teacher = tiny(1), tiny(2)
    start = torch.tensor([[2]])
    full = lambda model: model(start)[0][0, 0].log_softmax(-1)
    own = full(student)
    want = torch.autograd.grad(
        (own.exp() * (own - full(teacher).detach())).sum(), [*student.parameters()], allow_unused=True
    )
    got = [torch.zeros_like(one) for one in want if one is not None]
    for token in range(7):
        one = Batch(torch.tensor([[2, token]]), {"policy": torch.tensor([[0.0, 1.0]])})
        one.sampled_logprob = drawn_logprob(student, one, "policy").detach()
        one.teacher_logprob = drawn_logprob(teacher, one, "policy").detach()
        for total, part in zip(got, gradient(student, distill(Surrogate()), [one]), strict=True):
            total += one.sampled_logprob[0, 1].exp() * part
    for a, b in zip((one for one in want if one is not None), got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_a_teacher_that_is_the_student_teaches_nothing():
    model, given_batch = tiny(1), batch()
    lp_BT = drawn_logprob(model, given_batch, "policy").detach()
    same = dataclasses.replace(given_batch, sampled_logprob=lp_BT, teacher_logprob=lp_BT, proximal_logprob=None)
    assert all(one.abs().max() == 0 for one in gradient(model, distill(), [same]))
    assert any(one.abs().max() > 0 for one in gradient(model, distill(reward=0.5), [same]))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-60, 60), min_size=1, max_size=6), st.sampled_from(["none", "truncate", "mask", "sequence"]))
def test_weights_stay_within_their_bounds(logs, kind):
    how = Correction(kind=kind, least=0.2, most=5.0, apart=math.inf)
    found_BT = how.of(torch.tensor([logs + [math.nan, math.inf]]), torch.ones(1, len(logs) + 2))
    assert found_BT.isfinite().all() and (found_BT >= 0).all()
    if kind in ("truncate", "mask"):
        assert (found_BT <= 5.0).all()
    if kind == "mask":
        assert ((found_BT == 0) | (found_BT >= 0.2)).all()


def test_rows_are_left_out_whole_where_they_are_off_in_the_mean():
    how = Correction(kind="sequence")
    log_BT = torch.tensor([[0.0, 0.1, -0.1, 9.0], [0.1, 0.1, 0.1, 9.0]])
    mask_BT = torch.tensor([[1.0, 1, 1, 0], [1, 1, 1, 0]])
    found_BT = how.of(log_BT, mask_BT)
    assert found_BT[0, 1] == pytest.approx(math.exp(0.1)) and (found_BT[1] == 0).all()


@pytest.mark.parametrize("kind", ["none", "truncate", "mask", "sequence"])
def test_rows_are_left_out_whole_whose_tokens_are_far_off_either_way(kind):
    log_BT = torch.tensor([[0.0, 0.1, -0.1, 9.0], [1.2, -1.2, 0.0, 0.0], [0.0, 0.0, 0.0, -9.0]])
    mask_BT = torch.tensor([[1.0, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]])
    found_BT = Correction(kind=kind).of(log_BT, mask_BT)
    assert (found_BT[1] == 0).all() and (found_BT[0, :3] > 0).all(), "the mean of exp |log w| is 2.55 and 1.07"
    assert (Correction(kind=kind, apart=2.6).of(log_BT, mask_BT)[1, 2:] > 0).all()
    assert (Correction(kind=kind, apart=1.0).of(log_BT, mask_BT)[2, :3] > 0).all(), "nothing was drawn"


def test_bounds_are_those_of_the_kind_where_none_are_given():
    found = {kind: Correction(kind=kind).bounds for kind in ("truncate", "mask", "sequence")}
    assert found == {"truncate": (0.0, 5.0), "mask": (0.5, 5.0), "sequence": (0.999, 1.002)}
    assert Correction(kind="mask", least=0.2).bounds == (0.2, 5.0) and Correction(most=3.0).bounds == (0.0, 3.0)
    assert rlvr.Settings(correction="sequence").surrogate().correction.bounds == (0.999, 1.002)
    assert mopd.Settings().surrogate().correction.bounds == (0.5, 5.0)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Correction(kind="tis"), "'tis'"), (lambda: Correction(least=2, most=3), "within .2, 3."),
        (lambda: Correction(kind="sequence", most=0.9), "within .0.999, 0.9."),
        (lambda: Correction(apart=0.5), "apart=0.5"),
        (lambda: Surrogate(low=1), "low=1"), (lambda: Surrogate(kl=-1), "kl=-1"),
        (lambda: preference(beta=0), "beta=0"),
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# ----- the same numbers -----------------------------------------------------------------------------------------------


def drawn_twice(model: Language, tokenizer) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Two answers to each of some prompts, as rollouts draw them: the second goes on from what the first had read. The
    log-probs of each, by the trainer and by the engine."""
    engine, rng = Engine(model, tokenizer, max_tokens=64, rows=3, saved_gb=0.01), torch.Generator().manual_seed(5)
    prompts = [torch.randint(SMALLEST, (size,), generator=rng).tolist() for size in (5, 6, 17, 24, 33)]
    asked = [
        engine.request(prompt, Sampling(max_tokens=12, seed=10 * len(prompt) + number), marks=(len(prompt) - 1,))
        for prompt in prompts for number in range(2)
    ]  # fmt: skip
    for request in asked:
        engine.submit(request)
    while not all(request.finished for request in asked):
        engine.step()
    done = [request.completion() for request in asked]
    assert [one.cached > 0 for one in done[1::2]] == [False, False, True, True, True], "the shortest are not kept"
    model.train()
    pairs = []
    for one in done:
        tokens_BT = torch.tensor([[*one.prompt, *one.tokens]])
        mask_BT = torch.zeros(tokens_BT.shape)
        mask_BT[0, len(one.prompt) :] = 1
        lp_BT = drawn_logprob(model, Batch(tokens_BT, {"policy": mask_BT}), "policy")
        assert lp_BT.requires_grad
        pairs.append((lp_BT[0, len(one.prompt) :].detach(), torch.tensor(one.logprobs)))
    return pairs


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", [LAYERS, EVERY_KIND], ids=["hybrid", "every kind"])
def test_engine_and_trainer_agree_bit_for_bit_on_what_was_drawn(layers, compute):
    tokenizer = train_tokenizer([], vocab=SMALLEST)
    model = tiny(4, vocab=tokenizer.vocab, layers=layers)
    model.compute = compute
    for trained, drew in drawn_twice(model, tokenizer):
        assert torch.equal(trained, drew) and drew.std() > 0


def test_without_native_kernels_engine_and_trainer_agree_closely(monkeypatch):
    monkeypatch.setenv("NAUTILUS_OPS", "torch")
    tokenizer = train_tokenizer([], vocab=SMALLEST)
    for trained, drew in drawn_twice(tiny(4, vocab=tokenizer.vocab, layers=EVERY_KIND), tokenizer):
        torch.testing.assert_close(trained, drew, rtol=0, atol=1e-4)


def test_a_preference_is_the_formula_pair_by_pair():
    """-log sigmoid(beta ((lp - ref)(chosen) - (lp - ref)(rejected))), by a loop, in the mean over pairs."""
    model, whole, beta = tiny(5), batch(3), 0.3
    sign_B1, mask_BT = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None], whole.weights["policy"]
    first_BT = torch.zeros(4, 9)
    first_BT[0::2, 1] = 1
    weights = {"preference": first_BT, "next_token": mask_BT * (sign_B1 > 0)}
    given_batch = dataclasses.replace(whole, weights=weights, advantage=mask_BT * sign_B1)
    terms, watched = preference(beta=beta)(model, given_batch)
    lp_BT, loss, agrees, chosen = logprobs(model, whole.tokens).detach(), 0.0, 0, 0.0
    for pair in range(2):
        gained = [
            sum(float(lp_BT[row, at] - whole.teacher_logprob[row, at]) for at in range(9) if mask_BT[row, at])
            for row in (2 * pair, 2 * pair + 1)
        ]
        margin = beta * (gained[0] - gained[1])
        loss, agrees = loss + math.log1p(math.exp(-margin)), agrees + (margin > 0)
        chosen -= sum(float(lp_BT[2 * pair, at]) for at in range(9) if mask_BT[2 * pair, at])
    found = {name: (float(total.detach()), float(count)) for name, (total, count) in terms.items()}
    assert found["preference"] == (pytest.approx(loss, rel=1e-4), 2)
    assert found["next_token"][0] == pytest.approx(chosen, rel=1e-4)
    assert float(watched["agrees"][0]) == agrees
    assert preference().coefficients == {"next_token": 0.2} and preference(sft=0.0).coefficients == {"next_token": 0.0}
