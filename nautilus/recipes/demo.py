"""The whole main job in minutes on two cores: train a small model of the family, report on it, let it talk.

A hybrid of Mamba-2, attention and LatentMoE layers with multi-token prediction learns from the text that came with
Python. Nothing is downloaded. The same command again goes on where an interrupted one stopped.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nautilus.eval.loss import HeldOut
from nautilus.recipes import pretrain
from nautilus.train.optim import OptimConfig

PROMPTS = ("def read_lines(path):\n", "class Queue:\n    ", "Return the ")


@dataclass(frozen=True, kw_only=True)
class Settings(pretrain.Settings):
    out: Path = field(default=Path("runs/demo"), metadata={"help": "the run's folder; resumed if it is there"})
    steps: int = 500
    rows: int = 16
    length: int = 256
    max_bytes: int = 6_000_000
    optim: OptimConfig = OptimConfig(lr=3e-3, min_lr=3e-5, warmup=30, decay=0.3)
    prompts: tuple[str, ...] = PROMPTS


def main(settings: Settings) -> None:
    begin, console = time.monotonic(), Console(soft_wrap=True)
    run, model, prepared = pretrain.train(settings)
    scores, samples = pretrain.examine(settings, run, model, prepared, {"train it again": "nautilus demo"})
    for sample in samples:
        console.rule(style="dim")
        console.print(sample.prompt, style="bold", end="", markup=False, highlight=False)
        console.print(sample.completion, markup=False, highlight=False)
    console.rule(style="dim")
    console.print(summary(scores))
    minutes = (time.monotonic() - begin) / 60
    console.print(f"{minutes:.1f} minutes. The report: {run.report}", highlight=False)
    console.print(f"Talk to it: nautilus chat {run.folder}", highlight=False)


def summary(scores: HeldOut) -> Table:
    """Bits per byte of text the model has not seen, by source, beside two compressors."""
    table = Table("held-out text", "bytes", "bits per byte", "xz -9e", "bzip2 -9", title="Bits per byte (lower is better)")
    for score in (*scores.scores, scores.total):
        measured = (score.bits_per_byte, score.xz_bits_per_byte, score.bz2_bits_per_byte)
        table.add_row(score.source, f"{score.bytes:,}", *(f"{value:.3f}" for value in measured))
    return table
