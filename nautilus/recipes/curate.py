"""Make text worth training on out of raw text: extraction, quality, duplicates, evaluation sets kept out.

The same command again goes on where an interrupted one stopped. The texts are in out/text, to be given to `pretrain`
as data=OUT/text; report.html says what each filter dropped, with examples.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from nautilus.config import setting, to_dict
from nautilus.data.card import curated_card
from nautilus.data.curate import Plan, curate
from nautilus.eval.curation import funnel, write_curation
from nautilus.runtime import continue_or_create, flat_settings, last_part, write_atomic


@dataclass(frozen=True, kw_only=True)
class Settings(Plan):
    out: Path = setting(Path("runs/curate"), "the run's folder; resumed if it is there")


def main(settings: Settings) -> None:
    asked = to_dict(settings)
    del asked["workers"]  # more or fewer give the same text
    run = continue_or_create(settings.out, asked)
    result = curate(run, settings)
    card = {name: last_part(value) for name, value in flat_settings(asked) if name != "out"}
    write_atomic(run.folder / "README.md", curated_card(result, card))
    write_curation(run, result)
    say = Console(soft_wrap=True, highlight=False).print
    for step, documents, size in funnel(result):
        say(f"{step:<24}{documents:>12,} documents  {size / 1e6:>12,.1f} MB")
    say(f"report {run.report}")
    if result.after.documents:
        say(f"train on it: data={run.folder / 'text'}")
    else:
        say("nothing was kept: the report says what left it out; filters= (none) keeps code and other languages")
