"""Tokens that are run on trial and taken back in part, by whole models: what stays has the bits of tokens read one by
one, in the vectors that the call gives and in every later call."""

import itertools
import random

import pytest
import torch

from nautilus.config import Attention, Config, Experts, Mamba, Mlp, Rotary
from nautilus.model.lanes import Lanes, MambaSlots, new_memory
from nautilus.model.language import Language
from nautilus.ops.pages import Rows
from nautilus.ops.state_format import StateFormat

VOCAB, PAGES = 50, 8  # pages of a slot
MIXERS = (
    Mamba(heads=4, head_width=16, state=6, groups=2),
    Mamba(heads=3, head_width=12, state=9, groups=1, taps=2),
    Attention(heads=4, groups=2, head_width=10),
    Attention(heads=2, groups=1, head_width=16, window=20, rotary=Rotary(), head_norm=True),
    Experts(experts=6, active=2, hidden=10, shared=14, latent=8, scale=2.5),
    Mlp(hidden=22),
)


def stack(layers, seed, dtype):
    model = Language(Config(vocab=VOCAB, width=20, layers=tuple(layers)), dtype=dtype).initialise(seed).eval()
    return model.requires_grad_(False)


def hybrid(seed, dtype):
    """A random stack with at least one layer of each of the two that remember."""
    draw = random.Random(seed)
    layers = [draw.choice(MIXERS[:2]), draw.choice(MIXERS[2:4]), *draw.choices(MIXERS, k=4)]
    draw.shuffle(layers)
    return stack(layers, seed, dtype)


class Serving:
    """Some requests of a model: row b has slot b, its pages, and so many tokens."""

    def __init__(self, model, rows, *, window=0, cache=""):
        self.model, self.lengths, pages = model, [0] * rows, rows * PAGES
        sizes = {"slots": rows, "pages": pages, "window": window}
        self.layers = new_memory(model.config, **sizes, dtype=model.compute, cache=cache)
        self.table_BL = torch.randperm(pages, generator=torch.Generator().manual_seed(0)).int().view(rows, PAGES)

    def lanes(self, rows, counts, *, tentative=False):
        at = Rows(
            begin=torch.tensor([0, *itertools.accumulate(counts)]).int(),
            length=torch.tensor([self.lengths[row] + count for row, count in zip(rows, counts, strict=True)]).int(),
            table_BL=self.table_BL[rows],
        )
        return Lanes(layers=self.layers, slot_B=torch.tensor(rows).int(), rows=at, tentative=tentative)

    def read(self, rows, texts, *, stay=None):
        """Hidden vectors of each row's tokens. stay: the call is tentative, and so many of them stay."""
        counts = [len(text) for text in texts]
        lanes = self.lanes(rows, counts, tentative=stay is not None)
        hidden_1ND, _ = self.model.hidden(torch.cat(texts)[None], state=lanes)
        if stay is not None:
            lanes.accept(stay)
        for row, count in zip(rows, counts if stay is None else stay, strict=True):
            self.lengths[row] += count
        return hidden_1ND[0].split(counts)

    @property
    def states(self):
        for layer in self.layers:
            if isinstance(layer, MambaSlots):
                yield from (layer.ssm_SHNP, layer.tail_SRC[:, : layer.taps - 1])


def cycles(model, width, same, *, rows=0, cache="", ragged=False):
    """`same` compares what trials of `width` tokens left with what serial reading left. Every count is met, in one row
    or another. ragged: a row has from one to `width` tokens, each another number."""
    everyone, draw = list(range(rows or min(width, 4) + 1)), torch.Generator().manual_seed(width)
    tokens = lambda counts: [torch.randint(0, VOCAB, (count,), generator=draw) for count in counts]
    trying, serial = (Serving(model, len(everyone), window=window, cache=cache) for window in (width, 0))

    def alike(rows, texts):
        """Plain calls, which fold, too: together, and of each row alone."""
        for row, text, hidden_TD in zip(rows, texts, trying.read(rows, texts), strict=True):
            same(hidden_TD, serial.read([row], [text])[0])

    alike(everyone, tokens(3 + 5 * row for row in everyone))
    for cycle in range(-(-(width + 1) // len(everyone)) + 1):
        counts = torch.randint(1, width + 1, (len(everyone),), generator=draw).tolist()
        texts = tokens(counts if ragged else [width] * len(everyone))
        stay = [(cycle * len(everyone) + row) % (len(text) + 1) for row, text in enumerate(texts)]
        found = trying.read(everyone, texts, stay=stay)
        for row, (text, hidden_TD) in enumerate(zip(texts, found, strict=True)):
            for t in range(stay[row]):
                same(hidden_TD[t], serial.read([row], [text[t : t + 1]])[0][0])
        if cycle % 2 and everyone[1:]:
            alike(everyone[1:], [text[:2] for text in texts[1:]])
    trying.lanes(everyone, [0] * len(everyone)).fold()
    for got, want in zip(trying.states, serial.states, strict=True):
        same(got, want)
    alike(everyone, texts)


def equal(got, want):
    assert torch.equal(got, want)


def close(got, want):
    """To the rounding of float64: products of matrices depend on how many rows there are."""
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("seed", "width"), [(0, 1), (1, 2), (2, 5), (3, 9), (4, 16)])
def test_what_stays_of_a_trial_has_the_bits_of_tokens_read_one_by_one(level, seed, width, dtype):
    cycles(hybrid(seed, dtype), width, equal)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layers", [[0, 4, 2, 1], [1, 0], [3, 5, 2]], ids=["hybrid", "all Mamba", "all attention"])
@pytest.mark.parametrize(("rows", "width"), [(1, 17), (3, 9), (8, 17)])
def test_trials_of_other_lengths_in_each_row_have_the_bits_of_tokens_read_one_by_one(level, rows, width, layers, dtype):
    cycles(stack([MIXERS[i] for i in layers], rows, dtype), width, equal, rows=rows, ragged=True)


@torch.inference_mode()
@pytest.mark.parametrize("cache", ["fp8", "int8"])
@pytest.mark.parametrize("ragged", [False, True])
def test_narrow_keys_and_values_that_were_taken_back_leave_no_trace(level, cache, ragged):
    cycles(hybrid(5, torch.bfloat16), 7, equal, cache=cache, ragged=ragged)


@torch.inference_mode()
@pytest.mark.parametrize("ops", ["reference", "torch"])
@pytest.mark.parametrize("ragged", [False, True])
def test_what_is_not_native_agrees_with_its_serial_self(ops, ragged, monkeypatch):
    monkeypatch.setenv("NAUTILUS_OPS", ops)
    cycles(hybrid(2, torch.float64), 3, close, ragged=ragged)


@torch.inference_mode()
def test_verdicts_that_cannot_be_are_errors():
    serving, tokens_1N = Serving(hybrid(0, torch.float32), 2, window=3), torch.ones(1, 5, dtype=torch.int64)
    lanes = serving.lanes([0, 1], [3, 2], tentative=True)
    with pytest.raises(ValueError, match=r"accepted where \[0, 0\] wait"):
        lanes.accept([0, 0])
    serving.model.hidden(tokens_1N, state=lanes)
    for counts in ([4, 0], [0, -1], [2, 3]):
        with pytest.raises(ValueError, match=r"accepted where \[3, 2\] wait"):
            lanes.accept(counts)
    with pytest.raises(RuntimeError, match="how many of them stay"):
        serving.model.hidden(tokens_1N, state=lanes)
    lanes.accept([0, 2])
    with pytest.raises(ValueError, match="once|after each"):
        lanes.accept([0, 2])


@torch.inference_mode()
def test_without_mamba_layers_no_more_stays_than_was_tried():
    serving = Serving(stack(MIXERS[2:3], 0, torch.float32), 2)
    with pytest.raises(ValueError, match=r"\[1, 4\] tokens were accepted where \[1, 3\] wait"):
        serving.read([0, 1], [torch.ones(1).long(), torch.ones(3).long()], stay=[1, 4])


@torch.inference_mode()
def test_lanes_take_the_tokens_of_all_rows_as_one():
    model = hybrid(0, torch.float32)
    with pytest.raises(ValueError, match=r"shape \(2, 3\); give the tokens of all rows after one another, as \(1, N\)"):
        model.hidden(torch.ones(2, 3).long(), state=Serving(model, 2).lanes([0, 1], [3, 3]))
    with pytest.raises(ValueError, match="let it rise from 0 to their number"):
        model.hidden(torch.ones(1, 5).long(), state=Serving(model, 2).lanes([0, 1], [3, 3]))


@torch.inference_mode()
def test_trials_need_a_window_and_exact_states():
    model, tokens_1N = hybrid(0, torch.float32), torch.ones(1, 5, dtype=torch.int64)
    for window in (0, 2):
        with pytest.raises(ValueError, match=f"3 tokens was made on slots that can keep {window}"):
            model.hidden(tokens_1N, state=Serving(model, 2, window=window).lanes([0, 1], [2, 3], tentative=True))
    sizes = {"slots": 1, "pages": 1, "dtype": torch.float32}
    with pytest.raises(ValueError, match="window of 4 tokens was asked for with states in fp16_sr"):
        new_memory(model.config, **sizes, window=4, state=StateFormat(name="fp16_sr"))


def test_a_slot_that_is_cleared_forgets_what_it_kept():
    config = Config(vocab=VOCAB, width=20, layers=MIXERS[:1])
    (slots,) = new_memory(config, slots=2, pages=1, dtype=torch.float32, window=2)
    assert isinstance(slots, MambaSlots) and slots.pending_S is not None
    slots.pending_S.fill_(2)
    slots.clear(1)
    assert slots.pending_S.tolist() == [2, 0]
