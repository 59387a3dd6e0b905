"""Training in few bits: it learns, it is resumed bit for bit, it is watched, and a switch back is what it says."""

import pytest
import torch

from nautilus.config import PrecisionTable
from nautilus.model.lower import lower
from nautilus.runtime import Run, UserError
from nautilus.train.checkpoint import Checkpoints
from nautilus.train.loop import fit
from nautilus.train.objective import next_token
from nautilus.train.optim import OptimConfig, adamw

NVFP4 = PrecisionTable(format="nvfp4", last_layers=1)


class Rows:
    """Always the same batches, in turn, with a position that can be saved."""

    def __init__(self, batches):
        self.batches, self.at = batches, 0

    def __iter__(self):
        while True:
            self.at += 1
            yield self.batches[self.at % len(self.batches)]

    def state(self):
        return {"at": self.at}

    def restore(self, state):
        self.at = state["at"]


@pytest.fixture
def train(small_model, random_rows):
    def run(table, steps, *, folder=None, pieces=1, health=0, seed=7):
        model = small_model(pattern_layers=4)
        model.compute = torch.bfloat16
        lower(model, table, seed=seed)
        batches = [[random_rows(4, 24, seed=10 * i + j) for j in range(pieces)] for i in range(2)]
        lines = []
        kept = None if folder is None else Checkpoints(run=folder, every=2)
        fit(model, Rows(batches), next_token, adamw(model, OptimConfig(lr=3e-3)), steps=steps, checkpoints=kept,
            health_every=health, log=lines.append)  # fmt: skip
        return model, lines

    return run


def losses(lines):
    return [line["loss"] for line in lines]


@pytest.mark.parametrize("format", ["nvfp4", "mxfp8"])
def test_it_learns_almost_as_bf16_does(train, format):
    _, low = train(PrecisionTable(format=format, last_layers=1), 40)
    _, plain = train(PrecisionTable(), 40)
    fell = plain[0]["loss"] - plain[-1]["loss"]
    assert fell > 0.5 and low[0]["loss"] - low[-1]["loss"] > 0.9 * fell
    assert losses(low) != losses(plain)


@pytest.mark.parametrize("pieces", [1, 2])
def test_stopping_and_resuming_changes_no_bit(train, tmp_path, pieces):
    whole, lines = train(NVFP4, 5, pieces=pieces)
    folder = Run.create(tmp_path / "run", {})
    train(NVFP4, 2, folder=folder, pieces=pieces)
    resumed, rest = train(NVFP4, 5, folder=Run.open(tmp_path / "run"), pieces=pieces)
    assert losses(rest) == losses(lines)[2:]
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_every_step_and_micro_batch_has_its_own_address(small_model, random_rows):
    model = lower(small_model(), NVFP4)
    seen = []

    def objective(model, batch):
        seen.append((model.lowered.step, model.lowered.row))
        return next_token(model, batch)

    batches = [random_rows(rows, 23, seed=rows) for rows in (1, 2, 3)]  # 23, 46 and 69 tokens
    fit(model, Rows([batches]), objective, adamw(model, OptimConfig()), steps=2)
    assert seen == [(step, row) for step in (0, 1) for row in (0, 32, 80)]


def test_another_table_or_seed_refuses_to_resume(train, tmp_path):
    folder = Run.create(tmp_path / "run", {})
    train(NVFP4, 2, folder=folder)
    with pytest.raises(UserError, match="precision"):
        train(PrecisionTable(format="mxfp8", last_layers=1), 3, folder=Run.open(tmp_path / "run"))
    with pytest.raises(UserError, match="seed"):
        train(NVFP4, 3, folder=Run.open(tmp_path / "run"), seed=8)


def test_bf16_from_a_token_on(train):
    """4 x 24 tokens a step: the first two steps in few bits, then none."""
    table = PrecisionTable(format="nvfp4", last_layers=1, schedule=("192:bf16",))
    model, lines = train(table, 4)
    assert model.lowered.recipe == "bf16"
    assert losses(lines)[:2] == losses(train(NVFP4, 2)[1])
    assert losses(lines)[:3] != losses(train(NVFP4, 3)[1])


def test_health_says_what_few_bits_made_zero(train):
    _, lines = train(NVFP4, 3, health=2)
    watched = [{n for n in line if n.startswith("flush.")} for line in lines]
    assert watched[0] and watched[0] == watched[2] and not watched[1]
    assert {"flush.mamba.in_proj.dy", "flush.experts.up.x", "zero_grad.experts.up_proj"} <= lines[0].keys()
