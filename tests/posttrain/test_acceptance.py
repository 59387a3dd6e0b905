"""What is counted is what an engine would accept, draft by draft; a drafter that is fed wrongly is found out."""

import dataclasses

import numpy as np
import pytest
import torch

from nautilus.model.state import place
from nautilus.posttrain import acceptance
from nautilus.posttrain.acceptance import Acceptance, Walk, accepted, gain, walk
from nautilus.posttrain.drafter import Drafter, mtp_drafter
from nautilus.posttrain.own_text import Answer
from nautilus.runtime import UserError
from tests.posttrain.small import counter, greedy

torch.set_num_threads(1)
DRAFTS = 4


def block_at_the_end(model, features, tokens):
    """Of the whole sequence anew: what the block gives at its last place."""
    feature_BTD, ahead_BTD = torch.stack(features)[None], model.embed(torch.tensor([tokens]))
    return model.mtp(feature_BTD, ahead_BTD, place(None, None, 1, len(tokens), "cpu"))[0, -1]


@torch.no_grad()
def accepted_by_an_engine(model, answer, drafts):
    """With drafts of its own, one after another, from entries that are all made again at every place."""
    tokens, found = [*answer.prompt, *answer.tokens], []
    at = len(answer.prompt)  # the last committed token
    while at + drafts + 1 < len(tokens):
        hidden_TD = model.hidden(torch.tensor([tokens[: at + 1]]))[0][0]
        features, entered = [*hidden_TD[:-1]], tokens[1 : at + 1]
        drafted = []
        for _ in range(drafts):
            out_D = block_at_the_end(model, features, entered)
            drafted.append(int(model.head(out_D[None, None]).argmax()))
            features, entered = [*features, out_D], [*entered, drafted[-1]]
        right = [mine == theirs for mine, theirs in zip(drafted, tokens[at + 1 :], strict=False)]
        found.append((right + [False]).index(False))
        at += found[-1] + 1
    return tuple(found)


@pytest.mark.parametrize("mtp", ["*E"])
def test_as_many_are_accepted_as_by_a_chain_of_the_drafters_own(mtp):
    model = counter(mtp)
    found = accepted(mtp_drafter(model), answers := greedy(model, count=4), DRAFTS)
    assert [one.accepted for one in found.walks] == [accepted_by_an_engine(model, each, DRAFTS) for each in answers]
    if "*" in mtp:
        assert {length for one in found.walks for length in one.accepted} > {DRAFTS}, "all alike proves little"


def test_the_first_draft_is_right_as_often_as_was_recorded():
    """High acceptance proves no answer right, but a drafter that is fed wrongly shows here (1.0 was recorded)."""
    model = counter()
    answers = greedy(model, count=12)
    drafter = mtp_drafter(model)
    assert accepted(drafter, answers, DRAFTS).by_depth[0] > RECORDED - 0.05
    for fault in (late, featureless, next_of_the_same):
        assert accepted(fault(model), answers, DRAFTS).by_depth[0] < RECORDED - 0.05, fault.__name__


RECORDED = 1.0


class Faulty(Drafter):
    def __init__(self, model, *, feature=lambda model, hidden: hidden, tokens=lambda tokens: tokens):
        super().__init__(model, model.mtp)
        self.faults = feature, tokens

    def read(self, tokens_BT, document_BT=None):
        hidden_BTD, last_BTD = super().read(tokens_BT, document_BT)
        return self.faults[0](self.model, hidden_BTD), last_BTD

    def steps(self, feature_BTD, tokens_BT, *rest):
        return super().steps(feature_BTD, self.faults[1](tokens_BT), *rest)


def late(model):
    return Faulty(model, feature=lambda _, hidden_BTD: hidden_BTD.roll(1, 1))


def featureless(model):
    return Faulty(model, feature=lambda _, hidden_BTD: torch.zeros_like(hidden_BTD))


def next_of_the_same(model):
    return Faulty(model, tokens=lambda tokens_BT: tokens_BT.roll(1, 1))


def test_a_walk_jumps_over_what_was_accepted():
    right_TK = torch.tensor([[1, 1], [0, 1], [1, 0], [0, 0], [1, 1], [0, 0], [1, 1]]).bool()
    assert walk(right_TK, 1) == (2, 0, 2)  # from chain 0 on: over three tokens, over one, over three
    assert walk(right_TK, 2) == (0, 1, 2)
    assert walk(right_TK, 8) == ()


def test_lengths_count_the_free_token_and_depths_only_drafts_that_could_be_right():
    found = Acceptance(walks=(Walk(accepted=(0, 2, 2)), Walk(accepted=(1,)), Walk(accepted=())), drafts=3)
    assert found.visits == 4 and found.length == (0 + 2 + 2 + 1 + 4) / 4
    assert found.by_depth == [3 / 4, 2 / 3, 0.0]
    assert np.isnan(Acceptance(walks=(Walk(accepted=(0, 0)),), drafts=2).by_depth[1])


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    draw, held = np.random.default_rng(3), 0
    for _ in range(200):
        texts = [Walk(accepted=tuple(draw.geometric(0.5, size=9) - 1)) for _ in range(25)]
        low, high = Acceptance(walks=tuple(texts), drafts=99).interval
        held += low <= 2.0 <= high
    assert 0.88 < held / 200 < 0.99


def test_the_gain_is_of_the_same_texts():
    easy, hard = Walk(accepted=(5, 5, 5)), Walk(accepted=(0, 0))
    before = Acceptance(walks=(easy, hard) * 9, drafts=7)
    better = dataclasses.replace(before, walks=tuple(Walk(accepted=(*w.accepted, 7)) for w in before.walks))
    mean, (low, high) = gain(before, better)
    assert mean == better.length - before.length and 0 < low < mean < high
    assert gain(before, before) == (0.0, (0.0, 0.0))


def test_texts_that_are_too_short_are_an_error_that_says_so():
    drafter = mtp_drafter(counter())
    with pytest.raises(UserError, match="none of them longer than 8"):
        accepted(drafter, [Answer(prompt=(101, 102), tokens=(103, 104))], 7)


def test_a_model_without_a_block_is_refused():
    with pytest.raises(UserError, match="no multi-token-prediction block"):
        mtp_drafter(counter(mtp=""))


def test_nothing_of_a_text_is_looked_at_beyond_its_end(monkeypatch):
    model = counter()
    answer = greedy(model, count=1)[0]
    whole = accepted(mtp_drafter(model), [answer], DRAFTS).walks[0].accepted
    monkeypatch.setattr(acceptance, "walk", lambda right_TK, prompt: (len(right_TK),))
    chains = accepted(mtp_drafter(model), [answer], DRAFTS).walks[0].accepted[0]
    assert chains == len(answer.prompt) + len(answer.tokens) - DRAFTS - 2 and sum(whole) + len(whole) <= chains + DRAFTS
