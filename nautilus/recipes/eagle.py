"""Train a draft head in the manner of EAGLE-3 for a model, with or without a prediction block of its own.

MODEL is a run, a checkpoint folder or a hub id, and stays as it is. The head reads the model at three depths and drafts
from the words that its answers use most; it learns from such answers, unrolled over seven steps. The head's folder is
out/model. The same command again goes on where an interrupted one stopped. Without prompts the model is given
beginnings: of the documents that its run was trained on, or such as it writes itself.

runs/demo words=2048                             for the model of the demo
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
from nautilus.model.eagle import Eagle, sizes_for
from nautilus.posttrain.boost import most_used, unrolled
from nautilus.posttrain.drafter import Drafter, mtp_drafter
from nautilus.posttrain.lesson import Lesson, open_lesson, teach, texts
from nautilus.runtime import UserError, keep_memory, program
from nautilus.train.optim import OptimConfig


@dataclass(frozen=True, kw_only=True)
class Settings(Lesson):
    out: Path = setting(Path("runs/eagle"), "the run's folder; gone on with if it is there")
    words: int = setting(32768, "that the head can draft, at most the vocabulary")
    hidden: int = setting(0, "of its MLP; 0: 8/3 of the model's width")
    gated: bool = setting(True, "its MLP has a gate; false: squared ReLU")
    optim: OptimConfig = OptimConfig(lr=3e-3, min_lr=3e-5, warmup=-1, decay=0.5, weight_decay=0.0)

    def __post_init__(self):
        super().__post_init__()
        if self.words < 1 or self.hidden < 0:
            raise UserError(f"words={self.words} must be at least 1, hidden={self.hidden} not below 0")


def main(settings: Settings) -> None:
    if not settings.model:
        raise UserError("no model to draft for; write nautilus eagle MODEL, a run, a checkpoint folder or a hub id")
    keep_memory()
    model, tokenizer = nautilus.load(settings.model)
    model.requires_grad_(False).eval()
    run = open_lesson(settings, model)
    own = texts(run, settings, settings.model, model, tokenizer)
    words_K = most_used(own.learnt, min(settings.words, model.config.vocab), model.config.vocab)
    sizes = sizes_for(model.config, len(words_K), hidden=settings.hidden, gated=settings.gated)
    head = Eagle(model.config, sizes, words_K, dtype=model.compute).initialise(model, settings.seed)
    drafter = Drafter(model, head)
    teach(run, settings, drafter, unrolled(settings.drafts), own.learnt)
    head.save(run.model, model)
    block = {"its block": own.accepted(mtp_drafter(model).eval(), settings.drafts)} if model.config.mtp else {}
    found = drafting.Drafting(
        title=f"{Path(settings.model).name}: a draft head",
        about="A draft head that reads the model at three depths, trained on the model's own answers.",
        command=f"{program()} {shlex.join(sys.argv[1:])}",
        found={**block, "head": own.accepted(drafter, settings.drafts)},
        facts={"model": settings.model, "seed": str(settings.seed), "words": f"{len(words_K):,}"},
    )
    drafting.write(run, found)
    console = Console(soft_wrap=True, highlight=False)
    console.print(*drafting.summary(found), sep="\n")
    console.print(f"report {run.report}\nhead   {run.model}")
