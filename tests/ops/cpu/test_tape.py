import pytest
import torch

from nautilus.ops.cpu.packs import packed_once
from nautilus.ops.cpu.tape import record
from nautilus.ops.linear import linear
from nautilus.ops.norm import rms_norm
from nautilus.ops.residual import add, embed


@pytest.fixture
def step(built):
    """A small computation of native calls, and the tokens that it reads."""
    draw = torch.Generator().manual_seed(0)
    tokens, table = torch.tensor([[1, 2, 3]]), torch.randn(9, 16, generator=draw)
    weight, matrix, packs = torch.ones(16), torch.randn(16, 16, generator=draw), {}

    def run():
        with packed_once(packs):
            x = embed(tokens, table, torch.float32)
            return add(x, linear(rms_norm(x, weight, 1e-5), matrix, squared_relu=True))

    with torch.inference_mode():
        run()  # packs
    return run, tokens


def test_a_replay_repeats_the_calls_on_what_the_memory_now_holds(step):
    run, tokens = step
    tape = record(run)
    assert [name.removeprefix("nautilus_") for name in tape.names] == ["embed", "norm_forward", "linear_forward", "add"]
    for other in ([[4, 5, 6]], [[8, 0, 8]]):
        tokens.copy_(torch.tensor(other))
        with torch.inference_mode():
            assert torch.equal(tape.replay(), run())


def test_what_pytorch_computes_in_between_cannot_be_recorded(step):
    run, tokens = step
    assert "mul" in record(lambda: run() * 2).broken
    assert (
        "contiguous" in record(lambda: run().mT.contiguous()).broken
        or "clone" in record(lambda: run().mT.contiguous()).broken
    )
    assert "add" in record(lambda: embed(tokens + 1, torch.ones(9, 4), torch.float32), inputs=[tokens]).broken
    assert torch.equal(record(lambda: run() * 2).result, run() * 2)  # it has run to its end all the same
    assert not record(lambda: run().view(-1)[3:]).broken  # a view moves nothing
    run()  # and nothing is recorded any more


def test_a_call_that_fails_in_a_replay_says_so_and_later_replays_work(step):
    run, tokens = step
    tape = record(run)
    tokens[0, 1] = 99
    with pytest.raises(IndexError, match="embed"):
        tape.replay()
    tokens[0, 1] = 0
    with torch.inference_mode():
        assert torch.equal(tape.replay(), run())
