"""A drafter's training from beginning to end: text of the model's own, the training, what is accepted of its drafts.

The same command again goes on where an interrupted one stopped: answers that are there are not asked for again, and
the training goes on from its newest state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from nautilus.config import setting, to_dict
from nautilus.data.batch import Batch
from nautilus.data.mix import Stream
from nautilus.data.tokenizer import Tokenizer
from nautilus.model.language import Language
from nautilus.posttrain.acceptance import Acceptance, accepted
from nautilus.posttrain.drafter import Drafter
from nautilus.posttrain.own_text import Answer, Manner, answers, rows_of
from nautilus.posttrain.prompts import Wanted, prompts
from nautilus.runtime import Run, UserError, continue_or_create
from nautilus.serve import Engine
from nautilus.serve.prefixes import fingerprint
from nautilus.train.checkpoint import Checkpoints
from nautilus.train.loop import fit
from nautilus.train.objective import Objective
from nautilus.train.optim import OptimConfig, adamw, schedule

LEAST = {"answers": 1, "measured": 1, "prompt_tokens": 1, "tokens": 2, "drafts": 1, "steps": 1, "rows": 1}
LEAST |= {"save_every": 0, "together": 1, "seed": 0}
GREEDY, DRAWN = "greedy", "temperature 1"


@dataclass(frozen=True, kw_only=True)
class Lesson:
    model: str = setting("", "run, checkpoint folder or hub id")
    out: Path = setting(Path("runs/lesson"), "the run's folder; gone on with if it is there")
    prompts: tuple[str, ...] = setting((), "texts to answer: place[#field]; none: beginnings, as said above")
    chat: bool = setting(False, "each text is a message, asked through the chat template")
    prompt_tokens: int = setting(32, "most tokens of a prompt; texts are cut behind them, longer messages left out")
    answers: int = setting(2048, "answers to learn from")
    sampled: float = setting(1.0, "temperature of these; below 1 where greedy answers matter and are unlike them")
    measured: int = setting(64, "other prompts, on answers to which acceptance is measured")
    tokens: int = setting(128, "most tokens of an answer")
    drafts: int = setting(7, "tokens drafted at a time, in training and in what is measured")
    steps: int = setting(400, "updates")
    rows: int = setting(8, "rows of a step, each as long as a prompt with its answer")
    optim: OptimConfig = OptimConfig(lr=1e-3, min_lr=1e-5, warmup=-1, decay=0.5, weight_decay=0.0)
    save_every: int = setting(100, "updates between saved states, 0: only at the end")
    together: int = setting(32, "most answers that are written together")
    seed: int = setting(0, "of the answers, their order and what is drawn in training")

    def __post_init__(self):
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} must be at least {least}")
        if not 0 < self.sampled < float("inf"):
            raise UserError(f"sampled={self.sampled} must be positive and finite; 1 draws from the model as it is")
        if self.tokens <= self.drafts + 1:
            raise UserError(
                f"tokens={self.tokens} of an answer hold no draft of drafts={self.drafts} tokens with a token before "
                "and after it; ask for longer answers or shorter drafts"
            )
        schedule(self.optim, self.steps)

    @property
    def length(self) -> int:
        return self.prompt_tokens + self.tokens


@dataclass(frozen=True, kw_only=True)
class Texts:
    """rows to learn from, and the answers on which drafts are measured, by how they were drawn."""

    learnt: Batch
    measured: Mapping[str, Sequence[Answer]]

    def accepted(self, drafter: Drafter, drafts: int) -> dict[str, Acceptance]:
        return {name: accepted(drafter, found, drafts) for name, found in self.measured.items()}


def open_lesson(lesson: Lesson, model: Language) -> Run:
    """The lesson's run, begun or gone on with; UserError where it was begun with other settings or another model."""
    if lesson.length > model.config.positions:
        raise UserError(
            f"prompts and answers of {lesson.length} tokens were asked for, the model has "
            f"positions={model.config.positions}; lower tokens or prompt_tokens"
        )
    return continue_or_create(lesson.out, {**to_dict(lesson), "weights": fingerprint(model)})


def texts(run: Run, lesson: Lesson, source: str | Path, model: Language, tokenizer: Tokenizer) -> Texts:
    """What the model writes: to learn from, and to measure on greedily and at temperature 1, where an argmax draft is
    accepted as often as it is the token that was drawn."""
    if lesson.chat and tokenizer.template is None:
        raise UserError("chat=true was asked for, but this model has no chat template; leave it out")
    engine = Engine(model, tokenizer, max_tokens=lesson.length, rows=lesson.together)
    wanted = Wanted(
        learnt=lesson.answers, measured=lesson.measured, tokens=lesson.prompt_tokens, places=lesson.prompts,
        chat=lesson.chat, seed=lesson.seed,
    )  # fmt: skip
    to_learn, to_measure = prompts(run, engine, source, wanted)
    drawn = Manner(temperature=lesson.sampled, tokens=lesson.tokens, seed=2 * lesson.seed)
    other = replace(drawn, seed=drawn.seed + 1)
    learnt = answers(run.state / "answers.jsonl", engine, to_learn, drawn)
    measured = {
        GREEDY: answers(run.state / "greedy.jsonl", engine, to_measure, replace(other, temperature=0)),
        DRAWN: answers(run.state / "drawn.jsonl", engine, to_measure, replace(other, temperature=1)),
    }
    return Texts(learnt=rows_of(learnt, length=lesson.length, pad=model.config.pad), measured=measured)


def teach(run: Run, lesson: Lesson, drafter: Drafter, objective: Objective, rows: Batch) -> None:
    """Trains the drafter, as float32 masters; it is then again in the types that it was in."""
    types = {name: weight.dtype for name, weight in drafter.named_parameters()}
    drafter.float().requires_grad_(True)
    fit(
        cast(Language, drafter),
        Stream({"own": rows}, rows=lesson.rows, micro=lesson.rows, seed=lesson.seed),
        objective,
        adamw(drafter, lesson.optim),
        steps=lesson.steps,
        schedule=schedule(lesson.optim, lesson.steps),
        clip=lesson.optim.clip,
        balance=0,  # biases would move with the load of text that no router was made for
        checkpoints=Checkpoints(run=run, every=lesson.save_every, settings={"drafts": lesson.drafts}),
    )
    drafter.requires_grad_(False).eval()
    for name, weight in drafter.named_parameters():
        weight.data = weight.data.to(types[name])
