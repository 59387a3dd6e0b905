"""Training on a model's own answers to tasks, from beginning to end: what all recipes that do so share.

The same command again goes on where an interrupted run stopped. `rollouts.jsonl` of the run has every answer as text,
with what it earned and why; a line of `metrics.jsonl` has the means of its step.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nautilus.config import setting, to_dict
from nautilus.data.batch import Batch
from nautilus.data.tokenizer import Tokenizer
from nautilus.model.language import Language
from nautilus.ops.precision import compute_dtype
from nautilus.posttrain.blend import Blend, Domain, domain
from nautilus.posttrain.crew import Actors, Crew, Here
from nautilus.posttrain.onpolicy import Ahead, Finish, Fresh, Plan, Rows
from nautilus.posttrain.remote import connected
from nautilus.posttrain.rollout import Playing, least_effort
from nautilus.posttrain.stream import Group, told_of
from nautilus.runtime import Run, UserError, continue_or_create
from nautilus.serve.prefixes import fingerprint
from nautilus.tasks.asked import Asked, asked
from nautilus.train.checkpoint import Checkpoints
from nautilus.train.loop import fit
from nautilus.train.objective import Objective
from nautilus.train.optim import OptimConfig, adamw, schedule
from nautilus.train.policy import Mtp

LEAST = {"prompts": 1, "group": 1, "tokens": 2, "turn_tokens": 1, "steps": 1, "problems": 1, "together": 1, "micro": 1}
LEAST |= {"thinking_grace": 0, "drafts": 0}
LEAST |= {"save_every": 0, "age": 0, "actors": 0, "silence": 1, "seed": 0, "seconds": 1, "balance": 0}


@dataclass(frozen=True, kw_only=True)
class Practice:
    model: str = setting("", "run, checkpoint folder or hub id")
    tasks: tuple[str, ...] = setting((), "what is asked: sort, sort:1-3, sort:2*0.5 (its share), math@rows.jsonl")
    out: Path = setting(Path("runs/practice"), "the run's folder; gone on with if it is there")
    steps: int = setting(100, "updates")
    prompts: int = setting(16, "problems of a step")
    group: int = setting(16, "answers to each problem")
    problems: int = setting(1024, "different problems of each task")
    tokens: int = setting(512, "most tokens of a conversation")
    turn_tokens: int = setting(128, "most tokens of an answer")
    thinking: bool | None = setting(None, "the model is asked to think first; none: as the task's worked answers do")
    thinking_budget: int | None = setting(None, "thinking is closed after so many tokens; none: never")
    thinking_grace: int = setting(0, "at the latest after so many more")
    budgeted: float = setting(0.0, "share of problems that are trained on within one of train_budgets")
    train_budgets: tuple[int, ...] = setting((), "thinking budgets, so that fewer tokens of thinking serve as well")
    less_effort: float = setting(0.0, "share of problems that are trained on with less effort asked for")
    seconds: float = setting(60.0, "that a task may take for a turn; then the answer is lost, and no other")
    optim: OptimConfig = OptimConfig(
        lr=3e-4, min_lr=3e-5, warmup=-1, decay=0.0, betas=(0.9, 0.999), weight_decay=0.0
    )  # fmt: skip
    compute: str = setting("auto", "bf16 or fp32 activations, in answers too; auto: what is faster here")
    balance: float = setting(1e-3, "step of the load-balancing biases; the routers' weights stay as they are")
    replay: bool = setting(False, "experts that wrote an answer learn from it, whatever the routers say by then")
    drafts: int = setting(0, "most tokens tried at once of what may come next, where that is faster; 0: none")
    mtp: Mtp = Mtp()
    micro: int = setting(8192, "most tokens of a micro-batch")
    together: int = setting(64, "most answers that are written together")
    age: int = setting(0, "updates by which answers may be older than what they train; 0: they are drawn between two")
    actors: int = setting(0, "processes of Ray that draw answers, here or in a cluster; 0: this one does")
    silence: float = setting(600.0, "seconds without a sign of life after which another takes a process's place")
    save_every: int = setting(50, "updates between saved states, 0: only at the end")
    seed: int = setting(0, "of the problems and the answers")

    def __post_init__(self):
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.thinking_budget is not None and self.thinking_budget < 0:
            raise UserError(f"thinking_budget={self.thinking_budget} must be at least 0, or none")
        most = math.inf if self.thinking_budget is None else self.thinking_budget
        within = all(0 <= one <= most for one in self.train_budgets)
        if not 0 <= self.budgeted <= 1 or bool(self.budgeted) != bool(self.train_budgets) or not within:
            raise UserError(
                f"budgeted={self.budgeted} of the problems within train_budgets={self.train_budgets} was asked for;"
                f" give a share and budgets of 0 up to thinking_budget={self.thinking_budget}, or neither"
            )
        if not 0 <= self.less_effort <= 1:
            raise UserError(f"less_effort={self.less_effort} of the problems was asked for; give a share of 0 to 1")
        if not 0 <= self.mtp.depths < self.tokens or self.mtp.weight < 0:
            raise UserError(
                f"mtp.depths={self.mtp.depths} and mtp.weight={self.mtp.weight} were asked for; neither is negative,"
                f" and a conversation of tokens={self.tokens} has fewer depths"
            )
        compute_dtype(self.compute)
        schedule(self.optim, self.steps)

    def computing(self, model: Language) -> Language:
        """The model, with the activations that are asked for."""
        model.compute = compute_dtype(self.compute, model.head_weight.device.type)
        return model

    @property
    def playing(self) -> Playing:
        names = "tokens turn_tokens thinking thinking_budget thinking_grace seconds drafts".split()
        told = {name: getattr(self, name) for name in names}
        shares = {"budgeted": self.budgeted, "budgets": self.train_budgets, "less_effort": self.less_effort}
        return Playing(routes=self.replay, **shares, **told)


def wanted(settings: Practice) -> list[Asked]:
    if not settings.tasks:
        raise UserError("no task was named; write tasks=sort, or several: tasks=sort,reverse,arithmetic")
    found = [asked(words) for words in settings.tasks]
    names = Counter(one.task.name for one in found)
    if twice := [name for name, count in names.items() if count > 1]:
        raise UserError(
            f"the task {twice[0]} was named twice; give its levels together, such as {twice[0]}:1-2, or all its rows in"
            " one file"
        )
    if settings.prompts < len(found):
        raise UserError(f"prompts={settings.prompts} of a step for {len(found)} tasks; each needs one")
    return found


def budgeted(budgets: Sequence[int], tasks: Sequence[Asked], settings: Practice) -> None:
    """UserError for thinking budgets that cannot be measured."""
    if budgets and (min(budgets) < 0 or len({*budgets}) < len(budgets)):
        raise UserError(f"budgets={','.join(map(str, budgets))} were asked for; each is 0 or more, and named once")
    if budgets and tasks and not any(settings.playing.chatting(one.task).enable_thinking for one in tasks):
        names = ", ".join(one.task.name for one in tasks)
        raise UserError(f"budgets of thinking were asked for, but {names} are answered without; leave budgets out")


def routes(words: Sequence[str], who: str) -> dict[str, str]:
    """By task, whom it has for a teacher or a judge."""
    found = dict[str, str]()
    for each in words:
        task, equals, place = each.partition("=")
        if not (task and equals and place):
            raise UserError(f"the {who} {each!r} was asked for; write task=RUN, such as sort=runs/sort")
        if found.setdefault(task, place) != place:
            raise UserError(f"{task} has two {who}s, {found[task]} and {place}; it can have one")
    return found


def open_practice(settings: Practice, model: Language, tokenizer: Tokenizer, **others: Any) -> Run:
    """The run, begun or gone on with; others: what it must have been begun with beside settings and weights."""
    if tokenizer.template is None:
        raise UserError("this model has no chat template, in which tasks are asked; train it on conversations first")
    if settings.less_effort and least_effort(tokenizer) is None:
        raise UserError(
            f"less_effort={settings.less_effort} was asked for, but the model's chat template has no words for less"
            " effort; give 0, and rows that ask for it themselves"
        )
    if settings.mtp.depths and not model.config.mtp:
        raise UserError(f"mtp.depths={settings.mtp.depths}, but the model has no block that predicts ahead; give 0")
    if settings.tokens > model.config.positions:
        raise UserError(
            f"tokens={settings.tokens} of a conversation were asked for, the model has"
            f" positions={model.config.positions}; lower tokens"
        )
    settings.computing(model)
    return continue_or_create(settings.out, {**to_dict(settings), "weights": fingerprint(model), **others})


def domains(settings: Practice, tasks: Sequence[Asked]) -> list[Domain]:
    return [
        domain(one.task, settings.problems, levels=one.levels, share=one.share, seed=settings.seed) for one in tasks
    ]


def practise(
    run: Run, settings: Practice, model: Language, tokenizer: Tokenizer, blend: Blend,
    rows: Rows, objective: Objective, finish: Finish | None = None,
) -> None:  # fmt: skip
    """Trains the model, as float32 masters with routers that stay; afterwards its types are what they were."""
    types = {name: weight.dtype for name, weight in model.named_parameters()}
    model.float().requires_grad_(True)
    for name, weight in model.named_parameters():
        idle = name.startswith("mtp.") and not settings.mtp.depths
        weight.requires_grad_(not idle and not name.endswith(("gate.weight", "router.weight")))
    plan = Plan(blend=blend, group=settings.group, seed=settings.seed, finish=finish)
    log = Log(run.folder / "rollouts.jsonl", tokenizer)
    stream = stream_of(settings, model, tokenizer, plan, told_rows(rows), log)
    try:
        fit(
            model, stream, objective, adamw(model, settings.optim), steps=settings.steps,
            schedule=schedule(settings.optim, settings.steps), clip=settings.optim.clip, balance=settings.balance,
            checkpoints=Checkpoints(run=run, every=settings.save_every, settings=shaping(settings)),
        )  # fmt: skip
    finally:
        stream.close()
    model.requires_grad_(False).eval()
    for name, weight in model.named_parameters():
        weight.data = weight.data.to(types[name])


def shaping(settings: Practice) -> dict:
    """What a run that goes on must have been begun with, beside what `fit` sees itself."""
    apart = "out model steps save_every optim balance together drafts".split()
    apart += "actors silence teacher_actors measured profile".split()
    return {name: json.loads(json.dumps(value)) for name, value in to_dict(settings).items() if name not in apart}


def stream_of(
    settings: Practice, model: Language, tokenizer: Tokenizer, plan: Plan, rows: Rows, log: Log
) -> Fresh | Ahead:
    """Answers drawn here with the model itself, or with copies of it: ahead of training, or by processes of Ray."""

    def make(version: int) -> Crew:
        how = {"rows": settings.together, "version": version}
        if settings.actors:
            given = connected(settings.actors), settings.actors, model, tokenizer, settings.playing
            return Actors(*given, **how, silence=settings.silence)
        own = copy_of(model) if settings.age else model
        return Here(own, tokenizer, settings.playing, **how, beside=bool(settings.age))

    if settings.age:
        return Ahead(model, plan, make, rows, log, age=settings.age)
    return Fresh(model, plan, make, rows, log, own=not settings.actors)


def copy_of(model: Language) -> Language:
    """With weights of its own."""
    copy = Language(model.config, device="meta").to_empty(device="cpu")
    copy.load_state_dict(model.state_dict())
    copy.compute = model.compute
    return copy.requires_grad_(False).eval()


def told_rows(rows: Rows) -> Rows:
    """With what is told of the step on the first of its batches."""

    def told(groups: Sequence[Group]) -> list[Batch]:
        found = rows(groups)
        return [replace(one, told={} if number else told_of(groups)) for number, one in enumerate(found)]

    return told


@dataclass(frozen=True)
class Log:
    """Every answer of a step as a line; those of steps that are drawn once more after an interruption come again."""

    path: Path
    tokenizer: Tokenizer

    def __call__(self, step: int, groups: Sequence[Group]) -> None:
        with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows(step, groups))

    def rows(self, step: int, groups: Sequence[Group]) -> Iterator[dict]:
        for group in groups:
            asked = group.problem
            named = {"step": step, "task": asked.task, "level": asked.level, "problem": asked.id}
            for one in group.rollouts:
                text = self.tokenizer.decode(one.tokens, skip_special=False)
                yield {
                    **named, "version": one.version, "newest": one.newest,
                    "reward": one.verdict.reward, "why": one.verdict.why, "parts": dict(one.verdict.parts),
                    "ended": one.ended, "text": text,
                }  # fmt: skip
            for kind, count in group.lost.items():
                yield {**named, "lost": count, "to": kind, "why": group.why.get(kind, "")}
