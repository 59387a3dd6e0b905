"""Train a model's multi-token-prediction block on the model's own answers, so that more of its drafts are accepted.

MODEL is a run, a checkpoint folder or a hub id. The model answers prompts; the block learns to predict what the model
would, seven tokens ahead, fed with its own outputs, as the report of Nemotron 3 Ultra tells. All else of the model
stays bit for bit as it is. The output folder opens with `nautilus serve`. The same command again goes on where an
interrupted one stopped. Without prompts it is given beginnings: of the documents that the run of the model was trained
on, or such as it writes itself.

runs/demo                                        boost the model of the demo
runs/demo prompts=questions.jsonl#question chat=true prompt_tokens=512
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

import nautilus
from nautilus.config import setting
from nautilus.eval import drafting
from nautilus.posttrain.boost import boosting
from nautilus.posttrain.drafter import mtp_drafter
from nautilus.posttrain.lesson import Lesson, open_lesson, teach, texts
from nautilus.runtime import UserError, keep_memory, program


@dataclass(frozen=True, kw_only=True)
class Settings(Lesson):
    out: Path = setting(Path("runs/boost"), "the run's folder; gone on with if it is there")
    temperature: float = setting(2.0, "of both distributions that are compared")

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"temperature={self.temperature} must be positive and finite")


def main(settings: Settings) -> None:
    if not settings.model:
        raise UserError("no model to boost; write nautilus boost MODEL, a run, a checkpoint folder or a hub id")
    keep_memory()
    model, tokenizer = nautilus.load(settings.model)
    drafter = mtp_drafter(model.requires_grad_(False).eval()).eval()
    run = open_lesson(settings, model)
    own = texts(run, settings, settings.model, model, tokenizer)
    before = own.accepted(drafter, settings.drafts)
    objective = boosting(steps=settings.drafts, temperature=settings.temperature, seed=settings.seed)
    teach(run, settings, drafter, objective, own.learnt)
    after = own.accepted(drafter, settings.drafts)
    told = {"boosted": f"its prediction block, {settings.steps} updates on {settings.answers:,} answers of its own"}
    model.save(run.model, tokenizer=tokenizer, facts=told)
    found = drafting.Drafting(
        title=f"{Path(settings.model).name}: boosted drafts",
        about="A multi-token-prediction block before and after training on its model's own answers.",
        command=f"{program()} {shlex.join(sys.argv[1:])}",
        found={"before": before, "after": after},
        facts={"model": settings.model, "seed": str(settings.seed)},
    )
    drafting.write(run, found)
    console = Console(soft_wrap=True, highlight=False)
    console.print(*drafting.summary(found), sep="\n")
    console.print(f"report {run.report}\nserve it: {program()} serve {run.folder}")
