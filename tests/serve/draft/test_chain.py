"""What a block drafts in the engine is what it drafts over the whole text, computed anew."""

import pytest
import torch

from nautilus.config import Config, Experts, lay
from nautilus.model.eagle import Eagle, sizes_for
from nautilus.model.language import Language
from nautilus.model.state import place
from nautilus.ops.cpu.library import native
from nautilus.serve import Engine, Sampling
from nautilus.serve.draft.chain import Chain, EagleHead, MtpHead
from nautilus.serve.forward import Forward, Part
from nautilus.serve.memory import Berths
from tests.serve.test_scheduler import ATTENTION, MAMBA, TOKENIZER, VOCAB

torch.set_num_threads(1)
EXPERTS = Experts(experts=6, active=2, hidden=32)


def model_of(pattern="ME*M", block="*E", dtype=torch.float32, **more):
    layers = lay(pattern, MAMBA, ATTENTION, EXPERTS)
    mtp = lay(block, MAMBA, ATTENTION, EXPERTS)
    config = Config(vocab=VOCAB, width=64, positions=320, layers=layers, mtp=mtp, **more)
    model = Language(config, dtype=dtype).initialise(3)
    model.head_weight.data *= 6
    return model.requires_grad_(False).eval()


MODELS = {dtype: model_of(dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}


class Played:
    """A model and its block in an engine that is told what the answer is."""

    def __init__(self, model, rows=3, head=None):
        self.engine = Engine(model, TOKENIZER, max_tokens=300, rows=rows, chunk=7)
        head = head or MtpHead(model, VOCAB)
        self.engine.berths = Berths(model, rows=rows, max_tokens=300, window=9, beside=head.layers)
        self.forward = Forward(model, self.engine.berths)
        self.chain = self.forward.watcher = Chain(self.forward, head)

    def begin(self, tokens):
        request = self.engine.request(list(tokens), Sampling(max_tokens=200))
        request.berth = self.engine.berths.take(300)
        for at in range(0, len(tokens), 7):
            part = tokens[at : at + 7]
            logits = self.forward.read([Part(tokens=part, berth=request.berth, last=at + 7 >= len(tokens))])
        request.tokens.append(int(logits.argmax()))
        return request

    def step(self, requests):
        logits = self.forward.step([one.berth for one in requests], [one.tokens[-1] for one in requests])
        for request, row in zip(requests, logits, strict=True):
            request.tokens.append(int(row.argmax()))

    def verify(self, request, tried, count):
        """count of 1 + len(tried) tokens stay, whatever the model thinks of them."""
        tokens = [request.tokens[-1], *tried]
        self.forward.attempt([request.berth], [tokens])
        self.forward.accept([request.berth], [count])
        request.tokens += [*tried[: count - 1], 5]


def naive(model, tokens, count):
    """count drafted tokens after these, everything computed from the beginning."""
    tokens, found, probs = list(tokens), [], []
    known = len(tokens)
    hidden_BTD, _ = model.hidden(torch.tensor([tokens[:-1]]))
    feature_BTD = torch.cat([torch.zeros_like(hidden_BTD[:, :1]), hidden_BTD], 1)
    for _ in range(count):
        ids_BT = torch.tensor([tokens])
        out_BTD = model.mtp(feature_BTD, model.embed(ids_BT), place(None, None, 1, len(tokens), "cpu"))
        prob_V = model.head(out_BTD[:, -1:])[0, 0].softmax(-1)
        tokens.append(int(prob_V.argmax()))
        found.append(tokens[-1])
        probs.append(float(prob_V.max()))
        feature_BTD = torch.cat([feature_BTD, out_BTD[:, -1:]], 1)
    assert len(tokens) == known + count
    return found, probs


def assert_drafts(played, model, asked):
    got = played.chain.draft(asked)
    for request, count in asked.items():
        tokens, probs = naive(model, request.tokens, count)
        assert list(got[request].tokens) == tokens
        assert got[request].probs == pytest.approx(probs, rel=2e-3 if model.compute == torch.float32 else 0.2)


@torch.no_grad()
def test_drafts_are_those_of_the_whole_text_computed_anew():
    model = MODELS[torch.float32]
    played = Played(model)
    one, two = played.begin([*range(3, 30)]), played.begin([7, 7, 9])
    assert_drafts(played, model, {one: 4, two: 2})
    for _ in range(3):
        played.step([one, two])
    assert_drafts(played, model, {one: 3})
    played.verify(one, [4, 8, 15, 16], 3)
    played.verify(two, [23, 42], 1)
    assert_drafts(played, model, {two: 5, one: 1})
    for count in (1, 2, 5):
        played.verify(one, [4, 8, 15, 16], count)
        played.step([two])
    assert_drafts(played, model, {one: 6, two: 6})
    for _ in range(3):  # the second time of a size is recorded, from then on it is replayed
        played.verify(one, [1, 2], 2)
        assert_drafts(played, model, {one: 4})


@torch.no_grad()
@pytest.mark.skipif(native().functions is None, reason="only native calls are recorded")
@pytest.mark.parametrize("dtype", MODELS, ids=str)
def test_all_of_a_chain_is_replayed(dtype):
    played = Played(MODELS[dtype])
    one = played.begin([*range(3, 30)])
    for _ in range(4):
        played.verify(one, [1, 2], 2)
        played.chain.draft({one: 3})
    assert played.chain.calls[1, 1].recorded.tape and played.chain.calls[1, 2].recorded.tape
    assert played.chain.tops[1].recorded.tape


@torch.no_grad()
def test_a_prefix_that_another_goes_on_from_holds_all_entries_but_one():
    """A finished request leaves entries as far as the model has read, not one of a token it has not."""
    model = MODELS[torch.float32]
    played = Played(model)
    one = played.begin([*range(3, 30)])
    for _ in range(5):
        played.step([one])
    played.chain.catch_up([one], leaving=True)
    assert len(one.berth.behind) == 1 and one.berth.length == len(one.tokens) - 1
    assert_drafts(played, model, {one: 4})


@torch.no_grad()
def test_a_chain_ends_where_it_is_told_and_a_smaller_head_drafts_frequent_tokens_only():
    model = MODELS[torch.float32]
    played = Played(model)
    one = played.begin([*range(3, 30)])
    asked = []
    played.chain.draft({one: 6}, lambda request, probs: asked.append(len(probs)) or len(probs) < 3)
    assert asked == [1, 2, 3]
    few = MtpHead(model, most=20)
    hidden = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(few.logits(hidden), model.head(hidden)[..., :20], atol=1e-5)


@torch.no_grad()
def test_a_draft_head_reads_the_layers_it_was_made_for():
    """Its drafts in the engine are those over the whole text."""
    model = MODELS[torch.float32]
    words = torch.arange(0, VOCAB, 2)
    eagle = Eagle(model.config, sizes_for(model.config, len(words)), words).initialise(model, 0)
    played = Played(model, head=EagleHead(eagle))
    one, two = played.begin([*range(3, 30)]), played.begin([7, 7, 9])
    for _ in range(3):
        got = played.chain.draft({one: 4, two: 2})
        for request, count in ((one, 4), (two, 2)):
            assert list(got[request].tokens) == by_head(model, eagle, request.tokens, count)
        played.verify(one, [4, 8, 15, 16], 3)
        played.step([two])
    assert played.chain.calls[2, 2].recorded.may_record is (native().functions is not None)


def by_head(model, eagle, tokens, count):
    left = {}
    model.hidden(torch.tensor([tokens[:-1]]), taps=[left.__setitem__])
    seen_BTE = torch.cat([left[layer] for layer in eagle.taps], -1)
    feature_BTD = eagle.fc(torch.cat([torch.zeros_like(seen_BTE[:, :1]), seen_BTE], 1))
    tokens = list(tokens)
    for _ in range(count):
        span = place(None, None, 1, len(tokens), "cpu")
        out_BTD = eagle(feature_BTD, model.embed(torch.tensor([tokens])), span)
        tokens.append(int(eagle.token_ids_K[eagle.head(out_BTD[:, -1]).argmax()]))
        feature_BTD = torch.cat([feature_BTD, out_BTD[:, -1:]], 1)
    return tokens[-count:]
