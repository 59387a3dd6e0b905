"""Make rows to learn from out of plain texts: rephrasings, questions with answers, questions with four options.

MODEL, a run, a checkpoint folder or a hub id with a chat template, writes them. A question is kept if the verifier,
with the text before it, answers as was written; a rephrasing if it keeps the numbers and names of its text. What shares
words with a problem that a task holds back is dropped. The same command again goes on where an interrupted one stopped.
In out are conversations.jsonl for `nautilus sft data=`, exact.jsonl and mcqa.jsonl for tasks=exact@FILE and mcqa@FILE,
and the report.

runs/chat texts=books.jsonl                               of every text one of each kind
runs/chat texts=wiki.jsonl#body kinds=choice each=4       four questions with options of every text
runs/chat texts=notes verifier=runs/large agree=3         another model must give the same answer three times of three
runs/chat texts=notes against=mcqa@exam.jsonl given=false     without an exam's questions; questions without their text
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

import nautilus
from nautilus.config import setting
from nautilus.data.template import template_of
from nautilus.eval import synthesis as report
from nautilus.posttrain.synthesis import Synthesis, listed, open_synthesis, synthesise
from nautilus.posttrain.synthetic import JUDGED
from nautilus.runtime import UserError, keep_memory, program


@dataclass(frozen=True, kw_only=True)
class Settings(Synthesis):
    out: Path = setting(Path("runs/synthesize"), "the run's folder; gone on with if it is there")


def main(settings: Settings) -> None:
    if not settings.model or not settings.texts:
        raise UserError("write nautilus synthesize MODEL texts=FILE: who writes, and what of")
    keep_memory()
    writer = nautilus.load(settings.model)
    writer[1].template = template_of(settings.template, writer[1].template)
    verifier = nautilus.load(settings.verifier) if settings.verifier else writer
    for model, _ in (writer, verifier):
        model.requires_grad_(False).eval()
    run = open_synthesis(settings, writer, verifier)
    made = synthesise(run, settings, writer, verifier)
    name = Path(settings.model).name
    facts = {"model": settings.model, "verifier": settings.verifier or settings.model, "seed": str(settings.seed)}
    report.show(run, made, title=f"{name}: rows made of texts", facts=facts)
    if not made.items:
        raise UserError(
            f"nothing of what {name} wrote can be used{listed(*made.left.values())}; {run.report} has examples. Take a"
            f" model that does what it is asked, longer answers than turn_tokens={settings.turn_tokens}, or other texts"
        )
    say = Console(soft_wrap=True, highlight=False).print
    say(f"train on it: {program()} sft {settings.model} data={run.folder / 'conversations.jsonl'}")
    for task in JUDGED.values():
        if (file := run.folder / f"{task}.jsonl").is_file():
            say(f"or by reinforcement: {program()} rlvr MODEL tasks={task}@{file}")
