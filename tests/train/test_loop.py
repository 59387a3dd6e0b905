import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nautilus.data.batch import Batch
from nautilus.runtime import UserError
from nautilus.train.balance import experts_mixers
from nautilus.train.interrupt import Stop
from nautilus.train.loop import Job, fit, train_step
from nautilus.train.objective import Objective, next_token, pretrain
from nautilus.train.optim import OptimConfig, adamw, schedule
from nautilus.train.policy import Mtp, Surrogate, distill, policy, preference
from nautilus.train.ranks import ALONE, Ranks

TIMES = {"tokens_per_s", "memory_gb", "mfu"}


def trained(model, data, objective=next_token, *, lr=1e-2, steps=None, **settings):
    """Trains and gives back the metrics of every step, but for what depends on the clock."""
    lines = []
    optim = OptimConfig(lr=lr, min_lr=0.0)
    fit(model, data, objective, adamw(model, optim), steps=steps or len(data), log=lines.append, **settings)
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def assert_same_model(got, want, rel):
    for name, value in want.state_dict().items():
        far = (got.state_dict()[name].double() - value.double()).norm() / value.double().norm().clamp_min(1e-30)
        assert far <= rel, f"{name}: relative difference {far:.1e}"


@settings(max_examples=6, deadline=None)
@given(cuts=st.sets(st.integers(1, 3)), seed=st.integers(0, 99), documents=st.booleans())
def test_how_a_step_is_cut_into_micro_batches_does_not_matter(small_model, random_rows, cuts, seed, documents):
    objective = pretrain(mtp_depths=2, mtp_weight=0.3, aux_weight=0.05)
    steps = [random_rows(4, 12, seed=seed + i, documents=documents, dtype=torch.float64) for i in range(2)]
    edges = [0, *sorted(cuts), 4]
    pieces = [[batch.take(range(a, b)) for a, b in zip(edges, edges[1:], strict=False)] for batch in steps]
    whole, cut = small_model(dtype=torch.float64), small_model(dtype=torch.float64)
    want = trained(whole, [[batch] for batch in steps], objective, balance=0.01)
    got = trained(cut, pieces, objective, balance=0.01)
    assert_same_model(cut, whole, 1e-10)
    for a, b in zip(got, want, strict=True):
        assert a == pytest.approx(b, rel=1e-10)


def test_an_unequal_split_would_show_if_micro_batches_were_averaged(small_model, random_rows):
    """Guards the test above: the mean of per-micro-batch means is another number."""
    batch = random_rows(4, 12, dtype=torch.float64)
    batch.weights["next_token"][:3, 2:] = 0
    model = small_model(dtype=torch.float64).train()
    pairs = [next_token(model, batch.take(rows))[0]["next_token"] for rows in ([0, 1, 2], [3])]
    mean_of_means = sum((total / count).item() for total, count in pairs) / 2
    line = trained(model, [[batch.take([0, 1, 2]), batch.take([3])]])[0]
    assert line["next_token"] == pytest.approx((sum(t for t, _ in pairs) / sum(c for _, c in pairs)).item(), rel=1e-10)
    assert abs(line["next_token"] - mean_of_means) > 1e-3


class Twice(Ranks):
    def total(self, number):
        return 2 * number


def drawn(batch: Batch, *, pairs: bool) -> Batch:
    """The same rows as tokens that a model drew itself; pairs: a better answer and a worse one by turns."""
    mask_BT = (batch.weights["next_token"] > 0).double()
    noise = iter(torch.randn(3, *mask_BT.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    told = {name: math.log(1 / 97) + 0.3 * next(noise) for name in ("sampled_logprob", "teacher_logprob")}
    if not pairs:
        return Batch(batch.tokens, {"policy": mask_BT}, advantage=next(noise), **told)
    sign_BT, first_BT = mask_BT.clone(), torch.zeros_like(mask_BT)
    sign_BT[1::2] *= -1
    first_BT[0::2, 1] = 1
    return Batch(batch.tokens, {"preference": first_BT, "next_token": sign_BT.clamp(min=0)}, advantage=sign_BT, **told)


@pytest.mark.parametrize(
    "objective, names",
    [
        (pretrain(mtp_depths=1, aux_weight=0.1), {"next_token", "mtp_1", "balance"}),
        (policy(Surrogate(kl=0.1), Mtp(depths=1)), {"policy", "kl", "mtp_1", "mismatch", "left_out", "surprise"}),
        (distill(mtp=Mtp(depths=1), reward=0.5), {"policy", "mtp_1", "mismatch", "teacher_gap"}),
        (preference(), {"preference", "next_token", "agrees"}),
    ],
    ids=["pretrain", "policy", "distill", "preference"],
)
def test_sums_and_counts_go_over_ranks(small_model, random_rows, objective, names):
    """Two ranks with the same rows: every mean stays, tokens double, and each rank's share of the gradient halves."""
    one, two = small_model(dtype=torch.float64), small_model(dtype=torch.float64)
    batch = random_rows(dtype=torch.float64)
    batch = batch if "balance" in names else drawn(batch, pairs="preference" in names)
    alone = trained(one, [[batch]], objective, clip=0.0)[0]
    pair = trained(two, [[batch]], objective, clip=0.0, ranks=Twice())[0]
    assert pair["tokens"] == 2 * alone["tokens"]
    assert pair["grad_norm"] == pytest.approx(alone["grad_norm"] / 2, rel=1e-10) and alone["grad_norm"] > 1e-3
    for name in names | {"loss"}:
        assert pair[name] == pytest.approx(alone[name], rel=1e-10)
    assert all(alone[name] for name in names - {"left_out", "agrees"})


def test_a_small_model_learns_a_few_rows_by_heart(small_model, random_rows):
    model, batch = small_model(), random_rows(2, 16)
    lines = trained(model, [[batch]] * 60, schedule=schedule(OptimConfig(lr=1e-2, min_lr=1e-4, warmup=5), 60))
    assert lines[0]["loss"] > 4 and lines[-1]["loss"] < 0.2


def test_bf16_activations_train_float32_masters(small_model, random_rows):
    model, batch = small_model(), random_rows(2, 16)
    model.compute = torch.bfloat16
    optimizer = adamw(model, OptimConfig(lr=1e-2))
    lines = []
    fit(model, [[batch]] * 40, pretrain(mtp_depths=1, aux_weight=1e-3), optimizer, steps=40, log=lines.append)
    assert lines[-1]["next_token"] < 0.6 * lines[0]["next_token"]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {v.dtype for values in optimizer.state.values() for v in values.values()} == {torch.float32}


def test_every_step_reports_the_house_keys_and_the_terms(small_model, random_rows):
    seen = []
    model = small_model()
    last = fit(
        model,
        [[random_rows(4, 8), random_rows(2, 8)]] * 3,
        pretrain(mtp_depths=1),
        adamw(model, OptimConfig()),
        steps=3,
        schedule=lambda step: 1e-3 * (step + 1),
        peak_flops=1e12,
        log=seen.append,
    )
    assert seen[-1] == last
    assert [line["step"] for line in seen] == [0, 1, 2]
    assert [line["tokens"] for line in seen] == [48, 96, 144]
    assert [line["lr"] for line in seen] == pytest.approx([1e-3, 2e-3, 3e-3])
    house = {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "mfu", "memory_gb"}
    assert last.keys() == house | {"next_token", "mtp_1"}
    assert 0 < last["mfu"] < 1 and last["memory_gb"] > 0.05


def test_the_gradient_is_clipped_and_its_norm_before_that_is_reported(small_model, random_rows):
    data = [[random_rows()]]

    def moved(clip):
        model = small_model()
        before = model.head_weight.detach().clone()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        line = fit(model, data, next_token, optimizer, steps=1, clip=clip)
        return (model.head_weight.detach() - before).norm().item(), line["grad_norm"]

    (free, norm), (held, same_norm) = moved(0.0), moved(0.01)
    assert norm == same_norm > 0.01
    assert held == pytest.approx(free * 0.01 / norm, rel=1e-3)


def test_a_loss_that_is_no_number_names_step_and_batch_and_leaves_the_weights(small_model, random_rows):
    model, good, bad = small_model(), random_rows(2), random_rows(2, seed=5)
    before = {}

    def poisoned(model, batch):
        terms, metrics = next_token(model, batch)
        factor = math.nan if batch.fingerprint == bad.fingerprint else 1.0
        return {"next_token": (terms["next_token"][0] * factor, terms["next_token"][1])}, metrics

    def remember(line):
        before.update({name: value.clone() for name, value in model.state_dict().items()})

    with pytest.raises(UserError, match=rf"step 1: the loss.*next_token=nan.*micro-batch 2 of 2.*{bad.fingerprint}"):
        fit(model, [[good, good], [good, bad]], poisoned, adamw(model, OptimConfig()), steps=2, log=remember)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_gradient_that_is_no_number_names_its_parameters(small_model, random_rows):
    model = small_model()
    model.backbone.layers[0].mixer.D.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(UserError, match=r"step 0: the loss is finite.*backbone\.layers\.0\.mixer\.D \(1 param"):
        fit(model, [[random_rows()]], next_token, adamw(model, OptimConfig()), steps=1)
    assert model.backbone.layers[0].mixer.D.eq(1).all()


def test_a_stream_that_ends_early_is_an_error(small_model, random_rows):
    with pytest.raises(UserError, match="ended before step 1"):
        trained(small_model(), [[random_rows()]], steps=3)
    with pytest.raises(UserError, match="no micro-batch for step 0"):
        trained(small_model(), [[]])


def test_a_step_with_nothing_to_learn_is_an_error_but_one_idle_term_is_not(small_model, random_rows):
    idle = random_rows(2, 3)  # too short for depth 2
    lines = trained(small_model(), [[idle]], pretrain(mtp_depths=2))
    assert "mtp_1" in lines[0] and "mtp_2" not in lines[0]
    idle.weights["next_token"].zero_()
    with pytest.raises(UserError, match="no token to learn from.*next_token"):
        trained(small_model(), [[idle]])


def test_an_idle_micro_batch_among_busy_ones_is_fine(small_model, random_rows):
    idle = random_rows(2)
    idle.weights["next_token"].zero_()
    with_idle, without = small_model(), small_model()
    trained(with_idle, [[random_rows(), idle]], balance=0.0)
    trained(without, [[random_rows()]], balance=0.0)
    assert_same_model(with_idle, without, 1e-6)


def test_an_objective_that_counts_otherwise_than_its_weights_is_found_out(small_model, random_rows):
    batch = random_rows()
    batch.weights["next_token"][:, 0] = 1  # the first token of a row can be no target
    with pytest.raises(ValueError, match="counted .* for term next_token but the weights"):
        trained(small_model(), [[batch]])
    with pytest.raises(ValueError, match="terms nothing_known but .* next_token"):
        trained(
            small_model(), [[random_rows()]], lambda m, b: ({"nothing_known": next_token(m, b)[0]["next_token"]}, {})
        )


def test_metrics_are_means_over_the_whole_step(small_model, random_rows):
    def watched(model, batch):
        return next_token(model, batch)[0], {"rows": (torch.tensor(float(len(batch)) ** 2), torch.tensor(len(batch)))}

    batch = random_rows(4)
    lines = trained(small_model(), [[batch.take([0]), batch.take([1, 2, 3])]], watched)
    assert lines[0]["rows"] == (1 + 9) / 4


def test_several_updates_of_a_step_are_as_many_steps(small_model, random_rows):
    parts = [[random_rows(3, seed=1), random_rows(2, seed=2)], [random_rows(2, seed=3)], [random_rows(seed=4)]]
    one, three = small_model(), small_model()
    want = trained(one, parts)
    (got,) = trained(three, [[replace(batch, update=n) for n, part in enumerate(parts) for batch in part]])
    assert all(torch.equal(value, one.state_dict()[name]) for name, value in three.state_dict().items())
    assert got["step"] == 0 and got["tokens"] == want[-1]["tokens"]
    for name in ("loss", "next_token", "grad_norm"):
        assert got[name] == pytest.approx(sum(line[name] for line in want) / 3)


def job_of(model, objective):
    return Job(
        model=model, objective=Objective(objective), optimizer=adamw(model, OptimConfig()), schedule=None, clip=1.0,
        balance=1e-3, health_every=0, peak_flops=0.0, ranks=ALONE,
    )  # fmt: skip


def test_a_stop_waits_for_the_last_update_of_a_step(small_model, random_rows):
    stop, seen = Stop(), []

    def asked_for_by_the_second(model, batch):
        seen.append(batch)
        stop.asked = "SIGINT" if len(seen) == 2 else stop.asked
        return next_token(model, batch)

    job = job_of(small_model().train(), asked_for_by_the_second)
    found = train_step(job, 0, 0, iter([[replace(random_rows(), update=n) for n in range(3)]]), stop)
    assert found is not None and len(seen) == 3


def test_a_stop_between_micro_batches_leaves_the_model_as_it_was(small_model, random_rows):
    model, stop = small_model().train(), Stop()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def asked_for_meanwhile(model, batch):
        stop.asked = "SIGINT"
        return next_token(model, batch)

    job = job_of(model, asked_for_meanwhile)
    assert train_step(job, 0, 0, iter([[random_rows(), random_rows()]]), stop) is None
    assert all(p.grad is None for p in model.parameters())
    assert not any(mixer.load_E.any() for mixer in experts_mixers(model).values())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_toy_training_follows_the_recorded_curve(small_model, small_stream, check_golden):
    """The loss of 20 steps, so that a change of numbers anywhere below is seen. `--rewrite-golden` records anew."""
    optim = OptimConfig(lr=5e-3, min_lr=5e-5, warmup=4)
    objective = pretrain(mtp_depths=2, mtp_weight=0.3, aux_weight=1e-3)
    lines = trained(small_model(seed=3), small_stream(seed=11), objective, steps=20, schedule=schedule(optim, 20))
    check_golden("train_toy", [line["loss"] for line in lines], rel=1e-4)
