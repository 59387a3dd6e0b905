"""What a finished language model run is asked: held-out loss and completions, which also make its report."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence

from nautilus.data.prepare import bars
from nautilus.data.tokenizer import Tokenizer
from nautilus.eval import charts
from nautilus.eval.figures import with_total
from nautilus.eval.loss import HeldOut, held_out
from nautilus.eval.material import Sample
from nautilus.eval.report import gather, write_picture, write_report
from nautilus.model.card import add_to_card
from nautilus.model.language import Language
from nautilus.runtime import Run, flat_settings, last_part, program
from nautilus.serve import Engine, Sampling

SAMPLING = Sampling(temperature=0.7, top_p=0.95, max_tokens=96)


def examine(
    run: Run,
    model: Language,
    tokenizer: Tokenizer,
    texts: Mapping[str, Sequence[str]],
    *,
    prompts: Sequence[str],
    start: int | None = None,
) -> tuple[HeldOut | None, Sequence[Sample]]:
    """Scores `texts`, a mapping from source to held-out documents, continues `prompts`, and writes the report.

    Without texts there are no scores. `start` is the token that stood before every document in training, if any did.
    """
    with bars() as progress:
        scores = None
        if texts:
            task = progress.add_task("scoring held-out text", total=None)
            watch = lambda done, total: progress.update(task, completed=done, total=total)
            scores = held_out(model, tokenizer.encode, texts, start=start, watch=watch)
        last = progress.add_task("writing the report", total=2)
        answers = Engine(model, tokenizer).generate(prompts, SAMPLING)
        progress.advance(last)
        samples = write_all(run, model, scores, prompts, [answer.text for answer in answers])
        progress.advance(last)
    return scores, samples


def write_all(
    run: Run, model: Language, scores: HeldOut | None, prompts: Sequence[str], answers: Sequence[str]
) -> Sequence[Sample]:
    """The report, and its picture where matplotlib is there."""
    note = f"temperature {SAMPLING.temperature}, top-p {SAMPLING.top_p}"
    samples = [Sample(prompt=p, completion=a, note=note) for p, a in zip(prompts, answers, strict=True)]
    again = shlex.join([program(), *sys.argv[1:]])
    commands = {"train it": again, "talk to it": talk(run), "look inside": f"{program()} info {run.folder}"}
    report = gather(run, model.config, held_out=scores, samples=samples, commands=commands)
    write_report(run.report, report)
    if charts.missing() is None:
        write_picture(run.picture, report)
    complete_card(run, scores)
    return samples


def complete_card(run: Run, scores: HeldOut | None) -> None:
    """To the model's card: every setting of the run but the sizes, which it has, and what was measured."""
    asked = {name: value for name, value in flat_settings(run.settings) if not name.startswith("model.")}
    settings = {name.rstrip("_"): last_part(value) for name, value in asked.items() if name != "out"}
    add_to_card(run.model, "Training", settings, f"The settings of the run `{run.folder.name}`.")
    rows = {
        score.source: f"{score.bits_per_byte:.4f} (`xz -9e` {score.xz_bits_per_byte:.4f}) on {score.bytes:,} bytes"
        for score in (with_total(scores) if scores else [])
    }
    words = "Bits per byte of held-out text; lower is better." if rows else "Nothing was held out, nothing measured."
    add_to_card(run.model, "Measures", rows, words)


def talk(run: Run) -> str:
    return f"{program()} chat {run.folder}"
