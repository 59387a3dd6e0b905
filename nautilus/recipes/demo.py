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
from rich.text import Text

from nautilus.eval.examine import talk
from nautilus.eval.loss import HeldOut
from nautilus.recipes.pretrain import Settings as PretrainSettings
from nautilus.recipes.pretrain import pretrain
from nautilus.train.optim import OptimConfig

LINES = 7  # of a completion that are printed; the report has all of them
PROMPTS = ("def read_lines(path):\n", "class Queue:\n    ", "Return the ")


@dataclass(frozen=True, kw_only=True)
class Settings(PretrainSettings):
    out: Path = field(default=Path("runs/demo"), metadata={"help": "the run's folder; resumed if it is there"})
    steps: int = 560
    rows: int = 8
    length: int = 256
    max_bytes: int = 6_000_000
    optim: OptimConfig = OptimConfig(lr=5e-3, min_lr=5e-5, warmup=-1, decay=0.3)
    prompts: tuple[str, ...] = PROMPTS


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
