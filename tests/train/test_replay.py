"""Experts that wrote a token are those that learn from it."""

import torch

from nautilus.config import Attention, Config, Experts, Mamba, lay
from nautilus.data.batch import Batch
from nautilus.model.language import Language
from nautilus.train.policy import Mtp, Surrogate, policy, read
from nautilus.train.replay import NONE, replaying, routes_of, trunk

LAYERS = lay(
    "ME*E", Mamba(heads=2, head_width=16, state=8, groups=1), Attention(heads=2, groups=1, head_width=16),
    Experts(experts=8, active=2, hidden=16, shared=16, scale=2.5),
)  # fmt: skip


def tiny(seed: int = 0, mtp: bool = False) -> Language:
    block = lay("*E", *{type(one): one for one in LAYERS}.values()) if mtp else ()
    model = Language(Config(vocab=11, width=16, layers=LAYERS, mtp=block)).initialise(seed)
    for mixer in model.experts_mixers().values():
        mixer.gate.weight.data.normal_(std=1.0, generator=torch.Generator().manual_seed(seed))
    return model


def tokens(rows: int = 3, time: int = 7) -> torch.Tensor:
    return torch.randint(11, (rows, time), generator=torch.Generator().manual_seed(5))


def test_own_experts_played_again_change_no_bit():
    model, some_BT = tiny(), tokens()
    routes = routes_of(model, some_BT)
    assert routes.shape == (3, 7, 2, 2) and routes.dtype == torch.int16
    plain, _ = model.hidden(some_BT)
    with replaying(model, routes):
        again, _ = model.hidden(some_BT)
    assert torch.equal(plain, again)
    assert all(mixer.given_RK is None and mixer.chosen is None for mixer in trunk(model))


def test_experts_of_before_are_at_work_after_routers_have_changed_and_weigh_what_they_weigh_now():
    model, some_BT = tiny(), tokens()
    routes = routes_of(model, some_BT)
    for mixer in trunk(model):
        mixer.gate.weight.data.neg_()
    assert not torch.equal(routes_of(model, some_BT), routes)
    mixer = trunk(model)[0]
    hidden_RD = torch.randn(21, 16, generator=torch.Generator().manual_seed(1))
    index_RK, weight_RK, score_RE = mixer.choose(hidden_RD)
    given_RK = routes[:, :, 0].flatten(0, 1).long()
    found_RK, weights_RK = mixer.replay(given_RK, index_RK, weight_RK, score_RE)
    assert torch.equal(found_RK, given_RK)
    own_RK = score_RE.gather(-1, given_RK)
    torch.testing.assert_close(weights_RK, 2.5 * own_RK / own_RK.sum(-1, keepdim=True))


def test_where_nothing_is_known_the_router_chooses():
    model, some_BT = tiny(), tokens()
    routes = torch.full_like(routes_of(model, some_BT), NONE)
    plain, _ = model.hidden(some_BT)
    with replaying(model, routes):
        again, _ = model.hidden(some_BT)
    assert torch.equal(plain, again)


def batch(routes=None) -> Batch:
    some_BT = tokens()
    weight_BT = torch.ones(some_BT.shape)
    weight_BT[:, :2] = 0
    flat = torch.zeros(some_BT.shape)
    return Batch(some_BT, {"policy": weight_BT}, advantage=flat + 1, sampled_logprob=flat - 1, routes=routes)


def test_a_step_learns_by_the_experts_of_its_batch():
    model = tiny()
    routes = routes_of(model, tokens())
    before, _ = read(model, batch(), "policy")
    for mixer in trunk(model):
        mixer.gate.e_score_correction_bias += 3 * torch.randn(8, generator=torch.Generator().manual_seed(3))
    other, _ = read(model, batch(), "policy")
    same, _ = read(model, batch(routes), "policy")
    assert torch.equal(before, same) and not torch.equal(before, other), "the bias selects, it never weighs"
    half = batch(routes).take([2, 0])
    assert torch.equal(half.routes, routes[[2, 0]])


def test_a_prediction_block_learns_along_and_nothing_else_from_it():
    model = tiny(mtp=True).train().requires_grad_(True)
    objective, given = policy(Surrogate(), Mtp(depths=2)), batch()
    terms, _ = objective(model, given)
    assert {*terms} == {"policy", "mtp_1", "mtp_2"} and objective.coefficients["mtp_1"] == 0.15
    (terms["mtp_1"][0] + terms["mtp_2"][0]).backward()
    moved = {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.abs().sum()}
    assert moved and all(name.startswith("mtp.") for name in moved)
    assert float(terms["mtp_1"][1]) == 3 * 5 and float(terms["mtp_2"][1]) == 3 * 4
    hidden_BTD, _ = model.hidden(given.tokens)
    deep_BTD = model.mtp_hidden(hidden_BTD, given.tokens, 1)[0]
    lp_BTV = model.head(deep_BTD).log_softmax(-1)[:, :-2]
    total = -lp_BTV.gather(-1, given.tokens[:, 2:, None]).sum()
    torch.testing.assert_close(terms["mtp_1"][0], total)
