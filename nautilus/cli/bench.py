"""How fast a model decodes and reads prompts on this machine, with what memory allows beside it.

MODEL is a run, a checkpoint folder or a hub id, or a preset, which gets random weights: `layers`, `vocab` and `shrink`
cut it to what fits, `format` is its number format. Every figure is a median of several turns after one that is not
counted, with its range. The roofline of a step is the time to read what it must at the bandwidth that memory had in the
same turn; a model that fits into the caches may be faster than that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import nautilus
from nautilus.cli import doctor
from nautilus.cli.doctor import counted
from nautilus.cli.info import bytes_text, config_of
from nautilus.config import Config, apply_overrides, setting
from nautilus.presets import PRESETS, shrink
from nautilus.runtime import Progress, UserError

if TYPE_CHECKING:
    from rich.table import Table

    from nautilus.eval.speed import Meter, Work
    from nautilus.model.language import Language

MACHINE = ("cpu", "cores", "torch_threads", "load_average", "largest_cache_mb")  # what speeds depend on
SHORT = 16  # tokens before those that several sequences decode


@dataclass(frozen=True, kw_only=True)
class Settings:
    model: str = setting("toy", "run, checkpoint folder, hub id, or preset for random weights")
    context: tuple[int, ...] = setting((SHORT, 4096), "decode one sequence after so many tokens")
    sequences: tuple[int, ...] = setting((8,), f"decode so many sequences together, after {SHORT} tokens each")
    prefill: tuple[int, ...] = setting((512,), "read prompts of so many tokens")
    steps: int = setting(32, "tokens that each sequence decodes in a turn")
    repeats: int = setting(5, "turns of each piece of work, after one to warm up")
    where: bool = setting(False, "also where the time of a step goes")
    cache: str = setting("", "format of keys and values: bf16, fp8, int8, f32; as the activations when empty")
    state: str = setting("fp32", "format of recurrent states between tokens")
    format: str = setting("", "of random weights: bf16 when empty, f32, or one of few bits, such as nvfp4")
    layers: str = setting("", "of a preset only these, in their full width, such as MEM*E")
    vocab: int = setting(0, "of a preset, instead of its own")
    shrink: bool = setting(False, "the toy twin of a preset")
    metrics: str = setting("", "a file for one JSON line per turn")
    json: bool = setting(False, "print one JSON object instead of tables")

    def __post_init__(self):
        counts = (*self.context, *self.sequences, *self.prefill, self.steps, self.repeats)
        if min(counts) < 1 or self.vocab < 0:
            raise ValueError(
                "context, sequences, prefill, steps and repeats must be at least 1, vocab 0 (the preset's) or more"
            )


def main(settings: Settings) -> None:
    facts = measure(settings)
    if settings.json:
        print(json.dumps(facts, indent=2))
    else:
        show(facts)


# ----- the facts -----------------------------------------------------------------------------------------------------


def measure(settings: Settings) -> dict:
    from nautilus.eval.speed import Meter, require_room
    from nautilus.ops.cpu.library import native

    works, config = works_of(settings), config_wanted(settings)
    require_room(config, works, settings.cache, settings.state)
    machine, turns = doctor.machine(Path(".")), len(works) * settings.repeats  # before this program is the load
    with Progress(rows_file(settings), turns, shown=("tokens_per_s",), unit="turn") as progress:
        with progress.uncounted():
            model, weights = model_wanted(settings, config, works, progress)
            meter = Meter(model, works, cache=settings.cache, state=settings.state)
        found = [timed(settings, meter, work, index, progress) for index, work in enumerate(works)]
    return {
        "model": settings.model,
        "pattern": config.pattern,
        "width": config.width,
        "vocab": config.vocab,
        "weights": weights,
        "machine": {name: machine[name] for name in MACHINE},
        "native": {"on": native().functions is not None, "reason": native().reason},
        "works": found,
    }


def works_of(settings: Settings) -> list[Work]:
    from nautilus.eval.speed import Work

    decoding = [(length, 1) for length in settings.context] + [(SHORT, count) for count in settings.sequences]
    works = [Work(prompt=length, sequences=count, steps=settings.steps) for length, count in decoding]
    return works + [Work(prompt=length) for length in settings.prefill]


def rows_file(settings: Settings) -> Path:
    """Where a line per turn goes. UserError for a file that is there, which would be written over, and
    for a folder that is not."""
    file = Path(settings.metrics or os.devnull)
    if file.is_file():
        raise UserError(f"the rows of metrics={file} were asked for, but that file is there; give a new name")
    if not file.parent.is_dir():
        raise UserError(f"the rows of metrics={file} were asked for, but {file.parent} is no folder; make it first")
    return file


def config_wanted(settings: Settings) -> Config:
    config = config_of(settings.model)
    if settings.model not in PRESETS:
        if settings.format or settings.layers or settings.vocab or settings.shrink:
            raise UserError(
                f"format, layers, vocab and shrink are of random weights, but {settings.model} has weights of its own;"
                f" leave them out, or give a preset"
            )
        return config
    config = shrink(config) if settings.shrink else config
    changes = [f"{name}={value}" for name in ("layers", "vocab") if (value := getattr(settings, name))]
    return dataclasses.replace(apply_overrides(config, changes), mtp=())


def model_wanted(settings: Settings, config: Config, works: list[Work], progress: Progress) -> tuple[Language, str]:
    """The model, and where its weights are from. UserError before any are made where they do not fit."""
    if settings.model not in PRESETS:
        from nautilus.model.weights import load_model, local_folder

        progress.say(f"opening {settings.model}")
        model = load_model(local_folder(nautilus.checkpoint_of(settings.model)))
        return model.requires_grad_(False).eval(), "as they are stored"
    from nautilus.eval.random_model import random_model, require_memory
    from nautilus.eval.speed import memory_of

    kind = settings.format or "bf16"
    require_memory(settings.model, config, kind, memory_of(config, works, 4 if kind == "f32" else 2))
    progress.say(f"making random weights in {kind}")
    return random_model(config, kind), f"random, in {kind}"


def timed(settings: Settings, meter: Meter, work: Work, index: int, progress: Progress) -> dict:
    from nautilus.eval.where import where

    with contextlib.ExitStack() as stack:
        with progress.uncounted():
            ready = stack.enter_context(meter.ready(work))
            ready.turn()  # to warm up
        turns = []
        for number in range(settings.repeats):
            turns.append(ready.turn())
            progress({"step": index * settings.repeats + number, "work": work.name, **dataclasses.asdict(turns[-1])})
        with progress.uncounted():
            parts = [dataclasses.asdict(part) for part in where(ready)] if settings.where and work.steps else []
        read = ready.bytes
    return {
        "work": work.name,
        **dataclasses.asdict(work),
        "tokens_per_s": spread([turn.tokens_per_s for turn in turns]),
        "bytes_per_step": read if work.steps else None,
        "bandwidth_gb_per_s": spread([turn.bandwidth / 1e9 for turn in turns if turn.bandwidth]),
        "share_of_roofline": spread([turn.share for turn in turns if turn.share]),
    } | ({"where": parts} if settings.where and work.steps else {})


def spread(values: list[float]) -> dict | None:
    if not values:
        return None
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "all": values}


# ----- for people ----------------------------------------------------------------------------------------------------


def show(facts: dict) -> None:
    from rich.console import Console

    console, machine = Console(), facts["machine"]
    say = lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True)
    say(
        f"{facts['model']}: {len(facts['pattern'])} layers {facts['pattern']}, width {facts['width']}, vocabulary"
        f" {facts['vocab']:,}, weights {facts['weights']}"
    )
    numbers = f"{counted(machine['cores'], 'core')}, {counted(machine['torch_threads'], 'thread')}"
    say(f"{machine['cpu']}, {numbers}, {facts['native']['reason']}")
    console.print(table_of(WORKS, map(work_cells, facts["works"])))
    for work in facts["works"]:
        if work.get("where"):
            console.print(table_of([work["work"], *WHERE], where_cells(work), left=2))
    for remark in remarks(facts):
        say(remark)


WORKS = ("work", "tokens/s", "range", "a step", "memory", "roofline")
WHERE = ("kernels", "µs/step", "%", "reads", "GB/s")


def table_of(titles: Sequence[str], cells: Iterable[Sequence[str]], left: int = 1) -> Table:
    """The first `left` columns are text."""
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE, pad_edge=False, padding=0)
    for number, title in enumerate(titles):
        table.add_column(title, justify="left" if number < left else "right", no_wrap=title != "kernels")
    for row in cells:
        table.add_row(*row)
    return table


def work_cells(work: dict) -> tuple[str, ...]:
    speed, bandwidth, share = (work[name] for name in ("tokens_per_s", "bandwidth_gb_per_s", "share_of_roofline"))
    return (
        work["work"],
        count_text(speed["median"]),
        f"{count_text(speed['low'])}-{count_text(speed['high'])}",
        bytes_text(work["bytes_per_step"]) if work["steps"] else "",
        f"{bandwidth['median']:.1f} GB/s" if bandwidth else "",
        f"{100 * share['median']:.0f} %" if share else "",
    )


def count_text(count: float) -> str:
    return f"{count:,.1f}" if count < 1000 else f"{count:,.0f}"


def where_cells(work: dict) -> Iterator[tuple[str, ...]]:
    """A line for each part of a step; together they are the whole of it."""
    whole = sum(part["seconds"] for part in work["where"])
    for part in work["where"]:
        seconds, read = part["seconds"], part["bytes"]
        yield (
            part["part"],
            kernels_text(part["kernels"]),
            f"{1e6 * seconds:,.1f}",
            f"{100 * seconds / whole:.1f}",
            bytes_text(read) if read else "",
            f"{1e-9 * read / seconds:.1f}" if read else "",
        )


def kernels_text(seconds: dict[str, float]) -> str:
    """The names, where there are several with the share of each."""
    if len(seconds) < 2:
        return "".join(seconds)
    whole = sum(seconds.values())
    return ", ".join(f"{name} {100 * one / whole:.0f} %" for name, one in seconds.items())


def remarks(facts: dict) -> Iterator[str]:
    asked = any("where" in work for work in facts["works"])
    if not facts["native"]["on"]:
        yield f"no roofline, no time by part: they take native kernels, which are off: {facts['native']['reason']}"
    elif asked and not any(work.get("where") for work in facts["works"]):
        yield "no time by part: a step of this model is not replayed, since PyTorch computes some of it"
    elif asked:
        yield (
            "µs, % and reads are of one step, a part of the model in all its layers together; outside the kernels: what"
            " Python does between them, such as drawing tokens and calling them, and the clock, about 1 µs a call"
        )
    shared = [work for work in facts["works"] if work["share_of_roofline"]]
    cache = 1e6 * (facts["machine"]["largest_cache_mb"] or 0)
    if cached := [work["bytes_per_step"] for work in shared if work["bytes_per_step"] <= cache]:
        yield (
            f"a step that reads {bytes_text(max(cached))} finds it in the caches (the largest has {bytes_text(cache)}):"
            f" its share of the roofline compares it with reading memory, which does not bound it, and may pass 100 %"
        )
    elif any(work["share_of_roofline"]["median"] > 1 for work in shared):
        yield "above 100 %: what a step reads lies in the caches, which are faster than memory"
    if line := doctor.busy(facts["machine"]):
        yield line
