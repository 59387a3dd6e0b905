"""Train variants of `nautilus pretrain` over several seeds, and say by how much they differ and how sure that is.

A study is one of those that come along (nvfp4, recipe, demo, latent, mtp, hybrid, decay, needle) or a TOML file; its
form is at the top of `nautilus/studies/study.py`. Its first variant is the control. The same command again goes on
where an interrupted one stopped, with more seeds or more variants too; what is finished is not repeated.

study=nvfp4                             bf16, the NVFP4 recipe, and the recipe without each of its techniques
study=nvfp4 variants=nvfp4 seeds=5      two of them, five times
study=mine.toml base=steps=100          another study, with a setting more for all variants
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console

import nautilus
from nautilus.config import setting
from nautilus.eval.comparison import record, summary, write
from nautilus.eval.needle import retrieval, write_needles
from nautilus.recipes.pretrain import Settings as PretrainSettings
from nautilus.recipes.pretrain import pretrain
from nautilus.runtime import Run, UserError, continue_or_create, is_run
from nautilus.studies.gathered import TIMES, gather
from nautilus.studies.named import NAMED
from nautilus.studies.study import Study, open_study, refuse_unequal
from nautilus.studies.trials import Trial, run_trials


@dataclass(frozen=True, kw_only=True)
class Settings:
    study: str = setting("nvfp4", f"{', '.join(NAMED)}, or a TOML file")
    out: Path = setting(Path("runs/compare"), "folder of the runs and the report; gone on with if it is there")
    seeds: int = setting(3, "trainings of each variant; one has no interval")
    base: tuple[str, ...] = setting((), "more settings of pretrain for all variants: steps=100,rows=4")
    variants: tuple[str, ...] = setting((), "of the study only these and the control; none: all")
    jobs: int = setting(0, "trainings at a time, 0: one for each core, at most 8")
    record: Path | None = setting(None, "append the result to this JSONL file, once all runs are there")

    def __post_init__(self):
        if self.seeds < 1 or self.jobs < 0:
            raise UserError(f"seeds={self.seeds} must be at least 1, and jobs={self.jobs} not below 0")


def main(settings: Settings) -> int:
    study = open_study(settings.study, NAMED).narrowed(settings.base, settings.variants)
    trials, console = trials_of(study, settings), Console(soft_wrap=True, highlight=False)
    refuse_unequal(study, {trial.variant: trial.settings for trial in trials})
    refuse_other(settings.out, study)
    run = continue_or_create(settings.out, {"study": study.name, "base": list(study.base), "measure": study.measure})
    if study.measure == "needle":
        hide(study, trials[0].settings)
    cores = os.cpu_count() or 1
    jobs = min(settings.jobs or min(cores, 8), len(trials))
    failed = run_trials(trials, partial(train_and_measure, study), jobs=jobs, threads=max(1, cores // jobs))
    found = gather(study, trials, failed)
    write(run, found)
    for table in summary(found):
        console.print(table)
    if settings.record and not failed:
        with settings.record.open("a") as file:
            file.write(json.dumps(record(found)) + "\n")
    for (variant, seed), why in failed.items():
        console.print(f"{variant} seed {seed} failed: {why}", markup=False)
    console.print(f"report {run.report}")
    return 1 if failed else 0


def trials_of(study: Study, settings: Settings) -> list[Trial]:
    """Seed by seed, so that what is there after an hour are whole pairs."""
    trials = []
    for seed in range(settings.seeds):
        for name in study.variants:
            words = f"seed={seed}", f"out={settings.out / name / f'seed_{seed}'}"
            asked = study.settings(PretrainSettings, name, *words)
            if study.measure == "needle":
                asked = replace(asked, data=(str(settings.out / f"needles-{study.needles}-{asked.length}.jsonl"),))
            trials.append(Trial(variant=name, seed=seed, settings=asked))
    return trials


def refuse_other(out: Path, study: Study) -> None:
    """A folder holds one study: another would take the place of its report."""
    begun = Run.open(out).settings.get("study", study.name) if is_run(out) else study.name
    if begun != study.name:
        raise UserError(f"{out} holds the study {begun!r}, not {study.name!r}; choose another folder with out=")


def hide(study: Study, asked: PretrainSettings) -> None:
    """The documents with needles that all train on: as many as one training reads, and what is held out."""
    path, documents = Path(asked.data[0]), round(asked.steps * asked.rows / 0.9)
    if not path.is_file():
        write_needles(path, documents=documents, length=asked.length, pairs=study.needles)


def train_and_measure(study: Study, settings: PretrainSettings) -> Mapping[str, float]:
    run, scores, _ = pretrain(settings)
    found: dict[str, float] = {}
    if scores is not None:
        found = {"bits_per_byte": scores.total.bits_per_byte, "near": scores.within(settings.length)}
    if study.measure == "needle":
        lengths = [times * settings.length for times in TIMES]
        right = retrieval(*nautilus.load(run.folder), lengths, pairs=study.needles)
        found |= {f"found_at_{times}x": right[length] for times, length in zip(TIMES, lengths, strict=True)}
    return found
