import dataclasses

import pytest
import torch

from nautilus.config import Attention, Experts, lay
from nautilus.presets import preset, shrink

ROWS, TIME = 2, 13


def tokens(seed=0):
    return torch.randint(0, 97, (ROWS, TIME), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------- the block, written again from its description and nothing else


def rms(x, weight, eps=1e-5):
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def causal_attention(w, layer, x_TD):
    """Query t over keys 0..t, head by head, without positions."""
    share, p = layer.heads // layer.groups, layer.head_width
    q, k, v = (x_TD @ w[f"{name}_proj.weight"].T for name in "qkv")
    rows = []
    for t in range(len(x_TD)):
        heads = []
        for h in range(layer.heads):
            mine, theirs = slice(h * p, (h + 1) * p), slice(h // share * p, (h // share + 1) * p)
            weight_S = (k[: t + 1, theirs] @ q[t, mine] / p**0.5).softmax(0)
            heads.append(weight_S @ v[: t + 1, theirs])
        rows.append(torch.cat(heads))
    return torch.stack(rows) @ w["o_proj.weight"].T


def mixture(w, layer, x_TD):
    """Token by token, expert by expert; the router reads the full width, the experts the latent one if there is one."""
    rows = []
    for x in x_TD:
        s = (w["gate.weight"] @ x).sigmoid()
        chosen = (s + w["gate.e_score_correction_bias"]).argsort(descending=True)[: layer.active]
        u, routed = (w["fc1_latent_proj.weight"] @ x if layer.latent else x), 0
        for e in chosen:
            inner = (w["experts.up_proj"][e] @ u).clamp_min(0).pow(2)
            routed = routed + layer.scale * s[e] / s[chosen].sum() * (w["experts.down_proj"][e] @ inner)
        routed = w["fc2_latent_proj.weight"] @ routed if layer.latent else routed
        shared = (w["shared_experts.up_proj.weight"] @ x).clamp_min(0).pow(2)
        rows.append(routed + w["shared_experts.down_proj.weight"] @ shared)
    return torch.stack(rows)


def by_hand(model, hidden_TD, id_T, depths):
    """Depth k for one document. It has len - k positions, the last of which reads the document's last token."""
    weights, config = {n.removeprefix("mtp."): w for n, w in model.state_dict().items()}, model.config
    inside = lambda prefix: {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
    out, h = [], hidden_TD
    for k in range(1, depths + 1):
        ahead, h = weights["backbone.embeddings.weight"][id_T[k:]], h[: len(id_T) - k]
        joined = [rms(ahead, weights["layers.0.enorm.weight"]), rms(h, weights["layers.0.hnorm.weight"])]
        f = torch.cat(joined, -1) @ weights["layers.0.eh_proj.weight"].T
        for i, layer in enumerate(config.mtp):
            mixer = causal_attention if isinstance(layer, Attention) else mixture
            f = f + mixer(inside(f"layers.{i}.mixer."), layer, rms(f, weights[f"layers.{i}.norm.weight"]))
        h = rms(f, weights[f"layers.{len(config.mtp) - 1}.final_layernorm.weight"])
        out.append(h)
    return out


# ------------------------------------------------------------------------------------------------------------ tests


@pytest.mark.parametrize("borders", [[0, TIME], [0, 6, TIME], [0, 1, 3, 12, TIME]], ids=str)
@pytest.mark.parametrize("name", ["toy", "lightning", "super"])
@torch.no_grad()
def test_each_depth_is_its_description_in_each_document(name, borders, twin):
    """At depth k the description says nothing of the last k positions of a document, and neither does the test."""
    model, tokens_BT = twin(name), tokens()
    document_BT = torch.zeros_like(tokens_BT)
    for number, begin in enumerate(borders[:-1]):
        document_BT[:, begin:] = number
    documents = None if len(borders) == 2 else document_BT
    hidden_BTD, _ = model.hidden(tokens_BT, document_BT=documents)
    got = model.mtp_hidden(hidden_BTD, tokens_BT, 3, documents)
    assert len(got) == 3 and all(h.shape == hidden_BTD.shape for h in got)
    for row in range(ROWS):
        for lo, hi in zip(borders, borders[1:], strict=False):
            want = by_hand(model, hidden_BTD[row, lo:hi], tokens_BT[row, lo:hi], min(3, hi - lo - 1))
            for k, w in enumerate(want, start=1):
                torch.testing.assert_close(got[k - 1][row, lo : hi - k], w, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_a_block_may_hold_any_attention_and_expert_layers(stir):
    toy = shrink(preset("toy"))
    attention, experts = Attention(heads=2, groups=1, head_width=8), Experts(experts=4, active=2, hidden=8, shared=8)
    model, tokens_BT = stir(dataclasses.replace(toy, mtp=lay("E**E", attention, experts))), tokens()
    hidden_BTD, _ = model.hidden(tokens_BT)
    for k, h in enumerate(model.mtp_hidden(hidden_BTD, tokens_BT, 2), start=1):
        want = by_hand(model, hidden_BTD[0], tokens_BT[0], 2)[k - 1]
        torch.testing.assert_close(h[0, :-k], want, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_entry_k_minus_1_at_t_has_read_tokens_up_to_t_plus_k_and_no_further(twin):
    model, tokens_BT = twin("super"), tokens()
    read = lambda ids: model.mtp_hidden(model.hidden(ids)[0], ids, 3)
    want, changed = read(tokens_BT), tokens_BT.clone()
    changed[:, 8] = (changed[:, 8] + 1) % 97
    for k, (before, after) in enumerate(zip(want, read(changed), strict=True), start=1):
        moved_T = (before - after).abs().amax((0, 2)) > 1e-9
        assert not moved_T[: 8 - k].any() and moved_T[8 - k]


@torch.no_grad()
def test_depth_two_reads_depth_one_and_not_the_stack(twin):
    model, tokens_BT = twin("super"), tokens()
    hidden_BTD, _ = model.hidden(tokens_BT)
    one, two = model.mtp_hidden(hidden_BTD, tokens_BT, 2)
    shifted = torch.cat([tokens_BT[:, 1:], tokens_BT[:, :1]], dim=1)  # the token two ahead as the token one ahead
    (again,) = model.mtp_hidden(one, shifted, 1)
    torch.testing.assert_close(two[:, :-2], again[:, :-2], rtol=1e-12, atol=1e-12)
    (skipped,) = model.mtp_hidden(hidden_BTD, shifted, 1)
    assert not torch.allclose(two[:, :-2], skipped[:, :-2])


def test_every_depth_teaches_the_one_block_the_stack_the_embedding_and_the_head(stir):
    model, tokens_BT = stir(shrink(preset("super"))), tokens()
    watched = [
        model.mtp.layers[0].eh_proj.weight,
        model.mtp.layers[1].mixer.experts.up_proj,
        model.backbone.layers[0].mixer.in_proj.weight,
        model.backbone.embeddings.weight,
        model.head_weight,
    ]
    hidden_BTD, _ = model.hidden(tokens_BT)
    losses = [model.head(h[:, :-3]).log_softmax(-1)[..., 5].sum() for h in model.mtp_hidden(hidden_BTD, tokens_BT, 3)]
    apart = [torch.autograd.grad(loss, watched, retain_graph=True) for loss in losses]
    together = torch.autograd.grad(sum(losses), watched)
    for summed, *each in zip(together, *apart, strict=True):
        assert all(gradient.any() for gradient in each)
        torch.testing.assert_close(summed, sum(each), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_more_depths_than_tokens_and_none_at_all_are_allowed(twin):
    model, tokens_BT = twin("toy"), tokens()[:, :2]
    hidden_BTD, _ = model.hidden(tokens_BT)
    assert model.mtp_hidden(hidden_BTD, tokens_BT, 0) == []
    deep = model.mtp_hidden(hidden_BTD, tokens_BT, 4)
    assert len(deep) == 4 and all(h.shape == hidden_BTD.shape and h.isfinite().all() for h in deep)


def test_a_model_without_the_block_says_so(twin):
    model, tokens_BT = twin("nano"), tokens()
    hidden_BTD, _ = model.hidden(tokens_BT)
    with pytest.raises(ValueError, match="no multi-token-prediction block; set mtp="):
        model.mtp_hidden(hidden_BTD, tokens_BT, 1)
