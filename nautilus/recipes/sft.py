"""Train a model on finished conversations: its own tokens count, all else is given.

MODEL is a run, a checkpoint folder or a hub id; one without a chat template gets the family's. Conversations come from
files of JSON lines ({"messages": [...], "tools": [...]}), from the worked answers of tasks, or both. The same command
again goes on where an interrupted run stopped.

runs/demo data=chats.jsonl                        conversations of a file
runs/demo tasks=sort,reverse,arithmetic:1-3       what is right for 4,096 problems, a third of each task
runs/demo data=chats.jsonl loss=sample off=0.1 cut=0.03     every conversation says as much; some without thinking
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from rich.console import Console

import nautilus
from nautilus.config import setting, to_dict
from nautilus.data.conversations import Conversation, Taught, Teaching, conversations_in, taught
from nautilus.data.mix import Stream, number_of
from nautilus.data.pack import pack_best_fit
from nautilus.data.template import template_of
from nautilus.eval.examine import examine
from nautilus.ops.precision import compute_dtype
from nautilus.posttrain.blend import domain
from nautilus.runtime import UserError, continue_or_create, keep_memory
from nautilus.serve.prefixes import fingerprint
from nautilus.tasks.asked import asked
from nautilus.train.checkpoint import Checkpoints
from nautilus.train.loop import fit
from nautilus.train.objective import pretrain
from nautilus.train.optim import OptimConfig, adamw, schedule

LEAST = {"problems": 1, "steps": 0, "rows": 1, "length": 2, "mtp_depths": 0, "mtp_weight": 0, "aux_weight": 0}
LEAST |= {"balance": 0, "save_every": 0, "seed": 0}


@dataclass(frozen=True, kw_only=True)
class Settings:
    model: str = setting("", "run, checkpoint folder or hub id")
    data: tuple[Path, ...] = setting((), "files of conversations, a JSON line each")
    tasks: tuple[str, ...] = setting((), "tasks whose worked answers are learnt: sort, sort:1-3, sort:2*0.5")
    problems: int = setting(4096, "worked answers, of all tasks together")
    out: Path = setting(Path("runs/sft"), "the run's folder; gone on with if it is there")
    template: str = setting("", "how chats are written: a file, or nemotron, the family's (as the model says)")
    steps: int = setting(500, "updates; 0: as many as take every sample once")
    rows: int = setting(16, "rows of a step")
    length: int = setting(1024, "tokens of a row, into which samples are packed; longer ones are left out")
    loss: str = setting("token", "what counts alike: every token, or every sample, which protects short answers")
    off: float = setting(0.0, "share of samples with thinking that are learnt without it")
    cut: float = setting(0.0, "share whose thinking is cut at random; the answer stays, its end does not count")
    toggle: bool = setting(False, "the system message says whether to think, as in Llama-Nemotron")
    compute: str = setting("auto", "bf16 or fp32 activations; auto: what is faster here")
    optim: OptimConfig = OptimConfig(lr=1e-3, min_lr=1e-5, warmup=-1, decay=0.9, shape="cosine")
    mtp_depths: int = setting(0, "tokens ahead that the multi-token-prediction block learns")
    mtp_weight: float = setting(0.3, "of the losses of those tokens, over the depths")
    aux_weight: float = setting(1e-4, "of the sequence balance loss")
    balance: float = setting(1e-3, "step of the load-balancing biases")
    save_every: int = setting(200, "updates between saved states, 0: only at the end")
    seed: int = setting(0, "of the order, and of what is cut")

    def __post_init__(self):
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.mtp_depths >= self.length:
            raise UserError(f"mtp_depths={self.mtp_depths} must be less than the length={self.length} of a row")
        self.teaching()  # for what these refuse
        compute_dtype(self.compute)
        if self.steps:
            schedule(self.optim, self.steps)

    def teaching(self) -> Teaching:
        return Teaching(
            length=self.length, loss=self.loss, off=self.off, cut=self.cut, toggle=self.toggle, seed=self.seed
        )


def main(settings: Settings) -> None:
    if not settings.model:
        raise UserError("no model to train; write nautilus sft MODEL data=…, a run, a checkpoint folder or a hub id")
    keep_memory()
    model, tokenizer = nautilus.load(settings.model)
    model.compute = compute_dtype(settings.compute, model.head_weight.device.type)
    tokenizer.template = template_of(
        settings.template or ("" if tokenizer.template else "nemotron"), tokenizer.template
    )
    if settings.length > model.config.positions:
        raise UserError(f"length={settings.length} was asked for, the model has positions={model.config.positions}")
    found = taught(tokenizer, chain(*map(conversations_in, settings.data), worked(settings)), settings.teaching())
    say = Console(soft_wrap=True, highlight=False).print
    say(told(found))
    run = continue_or_create(settings.out, {**to_dict(settings), "weights": fingerprint(model)})
    batch = pack_best_fit(found.samples, length=settings.length, pad=model.config.pad)
    steps = settings.steps or -(-len(batch) // settings.rows)
    model.float().requires_grad_(True)
    fit(
        model,
        Stream({"conversations": batch}, rows=settings.rows, micro=settings.rows, seed=settings.seed),
        pretrain(mtp_depths=settings.mtp_depths, mtp_weight=settings.mtp_weight, aux_weight=settings.aux_weight),
        adamw(model, settings.optim), steps=steps, schedule=schedule(settings.optim, steps),
        clip=settings.optim.clip, balance=settings.balance,
        checkpoints=Checkpoints(run=run, every=settings.save_every, settings=to_dict(settings.teaching())),
        health_every=10,
    )  # fmt: skip
    model.requires_grad_(False).eval().save(run.model, precision="fp32", tokenizer=tokenizer)
    examine(run, model, tokenizer, {}, prompts=())
    say(f"report {run.report}")


def worked(settings: Settings) -> Iterator[Conversation]:
    """Of the problems that are trained on, by the shares of their tasks; others than those that reinforcement with this
    seed draws, where there are others: on what it knows by heart a model has little to find out."""
    tasks = [asked(words) for words in settings.tasks]
    total = sum(one.share for one in tasks)
    for one in tasks:
        count = max(1, round(settings.problems * one.share / total))
        for problem in domain(one.task, count, levels=one.levels, seed=number_of(settings.seed, 3)).problems:
            yield Conversation(messages=[*problem.messages, *problem.worked], tools=[*problem.tools] or None)


def told(found: Taught) -> str:
    """UserError where nothing is left."""
    example = {name: f" ({text})" for name, text in found.first.items()}
    left = found.left_out.most_common()
    why = "".join(f"; {count:,} left out: {name}{example.get(name, '')}" for name, count in left)
    if not found.samples:
        raise UserError(f"there is nothing to learn from{why}: give data=FILE with conversations, or tasks=NAME")
    return f"{len(found.samples):,} samples{why}"
