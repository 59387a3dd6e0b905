import pytest
import torch

from nautilus.config import Experts
from nautilus.model.language import Language
from nautilus.model.moe import ExpertsMixer
from nautilus.model.state import Span
from nautilus.presets import preset, shrink

WIDTH = 10
LAYERS = {
    "full width": Experts(experts=6, active=2, hidden=7, shared=9, scale=2.5),
    "latent": Experts(experts=6, active=2, hidden=7, shared=9, latent=4, scale=2.5),
    "no shared expert": Experts(experts=6, active=3, hidden=7),
    "gated softmax": Experts(experts=6, active=2, hidden=7, shared=9, gated=True, score="softmax"),
    "gated latent": Experts(experts=6, active=2, hidden=7, latent=4, gated=True),
    "groups": Experts(experts=6, active=2, hidden=7, expert_groups=3, active_groups=1),
    "not normalised": Experts(experts=6, active=2, hidden=7, normalise=False, scale=0.5),
}
every_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)


def mixer_of(layer, seed=0, dtype=torch.float64):
    mixer, draw = ExpertsMixer(layer, WIDTH, dtype=dtype), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in mixer.state_dict().items():
            spread = 0.3 if name.endswith("bias") else 0.6
            tensor.copy_(spread * torch.randn(tensor.shape, generator=draw, dtype=torch.float64))
    return mixer.eval()


def hidden(seed=5, rows=2, time=7, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, time, WIDTH, generator=draw, dtype=torch.float64).to(dtype)


def run(mixer, hidden_BTD):
    return mixer(hidden_BTD, Span(0, torch.arange(hidden_BTD.shape[1])), None)[0]


def choose(w, layer, x):
    """(scores, chosen experts) of one token, best group first."""
    logits = w["gate.weight"] @ x
    s = logits.sigmoid() if layer.score == "sigmoid" else logits.softmax(0)
    choice = (s + w["gate.e_score_correction_bias"] if layer.score == "sigmoid" else s).tolist()
    size = layer.experts // layer.expert_groups
    worth = lambda g: sum(sorted(choice[g * size : (g + 1) * size])[-2:])
    groups = sorted(range(layer.expert_groups), key=worth)[-layer.active_groups :]
    allowed = [e for e in range(layer.experts) if e // size in groups]
    return s, sorted(allowed, key=lambda e: choice[e])[-layer.active :]


def perceptron(x, up, down, gate):
    inner = up @ x
    inner = inner.clamp_min(0) ** 2 if gate is None else (gate @ x) * (gate @ x).sigmoid() * inner
    return down @ inner


def by_hand(mixer, hidden_BTD):
    layer, w, out = mixer.layer, mixer.state_dict(), torch.zeros_like(hidden_BTD)
    for x, place in zip(hidden_BTD.flatten(0, 1), out.view(-1, WIDTH), strict=True):
        s, chosen = choose(w, layer, x)
        u, routed = (w["fc1_latent_proj.weight"] @ x if layer.latent else x), 0
        for e in chosen:
            share = layer.scale * s[e] / (s[chosen].sum() if layer.normalise else 1)
            gate = w["experts.gate_proj"][e] if layer.gated else None
            routed = routed + share * perceptron(u, w["experts.up_proj"][e], w["experts.down_proj"][e], gate)
        place += w["fc2_latent_proj.weight"] @ routed if layer.latent else routed
        if layer.shared:
            up, down = (w[f"shared_experts.{name}_proj.weight"] for name in ("up", "down"))
            place += perceptron(x, up, down, w["shared_experts.gate_proj.weight"] if layer.gated else None)
    return out


@every_layer
@torch.no_grad()
def test_the_mixer_is_its_description_token_by_token(layer):
    mixer = mixer_of(layer)
    torch.testing.assert_close(run(mixer, hidden()), by_hand(mixer, hidden()), rtol=1e-11, atol=1e-11)


@every_layer
def test_load_counts_the_tokens_sent_to_each_expert_in_training_only(layer):
    mixer, hidden_BTD = mixer_of(layer), hidden()
    want = torch.zeros(layer.experts)
    for x in hidden_BTD.flatten(0, 1):
        want[choose(mixer.state_dict(), layer, x)[1]] += 1
    run(mixer, hidden_BTD)
    assert not mixer.load_E.any()
    mixer.train()
    run(mixer, hidden_BTD)
    assert torch.equal(mixer.load_E, want) and want.sum() == 14 * layer.active
    run(mixer, hidden_BTD)
    run(mixer.eval(), hidden_BTD)
    assert torch.equal(mixer.load_E, 2 * want)
    mixer.load_E.zero_()
    run(mixer.train(), hidden_BTD[:1])
    assert mixer.load_E.sum() == 7 * layer.active
    assert mixer.load_E.dtype == torch.float32 and "load_E" not in mixer.state_dict()


def test_counting_leaves_no_graph_and_no_gradient_behind():
    mixer = mixer_of(LAYERS["full width"]).train()
    run(mixer, hidden()).sum().backward()
    assert not mixer.load_E.requires_grad and mixer.load_E.grad_fn is None


def test_the_bias_selects_but_never_weighs():
    """One shift of all biases changes nothing; a push that changes the choice changes it to the scores' own weights."""
    layer, hidden_BTD = LAYERS["full width"], hidden()
    mixer = mixer_of(layer)
    weights = [mixer.gate.weight, mixer.experts.up_proj]
    push = torch.randn(hidden_BTD.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out = run(mixer, hidden_BTD)
    want = torch.autograd.grad(out, weights, push)
    with torch.no_grad():
        mixer.gate.e_score_correction_bias += 0.25
    moved = run(mixer, hidden_BTD)
    assert torch.equal(moved, out)
    for got, reference in zip(torch.autograd.grad(moved, weights, push), want, strict=True):
        assert torch.equal(got, reference)
    with torch.no_grad():
        mixer.gate.e_score_correction_bias[4] = 9.0
    torch.testing.assert_close(run(mixer, hidden_BTD), by_hand(mixer, hidden_BTD), rtol=1e-11, atol=1e-11)
    assert all(4 in choose(mixer.state_dict(), layer, x)[1] for x in hidden_BTD.flatten(0, 1))


def test_the_bias_is_a_float32_buffer_of_sigmoid_routers_only():
    mixer = mixer_of(LAYERS["latent"], dtype=torch.bfloat16)
    assert mixer.gate.bias.dtype == torch.float32 and not mixer.gate.bias.requires_grad
    assert "gate.e_score_correction_bias" in mixer.state_dict()
    assert not any("bias" in name for name, _ in mixer.named_parameters())
    softmax = mixer_of(LAYERS["gated softmax"])
    assert softmax.gate.bias is None and "gate.e_score_correction_bias" not in softmax.state_dict()


def test_gradients_of_the_whole_mixer_are_those_of_finite_differences():
    mixer, hidden_BTD = mixer_of(LAYERS["latent"]), hidden(rows=1, time=3).requires_grad_()
    names, values = zip(*mixer.named_parameters(), strict=True)

    def call(x, *weights):
        return torch.func.functional_call(mixer, dict(zip(names, weights, strict=True)), (x, None, None))[0]

    assert torch.autograd.gradcheck(call, [hidden_BTD, *values], fast_mode=True)


@torch.no_grad()
def test_the_router_sees_differences_that_bf16_cannot_hold():
    """Two experts whose router rows agree in bf16 and differ in float32 by 2^-12: always the larger one is chosen."""
    mixer = mixer_of(Experts(experts=2, active=1, hidden=4), dtype=torch.float32).train()
    mixer.gate.weight[:] = torch.tensor([[1.0], [1.0 + 2.0**-12]])
    mixer.gate.e_score_correction_bias.zero_()
    assert torch.equal(mixer.gate.weight[0].bfloat16(), mixer.gate.weight[1].bfloat16())
    hidden_BTD = hidden(time=50).abs().div(16).bfloat16()
    assert run(mixer, hidden_BTD).dtype == torch.bfloat16
    assert mixer.load_E.tolist() == [0, 100]
    assert mixer.gate(hidden_BTD.flatten(0, 1)).dtype == torch.float32


def test_the_balance_loss_is_left_in_training_when_asked_for_and_at_no_other_time():
    layer, hidden_BTD = LAYERS["latent"], hidden()
    mixer = mixer_of(layer)
    for training, watched, expected in ((False, [], []), (True, None, None)):
        mixer.train(training).balances = watched
        run(mixer, hidden_BTD)
        assert mixer.balances == expected
    mixer.balances = []
    run(mixer, hidden_BTD)
    ((total, sequences),) = mixer.balances
    f, p = torch.zeros(2, 6).double(), torch.zeros(2, 6).double()
    for row in range(2):
        for x in hidden_BTD[row]:
            s = (mixer.gate.weight @ x).sigmoid()
            f[row, s.topk(2).indices] += 1 / (7 * 2)  # the top of the scores themselves: no bias
            p[row] += s.detach() / s.detach().sum() / 7
    assert sequences == 2
    torch.testing.assert_close(total.detach(), 6 * (f * p).sum(), rtol=1e-12, atol=1e-12)
    assert torch.autograd.grad(total, mixer.gate.weight)[0].any()


def training_model():
    model = Language(shrink(preset("super")), dtype=torch.float64).initialise(0).train()
    model.collect_balance(True)
    return model, torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(0))


def test_the_model_hands_out_one_balance_loss_per_expert_layer():
    model, tokens_BT = training_model()
    assert model.auxiliary == []
    model.hidden(tokens_BT)
    names = list(model.experts_mixers())
    assert names[-1] == "mtp.layers.1.mixer" and len(model.auxiliary) == len(names) - 1 == 3
    assert all(count == 2 for _, count in model.auxiliary)


def test_every_depth_of_multi_token_prediction_leaves_a_balance_loss():
    model, tokens_BT = training_model()
    hidden_BTD, _ = model.hidden(tokens_BT)
    model.mtp_hidden(hidden_BTD, tokens_BT, 2)
    assert sum(count for _, count in model.auxiliary) == (3 + 2) * 2


def test_a_step_without_multi_token_prediction_has_no_losses_of_the_step_before():
    model, tokens_BT = training_model()
    hidden_BTD, _ = model.hidden(tokens_BT)
    model.mtp_hidden(hidden_BTD, tokens_BT, 1)
    sum(total for total, _ in model.auxiliary).backward()
    model.collect_balance(True)
    model.hidden(tokens_BT)
    assert len(model.auxiliary) == 3
    sum(total for total, _ in model.auxiliary).backward()


def test_padding_counts_neither_as_load_nor_in_the_balance_loss():
    model, tokens_BT = training_model()
    document_BT = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1]])
    model.hidden(tokens_BT, document_BT=document_BT)
    padded = [total.item() for total, _ in model.auxiliary]
    assert all(mixer.load_E.sum() in (0, 15 * mixer.layer.active) for mixer in model.experts_mixers().values())
    model.collect_balance(True)
    model.hidden(tokens_BT[:1, 3:])
    model.hidden(tokens_BT[1:])
    alone = [total.item() for total, _ in model.auxiliary]
    torch.testing.assert_close(padded, [a + b for a, b in zip(alone[::2], alone[1::2], strict=True)], rtol=1e-9, atol=0)
