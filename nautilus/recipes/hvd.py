"""Train a predictor of what copied drafts bring, for one model on this machine: Hybrid Verified Decoding.

MODEL, a run, a checkpoint folder or a hub id, answers prompts; the answers are replayed with the drafts that an engine
would have had, and a small network learns how many tokens of a draft come true. The same command again goes on where an
interrupted one stopped. In out are the predictor (payoff.safetensors), one in the manner of the paper for comparison
(paper.safetensors), the answers (traces.jsonl), the report and its picture.

prompts=texts,questions.jsonl      files that are a prompt each; of JSONL every line's `prompt` or `messages`
traces=served.jsonl                recorded answers in place of prompts; nautilus/posttrain/traces.py has their form
"""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

import nautilus
from nautilus.config import setting
from nautilus.eval import payoff as report
from nautilus.model.eagle import load_eagle
from nautilus.posttrain import traces as recorded
from nautilus.posttrain.depths import with_depths
from nautilus.posttrain.drafter import drafter_of
from nautilus.posttrain.judged import outcomes, qualities, timed
from nautilus.posttrain.payoff import ROUNDS, Material, rounds, train_paper
from nautilus.posttrain.policies import Prices, by_paper, by_rate
from nautilus.posttrain.rows import split
from nautilus.runtime import Progress, Run, UserError, continue_or_create, program, read_json, write_atomic
from nautilus.serve import Engine, Sampling
from nautilus.serve.draft.choice import on_grid
from nautilus.serve.draft.costs import Costs
from nautilus.serve.draft.features import Spelling
from nautilus.serve.draft.proposal import DEEPEST
from nautilus.serve.draft.settings import Drafts
from nautilus.serve.prefixes import fingerprint

FILE, PAPER = "payoff.safetensors", "paper.safetensors"


@dataclass(frozen=True, kw_only=True)
class Settings:
    model: str = setting("", "run, checkpoint folder or hub id")
    prompts: tuple[str, ...] = setting((), "files or folders of prompts")
    traces: Path | None = setting(None, "JSONL file of recorded answers, in place of prompts")
    out: Path = setting(Path("runs/hvd"), "folder of the answers, the predictor and the report; gone on with if there")
    temperatures: tuple[float, ...] = setting((0.0, 0.6), "every prompt is answered at each of them")
    answer: int = setting(512, "most tokens of an answer")
    max_tokens: int = setting(8192, "most tokens of a prompt with its answer; longer prompts are left out")
    drafts: int = setting(32, "most tokens of a draft")
    depth: int = setting(3, "tokens of the drafts of a model's block or of a head")
    eagle: Path | None = setting(None, "a draft head in the place of the model's block")
    rows: int = setting(8, "most requests that run together")
    seed: int = setting(0, "of the answers, of which are trained on, and of the training")

    def __post_init__(self):
        if min(self.answer, self.drafts, self.rows) < 1 or self.depth < 0 or not self.temperatures:
            raise UserError(
                f"answer={self.answer}, drafts={self.drafts} and rows={self.rows} must be at least 1, "
                f"depth={self.depth} not below 0, and temperatures must name one"
            )


def main(settings: Settings) -> None:
    if not settings.model or bool(settings.prompts) == (settings.traces is not None):
        raise UserError("write nautilus hvd train MODEL prompts=FILE, or traces=FILE in place of the prompts")
    model, tokenizer = nautilus.load(settings.model)
    model.requires_grad_(False)
    identity = {name: value for name, value in asdict(settings).items() if name not in ("out", "rows")}
    run = continue_or_create(settings.out, {**identity, "weights": fingerprint(model)})
    run.state.mkdir(exist_ok=True)  # from here on other settings are refused
    longest = min(settings.max_tokens, model.config.positions)
    head = load_eagle(settings.eagle, model) if settings.eagle else None
    drafts = Drafts(most=settings.drafts, eagle=head)
    engine = Engine(model, tokenizer, max_tokens=longest, rows=settings.rows, drafts=drafts)
    prices = prices_of(engine, run.state / "costs.json")
    found = recorded.read_traces(settings.traces) if settings.traces else answers_of(engine, settings, run)
    if drafter := drafter_of(model, head):
        found = with_depths(found, drafter, DEEPEST, run.state / "depths.jsonl")
    recorded.write_traces(run.folder / "traces.jsonl", found)
    material = Material(
        traces=found, parts=split(found, settings.seed), spelling=Spelling(tokenizer), prices=prices,
        most=on_grid(min(settings.drafts, max(prices.passes) - 1)), target=fingerprint(model),
        tokenizer=tokenizer.fingerprint, depth=settings.depth if any(trace.depths for trace in found) else 0,
        seed=settings.seed,
    )  # fmt: skip
    told, console = trained(run, material, settings), Console(soft_wrap=True, highlight=False)
    report.write(run, told)
    for table in report.summary(told):
        console.print(table)
    console.print(f"predictor {run.folder / FILE}\nreport {run.report}")


def prices_of(engine: Engine, path: Path) -> Prices:
    """What passes and tokens of a block cost here, measured once."""
    assert engine.speculation
    if not path.is_file():
        costs, block = engine.speculation.costs, engine.speculation.drafting.of(DEEPEST)
        write_atomic(path, json.dumps({"passes": costs.seconds, "block": (block or 0.0) / DEEPEST}) + "\n")
    known, costs = read_json(path), Costs()
    costs.seconds = {int(size): float(seconds) for size, seconds in known["passes"].items()}
    return Prices.of(costs, model=known["block"])


def answers_of(engine: Engine, settings: Settings, run: Run) -> list[recorded.Trace]:
    asked = [
        recorded.Asked(prompt=prompt, group=group, sampling=Sampling(
            temperature=temperature, seed=settings.seed + number, max_tokens=settings.answer
        ))
        for number, (group, prompt) in enumerate(recorded.read_prompts(settings.prompts))
        for temperature in settings.temperatures
    ]  # fmt: skip
    return recorded.record(engine, asked, run.state / "answers.jsonl")


def trained(run: Run, material: Material, settings: Settings) -> report.PayOff:
    with Progress(run.metrics, ROUNDS + 4, unit="part") as progress:
        predictors = []
        for predictor in rounds(material):
            progress({"step": len(predictors)})
            predictors.append(predictor)
        predictor = predictors[-1]
        predictor.save(run.folder / FILE)
        ours, paper = by_rate(predictor, material.prices, material.depth), train_paper(material)
        paper.save(run.folder / PAPER)
        progress({"step": ROUNDS})
        judged = {"ours": qualities(material, predictor, ours)}
        progress({"step": ROUNDS + 1})
        judged["paper"] = qualities(material, paper, by_paper(paper, material.depth))
        progress({"step": ROUNDS + 2})
        material = timed(material, ours)
        told = outcomes(material, predictor, paper)
        progress({"step": ROUNDS + 3})
    counts = {name: len(part) for name, part in asdict(material.parts).items()}
    facts = {"model": settings.model, "answers": ", ".join(f"{count} to {name}" for name, count in counts.items())}
    facts |= {"to look and decide": f"{1e6 * material.prices.look:.0f} us", "seed": str(settings.seed)}
    return report.PayOff(
        title=f"{Path(settings.model).name}: what copied drafts bring",
        command=f"{program()} {shlex.join(sys.argv[1:])}",
        outcomes=told, qualities=judged, prices=material.prices, facts=facts,
    )  # fmt: skip
