"""Passes that are tried for several requests at once, each with another number of tokens: a request gets what it gets
alone, token by token, however the tokens are dealt out to the rows of a recorded step."""

import dataclasses
import random

import pytest
import torch

from nautilus.config import Attention, Config, Experts, Mamba, lay
from nautilus.model.language import Language
from nautilus.ops.cpu.library import native
from nautilus.presets import preset, shrink
from nautilus.serve.forward import OFTEN, TRIED, Forward, Part
from nautilus.serve.memory import Berth, Berths

torch.set_num_threads(1)
NATIVE = pytest.mark.skipif(native().functions is None, reason="only native steps are recorded")
VOCAB, WINDOW = 60, 17
KINDS = (
    Mamba(heads=4, head_width=12, state=6, groups=2),
    Attention(heads=2, groups=1, head_width=16),
    Experts(experts=6, active=2, hidden=32),
)
PATTERNS = ["ME*M", "MM", "*E*"]


def model_of(kind, dtype=torch.float32):
    """kind: a pattern of layers, or a preset."""
    if kind.islower():
        config = dataclasses.replace(shrink(preset(kind)), vocab=VOCAB, eos=())
    else:
        config = Config(vocab=VOCAB, width=64, layers=lay(kind, *KINDS))
    return Language(config, dtype=dtype).initialise(3).requires_grad_(False).eval()


def forward_of(model, rows, *, window=WINDOW):
    return Forward(model, Berths(model, rows=rows, max_tokens=400, window=window))


def taken(forward, count) -> list[Berth]:
    found = [forward.berths.take(400) for _ in range(count)]
    assert None not in found
    return found


class Both:
    """Requests in one engine's memory, tried together, and each again alone in another's, token by token."""

    def __init__(self, model, rows, same, seed=0):
        self.forward, self.serial, self.same = forward_of(model, rows), forward_of(model, rows, window=0), same
        self.berths, self.alone = taken(self.forward, rows), taken(self.serial, rows)
        self.draw = random.Random(seed)
        for row in range(rows):
            prompt = self.tokens(1 + 3 * row)
            got, want = (f.read([Part(tokens=prompt, berth=b[row], last=True)]) for f, b in self.each)
            self.same(got, want)

    @property
    def each(self):
        return (self.forward, self.berths), (self.serial, self.alone)

    def tokens(self, count):
        return [self.draw.randrange(VOCAB) for _ in range(count)]

    def cycle(self, counts, rows=None):
        """A pass over so many tokens for each of these rows, any number of which then stay."""
        rows = [*range(len(self.berths))] if rows is None else rows
        berths, texts = [self.berths[row] for row in rows], [self.tokens(count) for count in counts]
        logits_NV = self.forward.attempt(berths, texts).clone()
        stay = [self.draw.randint(0, count) for count in counts]
        self.forward.accept(berths, stay)
        for row, text, count, logits_TV in zip(rows, texts, stay, logits_NV.split(counts), strict=True):
            for token, logits_V in zip(text[:count], logits_TV, strict=False):
                self.same(logits_V, self.serial.step([self.alone[row]], [token])[0])
        assert [berth.length for berth in self.berths] == [berth.length for berth in self.alone]

    def plain(self):
        tokens = self.tokens(len(self.berths))
        got, want = (f.step(b, tokens) for f, b in self.each)
        self.same(got, want)

    def states_are_the_same(self):
        for pair in zip(self.berths, self.alone, strict=True):
            kept = [f.berths.state(berth) for (f, _), berth in zip(self.each, pair, strict=True)]
            for got, want in zip(*kept, strict=True):
                self.same(got, want)


def equal(got, want):
    assert torch.equal(got, want)


def near(got, want):
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def split(draw, tokens, rows):
    """So many tokens dealt out to the rows: one or more, at most WINDOW each."""
    counts = [1] * rows
    for _ in range(tokens - rows):
        counts[draw.choice([row for row in range(rows) if counts[row] < WINDOW])] += 1
    return counts


def recorded_passes(model, rows, tokens):
    """That one recorded step serves any split, and what is left is that of tokens alone."""
    both = Both(model, rows, equal)
    for cycle in range(7):
        both.cycle(split(both.draw, tokens, rows))
        if cycle % 3 == 2:
            both.plain()
            both.states_are_the_same()
    (step,) = both.forward.attempts.values()
    assert step.recorded.tape is not None and [*both.forward.attempts] == [(rows, tokens)]
    both.states_are_the_same()


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [*PATTERNS, "toy", "super"])
@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (1, 17), (2, 9), (3, 29), (8, 40)])
def test_a_recorded_pass_serves_any_split_of_its_tokens_with_the_bits_of_tokens_alone(rows, tokens, kind, dtype):
    recorded_passes(model_of(kind, dtype), rows, tokens)


@NATIVE
@pytest.mark.parametrize("format", ["nvfp4", "fp8_e4m3"])
def test_so_does_one_of_matrices_in_few_bits(format, in_few_bits):
    recorded_passes(in_few_bits(model_of("super", torch.bfloat16), format), 3, 29)


@NATIVE
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("seed", range(3))
def test_requests_in_changing_company_with_any_numbers_of_tokens_have_their_own_bits(pattern, seed):
    both = Both(model_of(pattern), 8, equal, seed)
    for _ in range(12):
        rows = both.draw.sample(range(8), both.draw.randint(1, 8))
        both.cycle([both.draw.randint(1, WINDOW) for _ in rows], rows)
    both.states_are_the_same()
    both.plain()


@pytest.mark.parametrize("way", ["native", "torch"])
@pytest.mark.parametrize("kind", [*PATTERNS, "super"])
def test_numbers_of_requests_that_seldom_come_take_the_record_of_some_more(kind, way, monkeypatch):
    monkeypatch.setenv("NAUTILUS_OPS", "" if way == "native" else way)
    exact = way == "native" and native().functions is not None
    both = Both(model_of(kind), 13, equal if exact else near)
    for rows in (13, 9, 10, 5, 7, 6, 8, 3, 12, 11):
        berths, tokens = both.berths[:rows], both.tokens(rows)
        logits_BV = both.forward.step(berths, tokens)
        assert logits_BV.shape == (rows, VOCAB) and len(both.forward.looked_at()) == rows
        for token, alone, got in zip(tokens, both.alone, logits_BV.clone(), strict=False):
            both.same(got, both.serial.step([alone], [token])[0])
    assert [*both.forward.steps] == (
        [16, 12, 8, 3] if both.forward.berths.roomy else [13, 9, 10, 5, 7, 6, 8, 3, 12, 11]
    )
    both.states_are_the_same()
    for _ in range(OFTEN):
        both.forward.step(both.berths[:5], both.tokens(5))
    assert 5 in both.forward.steps, "what comes often has a record of its own"


def test_on_torch_they_agree_to_rounding(monkeypatch):
    monkeypatch.setenv("NAUTILUS_OPS", "torch")
    both = Both(model_of("ME*M"), 3, near)
    for counts in ([1, 5, 2], [3, 3, 3], [7, 1, 1], [1, 1, 1]):
        both.cycle(counts)
        both.plain()
    both.states_are_the_same()
    assert all(step.recorded.tape is None for step in both.forward.attempts.values())


@NATIVE
def test_what_is_kept_of_a_row_goes_on_in_another_place():
    """As a saved prefix does: its states are copied after some of what was tried has stayed."""
    both = Both(model_of("MM"), 3, equal)
    both.cycle([4, 9, 2])
    first = both.berths[1]
    kept, fresh = both.forward.berths.state(first), forward_of(both.forward.model, 1)
    (other,) = taken(fresh, 1)
    fresh.berths.put_state(other, kept)
    other.length = first.length
    text = both.tokens(6)
    got = fresh.read([Part(tokens=text, berth=other, last=True)])
    equal(got, both.forward.attempt([first], [text])[-1:])


@NATIVE
def test_a_thread_more_changes_no_bit_of_a_recorded_pass():
    model, found = model_of("ME*M"), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            forward, draw = forward_of(model, 4), random.Random(0)
            berths, logits = taken(forward, 4), []
            for counts in ([2, 8, 1, 5], [4, 4, 4, 4], [1, 1, 13, 1], [8, 2, 5, 1]):
                texts = [[draw.randrange(VOCAB) for _ in range(count)] for count in counts]
                logits.append(forward.attempt(berths, texts).clone())
                forward.accept(berths, [count // 2 for count in counts])
            found.append(torch.stack(logits))
        finally:
            torch.set_num_threads(1)
    equal(*found)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_verdicts_without_an_attempt_or_of_other_berths_are_errors(pattern):
    forward = forward_of(model_of(pattern), 2)
    first, second = taken(forward, 2)
    with pytest.raises(ValueError, match="were not tried last"):
        forward.accept([first], [0])
    forward.attempt([first, second], [[1, 2], [3]])
    for berths in ([first], [second, first]):
        with pytest.raises(ValueError, match="were not tried last"):
            forward.accept(berths, [0] * len(berths))
    for counts in ([3, 0], [0, 2], [-1, 0]):
        with pytest.raises(ValueError, match=r"were accepted where \[2, 1\] wait"):
            forward.accept([first, second], counts)
    assert first.length == second.length == 0
    forward.accept([first, second], [2, 0])
    with pytest.raises(ValueError, match="were not tried last"):
        forward.accept([first, second], [2, 0])
    assert (first.length, second.length) == (2, 0)


def test_an_attempt_that_fails_leaves_nothing_to_accept():
    forward = forward_of(model_of("MM"), 1)
    berths = taken(forward, 1)
    forward.attempt(berths, [[1, 2]])
    with pytest.raises(RuntimeError, match="how many of them stay"):
        forward.attempt(berths, [[3]])
    with pytest.raises(ValueError, match="were not tried last"):
        forward.accept(berths, [1])


@pytest.mark.parametrize("before", range(4))
def test_more_tokens_than_the_window_are_an_error_computed_recorded_and_replayed(before):
    """Nothing has changed then: the same requests go on."""
    both = Both(model_of("MEM"), 2, near)
    for _ in range(before):
        both.cycle([10, 10])
    with pytest.raises(ValueError, match="slots that can keep 17|more tokens of a row than slots can keep"):
        both.forward.attempt(both.berths, [both.tokens(18), both.tokens(2)])
    with pytest.raises(ValueError, match="were not tried last"):
        both.forward.accept(both.berths, [1, 1])
    both.cycle([10, 10])
    both.states_are_the_same()


@NATIVE
def test_only_attempts_of_late_stay_recorded():
    forward = forward_of(model_of("MM"), 8)
    berths = taken(forward, 8)

    def run(*counts):
        forward.attempt(berths[: len(counts)], [[1] * count for count in counts])
        forward.accept(berths[: len(counts)], [0] * len(counts))

    run(2)
    often = forward.attempts[1, 2]
    for tokens in range(2, WINDOW):
        run(*[tokens] * 8)
        run(2)
        assert sum(known for _, known in forward.attempts) <= TRIED
    assert forward.attempts[1, 2] is often and (8, 128) in forward.attempts and (8, 16) not in forward.attempts
    forward.forget()
    assert not forward.attempts
