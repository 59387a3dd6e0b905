"""Rows of several lengths, by turns or together."""

import dataclasses
import itertools

import pytest
import torch

from nautilus.data.batch import Batch
from nautilus.data.blend import Blend
from nautilus.data.mix import Stream
from nautilus.data.turns import Turns, rows_of_lengths
from nautilus.runtime import UserError


def stream_of(length, rows, micro, phases=()):
    tokens = torch.arange(40 * length).view(40, length)
    return Stream({"text": Batch(tokens, {"next_token": torch.ones(40, length)})}, rows=rows, micro=micro, seed=3)


def mixed(lengths, mixing="turns", length=8, rows=8, micro=4):
    return rows_of_lengths(stream_of, lengths, mixing=mixing, length=length, rows=rows, micro=micro, seed=5)


def shapes(step):
    return [tuple(batch.tokens.shape) for batch in step]


def test_without_lengths_it_is_the_plain_stream():
    assert isinstance(mixed(()), Stream) and shapes(next(mixed(()))) == [(4, 8), (4, 8)]


def test_by_turns_each_update_has_one_length_and_all_have_equally_many_tokens():
    steps = [shapes(step) for step, _ in zip(mixed(("0.75*32", "0.25*4")), range(40), strict=False)]
    assert all(sum(rows * time for rows, time in step) == 64 for step in steps)
    assert all(len({time for _, time in step}) == 1 for step in steps)
    assert sum(step[0][1] == 32 for step in steps) == pytest.approx(30, abs=1)
    assert {step[0] for step in steps} == {(1, 32), (8, 4)}  # micro-batches of as many tokens, or of one row


def test_halves_alternate_nearly_strictly():
    steps = [step[0].tokens.shape[1] for step, _ in zip(mixed(("1*32", "1*4")), range(30), strict=False)]
    assert max(len(list(group)) for _, group in itertools.groupby(steps)) <= 2


def test_together_every_update_has_all_lengths_by_their_share_of_tokens():
    for step, _ in zip(mixed(("0.5*32", "0.5*4"), "together"), range(5), strict=False):
        assert sorted(shapes(step)) == [(1, 32), (8, 4)]


@pytest.mark.parametrize("mixing", ["turns", "together"])
@pytest.mark.parametrize("cut", [0, 1, 5])
def test_the_stream_goes_on_where_its_state_was_taken(mixing, cut):
    whole, part, rest = (mixed(("0.5*32", "0.5*4"), mixing) for _ in range(3))
    steps = [next(whole) for _ in range(8)]
    for _ in range(cut):
        next(part)
    rest.restore(part.state())
    for want in steps[cut:]:
        got = next(rest)
        assert shapes(got) == shapes(want)
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(got, want, strict=True))


def test_a_state_of_other_lengths_is_refused():
    with pytest.raises(UserError, match="other lengths"):
        mixed(("1*32", "1*4")).restore(mixed(("1*32",)).state())
    with pytest.raises(UserError, match="fingerprint"):
        mixed(("1*32",)).restore(mixed(("1*16",)).state())


@pytest.mark.parametrize("text", ["a*4", "0*4", "0.5*1", "nan*4", "x"])
def test_lengths_of_another_form_are_refused(text):
    with pytest.raises(ValueError, match="share.tokens"):
        mixed((text,))


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="64 tokens"):
        mixed(("1*128",))
    with pytest.raises(UserError, match="32 of them of this length"):
        mixed(("0.5*64", "0.5*4"), "together")
    with pytest.raises(ValueError, match="turns, together"):
        mixed(("1*8",), "both")
    assert isinstance(mixed(("1*8",)), Turns)


# ----- blends ---------------------------------------------------------------------------------------------------------

BLEND = Blend(where="b.toml", places={"a": "", "b": ""}, phases=((0.4, {"a": 1}), (float("inf"), {"b": 1})))
LENGTHS = ("0.7*32", "0.3*4")


def blended(blend, steps, mixing="turns", lengths=LENGTHS):
    """A stream whose tokens say which source they are of: 1 for the one with weight now."""

    def make(length, rows, micro, phases=()):
        sources = {
            name: Batch(torch.full((40, length), number), {"next_token": torch.ones(40, length)})
            for number, name in enumerate("ab")
        }
        weights = {name: float(phases[0].weights.get(name, 0)) for name in sources} if phases else {"a": 1.0, "b": 1.0}
        used = {name for phase in phases for name in phase.weights} or {*sources}
        kept, shares = {name: sources[name] for name in used}, {name: weights[name] for name in used}
        return Stream(kept, rows=rows, micro=micro, seed=3, weights=shares, later=phases[1:])

    named = {"mixing": mixing, "length": 8, "rows": 8, "micro": 4, "seed": 5, "blend": blend, "steps": steps}
    return rows_of_lengths(make, lengths, **named)


def tokens_by_step(stream, steps):
    """(tokens of source a, of source b) in each step."""
    found = []
    for step, _ in zip(stream, range(steps), strict=False):
        tokens = torch.cat([batch.tokens.flatten() for batch in step])
        found.append((int((tokens == 0).sum()), int((tokens == 1).sum())))
    return found


@pytest.mark.parametrize("mixing", ["turns", "together"])
@pytest.mark.parametrize("steps", [10, 24, 33])
def test_a_blend_changes_where_the_run_has_seen_its_share_of_tokens_in_every_length(mixing, steps):
    lengths = ("0.5*32", "0.5*4") if mixing == "together" else LENGTHS
    seen = tokens_by_step(blended(BLEND, steps, mixing, lengths), steps)
    step, inside = divmod(0.4 * sum(map(sum, seen)), sum(seen[0]))
    for number, (old, new) in enumerate(seen):
        assert old == 0 if number > step else new == 0 if number < step else abs(old - inside) <= 16 + 4


def test_a_border_in_tokens_does_not_move_with_the_length_of_the_run():
    blend = dataclasses.replace(BLEND, unit="tokens", phases=((640, {"a": 1}), (float("inf"), {"b": 1})))
    for steps in (12, 40):
        assert tokens_by_step(blended(blend, steps), 12) == [(64, 0)] * 10 + [(0, 64)] * 2
    assert tokens_by_step(blended(blend, 9), 9) == [(64, 0)] * 9


def test_a_phase_without_rows_in_one_length_is_left_out_there_and_refused_if_it_has_none_at_all():
    short = dataclasses.replace(BLEND, phases=((0.1, {"a": 1}), (float("inf"), {"b": 1})))
    seen = tokens_by_step(blended(short, 10), 10)
    assert seen == [(64, 0)] + [(0, 64)] * 9
    with pytest.raises(UserError, match="phase 1 has no rows"):
        blended(dataclasses.replace(short, phases=((1e-9, {"a": 1}), (float("inf"), {"b": 1}))), 10)


def test_the_plain_stream_of_a_blend_is_as_ever():
    assert tokens_by_step(blended(BLEND, 10, lengths=()), 10) == [(64, 0)] * 4 + [(0, 64)] * 6
