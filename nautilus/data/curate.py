"""Curation: a folder of raw text → text worth training on, and a count of all that was left out and why.

The work is a row of stages (data/screen.py), each cut into tasks of about `task_bytes` of text. A finished task leaves
a marker in the run's state/done; whatever ends the process, the same command does only what has no marker, and since a
task depends on nothing but its input, the output is the same bytes. Memory holds one document, the hashes of one task
and, while groups are made, the duplicates' numbers; what is in between lies on disk, about as much as the input.

    out/text/N.jsonl.gz   id and text           out/README.md              the data card
    out/curation.json     counts, examples      out/report.html, .png      the same for people (recipes/curate.py)
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nautilus.config import setting
from nautilus.data.pieces import Job, Piece, plan
from nautilus.data.tally import Tally, together
from nautilus.runtime import Progress, Run, UserError, disk_errors, installing, read_json, write_atomic
from nautilus.runtime.progress import clock_time

FILTERS = ("repetition", "quality", "c4")
BUCKETS = 14  # of MinHash: signatures are compared in this many parts
# About what a byte of text costs in each stage, for the time that is left. `find` and others are one task or few.
COST = {"index": 0.1, "screen": 10.0, "find": 0.2, "sign": 3.0, "match": 0.2, "group": 0.1, "write": 1.0}
NEEDED = {"datatrove": "data"}
HELD: dict[str, Any] = {}  # in a worker: the job, which all its tasks share


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is asked of a curation."""

    data: tuple[str, ...] = setting((), "text: folders or files of jsonl, parquet, txt, html: place[#field]")
    filters: tuple[str, ...] = setting(FILTERS, "rules of quality for English prose; empty for code or other languages")
    languages: tuple[str, ...] = setting((), "languages to keep, as en,de; empty: all")
    html: bool = setting(False, "every document is HTML; false: files named so")
    undecodable: str = setting("skip", "text that is not UTF-8: error, skip or replace")
    against: tuple[str, ...] = setting((), "evaluation sets that must not be in the text: place[#field]")
    words: int = setting(13, "a run of so many words shared with an evaluation set drops a document, 0: not looked for")
    width: int = setting(50, "a run of so many bytes shared with an evaluation set does, 0: not looked for")
    near: bool = setting(True, "drop near duplicates (MinHash) besides equal ones")
    task_bytes: int = setting(1 << 24, "of text in one task: what a kill may cost")
    workers: int = setting(max(1, (os.cpu_count() or 2) - 1), "processes")

    def __post_init__(self):
        if unknown := sorted(set(self.filters) - set(FILTERS)):
            raise UserError(f"filters has {', '.join(unknown)}; there are {', '.join(FILTERS)}")
        if self.undecodable not in ("error", "skip", "replace"):
            raise UserError(f"undecodable={self.undecodable!r} is none of error, skip, replace")
        least = {"words": 0, "width": 0, "task_bytes": 1, "workers": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise UserError(f"{name}={getattr(self, name)} must be at least {low}")
        if self.against and not self.words and not self.width:
            raise UserError("against names evaluation sets, but words=0 and width=0 look for nothing; set one of them")


@dataclass(frozen=True, kw_only=True)
class Result:
    """What went in, what each stage dropped, what came out."""

    before: Tally
    after: Tally
    dropped: Tally  # of all stages
    sets: Tally | None  # the evaluation sets
    skipped: Sequence[str]  # files that hold no text by their names


def curate(run: Run, asked: Plan) -> Result:
    """Everything, or what is left of it; ends with the texts in run.folder/text and curation.json."""
    need(asked)
    if not asked.data:
        raise UserError("nothing to curate: name folders or files of text with data=")
    tasks, skipped = plan(asked.data, asked.task_bytes)
    job = Job(
        work=run.state,
        text=run.folder / "text",
        tasks=tuple(map(tuple, tasks)),
        filters=asked.filters,
        languages=asked.languages,
        html=asked.html,
        undecodable=asked.undecodable,
        words=asked.words,
        width=asked.width,
        sets=tuple(evaluation_sets(asked.against)),
        near=asked.near,
    )
    if any(piece.kind == "html" for task in tasks for piece in task):
        need(dataclasses.replace(asked, html=True))
    with disk_errors(run.folder):
        for folder in (job.text, *(run.state / name for name in ("done", "kept", "again", "matches", "groups"))):
            folder.mkdir(parents=True, exist_ok=True)
        hold_input(run, job)
        work(run, job, asked.workers)
    return finish(run, job, skipped)


def need(asked: Plan) -> None:
    """A UserError for a library that is asked for and not here."""
    wanted = dict(NEEDED)
    wanted |= {"trafilatura": "html"} if asked.html else {}
    wanted |= {"py3langid": "vlm"} if asked.languages else {}
    for name, extra in wanted.items():
        if importlib.util.find_spec(name) is None:
            raise UserError(f"this curation needs the library {name!r}; {installing(extra)}")


def evaluation_sets(places: Sequence[str]) -> Iterator[tuple[str, tuple[Piece, ...]]]:
    """(a name that can be a file's, pieces) of each set."""
    for number, place in enumerate(places):
        tasks, _ = plan([place], 1 << 40)
        base = Path(place.partition("#")[0]).name.replace(" ", "-").replace(":", "-")
        yield f"{number + 1}-{base}", tuple(piece for task in tasks for piece in task)


def hold_input(run: Run, job: Job) -> None:
    """The text must not change under a curation that is only half done."""
    pieces = [piece for task in (*job.tasks, *(pieces for _, pieces in job.sets)) for piece in task]
    found = [[*piece[:4], piece.start, piece.stop, changed(piece.path)] for piece in pieces]
    path = run.state / "input.json"
    if path.exists() and read_json(path).get("pieces") != found:
        raise UserError(
            f"the text has changed since the curation in {run.folder} began; put it back, or choose another folder with"
            " out= and begin anew"
        )
    write_atomic(path, json.dumps({"pieces": found}))


def changed(path: str) -> list[int]:
    """What is another number once a file has changed; nothing of what is no file."""
    return [os.stat(path).st_size, os.stat(path).st_mtime_ns] if os.path.isfile(path) else []


# ----- tasks ---------------------------------------------------------------------------------------------------------


def stages(job: Job) -> dict[str, int]:
    """How many tasks each stage has, in order."""
    each, near = len(job.tasks), {"sign": len(job.tasks), "match": BUCKETS, "group": 1}
    return (
        ({"index": 1} if job.sets else {}) | {"screen": each, "find": 1} | (near if job.near else {}) | {"write": each}
    )


def marker(run: Run, stage: str, number: int) -> Path:
    return run.state / "done" / f"{stage}-{number:05d}.json"


def work(run: Run, job: Job, workers: int) -> None:
    counts = stages(job)
    todo = {stage: [i for i in range(n) if not marker(run, stage, i).exists()] for stage, n in counts.items()}
    total = sum(counts.values())
    done = total - sum(map(len, todo.values()))
    if done == total:
        return
    with Line(run.metrics, total, done, counts, job) as line, pool(job, workers) as submit:
        if done:
            line.say(f"going on in {run.folder} after {done} of {total} tasks")
        for stage, numbers in todo.items():
            line.stage(stage)
            futures = {submit(task, stage, number): number for number in numbers}
            for future in as_completed(futures):
                found, number = future.result(), futures[future]
                write_atomic(marker(run, stage, number), json.dumps(dataclasses.asdict(found)))
                line({"step": done, "stage": stage, "task": number, "documents": found.documents, "bytes": found.bytes})
                done += 1


def task(stage: str, number: int) -> Tally:
    from nautilus.data.screen import STAGES

    return STAGES[stage](HELD["job"], number)


@contextmanager
def pool(job: Job, workers: int):
    """A function that hands a task to one of the workers. They end with this process, however it ends."""
    context = multiprocessing.get_context("spawn")
    theirs, ours = context.Pipe(duplex=False)
    executor = ProcessPoolExecutor(workers, context, begin, (job, theirs))
    bars = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"  # the workers', which read it when they start
    try:
        yield executor.submit
        executor.shutdown()
    except BrokenProcessPool as bad:
        raise UserError(
            "a worker was killed, perhaps for want of memory; the same command goes on where it stopped; fewer workers="
            " need less memory"
        ) from bad
    finally:
        os.environ.pop("TQDM_DISABLE")
        os.environ |= {} if bars is None else {"TQDM_DISABLE": bars}
        ours.close()
        executor.shutdown(wait=False, cancel_futures=True)


def begin(job: Job, alive) -> None:
    """In a worker: hold the job, keep the library quiet, leave the keyboard to the parent, end when it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        alive.poll(None)  # nothing is ever sent: this returns when the other end is closed
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    HELD["job"] = job
    from datatrove.utils.logging import logger

    logger.remove()


class Line(Progress):
    """The progress of tasks, which cost differently: `screen 12/64  3.1 MB/s  2:38 left`."""

    def __init__(self, path: Path, total: int, start: int, counts: Mapping[str, int], job: Job):
        super().__init__(path, total, start)
        self.counts, self.bytes = counts, sum(piece.size for task in job.tasks for piece in task)
        self.cost = {stage: COST[stage] / count for stage, count in counts.items()}
        ends = [stage for stage, count in counts.items() for _ in range(count)]
        self.order, self.name = ends, ends[start]

    def stage(self, name: str) -> None:
        self.name = name

    def describe(self, done: int, metrics: dict) -> str:
        """`done` counts tasks; stages come one after another, so it says which stage and how much of the cost."""
        here = sum(stage == self.name for stage in self.order[:done])
        spent, whole = (sum(self.cost[stage] for stage in part) for part in (self.order[self.start : done], self.order))
        before = sum(self.cost[stage] for stage in self.order[: self.start])
        rate = spent / max(self.clock() - self.began, 1e-9)
        left = (whole - before - spent) / max(rate, 1e-9)
        speed = f"{rate / whole * self.bytes / 1e6:.3g} MB/s"
        return (
            f"{self.name} {here}/{self.counts[self.name]}  {done}/{self.total} tasks  {speed}  {clock_time(left)} left"
        )


# ----- the end -------------------------------------------------------------------------------------------------------


def finish(run: Run, job: Job, skipped: Sequence[str]) -> Result:
    """Adds up the markers, writes curation.json, and removes what lay in between."""
    counts = stages(job)
    texts = [job.text / f"{number:05d}.jsonl.gz" for number in range(counts["write"])]
    if gone := [path.name for path in texts if not path.exists()]:
        raise UserError(f"{job.text} has lost {', '.join(gone[:5])}; remove the folder {run.folder} and curate anew")
    found = {stage: together(marked(run, stage, count)) for stage, count in counts.items()}
    result = Result(
        before=found["screen"],
        after=found["write"],
        dropped=together([found["screen"], found["write"]]),
        sets=found.get("index"),
        skipped=skipped,
    )
    write_atomic(run.folder / "curation.json", json.dumps(dataclasses.asdict(result), indent=1) + "\n")
    for name in ("kept", "exact", "again", "signatures", "matches", "groups", "ngrams"):
        shutil.rmtree(run.state / name, ignore_errors=True)
    return result


def marked(run: Run, stage: str, count: int) -> Iterator[Tally]:
    return (Tally(**read_json(marker(run, stage, number))) for number in range(count))
