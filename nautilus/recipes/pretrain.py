"""Train a model from plain text: tokenizer, packed rows, AdamW under a warm-up, stable, decay schedule, report.

MODEL is a preset; its sizes are settings too: model.width=384 model.layers.E.active=2. The same command again goes on
where an interrupted run stopped. The output folder opens with `nautilus chat` and `nautilus.load`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console

from nautilus.config import Config, to_dict
from nautilus.data.corpus import sources
from nautilus.data.prepare import Prepared, prepare
from nautilus.eval.loss import HeldOut, held_out
from nautilus.eval.report import Sample, gather, write_report
from nautilus.model.language import Language
from nautilus.model.weights import save_model
from nautilus.ops.precision import compute_dtype
from nautilus.presets import toy
from nautilus.runtime import Run, UserError, continue_or_create, keep_memory
from nautilus.serve import Engine, Sampling
from nautilus.train.average import average_checkpoints
from nautilus.train.checkpoint import Checkpoints, snapshots
from nautilus.train.loop import fit
from nautilus.train.objective import pretrain
from nautilus.train.optim import OptimConfig, adamw, schedule


def setting(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class Settings:
    model: Config = toy()
    out: Path = setting(Path("runs/pretrain"), "the run's folder; resumed if it is there")
    data: tuple[str, ...] = setting(("embedded",), "text: [weight*]place[#field]; embedded, paths, hub:owner/name")
    undecodable: str = setting("error", "text that is not UTF-8: error, skip or replace")
    max_bytes: int = setting(0, "of each source, 0: all")
    tokenizer: Path | None = setting(None, "folder of a tokenizer to use; none: learn one")
    steps: int = setting(1000, "updates")
    rows: int = setting(16, "rows of a step")
    micro: int = setting(16, "rows of a micro-batch")
    length: int = setting(512, "tokens of a row")
    reset: bool = setting(True, "documents of a row do not see each other")
    seed: int = 0
    compute: str = setting("auto", "bf16 or fp32 activations; auto: what is faster here")
    optim: OptimConfig = OptimConfig(lr=3e-3, min_lr=3e-5, warmup=50)
    mtp_depths: int = setting(2, "tokens ahead that the multi-token-prediction block learns")
    mtp_weight: float = 0.3
    aux_weight: float = setting(1e-4, "of the sequence balance loss")
    balance: float = setting(1e-3, "step of the load-balancing biases")
    save_every: int = setting(200, "updates between saved states, 0: only at the end")
    average: int = setting(0, "of how many snapshots of the last stretch the final weights are made, 0: none")
    average_every: int = setting(50, "updates between those snapshots")
    prompts: tuple[str, ...] = setting(("def main(",), "texts that the report shows continued")


def main(settings: Settings) -> None:
    run, model, prepared = train(settings)
    scores, _ = examine(settings, run, model, prepared)
    total = scores.total
    console = Console(soft_wrap=True)
    console.print(f"held-out bits per byte {total.bits_per_byte:.4f}, xz {total.xz_bits_per_byte:.4f}")
    console.print(f"report {run.report}\ntalk to it: nautilus chat {run.folder}", highlight=False)


def train(settings: Settings) -> tuple[Run, Language, Prepared]:
    """The trained model in eval mode, saved in the run's model folder."""
    if settings.average * settings.average_every > settings.steps:
        raise UserError(
            f"average={settings.average} snapshots, one every average_every={settings.average_every}, do not fit into "
            f"steps={settings.steps}; lower one of them or raise steps"
        )
    keep_memory()
    run = continue_or_create(settings.out, to_dict(settings))
    found = sources(settings.data, undecodable=settings.undecodable, max_bytes=settings.max_bytes)
    prepared = prepare(found, run.folder / "data", vocab=settings.model.vocab, tokenizer=settings.tokenizer)
    if prepared.tokenizer.vocab > settings.model.vocab:
        raise UserError(
            f"the tokenizer has {prepared.tokenizer.vocab} words but model.vocab={settings.model.vocab}; raise "
            f"model.vocab or use another tokenizer"
        )
    model = Language(replace(settings.model, eos=prepared.tokenizer.stop)).initialise(settings.seed)
    model.compute = compute_dtype(settings.compute)
    rows = {"length": settings.length, "rows": settings.rows, "micro": settings.micro}
    fit(
        model,
        prepared.stream(**rows, seed=settings.seed, reset=settings.reset),
        pretrain(mtp_depths=settings.mtp_depths, mtp_weight=settings.mtp_weight, aux_weight=settings.aux_weight),
        adamw(model, settings.optim),
        steps=settings.steps,
        schedule=schedule(settings.optim, settings.steps),
        clip=settings.optim.clip,
        balance=settings.balance,
        checkpoints=Checkpoints(
            run=run, every=settings.save_every, snapshots=settings.average_every if settings.average else 0
        ),
        health_every=10,
    )
    if settings.average:
        model.load_state_dict(average_checkpoints(snapshots(run)[-settings.average :]))
    facts = {"text": ", ".join(f"{name} {c.fingerprint[:12]}" for name, c in prepared.corpora.items())}
    save_model(model, run.model, precision="fp32", tokenizer=prepared.tokenizer, facts=facts)
    return run, model.eval(), prepared


def examine(
    settings: Settings, run: Run, model: Language, prepared: Prepared, commands: dict[str, str] | None = None
) -> tuple[HeldOut, Sequence[Sample]]:
    """Held-out loss and completions; both also go into the run's report."""
    tokenizer = prepared.tokenizer
    start = None if settings.reset else tokenizer.document_end
    scores = held_out(model, tokenizer.encode, prepared.held_out(), start=start)
    sampling = Sampling(temperature=0.7, top_p=0.95, max_tokens=96)
    answers = Engine(model, tokenizer).generate(settings.prompts, sampling)
    samples = [Sample(prompt=p, completion=a.text) for p, a in zip(settings.prompts, answers, strict=True)]
    talk = {"talk to it": f"nautilus chat {run.folder}"}
    report = gather(run, model.config, held_out=scores, samples=samples, commands=(commands or {}) | talk)
    write_report(run.report, report)
    return scores, samples
