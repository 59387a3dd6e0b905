"""The report of a run: one HTML file that needs nothing else, and one picture for a README.

`gather` collects what a run folder holds and what was measured on its model; `write_report` and `write_picture` show
it. Without matplotlib the page has its numbers as tables; the picture needs it.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy
import torch

from nautilus.config import Config
from nautilus.eval import charts, figures, sections
from nautilus.eval.loss import HeldOut
from nautilus.eval.material import Report, Sample, series, smooth, thin
from nautilus.eval.page import amount, page, paragraph, section, text
from nautilus.runtime import Run, UserError, read_metrics, write_atomic


def gather(
    run: Run,
    config: Config,
    *,
    title: str = "",
    held_out: HeldOut | None = None,
    samples: Sequence[Sample] = (),
    commands: Mapping[str, str] | None = None,
) -> Report:
    """What the run folder holds, with what was measured on its model; the environment is that of this process."""
    return Report(
        title=title or run.folder.name,
        config=config,
        settings=run.settings,
        rows=read_metrics(run.metrics),
        held_out=held_out,
        samples=samples,
        commands=commands or {},
        environment=environment(),
    )


def write_report(path: str | Path, report: Report) -> None:
    write_atomic(path, render(report))


def render(report: Report) -> str:
    """The whole page."""
    parts = {
        "model": ("Model", sections.model_part),
        "training": ("Training", sections.training_part),
        "experts": ("Experts", sections.experts_part),
        "health": ("Health", sections.health_part),
        "held-out": ("Held-out text", sections.held_out_part),
        "samples": ("Samples", sections.samples_part),
        "reproduce": ("Reproduce", sections.reproduce_part),
    }
    links = "".join(f'<a href="#{name}">{text(title)}</a>' for name, (title, _) in parts.items())
    head = f'<h1>{text(report.title)}</h1>{paragraph(lead(report), "lead")}<nav aria-label="Sections">{links}</nav>'
    body = "".join(section(name, title, part(report)) for name, (title, part) in parts.items())
    body = f"{sections.headline(report)}{sections.notes(report)}\n{body}"
    return page(report.title, f"<header>{head}</header>\n<main>{body}</main>\n<footer>Written by Nautilus.</footer>")


def lead(report: Report) -> str:
    """One sentence: what this is."""
    pattern = report.config.pattern
    layers = [f"{pattern.count(letter)} {kind}" for letter, kind in sections.KINDS.items() if letter in pattern]
    listed = ", ".join(layers[:-1]) + " and " * (len(layers) > 1) + layers[-1]
    trained = f", trained on {amount(report.tokens)} tokens" if report.tokens else ""
    return f"A language model of {len(pattern)} layers ({listed}){trained}."


def write_picture(path: str | Path, report: Report) -> None:
    """Loss, expert loads and held-out bits per byte side by side, as a PNG; what has no data is left out."""
    parts = []
    loss, held_out = series(report.rows, "loss"), report.held_out
    if loss is not None:
        parts.append(("Training loss, all terms", charts.draw_loss, (thin(smooth(loss)),)))
    if held_out is not None and held_out.loads:
        parts.append(("Load of each expert on held-out text", charts.draw_loads, (held_out.loads,)))
    if held_out is not None:
        parts.append(("Held-out bits per byte", charts.draw_bars, (figures.score_bars(held_out),)))
    if not parts:
        raise UserError(f"no picture of {report.title!r}: it has neither losses nor held-out scores; train or score it")
    charts.png(Path(path), parts)


def environment() -> dict[str, str]:
    """What the numbers depend on beside the settings. No names of people, machines or folders."""
    linux = platform.system() == "Linux"
    return {
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": str(len(os.sched_getaffinity(0)) if linux else os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def processor() -> str:
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
