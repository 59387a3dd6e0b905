"""Examine a model: retrieval in long texts (suite=ruler), or any tasks of EleutherAI's lm-eval (suite=lm-eval).

MODEL is a run, a checkpoint folder or a hub id. The same command again goes on where an interrupted one stopped; with
more tasks, lengths or samples it adds to what is there. The report, its picture and results.json are in out.

suite=ruler lengths=4096,8192                         six tasks in the manner of RULER at two lengths, in tokens
suite=ruler tasks=single chat=true thinking=512       one of them, as a chat, with reasoning of 512 tokens at most
suite=ruler tasks=pairs lengths=512                   for models of bytes, trained as in `compare study=needle`
suite=lm-eval tasks=arc_easy,lambada_openai limit=100 needs the extra `eval`; include=FOLDER has more tasks, as YAML
"""

from __future__ import annotations

import difflib
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

import nautilus
from nautilus.config import setting
from nautilus.eval import harness, retrieval, ruler, suite
from nautilus.model.weights import local_folder
from nautilus.runtime import Run, UserError, continue_or_create, program
from nautilus.serve import Engine
from nautilus.serve.prefixes import fingerprint

SUITES = {
    "ruler": "Retrieval in texts of several lengths, by string match.",
    "lm-eval": "Tasks of lm-eval, asked of our server by its own clients.",
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    model: str = setting("", "run, checkpoint folder or hub id")
    suite: str = setting("ruler", " or ".join(SUITES))
    out: Path = setting(Path("runs/eval"), "folder of the answers and the report; gone on with if it is there")
    tasks: tuple[str, ...] = setting((), f"of ruler: {', '.join(ruler.TASKS)} (none: all but pairs); of lm-eval: names")
    lengths: tuple[int, ...] = setting((4096, 8192), "of ruler: tokens of a text with its answer")
    samples: int = setting(20, "of ruler: questions of each task at each length")
    include: Path | None = setting(None, "of lm-eval: folder with more tasks")
    limit: int = setting(0, "of lm-eval: examples of each task (0: all)")
    max_tokens: int = setting(
        8192, "of lm-eval: most tokens of a text with its answer; longer ones lose their beginning"
    )
    fewshot: int | None = setting(None, "of lm-eval: examples before each (none: as the task says)")
    chat: bool = setting(False, "ask through the chat template, not as text to be continued")
    thinking: int = setting(0, "in a chat: tokens of reasoning before the answer (0: none)")
    seed: int = setting(0, "of ruler: another one asks other questions")
    rows: int = setting(8, "most requests that run together")
    cache: str = setting("", "format of keys and values: bf16, fp8, int8 or f32 (as the activations)")
    cache_gb: float | None = setting(None, "most 10^9 bytes of keys and values (none: a quarter of the memory)")
    saved_gb: float = setting(1.0, "10^9 bytes for states after beginnings that questions share; 0: none")

    def __post_init__(self):
        if self.samples < 1 or min(self.limit, self.thinking, self.fewshot or 0) < 0 or not self.lengths:
            raise UserError(
                f"samples={self.samples} must be at least 1, limit={self.limit}, thinking={self.thinking} and "
                f"fewshot={self.fewshot} not below 0, and lengths must name one"
            )


def main(settings: Settings) -> None:
    if settings.suite not in SUITES:
        near = difflib.get_close_matches(settings.suite.replace("_", "-"), SUITES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"have {', '.join(SUITES)}"
        raise UserError(f"suite={settings.suite!r} was asked for; {hint}")
    if not settings.model:
        raise UserError("no model to examine; write nautilus eval MODEL, a run, a checkpoint folder or a hub id")
    manager = harness.known_tasks(asked_of(settings)) if settings.suite == "lm-eval" else None
    model, tokenizer = nautilus.load(settings.model)
    model.requires_grad_(False)
    if settings.chat and tokenizer.template is None:
        raise UserError(
            "chat=true was asked for, but this model has no chat template; leave it out, or use a chat model"
        )
    if settings.suite == "ruler":
        retrieval.refuse(plan_of(settings), model.config.positions)
    names = "model", "suite", "chat", "thinking", "seed", "cache", "max_tokens"
    identity = {name: getattr(settings, name) for name in names}
    run = continue_or_create(settings.out, {**identity, "weights": fingerprint(model)})
    run.state.mkdir(exist_ok=True)  # from here on other settings are refused
    limits = {name: getattr(settings, name) for name in ("rows", "cache", "cache_gb", "saved_gb")}
    longest = max(settings.lengths) if settings.suite == "ruler" else min(settings.max_tokens, model.config.positions)
    found = examined(run, Engine(model, tokenizer, max_tokens=longest, **limits), settings, manager)
    suite.write(run, found)
    console = Console(soft_wrap=True, highlight=False)
    console.print(suite.summary(found))
    console.print(f"report {run.report}")


def examined(run: Run, engine: Engine, settings: Settings, manager) -> suite.Evaluation:
    examples: list[list[str]] = []
    if settings.suite == "ruler":
        cells, examples = retrieval.retrieve(run, engine, plan_of(settings))
    else:
        folder = Path(local_folder(nautilus.checkpoint_of(settings.model)))
        cells = harness.cells_of(harness.harness(engine, folder, asked_of(settings), manager, run.state / "answers"))
    how = f"a chat with {settings.thinking} tokens of reasoning" if settings.chat else "text to be continued"
    return suite.Evaluation(
        title=f"{Path(settings.model).name}: {settings.suite}",
        about=SUITES[settings.suite],
        command=f"{program()} {shlex.join(sys.argv[1:])}",
        cells=cells,
        facts={"model": settings.model, "asked as": how, "seed": str(settings.seed)},
        examples=examples,
    )


def plan_of(settings: Settings) -> retrieval.Plan:
    names = "lengths", "samples", "seed", "chat", "thinking"
    return retrieval.Plan(tasks=settings.tasks or ruler.DEFAULT, **{name: getattr(settings, name) for name in names})


def asked_of(settings: Settings) -> harness.Asked:
    names = "tasks", "include", "limit", "fewshot", "chat", "thinking"
    return harness.Asked(**{name: getattr(settings, name) for name in names})
