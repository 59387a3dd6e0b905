"""What is put away of a step is what concatenation would have kept, and growing loses none of it."""

import pytest
import torch

from nautilus.serve.seen import START, Seen, raw


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_are_those_that_were_seen_side_by_side(dtype):
    rng, seen, whole = torch.Generator().manual_seed(0), Seen(), []
    assert not seen
    for count in (1, 3, START, 2, 5 * START):
        parts = [torch.randn(count + 4, width, generator=rng).to(dtype) for width in (3, 5)]
        seen.add(parts, [raw(part) for part in parts], 2, count)
        whole.append(torch.cat(parts, -1)[2 : 2 + count])
        for part in parts:
            part.zero_()  # the memory of a step is written over by the next one
        assert len(seen) == sum(map(len, whole)) and torch.equal(seen.rows, torch.cat(whole))


@pytest.mark.parametrize("count", [0, 1, 7])
def test_the_last_rows_may_be_kept_alone_and_others_follow(count):
    rows = torch.arange(20.0)[:, None]
    seen = Seen()
    seen.add([rows], [raw(rows)], 0, 20)
    seen.keep(count)
    seen.add([rows], [raw(rows)], 4, 2)
    assert seen.rows.flatten().tolist() == [*range(20 - count, 20), 4, 5]
