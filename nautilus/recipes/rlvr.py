"""Train a model by reinforcement on tasks whose answers can be verified.

MODEL is a run, a checkpoint folder or a hub id with a chat template. Every step puts problems to the model, each
`group` times; answers are compared within their group, and what was better becomes likelier. The routers of experts
stay as they are. The same command again goes on where an interrupted run stopped. Problems that are measured are none
of those that are trained on.

runs/sft tasks=sort,reverse,arithmetic:1-3      three tasks at once, in equal shares
runs/sft tasks=math@train.jsonl thinking_budget=2000 tokens=4096
runs/sft tasks=sort profile=8                   first what is easy, then what is hard, by how often each is solved
runs/sft tasks=style judges=style=oracle        answers that are better or worse than others, and not right or wrong
runs/sft tasks=sort age=1                       answers are drawn while training goes on, with weights one update old
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import nautilus
from nautilus.config import setting
from nautilus.data.batch import Batch
from nautilus.eval import practice as report
from nautilus.model.language import Language
from nautilus.posttrain.blend import Blend, Curriculum
from nautilus.posttrain.compared import Judged, judges_of
from nautilus.posttrain.credit import Effort
from nautilus.posttrain.onpolicy import Rows
from nautilus.posttrain.practice import budgeted, copy_of, domains, open_practice, practise, wanted
from nautilus.posttrain.profile import curve, examined, with_rates
from nautilus.posttrain.stream import Group, Scoring, batches_of, telling, trained_on
from nautilus.posttrain.teachers import score
from nautilus.runtime import UserError, keep_memory
from nautilus.train.policy import Correction, Surrogate, before_updates, policy


@dataclass(frozen=True, kw_only=True)
class Settings(Judged):
    out: Path = setting(Path("runs/rlvr"), "the run's folder; gone on with if it is there")
    overlong: bool = setting(True, "answers that were cut off are learnt from too")
    advantage: float = setting(20.0, "most of an advantage, either way")
    updates: int = setting(1, "updates of a step, each by the answers to a part of its problems")
    low: float = setting(0.2, "share by which the updates of a step may lower a probability, where it has several")
    high: float = setting(0.28, "share by which they may raise it")
    correction: str = setting("truncate", "of answers that other weights drew: none, truncate, mask or sequence")
    least: float | None = setting(None, "weight below which a token is raised to it, or left out; none: by correction")
    most: float | None = setting(None, "weight above which it is lowered to it, or left out; none: by correction")
    apart: float = setting(2.0, "answers are left out whose probabilities are off by more than this factor in the mean")
    kl: float = setting(0.0, "weight of the distance from the model as it was before")
    effort: Effort = Effort()
    effort_words: str = setting("", "words of a prompt that ask for less effort: shorter answers earn more there")
    profile: int = setting(0, "answers to each problem before training, by which the order is easy to hard; 0: mixed")
    curriculum: Curriculum = Curriculum()
    measured: int = setting(256, "other problems of each task, measured before and after")
    budgets: tuple[int, ...] = setting((), "thinking budgets under which the trained model is measured too")

    def __post_init__(self):
        super().__post_init__()
        if self.profile < 0 or self.measured < 1:
            raise UserError(
                f"profile={self.profile} and measured={self.measured} were asked for; give 0 and 1, or more"
            )
        if self.group < 2:
            raise UserError(f"group={self.group} was asked for; an answer is compared with others: give 2 or more")
        if not 1 <= self.updates <= self.prompts:
            raise UserError(
                f"updates={self.updates} of a step were asked for, with prompts={self.prompts}; each takes some of them"
            )
        if not self.advantage > 0:
            raise UserError(f"advantage={self.advantage} was asked for, the most of one; give more than 0")
        if self.age and self.correction == "none":
            raise UserError(
                f"age={self.age} with correction=none was asked for: what older weights drew would count as drawn by"
                " the new ones; take correction=truncate, mask or sequence, or age=0"
            )
        budgeted(self.budgets, (), self)
        self.surrogate()  # for what it refuses

    def surrogate(self) -> Surrogate:
        correction = Correction(kind=self.correction, least=self.least, most=self.most, apart=self.apart)
        return Surrogate(low=self.low, high=self.high, correction=correction, kl=self.kl)


def main(settings: Settings) -> None:
    if not settings.model:
        raise UserError("no model to train; write nautilus rlvr MODEL tasks=…, a run, a checkpoint folder or a hub id")
    tasks = wanted(settings)
    budgeted(settings.budgets, tasks, settings)
    keep_memory()
    model, tokenizer = nautilus.load(settings.model)
    judges = judges_of(settings, [one.task for one in tasks], nautilus.load)
    run = open_practice(settings, model, tokenizer)
    exam = partial(examined, run, tasks=tasks, count=settings.measured, settings=settings, tokenizer=tokenizer)
    before = exam("before", model)
    asked = with_rates(run, domains(settings, tasks), settings, model, tokenizer, times=settings.profile)
    blend = Blend(
        domains=asked, prompts=settings.prompts, steps=settings.steps, curriculum=settings.curriculum,
        seed=settings.seed,
    )  # fmt: skip
    learnt = partial(rows, settings, model.config.pad)
    if settings.kl:
        learnt = beside(copy_of(model), learnt)
    learnt = in_parts(model, settings.updates, learnt)
    practise(run, settings, model, tokenizer, blend, learnt, policy(settings.surrogate(), settings.mtp), judges)
    after = exam("after", model)
    model.save(run.model, tokenizer=tokenizer, facts={"trained": f"by reinforcement on {', '.join(settings.tasks)}"})
    title = f"{Path(settings.model).name}: reinforcement on {', '.join(one.task.name for one in tasks)}"
    facts = {"model": settings.model, "seed": str(settings.seed)}
    how = {"tasks": tasks, "count": settings.measured, "settings": settings, "tokenizer": tokenizer}
    found = curve(run, model, settings.budgets, **how)
    report.show(run, {"before": before, "after": after}, title=title, facts=facts, curve=found)


def beside(reference: Language, learnt: Rows) -> Rows:
    """With the log-probs of the reference."""
    return lambda groups: [replace(batch, teacher_logprob=score(reference, batch)) for batch in learnt(groups)]


def in_parts(model: Language, updates: int, learnt: Rows) -> Rows:
    """For so many updates, each by the answers to a part of every task's problems; those of the later ones with the
    log-probs that they have before the first."""

    def parted(groups: Sequence[Group]) -> list[Batch]:
        parts = [found for first in range(updates) if (found := learnt(groups[first::updates]))]
        later = [replace(before_updates(model, one), update=n) for n, part in enumerate(parts) if n for one in part]
        return [*parts[0], *later] if parts else []

    return parted


def rows(settings: Settings, pad: int, groups: Sequence[Group]) -> list[Batch]:
    effort = settings.effort if settings.effort_words or settings.less_effort else None
    scoring = Scoring(
        group=settings.group, most=settings.advantage, overlong=settings.overlong, effort=effort,
        effort_words=settings.effort_words,
    )  # fmt: skip
    learnt = trained_on(groups, scoring)
    if settings.kl or settings.mtp.depths:  # which learn from every answer
        return batches_of(learnt, tokens=settings.micro, pad=pad)
    found, share = telling(learnt)
    batches = batches_of(found, tokens=settings.micro, pad=pad)
    return [replace(one, advantage=share * one.advantage) for one in batches if one.advantage is not None]
