"""Rollouts as a stream of batches: of the weights as they are, step by step.

A step puts its problems to the model, each `group` times, and makes rows of what came: tokens that the model drew have
weight 1 and the advantage of their answer within its group. Between two steps the weights change; the engine uses the
same ones, and forgets what it knew of them.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nautilus.data.batch import Batch
from nautilus.data.mix import number_of
from nautilus.posttrain.credit import FAULT, Effort, leave_one_out, tag_fault
from nautilus.posttrain.rollout import Dropped, Player, Rollout, Turn
from nautilus.runtime import UserError
from nautilus.tasks import Problem, Task
from nautilus.train.replay import NONE

Rows = list[tuple[Rollout, float]]
MOST_LOST = 0.5  # of the rollouts of a step, beyond which something is wrong with all of them
LARGEST = 1e30  # a part of a verdict that is no less is no number to add up


@dataclass(frozen=True, kw_only=True)
class Group:
    """Answers to one problem. lost: by what they were lost to, in place of which others came at times; why: for people,
    of the first of each; less: less effort was asked for."""

    problem: Problem
    rollouts: Sequence[Rollout]
    lost: Counter[str] = field(default_factory=Counter)
    why: Mapping[str, str] = field(default_factory=dict)
    less: bool = False


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """group: answers to each problem; most: of an advantage; overlong: answers that were cut are learnt from too;
    effort: for problems that ask for less, by what the user's last turn holds."""

    group: int = 16
    most: float = math.inf
    overlong: bool = True
    effort: Effort | None = None
    effort_words: str = ""

    def rewards(self, group: Group) -> list[float]:
        asked = ["", *(str(one.get("content")) for one in group.problem.messages if one.get("role") == "user")][-1]
        less = self.effort if self.effort and self.effort_words and self.effort_words in asked else None
        less = less or (self.effort if group.less else None)
        found = [one.verdict.reward for one in group.rollouts]
        return [less.reward(r, one.length) if less else r for r, one in zip(found, group.rollouts, strict=True)]

    def advantages(self, group: Group) -> list[float]:
        """Of fewer than two answers nothing can be said."""
        rewards = self.rewards(group)
        return leave_one_out(rewards, self.most) if len(rewards) > 1 else [0.0] * len(rewards)


async def play_group(player: Player, task: Task, problem: Problem, count: int, seed: int) -> Group:
    player = player.within(seed)
    ways = (player.play(task, problem, number_of(seed, number), alone=count < 2) for number in range(count))
    found = await asyncio.gather(*ways, return_exceptions=True)
    lost, why = Counter[str](), dict[str, str]()
    for one in found:
        if isinstance(one, Dropped):
            lost[one.kind] += 1
            why.setdefault(one.kind, str(one)[:300])
        elif isinstance(one, BaseException):
            raise one
    rollouts, less = [one for one in found if isinstance(one, Rollout)], player.playing.chat.effort is not None
    return Group(problem=problem, rollouts=rollouts, lost=lost, why=why, less=less)


def checked(groups: Sequence[Group]) -> Sequence[Group]:
    """UserError where so much was lost that the fault cannot be of single rollouts. What was lost to a process that
    died, and drawn by another then, is no part of that."""
    lost = sum((group.lost for group in groups), Counter[str]())
    lost -= Counter(actor=sum(group.lost["actor"] for group in groups if group.rollouts))
    whole = sum(len(group.rollouts) for group in groups)
    if lost.total() > MOST_LOST * (lost.total() + whole):
        why = {kind: text for group in reversed(groups) for kind, text in group.why.items()}
        told = "; ".join(f"{count} to {kind}: {why.get(kind, '')}".rstrip(": ") for kind, count in lost.most_common())
        raise UserError(
            f"{lost.total()} of {lost.total() + whole} rollouts of a step were lost ({told}); `rollouts.jsonl` has them"
            " all. Once that is mended the same command goes on from the last saved step"
        )
    return groups


# ----- rows -----------------------------------------------------------------------------------------------------------


def batches_of(rows: Sequence[tuple[Rollout, float]], *, tokens: int, pad: int) -> list[Batch]:
    """Micro-batches of at most so many tokens, padding included (at least a row each); rows of about one length
    together. The number beside a rollout is its advantage. What answers to one prompt share counts once, and only those
    to prompts of one length come together: with padding before a prompt, attention would add in another order than the
    engine."""
    asked: dict[tuple[int, ...], Rows] = {}
    for pair in rows:
        asked.setdefault(pair[0].prompt, []).append(pair)
    kinds: dict[int, list[Rows]] = {}  # by the columns that are shared
    for prompt, group in asked.items():
        common = len(prompt) if len(group) > 1 else 0
        kinds.setdefault(common, []).extend(parts_of(group, common, tokens))
    return [
        batch_of([pair for piece in pieces for pair in piece], pad, common)
        for common, parts in kinds.items()
        for pieces in packed(parts, common, tokens)
    ]


def parts_of(group: Rows, common: int, tokens: int) -> list[Rows]:
    """The answers to a prompt in parts of at most so many tokens, short ones first; at least one answer each."""
    found = list[Rows]()
    for pair in sorted(group, key=lambda pair: len(pair[0].tokens)):
        if not found or common + (len(found[-1]) + 1) * (len(pair[0].tokens) - common) > tokens:
            found.append([])
        found[-1].append(pair)
    return found


def packed(parts: Sequence[Rows], common: int, tokens: int) -> list[list[Rows]]:
    found, width = list[list[Rows]](), lambda part: max(len(one.tokens) for one, _ in part) - common
    for part in sorted(parts, key=width):
        rows = sum(map(len, found[-1])) + len(part) if found else 0
        if not found or (len(found[-1]) + 1) * common + rows * width(part) > tokens:
            found.append([])
        found[-1].append(part)
    return found


def batch_of(rows: Rows, pad: int, common: int = 0) -> Batch:
    """Padding is document 0, of weight 0. common: tokens of every prompt, where it is shared."""
    longest = max(len(one.tokens) for one, _ in rows)
    shape = len(rows), longest
    tokens_BT, document_BT = torch.full(shape, pad), torch.zeros(shape, dtype=torch.int64)
    weight_BT, advantage_BT, sampled_BT = torch.zeros(shape), torch.zeros(shape), torch.zeros(shape)
    for row, (one, advantage) in enumerate(rows):
        length = len(one.tokens)
        tokens_BT[row, :length] = torch.tensor(one.tokens)
        document_BT[row, :length] = 1
        weight_BT[row, :length] = torch.tensor(one.drawn).float()
        sampled_BT[row, :length] = torch.tensor(one.logprobs)
        advantage_BT[row, :length] = advantage
        for turn in one.turns:
            if broken(turn):
                advantage_BT[row, turn.begin : turn.end] = FAULT
    weight_BT[:, 0] = 0
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(one.prompt for one, _ in rows))}
    alike_B = torch.tensor([numbers[one.prompt] for one, _ in rows]) if common else None
    return Batch(
        tokens_BT, {"policy": weight_BT}, document=document_BT, advantage=advantage_BT, sampled_logprob=sampled_BT,
        routes=experts_of([one.routes for one, _ in rows], longest), alike=alike_B, common=common,
    )  # fmt: skip


def broken(turn: Turn) -> bool:
    """A call cannot be read, or the thinking is malformed: opened within the turn, gone on with behind an end that the
    model wrote, or left open where the answer ended. What a limit cut is unfinished, and behind an end that a budget
    wrote may come the model's own."""
    said, length = turn.reply, turn.end - turn.begin
    if said.fault or tag_fault(said) or (said.stray and not turn.forced):
        return True
    left_open = said.thinking is not None and turn.thought == length and not (said.content or said.calls)
    return left_open and said.ended


def experts_of(known: Sequence[Tensor | None], longest: int) -> Tensor | None:
    """Of rows of so many tokens; the trainer's own where nothing is known."""
    some = next((one for one in known if one is not None), None)
    if some is None:
        return None
    found = torch.full((len(known), longest, *some.shape[1:]), NONE, dtype=torch.int16)
    for row, one in zip(found, known, strict=True):
        if one is not None:
            row[: len(one)] = one
    return found


def trained_on(groups: Sequence[Group], scoring: Scoring) -> Rows:
    """What a step learns from: its answers and their advantages."""
    found = []
    for group in groups:
        for one, advantage in zip(group.rollouts, scoring.advantages(group), strict=True):
            if scoring.overlong or one.ended:
                found.append((one, advantage))
    return found


def telling(rows: Rows) -> tuple[Rows, float]:
    """Those with an advantage, or a turn whose form is broken: from the others no gradient comes. And their share of
    all drawn tokens: times that, the mean over theirs is the sum over theirs by the number of all."""
    found = [pair for pair in rows if pair[1] or any(map(broken, pair[0].turns))] or [*rows]
    count, whole = (sum(sum(one.drawn) for one, _ in some) for some in (found, rows))
    return found, count / max(1, whole)


def told_of(groups: Sequence[Group]) -> dict[str, tuple[float, float]]:
    """(sum, count) of what is worth knowing of a step: reward and its parts by task, length, what was cut, broken or
    lost."""
    found: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        pair = found.setdefault(name, [0.0, 0.0])
        pair[0] += value
        pair[1] += 1

    for group in groups:
        for one in group.rollouts:
            for name in ("reward", f"reward_{group.problem.task}"):
                add(name, one.verdict.reward)
            for name, value in parts_seen(one.verdict.parts).items():
                add(f"part_{group.problem.task}_{name}", value)
            add("answer_tokens", sum(turn.end - turn.begin for turn in one.turns))
            add("cut", float(not one.ended))
            add("faults", float(any(map(broken, one.turns))))
            add("lost", 0.0)
        for _ in range(group.lost.total()):
            add("lost", 1.0)
        if len(group.rollouts) > 1:
            rewards = {one.verdict.reward for one in group.rollouts}
            add("silent_groups", float(len(rewards) == 1))
    return {name: (total, count) for name, (total, count) in found.items()}


def parts_seen(parts: Mapping[str, Any]) -> dict[str, float]:
    """Those of which there is a mean: a grader elsewhere may say anything."""
    numbers = {name: value for name, value in parts.items() if isinstance(value, int | float)}
    return {name: float(value) for name, value in numbers.items() if abs(value) < LARGEST}
