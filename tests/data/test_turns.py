"""Rows of several lengths, by turns or together."""

import itertools

import pytest
import torch

from nautilus.data.batch import Batch
from nautilus.data.mix import Stream
from nautilus.data.turns import Turns, rows_of_lengths
from nautilus.runtime import UserError


def stream_of(length, rows, micro):
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
