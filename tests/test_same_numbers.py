"""The law of the house on the native path: a text gives the same bits however it is cut, in any batch, in a State or in
Lanes, in inference and in training.

Held at every instruction level, for stacks of every kind of layer, in float32, in bf16, and with matrices in few bits.
"""

import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from nautilus.config import Attention, Config, Experts, Linear, Mamba, Mlp, Nothing, Rotary
from nautilus.model.lanes import Lanes, new_memory
from nautilus.model.language import Language
from nautilus.ops.cpu.tape import record
from nautilus.ops.linear import packed_once
from nautilus.ops.pages import PAGE, Rows

EXPERTS = {"experts": 6, "active": 2, "hidden": 10}
LAYERS = (
    Mamba(heads=4, head_width=12, state=6, groups=2),
    Experts(**EXPERTS, shared=14, latent=8, scale=2.5),
    Attention(heads=4, groups=2, head_width=10),
    Experts(**EXPERTS, gated=True, score="softmax"),
    Attention(heads=6, groups=2, head_width=16, window=20, rotary=Rotary(), head_norm=True),
    Mlp(hidden=22),
    Experts(**EXPERTS, gated=True, shared=14, latent=8),
    Attention(heads=2, groups=2, head_width=18, rotary=Rotary(theta=500.0, factor=8.0, original=32)),
    Mlp(hidden=22, gated=True),
    Attention(heads=4, groups=1, head_width=8, head_norm=True),
    Experts(**EXPERTS, expert_groups=3, active_groups=2, normalise=False),
    Linear(),
    Nothing(),
)
NUMBERS = ["float32", "bfloat16", "nvfp4", "fp8_e4m3"]
VOCAB, TIME, ROWS = 50, 75, 3
FIXTURES = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
cut_sets = st.sets(st.integers(1, TIME - 1), max_size=6)


def build(layers, numbers, in_few_bits, seed=3):
    """numbers: the dtype of activations, or the format of matrices beside bf16 activations."""
    model = Language(Config(vocab=VOCAB, width=20, layers=tuple(layers))).initialise(seed).eval()
    for name, weight in model.named_parameters():
        # At first all scores are nearly 0: no query would prefer one key to another.
        weight.data *= 8 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1
    model.compute = torch.float32 if numbers == "float32" else torch.bfloat16
    return model if numbers in NUMBERS[:2] else in_few_bits(model, numbers)


@pytest.fixture(scope="module", params=NUMBERS)
def model(request, in_few_bits):
    return build(LAYERS, request.param, in_few_bits)


def tokens(seed, rows=ROWS):
    return torch.randint(0, VOCAB, (rows, TIME), generator=torch.Generator().manual_seed(seed))


def documents(seed):
    """Numbers of documents, about three in a row."""
    begins = torch.rand(ROWS, TIME, generator=torch.Generator().manual_seed(seed)) < 2 / TIME
    return 1 + begins.long().cumsum(1)


def spans(cuts):
    return itertools.pairwise([0, *sorted(cuts), TIME])


def in_state(model, tokens_BT, cuts, document_BT=None):
    """Logits of a text that is read in pieces, each from the State that the last one left."""
    state, parts = None, []
    for begin, end in spans(cuts):
        document = None if document_BT is None else document_BT[:, begin:end]
        hidden_BTD, state = model.hidden(tokens_BT[:, begin:end], state=state, document_BT=document)
        parts.append(model.head(hidden_BTD))
    return torch.cat(parts, 1)


def new_lanes(model, rows):
    """Slots and pages that lie in no order."""
    each = math.ceil(TIME / PAGE)
    memory = new_memory(model.config, slots=rows, pages=rows * each, dtype=model.compute)
    ints = lambda *shape: torch.zeros(*shape, dtype=torch.int32)
    table_BL = torch.randperm(rows * each).int().view(rows, each)
    where = Rows(begin=ints(rows + 1), length=ints(rows), table_BL=table_BL)
    return Lanes(layers=memory, slot_B=torch.arange(rows).flip(0).int(), rows=where)


def point(lanes, spans):
    """Row by row, from which of its tokens to which one."""
    lanes.rows.begin.copy_(torch.tensor([0, *itertools.accumulate(end - begin for begin, end in spans)]))
    lanes.rows.length.copy_(torch.tensor([end for _, end in spans]))


@torch.no_grad()
def in_lanes(model, tokens_BT, *cuts):
    """The same with memory that is changed where it lies; each row has its own cuts, or all the same."""
    lanes, parts = new_lanes(model, len(tokens_BT)), [[] for _ in tokens_BT]
    each = [[*spans(some)] for some in (cuts if len(cuts) > 1 else cuts * len(tokens_BT))]
    for now in itertools.zip_longest(*each, fillvalue=(TIME, TIME)):
        point(lanes, now)
        pieces = [row_T[begin:end] for row_T, (begin, end) in zip(tokens_BT, now, strict=True)]
        logits_NV = model.head(model.hidden(torch.cat(pieces)[None], state=lanes)[0])[0]
        for part, piece in zip(parts, logits_NV.split([len(piece) for piece in pieces]), strict=True):
            part.append(piece)
    return torch.stack([torch.cat(part) for part in parts])


@settings(max_examples=10, **FIXTURES)
@given(cuts=cut_sets, seed=st.integers(0, 99), packed=st.booleans())
def test_any_cut_and_any_company_give_the_same_bits(level, model, cuts, seed, packed):
    tokens_BT, document_BT = tokens(seed), documents(seed) if packed else None
    whole = model.head(model.hidden(tokens_BT, document_BT=document_BT)[0])
    alone = None if document_BT is None else document_BT[1:2]
    assert torch.equal(in_state(model, tokens_BT[1:2], cuts, alone)[0], whole[1])
    if not packed:
        assert torch.equal(in_lanes(model, tokens_BT[1:], cuts), whole[1:])
        assert torch.equal(in_lanes(model, tokens_BT, cuts, {1, TIME - 1 - seed // 2}, ()), whole)


def test_a_text_read_token_by_token_gives_the_same_bits(level, model):
    tokens_BT, each = tokens(1, rows=2), range(1, TIME)
    with torch.no_grad():
        whole, one_by_one = model.head(model.hidden(tokens_BT)[0]), in_state(model, tokens_BT, each)
    assert torch.equal(one_by_one, whole) and torch.equal(in_lanes(model, tokens_BT, each), whole)


def test_training_and_inference_give_the_same_bits(level, model):
    """Matrices in few bits are not trained: of them only what a forward in training mode does besides is held here."""
    with torch.no_grad():
        want = model.head(model.hidden(tokens(0, rows=2))[0])
    got = model.train().head(model.hidden(tokens(0, rows=2))[0])
    model.eval()
    assert torch.equal(got, want) and got.requires_grad == any(w.requires_grad for w in model.parameters())


@torch.inference_mode()
def test_a_step_of_all_kinds_of_layers_is_recorded_and_its_replay_gives_the_same_bits(level, model):
    """So nothing in it is computed by PyTorch."""
    tokens_BT, packs = tokens(2, rows=2), {}
    whole, lanes, token_1B = model.head(model.hidden(tokens_BT)[0]), new_lanes(model, 2), tokens_BT[:, :1].T.clone()

    def step():
        with packed_once(packs):
            return model.head(model.hidden(token_1B, state=lanes)[0])[0]

    rows, tape = lanes.rows, None
    for t in range(TIME):
        point(lanes, [(t, t + 1)] * 2)
        token_1B.copy_(tokens_BT[:, t : t + 1].T)
        if t == 1:  # matrices are packed in the first step
            tape = record(step, [token_1B, lanes.slot_B, rows.begin, rows.length, rows.table_BL])
        got = step() if tape is None else tape.result if t == 1 else tape.replay()
        assert torch.equal(got, whole[:, t])


@settings(max_examples=15, **FIXTURES)
@given(
    layers=st.lists(st.sampled_from(LAYERS), min_size=1, max_size=6), numbers=st.sampled_from(NUMBERS),
    cuts=cut_sets, seed=st.integers(0, 99),
)  # fmt: skip
def test_any_hybrid_gives_the_same_bits_in_any_cut_any_company_and_in_training(
    level, in_few_bits, layers, numbers, cuts, seed
):
    model, tokens_BT = build(layers, numbers, in_few_bits, seed=seed), tokens(seed)
    trained = model.train().head(model.hidden(tokens_BT)[0])
    model.eval()
    with torch.no_grad():
        assert torch.equal(model.head(model.hidden(tokens_BT)[0]), trained)
        assert torch.equal(in_state(model, tokens_BT[:1], cuts), trained[:1])
    assert torch.equal(in_lanes(model, tokens_BT[1:], cuts), trained[1:])
