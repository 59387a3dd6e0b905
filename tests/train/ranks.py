"""Processes for the tests of `train/parallel`: gloo on loopback, one torch thread each, ended after a while.

python ranks.py FOLDER SETTINGS      one process's work; its curve goes to FOLDER/rank_<rank>.json
python ranks.py                      a process that has imported all of it, and is told of work: see `Nursery`
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import replace
from pathlib import Path

import nautilus

PATIENCE = 240  # seconds
ALIKE = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(Path(nautilus.__file__).parents[1])}


CLOCK = {"tokens_per_s", "memory_gb"}


def curve_of(folder: Path, rank: int = 0) -> list[dict]:
    """The metrics of every step but those of the clock."""
    lines = json.loads((folder / f"rank_{rank}.json").read_text())
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]


def assert_same_curve(got: list[dict], want: list[dict], rel: float = 1e-5) -> None:
    import pytest

    assert len(got) == len(want) > 0
    for one, other in zip(got, want, strict=True):
        assert one == pytest.approx(other, rel=rel, abs=1e-9)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def together(folder: Path, ranks: int, **settings) -> list[dict]:
    """The curve of `ranks` processes that train together, as the first one saw it; each must end well."""
    folder.mkdir(parents=True, exist_ok=True)
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} | ALIKE
    logs = [folder / f"log_{rank}.txt" for rank in range(ranks)]
    each = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    status = nursery().raised(folder, settings, each, logs)
    assert not any(status), f"{status}\n" + "\n".join(log.read_text()[-2500:] for log in logs)
    curves = [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(ranks)]
    clock = {"tokens_per_s", "memory_gb"}
    plain = [[{k: v for k, v in line.items() if k not in clock} for line in curve] for curve in curves]
    assert all(curve == plain[0] for curve in plain), "ranks report different numbers"
    return plain[0]


class Nursery:
    """A process of which others are forked: what these import takes several times as long as what they do."""

    def __init__(self):
        command = [sys.executable, __file__]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=os.environ | ALIKE, start_new_session=True, **pipes)
        atexit.register(self.end)

    def raised(self, folder: Path, settings: dict, environments: list[dict], logs: list[Path]) -> list[int]:
        """How each ended; one that takes very long is ended."""
        order = {"folder": str(folder), "settings": settings, "environments": environments, "logs": [*map(str, logs)]}
        assert self.process.stdin and self.process.stdout
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


nursery = functools.cache(Nursery)


def forks() -> None:
    """The work of a nursery."""
    import torch._dynamo
    import torch.distributed.checkpoint
    import torch.distributed.fsdp
    import torch.distributed.tensor.parallel  # noqa: F401

    import nautilus.model.lower
    import nautilus.train.checkpoint
    import nautilus.train.parallel.many  # noqa: F401

    for line in sys.stdin:
        order = json.loads(line)
        children = [
            forked(order["folder"], order["settings"], *each)
            for each in zip(order["environments"], order["logs"], strict=True)
        ]
        print(json.dumps(ends(children)), flush=True)


def forked(folder: str, settings: dict, environment: dict, log: str) -> int:
    if child := os.fork():
        return child
    status = 1
    try:
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ |= environment
        work(Path(folder), **settings)
        status = 0
    except SystemExit as end:  # of a rank that others go on without
        if end.code:
            traceback.print_exc()
        else:
            status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ends(children: list[int]) -> list[int]:
    """The exit status of each, minus the signal of one that was killed."""
    found, until = dict[int, int](), time.monotonic() + PATIENCE
    while len(found) < len(children):
        for child in children:
            if child not in found and (done := os.waitpid(child, os.WNOHANG))[0]:
                found[child] = os.waitstatus_to_exitcode(done[1])
        if time.monotonic() > until:
            for child in {*children} - {*found}:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return [found[child] for child in children]


def work(
    folder: Path,
    *,
    layout: dict,
    like: str = "toy",
    compute: str = "float32",
    steps: int = 4,
    rows: int = 4,
    micro: int = 2,
    health: int = 0,
    documents: bool = False,
    state: str = "",
    every: int = 0,
    die: int = -1,
    tied: bool = False,
    roomy: bool = False,
    layers: int = 4,
    depths: int = 2,
    precision: dict | None = None,
    clip: float = 0.5,
    chunk: int = 0,
    checkpointing: bool = False,
    guard: dict | None = None,
    poison: int = -1,
    save: bool = False,
    beside: bool = True,
    held_up: int = 0,
    full: int = -1,
) -> None:
    """Trains a small model like a preset; a roomy one has whole blocks on two ranks. precision, chunk, checkpointing,
    guard: as `nautilus pretrain` has them. die: the last rank kills itself after that step, the first time. poison:
    number of the row whose loss is no number. save: write the model to FOLDER/model at the end. Each rank leaves a
    digest of its embedding, if it has one. beside: states are written while training goes on. held_up: each only after
    so many further steps. full: the rank whose disk is full; what training ends with goes to FOLDER/told_<rank>.txt.
    """
    import torch

    from nautilus.config import Experts, Mamba, PrecisionTable
    from nautilus.data.mix import Stream
    from nautilus.model.language import Language
    from nautilus.model.lower import lower
    from nautilus.presets import preset, shrink
    from nautilus.runtime import Run
    from nautilus.train.checkpoint import Checkpoints
    from nautilus.train.guard import Guard
    from nautilus.train.layout import Layout, Work
    from nautilus.train.loop import fit
    from nautilus.train.objective import pretrain
    from nautilus.train.optim import OptimConfig, adamw, schedule
    from nautilus.train.parallel import start

    torch.set_num_threads(1)
    torch.manual_seed(0)  # the global generator's state is saved too
    config = replace(shrink(preset(like), layers=layers, width=32), vocab=96, tied=tied)
    wide = lambda layer: replace(layer, heads=64 if roomy else 8, groups=4) if isinstance(layer, Mamba) else layer
    shared = lambda layer: replace(layer, shared=64) if roomy and isinstance(layer, Experts) else layer
    config = replace(config, layers=tuple(map(shared, map(wide, config.layers))))
    depths = depths if config.mtp else 0
    ranks = start(Layout(**layout), config, Work(rows=rows, length=24, mtp_depths=depths))
    model = Language(config).initialise(3)
    model.compute = getattr(torch, compute)
    model.chunk, model.checkpointing = chunk, checkpointing
    model = lower(ranks.distribute(model), PrecisionTable(**(precision or {})), seed=11)
    source = {"text": some_rows(config.vocab, documents)}
    stream = Stream(source, rows=rows, micro=micro, seed=1, rank=ranks.row, ranks=ranks.rows)
    optim = OptimConfig(lr=3e-3, min_lr=1e-4, warmup=2)
    run = Run(state) if state else None
    lines = []

    def log(line):
        lines.append(line)
        if line["step"] == die and ranks.index == ranks.size - 1 and not (folder / "died").exists():
            while not (run.state / f"step_{die - die % every:09}").exists():
                time.sleep(0.01)  # it is being written
            (folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    objective = pretrain(mtp_depths=depths, aux_weight=0.01)
    objective = objective if poison < 0 else poisoned(objective, source["text"].tokens[poison])
    disk(lines, held_up, full == ranks.index)
    with contextlib.nullcontext() if full < 0 else told(folder / f"told_{ranks.index}.txt"):
        fit(
            model, stream, objective, adamw(model, optim), steps=steps, schedule=schedule(optim, 20), balance=1e-3,
            clip=clip, health_every=health, ranks=ranks, log=log, guard=Guard(**(guard or {})),
            checkpoints=Checkpoints(run=run, every=every, first=guard is not None, beside=beside) if run else None,
        )  # fmt: skip
    (folder / f"rank_{ranks.index}.json").write_text(json.dumps(lines))
    held = sum(ranks.own(parameter).numel() for parameter in model.parameters())
    (folder / f"held_{ranks.index}.json").write_text(json.dumps(held))
    if model.backbone.embeddings is not None:
        own = ranks.own(model.backbone.embeddings.weight).detach()
        (folder / f"embedding_{ranks.index}.txt").write_text(hashlib.sha256(own.numpy().tobytes()).hexdigest())
    if save:
        ranks.gathered(model).save(folder / "model", precision="fp32")
    elif ranks.size > 1:
        torch.distributed.destroy_process_group()


def disk(lines: list[dict], held_up: int, full: bool) -> None:
    """From now on the states of many ranks are written only when so many further steps have been made; or not at all,
    for want of room."""
    from torch.distributed.checkpoint.filesystem import FileSystem

    from nautilus.train.parallel import many

    usual, stream = many.write_shards, FileSystem.create_stream

    def later(folder, *what):
        until = time.monotonic() + PATIENCE / 4
        step = int(folder.name.removeprefix(".step_").partition(".")[0])
        while threading.current_thread() is not threading.main_thread() and len(lines) < step + held_up:
            assert time.monotonic() < until, "the training waits"
            time.sleep(0.001)
        usual(folder, *what)

    def no_room(self, path, mode):
        if mode == "wb":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return stream(self, path, mode)

    if held_up:
        many.write_shards = later
    if full:
        FileSystem.create_stream = no_room


@contextlib.contextmanager
def told(file: Path):
    """What ends the training is written down, and expected."""
    from nautilus.runtime import UserError

    try:
        yield
    except UserError as bad:
        file.write_text(str(bad))


def poisoned(objective, row_T):
    """The objective, whose loss is no number where this row is part of the batch; of a row dealt out, its beginning."""

    def terms(model, batch):
        found, metrics = objective.terms(model, batch)
        if "next_token" not in found:  # an early stage of a pipeline
            return found, metrics
        total, count = found["next_token"]
        bad = (batch.tokens[:, :10] == row_T[:10]).all(1).any()
        return found | {"next_token": (total * float("nan") if bad else total, count)}, metrics

    return replace(objective, terms=terms)


def some_rows(vocab: int, documents: bool):
    """32 rows of 24 random tokens; with `documents` of several, some of them with padding."""
    import torch

    from nautilus.data.batch import Batch

    g = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, vocab, (32, 24), generator=g)
    weight = torch.rand(32, 24, generator=g).mul(4).round() / 4
    document = None
    if documents:
        document = (torch.rand(32, 24, generator=g) < 0.15).long().cumsum(1) + 1
        document[::3, 20:] = 0
        weight[:, 1:][document[:, 1:] != document[:, :-1]] = 0
        weight[document == 0] = 0
    weight[:, 0] = 0
    return Batch(tokens, {"next_token": weight}, document=document)


if __name__ == "__main__":
    work(Path(sys.argv[1]), **json.loads(sys.argv[2])) if sys.argv[1:] else forks()
