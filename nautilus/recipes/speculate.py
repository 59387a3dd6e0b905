"""What speculation brings a model: the same prompts answered plainly and with every way to draft that there is.

MODEL, a run, a checkpoint folder or a hub id, answers prompts greedily, one at a time; every answer is compared with
the plain one. The same command again goes on where an interrupted one stopped. Table, page and picture are in out.

eagle=runs/eagle/model hvd=runs/hvd     with a head of `nautilus eagle` and the predictors of `nautilus hvd train` too
prompts=questions.jsonl                 own prompts: of JSONL every line's `prompt` or `messages`, of others the whole
prompts=made,spider:data/spider/dev.json      six families that are made from a seed, and a published set
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

import nautilus
from nautilus.config import setting
from nautilus.data.tokenizer import Tokenizer
from nautilus.eval import speculation_report as report
from nautilus.eval.contest import ALL_KNOWING, Contest, Means, Question
from nautilus.eval.families import FAMILIES, Prompt, chosen
from nautilus.eval.made import prompts as made
from nautilus.eval.public_sets import SETS, read_set
from nautilus.eval.speculation import ORACLE
from nautilus.model.eagle import load_eagle
from nautilus.model.language import Language
from nautilus.posttrain.traces import read_prompts
from nautilus.runtime import UserError, continue_or_create, program
from nautilus.serve.draft.predictor import load_predictor
from nautilus.serve.prefixes import fingerprint

ABOUT = "The same prompts answered plainly and with every way to draft that there is."
LEAST = {"each": 1, "answer": 1, "drafts": 1, "depth": 1, "repeats": 1, "max_tokens": 2}


@dataclass(frozen=True, kw_only=True)
class Settings:
    model: str = setting("", "run, checkpoint folder or hub id")
    prompts: tuple[str, ...] = setting(("made",), f"made, a file of prompts, or SET:PLACE; SET: {', '.join(SETS)}")
    eagle: Path | None = setting(None, "folder of a draft head for the model")
    hvd: Path | None = setting(None, "folder of `nautilus hvd train` for the model")
    out: Path = setting(Path("runs/speculate"), "folder of the answers and the report; gone on with if it is there")
    each: int = setting(20, "prompts of each set, and of each family of made ones")
    answer: int = setting(256, "most tokens of an answer")
    max_tokens: int = setting(8192, "most tokens of a prompt with its answer; longer prompts are left out")
    drafts: int = setting(16, "most tokens of a draft")
    depth: int = setting(3, "tokens of a model's draft, where a rule does not look at what they cost")
    repeats: int = setting(3, "times that everything is answered; the median time counts")
    seed: int = setting(0, "of made prompts, and of which are chosen of more")

    def __post_init__(self):
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} must be at least {least}")


def main(settings: Settings) -> None:
    if not settings.model:
        raise UserError("no model was named; write nautilus speculate MODEL, a run, a checkpoint folder or a hub id")
    model, tokenizer = nautilus.load(settings.model)
    model.requires_grad_(False).eval()
    identity = {name: value for name, value in asdict(settings).items() if name not in ("out", "repeats")}
    run = continue_or_create(settings.out, {**identity, "weights": fingerprint(model)})
    run.state.mkdir(exist_ok=True)  # from here on other settings are refused
    longest = min(settings.max_tokens, model.config.positions)
    contest = Contest(Path(settings.model).name, model, tokenizer, means_of(settings, model, tokenizer), longest)
    questions = [*questions_of(contest, settings)]
    if not questions:
        raise UserError(
            f"no prompt leaves room for answer={settings.answer} of max_tokens={contest.longest} (the model has "
            f"{model.config.positions} positions); raise max_tokens, lower answer, or give shorter prompts"
        )
    answers = contest.hold(run, questions, tokens=settings.answer, repeats=settings.repeats)
    found = report.gather(
        answers, title=f"{contest.target}: what speculation brings", about=ABOUT,
        command=f"{program()} {shlex.join(sys.argv[1:])}", facts=facts(contest, settings),
        pairs=pairs([*contest.contestants()]),
    )  # fmt: skip
    report.write(run, found)
    console = Console(soft_wrap=True, highlight=False)
    for table in report.summary(found):
        console.print(table)
    console.print(f"report {run.report}")


def means_of(settings: Settings, model: Language, tokenizer: Tokenizer) -> Means:
    mine = {"target": fingerprint(model), "tokenizer": tokenizer.fingerprint}
    predictors = {} if settings.hvd is None else {
        name: load_predictor(settings.hvd / file, **mine)
        for name, file in (("predictor", "payoff.safetensors"), ("paper", "paper.safetensors"))
    }  # fmt: skip
    head = load_eagle(settings.eagle, model) if settings.eagle else None
    return Means(most=settings.drafts, depth=settings.depth, eagle=head, **predictors)


def questions_of(contest: Contest, settings: Settings) -> Iterator[Question]:
    """Those that leave room for an answer."""
    longest = contest.longest - settings.answer
    for prompt in prompts_of(settings):
        asked = prompt.text if contest.tokenizer.template is None or prompt.prompt else prompt.messages
        tokens = tuple(contest.plain.tokens(asked))
        if 0 < len(tokens) <= longest:
            yield Question(prompt=prompt, tokens=tokens)


def prompts_of(settings: Settings) -> Iterator[Prompt]:
    for name in settings.prompts:
        kind, _, place = name.partition(":")
        if name == "made":
            for family in FAMILIES:
                yield from made(family, settings.each, seed=settings.seed)
        elif kind in SETS and place:
            yield from chosen(read_set(kind, place), settings.each, settings.seed)
        else:
            yield from chosen(given(name), settings.each, settings.seed)


def given(place: str) -> Iterator[Prompt]:
    """A user's own, whose family is not known."""
    for id, prompt in read_prompts([place]):
        named: dict[str, Any] = {"prompt" if isinstance(prompt, str) else "messages": prompt}
        yield Prompt(id=id, family="open", set=Path(place).name, **named)


def pairs(arms: Sequence[str]) -> list[tuple[str, str]]:
    """Which arm is told beside which other ones than the plain one."""
    others = [name for name in arms if name in (ORACLE, ALL_KNOWING) or name.partition(" ")[0] in ("mtp", "eagle")]
    return [(name, other) for name in arms if name.startswith("ours") for other in others]


def facts(contest: Contest, settings: Settings) -> Mapping[str, str]:
    costs = {name: engine.speculation.costs for name, engine in contest.engines.items() if engine.speculation}
    step = costs[contest.main].of(1) or float("nan")
    passes = ", ".join(f"{size}: {seconds / step:.2f}" for size, seconds in costs[contest.main].seconds.items())
    return {
        "model": settings.model, "a plain step": f"{1e6 * step:.0f} us", "passes by their tokens, plain = 1": passes,
        "drafts": f"at most {settings.drafts} tokens", "repeats": str(settings.repeats), "seed": str(settings.seed),
    }  # fmt: skip
