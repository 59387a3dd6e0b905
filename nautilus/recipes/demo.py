"""The whole main job in minutes on two cores: train a small model of the family until it answers, and report on it.

A hybrid of Mamba-2, attention and LatentMoE layers with multi-token prediction learns from the text that came with
Python. Then it is taught to answer: worked answers, a specialist for each task by reinforcement, all of them distilled
into one student, twice, and a prediction block that drafts for it. Nothing is downloaded. The same command again goes
on where an interrupted one stopped.

answers=false       pretraining alone
then.iterations=1   less post-training; see `nautilus posttrain` for its settings
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nautilus.config import Config, setting
from nautilus.eval.examine import talk
from nautilus.eval.loss import HeldOut
from nautilus.presets import starter
from nautilus.recipes import boost, mopd, posttrain, rlvr, sft
from nautilus.recipes.pretrain import Settings as PretrainSettings
from nautilus.recipes.pretrain import pretrain
from nautilus.runtime import Run
from nautilus.train.optim import OptimConfig

LINES = 7  # of a completion that are printed; the report has all of them
RATE = {"lr": 4e-4, "min_lr": 1e-5, "decay": 0.5}
SHORT = {**posttrain.SHORT, "problems": 8192, "budgeted": 0.25, "train_budgets": (4, 8, 12, 16, 20)}
SCHOOL = posttrain.Settings(
    tasks=("sort:5-6", "reverse:4-5", "arithmetic:1-2"), again=0.7,
    supervised=sft.Settings(
        tasks=("sort:3-6", "reverse:3-5", "arithmetic:1-2"), steps=370, length=256, problems=32_000, save_every=0,
        cut=0.15, mtp_depths=2, optim=replace(sft.Settings().optim, lr=3e-3),
    ),
    specialist=rlvr.Settings(steps=150, prompts=32, group=8, optim=replace(rlvr.Settings().optim, **RATE), **SHORT),
    student=mopd.Settings(
        steps=100, whole=True, reward=1.0, optim=replace(mopd.Settings().optim, **{**RATE, "lr": 1e-3}), **SHORT,
    ),
    drafts=boost.Settings(chat=True, prompt_tokens=64, answers=256, tokens=48, steps=60, save_every=0),
)  # fmt: skip
PROMPTS = ("def read_lines(path):\n", "class Queue:\n    ", "Return the ")


@dataclass(frozen=True, kw_only=True)
class Settings(PretrainSettings):
    out: Path = setting(Path("runs/demo"), "the run's folder; resumed if it is there")
    model: Config = setting(starter(), "a preset, or sizes: model.width=384, model.layers=MEM*E")
    data: tuple[str, ...] = setting(("embedded", "twice"), "text: [weight*]place[#field]; embedded, twice, paths")
    steps: int = setting(640, "updates")
    rows: int = setting(8, "rows of a step")
    length: int = setting(256, "tokens of a row")
    max_bytes: int = setting(6_000_000, "of each source, 0: all")
    optim: OptimConfig = OptimConfig(lr=5e-3, min_lr=5e-5, warmup=-1, decay=0.3)
    prompts: tuple[str, ...] = setting(PROMPTS, "texts that the report shows continued")
    answers: bool = setting(True, "post-training follows, until the model answers")
    then: posttrain.Settings = SCHOOL

    apart: ClassVar = {"answers", "then"}  # what a run that goes on may be told otherwise


def main(settings: Settings) -> None:
    begin, console = time.monotonic(), Console(soft_wrap=True, highlight=False)
    run, scores, samples = pretrain(settings)
    for sample in samples:
        console.rule(style="dim")
        console.print(Text(sample.prompt, style="bold") + Text(beginning(sample.completion), style="none"))
    console.rule(style="dim")
    if scores is not None:
        console.print(summary(scores))
    minutes, bits = (time.monotonic() - begin) / 60, scores.total.bits_per_byte if scores else float("nan")
    console.print(f"{minutes:.1f} minutes, held-out bits per byte {bits:.3f}")
    console.print(f"report      {run.report}\ntalk to it  {talk(run)}")
    if settings.answers:
        school = Run(run.folder / "posttrain")
        posttrain.main(replace(settings.then, model=str(run.folder), out=school.folder, seed=settings.seed))
        minutes = (time.monotonic() - begin) / 60
        console.print(f"{minutes:.1f} minutes in all\nreport      {school.report}")
        last = [Run(school.folder / one) for one in ("boost", f"{settings.then.iterations}-student")]
        console.print(f"talk to it  {talk(next(one for one in last if one.model.is_dir()))}")


def beginning(completion: str) -> str:
    """The first lines, and a mark where there are more."""
    lines = completion.splitlines()
    return completion if len(lines) <= LINES else "\n".join([*lines[:LINES], "…"])


def summary(scores: HeldOut) -> Table:
    """Bits per byte of text the model has not seen, by source, beside two compressors."""
    columns = "held-out text", "bytes", "bits per byte", "xz -9e", "bzip2 -9"
    table = Table(*columns, title="Bits per byte (lower is better)")
    for score in (*scores.scores, scores.total):
        measured = (score.bits_per_byte, score.xz_bits_per_byte, score.bz2_bits_per_byte)
        table.add_row(score.source, f"{score.bytes:,}", *(f"{value:.3f}" for value in measured))
    return table
