import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from nautilus.eval.loss import batches, begin, cut, document_nats, held_out, nats_by_position, ratio_error, score
from nautilus.model.language import Language
from nautilus.presets import preset, shrink
from nautilus.runtime import UserError

torch.set_num_threads(1)
VOCAB = 7


class Remembering(torch.nn.Module):
    """The smallest model with a State: each position sees a fading sum of all tokens so far."""

    def __init__(self, seed: int = 0):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.embed = torch.nn.Parameter(torch.randn(VOCAB, 5, generator=draw, dtype=torch.float64))
        self.head_weight = torch.nn.Parameter(torch.randn(VOCAB, 5, generator=draw, dtype=torch.float64))

    def experts_mixers(self):
        return {}

    def hidden(self, tokens_BT, state=None, document_BT=None):
        memory, out = torch.zeros(len(tokens_BT), 5, dtype=torch.float64) if state is None else state, []
        for token_B in tokens_BT.T:
            memory = 0.7 * memory + self.embed[token_B]
            out.append(memory.tanh())
        return torch.stack(out, dim=1), memory


def one_at_a_time(model, document, start):
    """The definition: feed everything before a token, take the softmax, look the token up."""
    nats = []
    for t, token in enumerate(document):
        before = ([] if start is None else [start]) + document[:t]
        if before:
            hidden, _ = model.hidden(torch.tensor([before]))
            nats.append(-(model.head_weight @ hidden[0, -1]).log_softmax(0)[token].item())
        else:
            nats.append(math.log(VOCAB))
    return nats


def letters(text):
    return [ord(letter) % VOCAB for letter in text]


def watched_sizes(monkeypatch, model):
    sizes, plain = [], model.hidden
    monkeypatch.setattr(model, "hidden", lambda t, state=None: (sizes.append(tuple(t.shape)), plain(t, state))[1])
    return sizes


printable = st.characters(categories=("L", "M", "N", "P", "S"), include_characters=" ")
texts = st.lists(st.text(printable, min_size=1, max_size=30), min_size=1, max_size=6)
starts = st.sampled_from([None, 0, 4])
token_lists = st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=20), min_size=1, max_size=6)


@settings(max_examples=30, deadline=None)
@given(documents=token_lists, start=starts, chunk=st.integers(1, 25), budget=st.integers(1, 60))
def test_every_way_of_batching_and_cutting_gives_the_definition(documents, start, chunk, budget):
    model = Remembering()
    got = document_nats(model, documents, start=start, chunk=chunk, budget=budget)
    for document, nats in zip(documents, got, strict=True):
        want = torch.tensor(one_at_a_time(model, document, start), dtype=torch.float64)
        torch.testing.assert_close(nats.double(), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("start", [None, 4])
def test_the_probabilities_of_all_documents_of_one_length_add_up_to_one(start):
    everything = list(itertools.product(range(VOCAB), repeat=3))
    nats = document_nats(Remembering(), everything, start=start)
    assert sum(math.exp(-document.sum()) for document in nats) == pytest.approx(1, abs=1e-12)


@settings(max_examples=12, deadline=None)
@given(documents=texts, start=starts)
def test_a_uniform_model_pays_log2_of_the_vocabulary_per_token(documents, start):
    model = Remembering()
    model.head_weight.data.zero_()
    result = held_out(model, letters, {"a": documents}, start=start).scores[0]
    size = sum(len(text.encode()) for text in documents)
    assert (result.documents, result.bytes, result.tokens) == (len(documents), size, sum(map(len, documents)))
    assert result.bits_per_byte == pytest.approx(result.tokens * math.log2(VOCAB) / size, rel=1e-12)
    assert documents[1:] == [] or result.standard_error >= 0


def test_the_total_counts_every_byte_once():
    sources = {"short": ["ab", "c"], "long": ["hello world, " * 9, "again " * 7]}
    result = held_out(Remembering(), letters, sources)
    flat = held_out(Remembering(), letters, {"both": [text for documents in sources.values() for text in documents]})
    assert result.total.bits_per_byte == pytest.approx(flat.scores[0].bits_per_byte, rel=1e-12)
    assert result.total.xz_bytes == sum(each.xz_bytes for each in result.scores)
    assert result.total.documents == 4
    one_source = held_out(Remembering(), letters, {"long": sources["long"]})
    assert one_source.total.standard_error == pytest.approx(one_source.scores[0].standard_error, rel=1e-12)


def test_the_loss_by_position_adds_up_to_the_whole():
    nats = document_nats(Remembering(), [[0, 1, 2, 3, 4], [5], [2, 2, 6]])
    spans = nats_by_position(nats)
    assert [(span.first, span.last, span.tokens) for span in spans] == [(0, 0, 3), (1, 1, 2), (2, 3, 3), (4, 7, 1)]
    assert sum(span.tokens * span.nats for span in spans) == pytest.approx(sum(n.sum().item() for n in nats), rel=1e-12)
    assert nats_by_position([]) == ()


def test_the_loss_within_a_length_is_that_of_the_tokens_before_it():
    texts = {"one": ["abcde", "f"], "two": ["ccg"]}
    letters = lambda text: ["abcdefg".index(letter) for letter in text]
    result = held_out(Remembering(), letters, texts)
    nats = document_nats(Remembering(), [letters(text) for text in ("abcde", "f", "ccg")])
    for length in (1, 2, 4, 8, 100):
        assert result.within(length) == pytest.approx(torch.cat([n[:length] for n in nats]).mean().item(), rel=1e-12)
    assert result.within(3) == result.within(2)  # the positions 2 and 3 are one span
    assert math.isnan(result.within(0))


def test_no_forward_pass_exceeds_its_bounds(monkeypatch):
    model = Remembering()
    sizes = watched_sizes(monkeypatch, model)
    document_nats(model, [[0] * length for length in (3, 50, 4, 9, 1, 9)], start=0, chunk=16, budget=20)
    assert all(width <= 16 and rows * width <= 20 for rows, width in sizes)
    assert sizes == [(1, 16), (1, 16), (1, 16), (1, 2), (2, 9), (3, 4)]


@given(lengths=st.lists(st.integers(0, 40), max_size=12), budget=st.integers(1, 80))
def test_batches_hold_every_document_once_within_the_budget(lengths, budget):
    groups = list(batches(lengths, budget))
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(len(group) == 1 or len(group) * max(lengths[i] for i in group) <= budget for group in groups)


@given(documents=st.lists(st.text(max_size=12), max_size=6), limit=st.integers(0, 60))
def test_the_limit_keeps_a_prefix_of_the_text_and_cuts_between_characters(documents, limit):
    kept = cut([text.replace("\ud800", "") for text in documents], limit)
    whole, part = "".join(documents).encode(), "".join(kept).encode()
    assert whole.startswith(part) and len(part) <= limit and all(kept)
    assert len(part) == len(whole) or limit - len(part) < 4


@given(documents=token_lists, tokens=st.integers(0, 30))
def test_the_begin_of_documents_has_the_asked_number_of_tokens(documents, tokens):
    kept = begin(documents, tokens)
    whole = [token for document in documents for token in document]
    assert [token for document in kept for token in document] == whole[:tokens]
    assert all(short == long[: len(short)] for short, long in zip(kept, documents, strict=False))


def test_the_standard_error_is_that_of_a_mean_when_all_documents_are_equally_long():
    costs = torch.tensor([3.0, 5.0, 4.0, 8.0], dtype=torch.float64)
    sizes = torch.full((4,), 2.0, dtype=torch.float64)
    assert ratio_error(costs, sizes) == pytest.approx((costs / 2).std().item() / 2, rel=1e-12)
    assert math.isnan(ratio_error(costs[:1], sizes[:1]))


def test_the_standard_error_is_zero_when_every_byte_costs_the_same():
    sizes = torch.tensor([3.0, 50.0, 7.0], dtype=torch.float64)
    assert ratio_error(1.5 * sizes, sizes) == pytest.approx(0, abs=1e-12)


def test_the_compressors_see_all_documents_of_a_source_in_one_stream():
    noise = "".join(chr(33 + int(c)) for c in torch.randint(0, 90, (4000,), generator=torch.Generator().manual_seed(3)))
    nats = [torch.zeros(4000, dtype=torch.float64)] * 8
    once, again = score("a", [noise], nats[:1]), score("a", [noise] * 8, nats)
    assert 6.4 < once.xz_bits_per_byte < 8 and 6.4 < once.bz2_bits_per_byte < 8
    assert again.xz_bytes < 1.2 * once.xz_bytes and again.bz2_bytes < 2 * once.bz2_bytes, "copies cost hardly anything"


def test_watch_hears_of_every_token():
    heard = []
    document_nats(Remembering(), [[0] * 9, [1] * 2], budget=9, watch=lambda done, total: heard.append((done, total)))
    assert heard == [(9, 11), (11, 11)]


def test_a_source_without_text_is_an_error_that_names_it():
    with pytest.raises(UserError, match="no source is given"):
        held_out(Remembering(), letters, {})
    with pytest.raises(UserError, match=r"'prose'.*2 documents.*limit_bytes=99"):
        held_out(Remembering(), letters, {"code": ["a"], "prose": ["", ""]}, limit_bytes=99)


def test_a_loss_that_is_not_a_number_is_an_error_that_names_the_source():
    model = Remembering()
    model.embed.data[letters("!")[0]] = math.nan
    with pytest.raises(UserError, match=r"'prose'.*1 of 2 documents.*earlier checkpoint"):
        held_out(model, letters, {"prose": ["!!!", "###"]})


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_scored_in_evaluation_mode_and_handed_back_as_it_was(training, monkeypatch):
    model = Remembering().train(training)
    modes, plain = [], model.hidden
    monkeypatch.setattr(model, "hidden", lambda t, state=None: (modes.append(model.training), plain(t, state))[1])
    document_nats(model, [[0, 1]])
    assert modes == [False] and model.training is training


@pytest.mark.parametrize("start", [None, 3])
def test_the_language_model_in_chunks_equals_the_language_model_whole(start):
    model = Language(shrink(preset("super")), dtype=torch.float64).initialise(seed=5)
    draw = torch.Generator().manual_seed(1)
    documents = [torch.randint(3, 97, (length,), generator=draw).tolist() for length in (37, 1, 12, 11, 0)]
    whole = document_nats(model, documents, start=start)
    for chunk, budget in ((5, 20), (1, 64), (16, 16)):
        for got, want in zip(
            document_nats(model, documents, start=start, chunk=chunk, budget=budget), whole, strict=True
        ):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-9)
    fed = documents[0][:-1] if start is None else [start, *documents[0][:-1]]
    logits, _ = model(torch.tensor([fed]))
    targets = torch.tensor(documents[0][-len(fed) :])
    want = -logits[0].log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(whole[0][-len(fed) :], want, rtol=0, atol=1e-9)
