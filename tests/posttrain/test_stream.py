"""Rollouts as rows to learn from."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from nautilus.data.template import template_text
from nautilus.data.tokenizer import SMALLEST, Tokenizer, train_tokenizer
from nautilus.posttrain.credit import FAULT, Effort
from nautilus.posttrain.rollout import Rollout, Turn
from nautilus.posttrain.stream import Group, Scoring, batches_of, broken, checked, telling, told_of, trained_on
from nautilus.runtime import UserError
from nautilus.tasks import Call, Problem, Reply, Verdict
from nautilus.tasks.named import TASKS
from tests.posttrain.test_rollout import Script, played, problem_of


def problem(words="?"):
    return Problem(task="sort", level=1, messages=({"role": "user", "content": words},))


def rollout(reward=1.0, prompt=3, answer=4, fault="", ended=True, asked="?", forced=(), thought=0, **said):
    reply = Reply(**{"content": "x", "fault": fault, "ended": ended} | said)
    turn = Turn(begin=prompt, end=prompt + answer, reply=reply, forced=frozenset(forced), thought=thought)
    return Rollout(
        problem=problem(asked), tokens=tuple(range(1, 1 + prompt + answer)),
        logprobs=(0.0,) * prompt + tuple(-float(at) for at in range(answer)), turns=(turn,),
        verdict=Verdict(reward=reward),
    )  # fmt: skip


def group(*rollouts, lost=()):
    return Group(problem=rollouts[0].problem if rollouts else problem(), rollouts=rollouts, lost=Counter(lost))


def passed(batch):
    """Tokens that pass through a model."""
    if batch.alike is None:
        return batch.tokens.numel()
    return len(batch.alike.unique()) * batch.common + len(batch) * (batch.tokens.shape[1] - batch.common)


def test_rows_have_what_was_drawn_at_its_place():
    rows = [(rollout(prompt=3, answer=4, forced=[4]), 0.5), (rollout(prompt=2, answer=2), -1.0)]
    (batch,) = batches_of(rows, tokens=1000, pad=99)
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 99, 99, 99], [1, 2, 3, 4, 5, 6, 7]]
    assert batch.document.tolist() == [[1, 1, 1, 1, 0, 0, 0], [1] * 7]
    assert batch.weights["policy"].tolist() == [[0, 0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 0, 1, 1]]
    assert batch.sampled_logprob.tolist() == [[0, 0, 0, -1, 0, 0, 0], [0, 0, 0, 0, -1, -2, -3]]
    assert batch.advantage[0, :4].tolist() == [-1] * 4 and batch.advantage[1].tolist() == [0.5] * 7
    assert batch.alike is None, "two prompts"


def test_answers_to_one_prompt_share_it_and_prompts_of_one_length_come_together():
    rows = [(rollout(prompt=size, answer=own), float(own)) for size in (3, 6) for own in (4, 1, 2, 3)]
    short, long = batches_of([*rows, (rollout(prompt=5), 7.0)], tokens=1000, pad=0)[:2]
    for batch, common in ((short, 3), (long, 6)):
        assert batch.common == common and batch.alike.tolist() == [0] * 4 and batch.tokens.shape == (4, common + 4)
        assert len(batch.tokens[:, :common].unique(dim=0)) == 1
    found = batches_of(rows, tokens=10, pad=0)
    assert all(passed(one) <= 10 or len(one) == 1 for one in found) and len(found) > 4
    assert sorted(float(row.max()) for one in found for row in one.advantage) == [1, 1, 2, 2, 3, 3, 4, 4]
    two = [(replace(one, tokens=(9, *one.tokens[1:])), 5.0) for one, _ in rows[:2]]
    (batch,) = batches_of([*rows[:4], *two], tokens=1000, pad=0)
    assert batch.alike.bincount().tolist() == [2, 4] or batch.alike.bincount().tolist() == [4, 2]


def test_answers_that_say_nothing_are_not_computed_and_the_mean_is_still_over_all():
    right, wrong, broken = rollout(1.0), rollout(0.0, answer=2), rollout(0.0, fault="no such call")
    rows = trained_on([group(right, wrong), group(wrong, wrong), group(broken, broken)], Scoring())
    found, share = telling(rows)
    assert [one for one, _ in found] == [right, wrong, broken, broken] and share == 14 / 18
    assert telling(rows[2:4]) == (rows[2:4], 1.0), "a step is made even where nothing can be learnt"


def test_broken_turns_lose_what_they_lose_whatever_the_answer_earned():
    (batch,) = batches_of([(rollout(fault="no such call"), 0.5)], tokens=100, pad=0)
    assert batch.advantage[0].tolist() == [0.5] * 3 + [FAULT] * 4


BEHIND = {"thinking": "1", "thought": 1, "stray": "thinking went on behind its end, and was ended again"}
OPEN = {"content": "", "thinking": "1 and 2", "thought": 4}


@pytest.mark.parametrize(
    "said, malformed",
    [
        ({"content": "<think>4"}, True), ({"thinking": "<think>2", "thought": 2}, True), (BEHIND, True), (OPEN, True),
        ({"content": "1</think>4"}, True), (OPEN | {"content": "", "thinking": ""}, True),
        ({"thinking": "2", "thought": 2}, False), (OPEN | {"ended": False}, False), (BEHIND | {"forced": [4]}, False),
        (OPEN | {"thought": 3}, False), (OPEN | {"calls": (Call(name="a", arguments={}),)}, False),
        ({"content": ""}, False),
    ],
)  # fmt: skip
def test_turns_with_malformed_thinking_lose_as_broken_calls_do(said, malformed):
    """Neither unfinished thinking, nor what follows the end that a budget wrote, nor an empty answer is malformed."""
    one = rollout(0.0, **said)
    (batch,) = batches_of([(one, 0.5)], tokens=100, pad=0)
    assert broken(one.turns[0]) == malformed
    assert batch.advantage[0].tolist() == [0.5] * 3 + [FAULT if malformed else 0.5] * 4
    assert told_of([group(one)])["faults"] == (malformed, 1)
    wrong = rollout(0.0)
    assert telling([(one, 0.0), (wrong, 1.0)])[0] == ([(one, 0.0), (wrong, 1.0)] if malformed else [(wrong, 1.0)])


@pytest.mark.parametrize(
    "text, how, malformed",
    [
        ("12345</think>6", {}, False), ("12345</think>", {}, False), ("123<think>45</think>6", {}, True),
        ("12345", {}, True), ("12345", {"cut": [0]}, False), ("12345</think>6", {"thinking_budget": 5}, False),
        ("12345</think>6</think>7", {}, True), ("12345</think>6</think>7", {"thinking_budget": 5}, False),
    ],
)  # fmt: skip
def test_what_a_player_makes_of_an_answer_is_malformed_or_not(text, how, malformed):
    plain = train_tokenizer([], vocab=SMALLEST)
    tokenizer = Tokenizer(plain.core, bos="<s>", eos="<|im_end|>", template=template_text("spaced"))
    script = Script(tokenizer, text, cut=how.get("cut", ()))
    budget = {"thinking_budget": how.get("thinking_budget")}
    (turn,) = played(script, tokenizer, TASKS["arithmetic"](), problem_of("arithmetic"), **budget).turns
    assert broken(turn) == malformed


@pytest.mark.parametrize("tokens", [1, 8, 16, 40])
def test_micro_batches_stay_within_their_tokens_and_have_every_row_once(tokens):
    rows = [(rollout(prompt=size % 5 + 1, answer=size), float(size)) for size in (9, 1, 4, 7, 2, 3)]
    found = batches_of(rows, tokens=tokens, pad=0)
    assert sum(len(batch) for batch in found) == 6
    assert all(passed(batch) <= tokens or len(batch) == 1 for batch in found)
    assert sorted(float(row.max()) for batch in found for row in batch.advantage) == [1, 2, 3, 4, 7, 9]
    assert sum(batch.weights["policy"].sum() for batch in found) == sum(sum(one.drawn) for one, _ in rows)
    assert not batches_of([], tokens=9, pad=0)


def test_answers_are_compared_within_their_group():
    right, wrong = rollout(1.0), rollout(0.0)
    advantages = [
        advantage for _, advantage in trained_on([group(right, wrong, wrong, wrong), group(wrong, wrong)], Scoring())
    ]
    assert advantages == pytest.approx([1, -0.577, -0.577, -0.577, 0, 0], abs=1e-3)
    assert trained_on([group(right)], Scoring()) == [(right, 0.0)]


def test_answers_that_were_cut_may_be_left_out_but_still_count_for_the_others():
    right, cut = rollout(1.0), rollout(0.0, ended=False)
    kept = trained_on([group(right, cut)], Scoring(overlong=False))
    assert kept == [(right, 1.0)]


def test_shorter_answers_earn_more_where_less_effort_was_asked_for():
    scoring = Scoring(effort=Effort(weight=1.0, upper=8), effort_words="{low}")
    short, long = (rollout(answer=size, asked="? {low}") for size in (2, 8))
    assert scoring.rewards(group(short, long)) == [1.75, 1.0]
    assert scoring.rewards(group(rollout(answer=2), rollout(answer=8))) == [1.0, 1.0]
    by = lambda *turns: [{"role": role, "content": words} for role, words in turns]
    for messages, low in (
        (by(("user", "? {low}"), ("assistant", "1"), ("tool", "2")), True),
        (by(("user", "? {low}"), ("assistant", "1"), ("user", "?")), False),
        (by(("user", "?"), ("assistant", "{low}")), False), (by(("system", "{low}")), False),
    ):  # fmt: skip
        one = replace(short, problem=replace(problem(), messages=tuple(messages)))
        assert scoring.rewards(group(one)) == [1.75 if low else 1.0], "the last turn of the user says it"


def test_parts_of_verdicts_are_told_by_task_where_they_are_numbers():
    parts = {"facts": 0.5, "done": True, "note": "x", "whole": {"a": 1}, "off": float("nan"), "far": 10**400}
    verdicts = Verdict(reward=1.0, parts=parts), Verdict(reward=0.0, parts={"facts": 1.0})
    told = told_of([group(*(replace(rollout(), verdict=verdict) for verdict in verdicts))])
    assert {name: pair for name, pair in told.items() if name.startswith("part_")} == {
        "part_sort_facts": (1.5, 2), "part_sort_done": (1.0, 1),
    }  # fmt: skip


def test_what_was_lost_is_counted_and_too_much_of_it_ends_the_training():
    good, bad = group(rollout(), rollout(0.0), lost=["time"]), group(lost=["grader", "grader"])
    told = told_of([good, bad])
    assert (
        told["lost"] == (3, 5) and told["reward"] == told["reward_sort"] == (1, 2) and told["silent_groups"] == (0, 1)
    )
    assert checked([good]) == [good]
    why = replace(bad, why={"grader": "there is no memory"})
    with pytest.raises(UserError, match="3 of 5 rollouts.*2 to grader: there is no memory; 1 to time"):
        checked([good, why])
    assert torch.is_tensor(batches_of(trained_on([good], Scoring()), tokens=99, pad=0)[0].advantage)
