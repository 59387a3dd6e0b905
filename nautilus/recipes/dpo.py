"""Train a model to prefer its better answers: direct preference optimisation on pairs that it draws itself.

MODEL is a run, a checkpoint folder or a hub id with a chat template. Every step puts problems to the model; of the
answers to each the best and the worst are a pair, and the model moves towards the one and away from the other, held by
the model that it began as. The same command again goes on where an interrupted run stopped.

runs/sft tasks=fields,constraints
runs/sft tasks=style judges=style=oracle         the taste of a task's own oracle
runs/sft tasks=style judges=style=runs/judge     of a reward model
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import nautilus
from nautilus.config import setting
from nautilus.data.batch import Batch
from nautilus.eval import practice as report
from nautilus.model.language import Language
from nautilus.posttrain.blend import Blend
from nautilus.posttrain.compared import Judged, judges_of
from nautilus.posttrain.pairs import pair_batches, pairs_of
from nautilus.posttrain.practice import copy_of, domains, open_practice, practise, wanted
from nautilus.posttrain.profile import examined
from nautilus.posttrain.stream import Group
from nautilus.runtime import UserError, keep_memory
from nautilus.train.policy import preference


@dataclass(frozen=True, kw_only=True)
class Settings(Judged):
    out: Path = setting(Path("runs/dpo"), "the run's folder; gone on with if it is there")
    group: int = setting(8, "answers to each problem, of which two are learnt from")
    beta: float = setting(0.05, "how far the model may go from where it began: less is further")
    sft: float = setting(0.2, "weight of the next token of the better answer")
    measured: int = setting(256, "other problems of each task, measured before and after")

    def __post_init__(self):
        super().__post_init__()
        if self.group < 2 or self.measured < 1:
            raise UserError(f"group={self.group} and measured={self.measured} were asked for; give 2 and 1, or more")
        if self.replay or self.mtp.depths:
            raise UserError(
                f"replay={str(self.replay).lower()} and mtp.depths={self.mtp.depths} were asked for; preferences are"
                " learnt without: leave both out"
            )
        preference(beta=self.beta, sft=self.sft)  # for what it refuses


def main(settings: Settings) -> None:
    if not settings.model:
        raise UserError("no model to train; write nautilus dpo MODEL tasks=…, a run, a checkpoint folder or a hub id")
    tasks = wanted(settings)
    keep_memory()
    model, tokenizer = nautilus.load(settings.model)
    judges = judges_of(settings, [one.task for one in tasks], nautilus.load)
    run = open_practice(settings, model, tokenizer)
    exam = partial(examined, run, tasks=tasks, count=settings.measured, settings=settings, tokenizer=tokenizer)
    before = exam("before", model)
    blend = Blend(domains=domains(settings, tasks), prompts=settings.prompts, steps=settings.steps, seed=settings.seed)
    learnt = partial(rows, settings, copy_of(model.float()), model.config.pad)
    how = preference(beta=settings.beta, sft=settings.sft)
    practise(run, settings, model, tokenizer, blend, learnt, how, judges)
    scores = {"before": before, "after": exam("after", model)}
    told = f"to prefer better answers to {', '.join(settings.tasks)}"
    model.save(run.model, tokenizer=tokenizer, facts={"trained": told})
    title = f"{Path(settings.model).name}: preferences on {', '.join(one.task.name for one in tasks)}"
    report.show(run, scores, title=title, facts={"model": settings.model, "seed": str(settings.seed)})


def rows(settings: Settings, reference: Language, pad: int, groups: Sequence[Group]) -> list[Batch]:
    return pair_batches(pairs_of(groups), reference, tokens=settings.micro, pad=pad)
