import dataclasses

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from nautilus.config import Attention, Experts, Mamba, Mlp, lay, weight_count
from nautilus.model.language import Language
from nautilus.presets import PRESETS, preset, shrink

ROWS, TIME = 2, 19
few = settings(max_examples=5, deadline=None, derandomize=True)
edges_of = lambda cuts, time=TIME: [0, *sorted(c for c in set(cuts) if c < time), time]


def tokens(seed=0, rows=ROWS, time=TIME):
    return torch.randint(0, 97, (rows, time), generator=torch.Generator().manual_seed(seed))


def same(got, want, far=1e-9):
    torch.testing.assert_close(got, want, rtol=far, atol=far)


def fed_in_pieces(model, tokens_BT, document_BT, edges):
    pieces, state = [], None
    for lo, hi in zip(edges, edges[1:], strict=False):
        document = None if document_BT is None else document_BT[:, lo:hi]
        logits, state = model(tokens_BT[:, lo:hi], state=state, document_BT=document)
        pieces.append(logits)
    return torch.cat(pieces, 1), state


# ---------------------------------------------------------------------------------------------- the law of state


row_of_documents = st.lists(st.tuples(st.integers(0, 3), st.integers(1, TIME)), min_size=1, max_size=6)


def numbered(row):
    """Document numbers of one row of tokens from (number, length) pairs, the last one filling the row."""
    line = [number for number, length in row for _ in range(length)]
    return (line + [line[-1]] * TIME)[:TIME]


@few
@given(
    cuts=st.sets(st.integers(1, TIME - 1), max_size=6),
    documents=st.none() | st.lists(row_of_documents, min_size=ROWS, max_size=ROWS),
    seed=st.integers(0, 999),
)
@torch.no_grad()
def test_any_way_of_feeding_the_tokens_gives_the_same_logits(name, cuts, documents, seed, twin):
    """The law of state: prefill, chunked prefill and decode, with any documents in any places."""
    model, tokens_BT = twin(name), tokens(seed)
    document_BT = None if documents is None else torch.tensor([numbered(row) for row in documents])
    want, whole = model(tokens_BT, document_BT=document_BT)
    got, state = fed_in_pieces(model, tokens_BT, document_BT, edges_of(cuts))
    same(got, want)
    after = tokens(seed + 1, time=3)
    same(model(after, state=state)[0], model(after, state=whole)[0])


@torch.no_grad()
def test_one_token_at_a_time_gives_the_same_logits(name, twin):
    model, tokens_BT = twin(name), tokens(5, time=11)
    document_BT = torch.tensor([[0] * 3 + [1] * 8, [2] * 11])
    for document in (None, document_BT):
        want, _ = model(tokens_BT, document_BT=document)
        same(fed_in_pieces(model, tokens_BT, document, list(range(12)))[0], want)


@torch.no_grad()
def test_packed_documents_equal_the_documents_alone(name, twin):
    """Also when their numbers come again later in the row: only neighbours belong together."""
    model, tokens_BT = twin(name), tokens(1)
    borders = [[0, 1, 8, 9, 17, TIME], [0, 5, TIME]]
    document_BT = torch.zeros_like(tokens_BT)
    for row, marks in enumerate(borders):
        for number, (lo, hi) in enumerate(zip(marks, marks[1:], strict=False)):
            document_BT[row, lo:hi] = number % 2
    packed, _ = model(tokens_BT, document_BT=document_BT)
    for row, marks in enumerate(borders):
        for lo, hi in zip(marks, marks[1:], strict=False):
            same(packed[row : row + 1, lo:hi], model(tokens_BT[row : row + 1, lo:hi])[0])


@few
@given(pads=st.lists(st.integers(0, 9), min_size=3, max_size=3), cuts=st.sets(st.integers(1, TIME - 1), max_size=3))
@torch.no_grad()
def test_left_padding_equals_no_padding(name, pads, cuts, twin):
    """Rows of different lengths pushed to the right edge, the padding a document of its own; then decoding goes on."""
    model, text = twin(name), tokens(2, rows=3, time=TIME)
    rows = [text[i, : TIME - pad] for i, pad in enumerate(pads)]
    padded = torch.stack([torch.cat([torch.zeros(p, dtype=torch.int64), r]) for p, r in zip(pads, rows, strict=True)])
    document_BT = torch.tensor([[0] * pad + [1] * (TIME - pad) for pad in pads])
    got, state = fed_in_pieces(model, padded, document_BT, edges_of(cuts))
    new = tokens(3, rows=3, time=4)
    later, _ = model(new, state=state)  # no numbers given: the last document goes on
    numbered_later, _ = model(new, state=state, document_BT=torch.ones(3, 4, dtype=torch.int64))
    same(later, numbered_later)
    for i, pad in enumerate(pads):
        alone, alone_state = model(rows[i][None])
        same(got[i : i + 1, pad:], alone)
        same(later[i : i + 1], model(new[i : i + 1], state=alone_state)[0])


@torch.no_grad()
def test_huge_numbers_in_other_documents_are_not_felt(name, twin):
    model, tokens_BT = twin(name), tokens(4)
    document_BT = torch.tensor([[0] * 7 + [1] * 5 + [2] * 7] * 2)
    embeds_BTD = model.embed(tokens_BT)
    want, _ = model.hidden(embeds_BTD=embeds_BTD, document_BT=document_BT)
    loud = embeds_BTD.clone()
    loud[:, :7] *= 1e6
    loud[:, 12:] = 1e6
    got, _ = model.hidden(embeds_BTD=loud, document_BT=document_BT)
    same(got[:, 7:12], want[:, 7:12])
    assert not torch.allclose(got[:, 12:], want[:, 12:])


@pytest.mark.parametrize("grad", [False, True])
def test_one_state_continues_in_two_ways_that_do_not_disturb_each_other(name, grad, twin):
    """The two take turns, and the buffers have room left, so that each would trip over what the other wrote."""
    model, prefix = twin(name), tokens(6, time=7)
    ways = [tokens(7, time=6), tokens(8, time=6)]
    with torch.set_grad_enabled(grad):
        _, shared = model(prefix[:, 5:], state=model(prefix[:, :5])[1])
        states, pieces = [shared, shared], [[], []]
        for t in range(0, 6, 2):
            for way in (0, 1):
                logits, states[way] = model(ways[way][:, t : t + 2], state=states[way])
                pieces[way].append(logits)
        again, _ = model(ways[0], state=shared)
        for way in (0, 1):
            same(torch.cat(pieces[way], 1), model(torch.cat([prefix, ways[way]], 1))[0][:, 7:])
        same(again, torch.cat(pieces[0], 1))


@torch.no_grad()
def test_rows_of_a_state_go_on_in_any_order_and_number(name, twin):
    model, prefix, index = twin(name), tokens(9, rows=3, time=8), torch.tensor([2, 0, 0, 1])
    new = tokens(10, rows=4, time=3)
    for document_BT in (None, torch.tensor([[0] * 3 + [1] * 5, [0] * 8, [0] + [1] * 7])):
        _, state = model(prefix, document_BT=document_BT)
        got, _ = model(new, state=state.rows(index))
        rest = None if document_BT is None else torch.cat([document_BT, document_BT[:, -1:].expand(-1, 3)], 1)[index]
        want, _ = model(torch.cat([prefix[index], new], 1), document_BT=rest)
        same(got, want[:, 8:])


@torch.no_grad()
def test_a_state_holds_on_to_no_more_than_it_remembers(twin):
    """A long prefill leaves three inputs of the convolution behind, not all of them."""
    _, state = twin("toy")(tokens(rows=1, time=300))
    tail_BRC = state.layers[0].tail_BRC
    assert tail_BRC.untyped_storage().nbytes() <= 2 * tail_BRC.nbytes


def test_calls_that_train_the_queries_alone_can_share_a_cache(stir):
    """Keys without a gradient are written in place; no attention of an earlier call may need what was there before."""
    model = stir(shrink(preset("llama_3_1_8b")))
    for path, parameter in model.named_parameters():
        parameter.requires_grad_("layers.0.mixer.q_proj" in path)
    state, total = None, 0
    for lo, hi in ((0, 4), (4, 5), (5, 6), (6, 9)):
        hidden_BTD, state = model.hidden(tokens()[:, lo:hi], state=state)
        total = total + hidden_BTD.sum()
    weight = model.backbone.layers[0].mixer.q_proj.weight
    got = torch.autograd.grad(total, weight)[0]
    want = torch.autograd.grad(model.hidden(tokens()[:, :9])[0].sum(), weight)[0]
    same(got, want)


# ------------------------------------------------------------------------------------- same numbers, other routes


def test_reference_ops_give_the_same_numbers_and_the_same_gradients(name, twin, monkeypatch):
    model, tokens_BT = twin(name), tokens(11)
    document_BT = torch.tensor([[0] * 3 + [1] * 16, [0] * 12 + [1] * 2 + [2] * 5])
    parameters = dict(model.named_parameters())

    def loss_and_gradients():
        hidden_BTD, _ = model.hidden(tokens_BT, document_BT=document_BT)
        loss = model.head(hidden_BTD).log_softmax(-1)[..., 5].sum()
        for ahead_BTD in model.mtp_hidden(hidden_BTD, tokens_BT, 2, document_BT) if model.config.mtp else ():
            loss = loss + model.head(ahead_BTD).log_softmax(-1)[..., 7].sum()
        return loss, torch.autograd.grad(loss, list(parameters.values()))

    loss, gradients = loss_and_gradients()
    monkeypatch.setenv("NAUTILUS_OPS", "reference")
    want_loss, want = loss_and_gradients()
    same(loss, want_loss)
    for (path, _), got, reference in zip(parameters.items(), gradients, want, strict=True):
        assert (got - reference).norm() <= 1e-10 * reference.norm() + 1e-13, path
    assert all(gradient.any() for gradient in gradients if gradient.ndim == 2), "a matrix has no gradient at all"


@torch.no_grad()
def test_embeddings_in_place_of_tokens_give_the_same(twin):
    model, tokens_BT = twin("toy"), tokens()
    want, _ = model.hidden(tokens_BT)
    got, _ = model.hidden(embeds_BTD=model.backbone.embeddings.weight[tokens_BT])
    assert torch.equal(got, want)
    logits, _ = model(tokens_BT)
    assert torch.equal(logits, want @ model.lm_head.weight.T) and torch.equal(logits, model.head(want))


@torch.no_grad()
def test_a_tied_head_is_the_embedding(stir):
    model = stir(dataclasses.replace(shrink(preset("toy")), tied=True))
    assert model.head_weight is model.backbone.embeddings.weight
    assert not any(name.startswith("lm_head") for name in model.state_dict())
    logits, _ = model(tokens())
    assert torch.equal(logits, model.hidden(tokens())[0] @ model.backbone.embeddings.weight.T)


ALL_KINDS = "M_*ELE-_"


def every_kind(**changes):
    records = (
        Mamba(heads=6, head_width=8, state=16, groups=2, chunk=8),
        Attention(heads=4, groups=2, head_width=16),
        Experts(experts=8, active=3, hidden=24, shared=40, latent=20),
        Mlp(hidden=64, gated=True),
    )
    return dataclasses.replace(shrink(preset("toy")), layers=lay(ALL_KINDS, *records), **changes)


@torch.no_grad()
def test_taps_see_the_residual_after_every_layer_in_order(stir):
    """What tap i sees is what the first i + 1 layers alone compute, layers without weights included."""
    config = every_kind()
    model, tokens_BT = stir(config), tokens()
    seen, twice = [], []
    hidden_BTD, _ = model.hidden(tokens_BT, taps=[lambda i, x: seen.append((i, x)), lambda i, x: twice.append(i)])
    assert [i for i, _ in seen] == twice == list(range(len(ALL_KINDS)))
    assert torch.equal(model.backbone.norm_f(seen[-1][1]), hidden_BTD)
    for i, x in seen:
        short = Language(dataclasses.replace(config, layers=config.layers[: i + 1]), dtype=torch.float64).eval()
        short.load_state_dict(model.state_dict(), strict=False)
        same(model.backbone.norm_f(x), short.hidden(tokens_BT)[0])
    assert torch.equal(seen[1][1], seen[0][1]), "a layer of nothing passes the residual on"


@torch.no_grad()
def test_a_linear_layer_is_one_matrix_and_nothing_has_no_weights(stir):
    model, seen = stir(every_kind()), []
    model.hidden(tokens(), taps=[lambda i, x: seen.append(x)])
    layer = model.backbone.layers[4]
    unit = seen[3] / (seen[3].square().mean(-1, keepdim=True) + model.config.norm_eps).sqrt() * layer.norm.weight
    same(seen[4], seen[3] + unit @ layer.mixer.linear.weight.T)
    assert not list(model.backbone.layers[1].parameters())


@torch.no_grad()
def test_a_later_token_never_changes_an_earlier_logit(name, twin):
    model, tokens_BT = twin(name), tokens(12)
    want, _ = model(tokens_BT)
    changed = tokens_BT.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 97
    got, _ = model(changed)
    same(got[:, :10], want[:, :10])
    assert (got[:, 10] - want[:, 10]).abs().max() > 1e-6


# ------------------------------------------------------------------------------------------- sizes and bad input


@pytest.mark.parametrize("preset_name", PRESETS)
def test_a_model_on_the_meta_device_has_the_weights_that_the_config_counts(preset_name):
    config = preset(preset_name)
    stored = Language(config, device="meta").state_dict()
    sizes = {part: 0 for part in ("main", "mtp")}
    for path, tensor in stored.items():
        assert tensor.device.type == "meta"
        sizes["mtp" if path.startswith("mtp.") else "main"] += tensor.numel()
    assert sizes == {part: weight_count(config)[part] for part in sizes}


def test_parameters_carry_the_names_of_the_released_checkpoints(twin):
    names = set(twin("super").state_dict())
    for name in (
        "backbone.embeddings.weight",
        "backbone.layers.0.norm.weight",
        *(f"backbone.layers.0.mixer.{n}" for n in ("in_proj.weight", "conv1d.weight", "conv1d.bias", "A_log", "D")),
        *(f"backbone.layers.0.mixer.{n}" for n in ("dt_bias", "norm.weight", "out_proj.weight")),
        *(f"backbone.layers.1.mixer.{n}" for n in ("gate.weight", "gate.e_score_correction_bias")),
        *(f"backbone.layers.1.mixer.{n}" for n in ("experts.up_proj", "experts.down_proj")),
        *(f"backbone.layers.1.mixer.shared_experts.{n}_proj.weight" for n in ("up", "down")),
        *(f"backbone.layers.1.mixer.fc{n}_latent_proj.weight" for n in (1, 2)),
        *(f"backbone.layers.7.mixer.{n}_proj.weight" for n in "qkvo"),
        "backbone.norm_f.weight",
        "lm_head.weight",
        *(f"mtp.layers.0.{n}.weight" for n in ("enorm", "hnorm", "eh_proj", "norm")),
        *(f"mtp.layers.1.{n}.weight" for n in ("norm", "final_layernorm", "mixer.gate")),
    ):
        assert name in names, name


def test_bad_input_is_refused_in_words(twin):
    model, tokens_BT = twin("toy"), tokens()
    with pytest.raises(ValueError, match="either tokens_BT or embeds_BTD, and exactly one"):
        model.hidden(tokens_BT, embeds_BTD=model.embed(tokens_BT))
    with pytest.raises(ValueError, match="either tokens_BT or embeds_BTD, and exactly one"):
        model.hidden()
    with pytest.raises(ValueError, match="2 rows of 0 tokens; it needs at least one"):
        model.hidden(tokens_BT[:, :0])
    with pytest.raises(ValueError, match=r"document_BT has shape \(2, 18\), the tokens \(2, 19\)"):
        model.hidden(tokens_BT, document_BT=torch.zeros(2, 18, dtype=torch.int64))
    _, state = model.hidden(tokens_BT)
    with pytest.raises(ValueError, match="give document_BT from the first call on"):
        model.hidden(tokens_BT, state=state, document_BT=torch.zeros_like(tokens_BT))
