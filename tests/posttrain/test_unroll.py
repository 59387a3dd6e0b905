"""All chains of a row at once are the chains of an engine one by one: entries of the trunk, then its own."""

import pytest
import torch

from nautilus.config import Attention, Config, Experts, Rotary, lay
from nautilus.model.language import Language
from nautilus.model.mtp import MtpBlock
from nautilus.model.state import place
from nautilus.posttrain import unroll as unrolling
from nautilus.posttrain.unroll import parts_of, unroll
from nautilus.runtime import UserError

torch.set_num_threads(1)
STEPS, TIME = 4, 21


def block_of(pattern, **more):
    attention = Attention(heads=4, groups=2, head_width=16, **more)
    experts = Experts(experts=4, active=2, hidden=24, latent=8, shared=16)
    config = Config(vocab=50, width=24, layers=lay("*", attention), mtp=lay(pattern, attention, experts))
    model = Language(config, dtype=torch.float64).initialise(2)
    for name, weight in model.mtp.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            weight.data *= 5  # so that attention is not to all alike
    return model.mtp.requires_grad_(False)


def inputs(rows=2, seed=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, rows, TIME, 24, generator=generator, dtype=torch.float64)


def by_chains(block, feature_TD, embeds_TD, index, begin=0):
    """out^1 … out^K of one chain: the block over the entries of the trunk, and one more of the chain for each step."""
    features, ahead = [*feature_TD[begin : index + 1]], [*embeds_TD[begin + 1 : index + 2]]
    outs = []
    for step in range(1, STEPS + 1):
        span = place(None, None, 1, len(features), "cpu")
        outs.append(block(torch.stack(features)[None], torch.stack(ahead)[None], span)[0, -1])
        features.append(outs[-1])
        if index + step + 1 < TIME:
            ahead.append(embeds_TD[index + step + 1])
        else:
            break
    return outs


@pytest.mark.parametrize("pattern", ["*E", "*", "E", "*E*"])
def test_each_index_is_the_chain_that_begins_there(pattern, monkeypatch):
    monkeypatch.setattr(unrolling, "QUERIES", 8)
    block, (feature, embeds) = block_of(pattern), inputs()
    outs = [*unroll(parts_of(block), feature, embeds, STEPS)]
    for row in range(2):
        for index in range(TIME - 1):
            for step, own in enumerate(by_chains(block, feature[row], embeds[row], index)):
                torch.testing.assert_close(outs[step][row, index], own, rtol=1e-8, atol=1e-10)


def test_the_first_step_is_the_block_itself():
    block, (feature, embeds) = block_of("*E"), inputs()
    (out,) = unroll(parts_of(block), feature, embeds, 1)
    ahead = torch.nn.functional.pad(embeds[:, 1:], (0, 0, 0, 1))
    assert torch.equal(out, block(feature, ahead, place(None, None, 2, TIME, "cpu")))


def test_documents_of_a_row_do_not_see_each_other():
    block, (feature, embeds) = block_of("*E"), inputs(rows=1)
    document_BT = torch.tensor([[1] * 9 + [2] * (TIME - 9)])
    outs = [*unroll(parts_of(block), feature, embeds, STEPS, document_BT=document_BT)]
    for index in range(9, TIME - 1):
        for step, own in enumerate(by_chains(block, feature[0], embeds[0], index, begin=9)):
            torch.testing.assert_close(outs[step][0, index], own, rtol=1e-8, atol=1e-10)


def test_a_feed_decides_what_a_step_begins_with():
    block, (feature, embeds) = block_of("E"), inputs()
    seen = []

    def first(outs):
        seen.append(len(outs))
        return outs[0]

    outs = [*unroll(parts_of(block), feature, embeds, 3, feed=first)]
    assert seen == [1, 2]
    ahead = torch.nn.functional.pad(embeds[:, 3:], (0, 0, 0, 3))
    span = place(None, None, 2, TIME, "cpu")
    torch.testing.assert_close(outs[2], block(outs[0], ahead, span))


def test_gradients_are_those_of_the_chains(monkeypatch):
    monkeypatch.setattr(unrolling, "QUERIES", 8)
    block, (feature, embeds) = block_of("*E"), inputs(rows=1)
    block.requires_grad_(True)
    *_, last = unroll(parts_of(block), feature, embeds, STEPS)
    last[0, 12].square().sum().backward()
    found = {name: weight.grad.clone() for name, weight in block.named_parameters() if weight.grad is not None}
    block.zero_grad()
    by_chains(block, feature[0], embeds[0], 12)[-1].square().sum().backward()
    for name, weight in block.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(found[name], weight.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("more", [{"rotary": Rotary()}, {"window": 4}])
def test_a_block_with_positions_or_a_window_is_refused(more):
    block, (feature, embeds) = block_of("*", **more), inputs()
    assert isinstance(block, MtpBlock)
    with pytest.raises(UserError, match="without positions and window"):
        next(unroll(parts_of(block), feature, embeds, 1))
