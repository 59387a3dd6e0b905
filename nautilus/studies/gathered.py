"""What the trainings of a study came to: an arm for each variant, and what is measured of it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence

from nautilus.eval.comparison import Arm, Comparison, Measure
from nautilus.eval.material import LAST, Report, last_loss, series
from nautilus.eval.techniques import demonstrations
from nautilus.runtime import Run, program, read_metrics
from nautilus.studies.study import Study, work_of
from nautilus.studies.trials import Trial

TIMES = (1, 2, 4, 8)  # the length of training, at which needles are looked for
BITS = {
    "bits_per_byte": Measure("Held-out bits per byte", "lower"),
    "near": Measure("Held-out nats per token, at positions as far as rows reached in training", "lower"),
    "last_loss": Measure(f"Loss while training, last {LAST:.0%} of the updates, in the formats trained in", "lower"),
}


def gather(study: Study, trials: Sequence[Trial], failed: Mapping[tuple[str, int], str]) -> Comparison:
    """Of all variants. failed: why, by variant and seed."""
    arms = []
    for name in study.variants:
        mine = [trial for trial in trials if trial.variant == name]
        arms.append(arm(study, mine, {seed: why for (variant, seed), why in failed.items() if variant == name}))
    return Comparison(
        title=study.name,
        about=study.about,
        command=f"{program()} {shlex.join(sys.argv[1:])}",
        arms=arms,
        measures=measures_of(study),
        shared={"model": study.model, "settings": " ".join(study.base), "equal": ", ".join(study.equal)}
        | text_of(trials),
        demonstrations=demonstrations() if study.demonstrate else (),
    )


def arm(study: Study, trials: Sequence[Trial], failed: Mapping[int, str]) -> Arm:
    """All that is known of one variant."""
    name, asked = trials[0].variant, trials[0].settings
    done = {trial.seed: trial.scores for trial in trials if trial.scores is not None}
    rows = {trial.seed: read_metrics(Run(trial.folder).metrics) for trial in trials if trial.seed in done}
    lines = {seed: line for seed, each in rows.items() if (line := series(each, "next_token", name)) is not None}
    last = {seed: {"last_loss": last_loss(line)} for seed, line in lines.items()}
    done = {seed: {**found, **last.get(seed, {})} for seed, found in done.items()}
    return Arm(
        name=name,
        changes=" ".join(study.variants[name]),
        work=work_of(asked),
        scores={m: {s: v[m] for s, v in done.items() if m in v} for m in measures_of(study)},
        curves=lines,
        seconds={s: Report(title="", config=asked.model, rows=each).seconds for s, each in rows.items()},
        failed=failed,
    )


def text_of(trials: Sequence[Trial]) -> dict[str, str]:
    """The hash of the text, which differs between versions of Python: it stands in the name of the tokenizer."""
    found = [
        file.parent.name for trial in trials for file in (trial.folder / "data").glob("tokenizer-*/tokenizer.json")
    ]
    return {"text": ", ".join(sorted({name.split("-", 2)[2] for name in found}))}


def measures_of(study: Study) -> Mapping[str, Measure]:
    needles = {f"found_at_{n}x": Measure(f"Needles found at {n} times the training length", "higher") for n in TIMES}
    return needles | BITS if study.measure == "needle" else BITS
