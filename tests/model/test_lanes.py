"""Tokens that are run on trial and taken back in part, by whole models: what stays has the bits of tokens read one by
one, in the vectors that the call gives and in every later call."""

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


def hybrid(seed, dtype):
    """A random stack with at least one layer of each of the two that remember."""
    draw = random.Random(seed)
    layers = [draw.choice(MIXERS[:2]), draw.choice(MIXERS[2:4]), *draw.choices(MIXERS, k=4)]
    draw.shuffle(layers)
    model = Language(Config(vocab=VOCAB, width=20, layers=tuple(layers)), dtype=dtype).initialise(seed).eval()
    return model.requires_grad_(False)


class Serving:
    """Some requests of a model: row b has slot b, its pages, and so many tokens."""

    def __init__(self, model, rows, *, window=0, cache=""):
        self.model, self.lengths, pages = model, [0] * rows, rows * PAGES
        sizes = {"slots": rows, "pages": pages, "window": window}
        self.layers = new_memory(model.config, **sizes, dtype=model.compute, cache=cache)
        self.table_BL = torch.randperm(pages, generator=torch.Generator().manual_seed(0)).int().view(rows, PAGES)

    def lanes(self, rows, time, *, tentative=False):
        at = Rows(
            begin=torch.arange(len(rows) + 1, dtype=torch.int32) * time,
            length=torch.tensor([self.lengths[row] + time for row in rows], dtype=torch.int32),
            table_BL=self.table_BL[rows],
        )
        return Lanes(layers=self.layers, slot_B=torch.tensor(rows).int(), rows=at, tentative=tentative)

    def read(self, rows, tokens_BT):
        hidden_BTD, _ = self.model.hidden(tokens_BT, state=self.lanes(rows, tokens_BT.shape[1]))
        for row in rows:
            self.lengths[row] += tokens_BT.shape[1]
        return hidden_BTD

    def try_out(self, rows, tokens_BT, counts):
        lanes = self.lanes(rows, tokens_BT.shape[1], tentative=True)
        hidden_BTD, _ = self.model.hidden(tokens_BT, state=lanes)
        lanes.accept(torch.tensor(counts))
        for row, count in zip(rows, counts, strict=True):
            self.lengths[row] += count
        return hidden_BTD

    @property
    def states(self):
        for layer in self.layers:
            if isinstance(layer, MambaSlots):
                yield from (layer.ssm_SHNP, layer.tail_SRC[:, : layer.taps - 1])


def cycles(model, width, same, *, cache=""):
    """`same` compares what trials left with what serial reading left. Every count is met, in one row or another."""
    everyone, draw = list(range(min(width, 4) + 1)), torch.Generator().manual_seed(width)
    tokens = lambda *shape: torch.randint(0, VOCAB, shape, generator=draw)
    trying, serial = (Serving(model, len(everyone), window=window, cache=cache) for window in (width, 0))
    for row in everyone:  # prompts of different lengths
        prompt = tokens(1, 3 + 5 * row)
        same(trying.read([row], prompt), serial.read([row], prompt))
    for cycle in range(-(-(width + 1) // len(everyone)) + 1):
        tokens_BT = tokens(len(everyone), width)
        counts = [(cycle * len(everyone) + row) % (width + 1) for row in everyone]
        hidden_BTD = trying.try_out(everyone, tokens_BT, counts)
        for row, count in zip(everyone, counts, strict=True):
            for t in range(count):
                same(hidden_BTD[row, t], serial.read([row], tokens_BT[row : row + 1, t : t + 1])[0, 0])
        if cycle % 2:  # a plain call folds, too
            same(trying.read(everyone[1:], tokens_BT[1:, :2]), serial.read(everyone[1:], tokens_BT[1:, :2]))
    trying.lanes(everyone, 0).fold()
    for got, want in zip(trying.states, serial.states, strict=True):
        same(got, want)
    same(trying.read(everyone, tokens_BT), serial.read(everyone, tokens_BT))


def equal(got, want):
    assert torch.equal(got, want)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("seed", "width"), [(0, 1), (1, 2), (2, 5), (3, 9), (4, 16)])
def test_what_stays_of_a_trial_has_the_bits_of_tokens_read_one_by_one(level, seed, width, dtype):
    cycles(hybrid(seed, dtype), width, equal)


@torch.inference_mode()
@pytest.mark.parametrize("cache", ["fp8", "int8"])
def test_narrow_keys_and_values_that_were_taken_back_leave_no_trace(level, cache):
    cycles(hybrid(5, torch.bfloat16), 7, equal, cache=cache)


@torch.inference_mode()
def test_the_reference_agrees_with_its_serial_self(monkeypatch):
    """To the rounding of float64: products of matrices depend on how many rows there are."""
    monkeypatch.setenv("NAUTILUS_OPS", "reference")
    cycles(hybrid(2, torch.float64), 3, lambda got, want: torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11))


@torch.inference_mode()
def test_verdicts_that_cannot_be_are_errors():
    serving, tokens_BT = Serving(hybrid(0, torch.float32), 2, window=3), torch.ones(2, 3, dtype=torch.int64)
    lanes = serving.lanes([0, 1], 3, tentative=True)
    with pytest.raises(ValueError, match=r"accepted where \[0, 0\] wait"):
        lanes.accept(torch.tensor([0, 0]))
    serving.model.hidden(tokens_BT, state=lanes)
    for counts in ([4, 0], [0, -1]):
        with pytest.raises(ValueError, match=r"accepted where \[3, 3\] wait"):
            lanes.accept(torch.tensor(counts))
    with pytest.raises(RuntimeError, match="how many of them stay"):
        serving.model.hidden(tokens_BT, state=lanes)
    lanes.accept(torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="once|after each"):
        lanes.accept(torch.tensor([0, 3]))


@torch.inference_mode()
def test_trials_need_a_window_and_exact_states():
    model, tokens_BT = hybrid(0, torch.float32), torch.ones(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="3 tokens was made on slots that can keep 0"):
        model.hidden(tokens_BT, state=Serving(model, 1).lanes([0], 3, tentative=True))
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
