"""What a finished language model run is asked: held-out loss and completions, which also make its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nautilus.data.tokenizer import Tokenizer
from nautilus.eval import charts
from nautilus.eval.loss import HeldOut, held_out
from nautilus.eval.material import Sample
from nautilus.eval.report import gather, write_picture, write_report
from nautilus.model.language import Language
from nautilus.runtime import Run, program
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
) -> tuple[HeldOut, Sequence[Sample]]:
    """Scores `texts`, a mapping from source to held-out documents, continues `prompts`, and writes the report.

    `start` is the token that stood before every document in training, if any did.
    """
    scores = held_out(model, tokenizer.encode, texts, start=start)
    answers = Engine(model, tokenizer).generate(prompts, SAMPLING)
    note = f"temperature {SAMPLING.temperature}, top-p {SAMPLING.top_p}"
    samples = [Sample(prompt=p, completion=a.text, note=note) for p, a in zip(prompts, answers, strict=True)]
    commands = {"talk to it": talk(run), "look inside": f"{program()} info {run.folder}"}
    report = gather(run, model.config, held_out=scores, samples=samples, commands=commands)
    write_report(run.report, report)
    if charts.missing() is None:
        write_picture(run.picture, report)
    return scores, samples


def talk(run: Run) -> str:
    return f"{program()} chat {run.folder}"
