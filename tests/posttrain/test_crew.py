"""Who plays: versions of weights, experts, and processes that die."""

import asyncio
import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nautilus.config import Attention, Config, Experts, lay
from nautilus.data.template import template_text
from nautilus.data.tokenizer import SMALLEST, Tokenizer, train_tokenizer
from nautilus.model.language import Language
from nautilus.ops.cpu.library import native
from nautilus.posttrain.crew import Here
from nautilus.posttrain.rollout import Playing
from nautilus.posttrain.stream import batches_of
from nautilus.tasks.named import TASKS
from nautilus.train.replay import routes_of
from tests.serve.draft.test_policy import make_cheap

LAYERS = lay("*E", Attention(heads=2, groups=1, head_width=16), Experts(experts=4, active=2, hidden=16))
TASK = TASKS["count"]()
PROBLEMS = [next(TASK.problems("train", level=3, seed=seed)) for seed in range(4)]
ROOT = Path(__file__).parents[2]
PLAYING = Playing(tokens=200, turn_tokens=24, thinking=None)


def words():
    plain = train_tokenizer([], vocab=SMALLEST)
    return Tokenizer(plain.core, bos="<s>", eos="<|im_end|>", template=template_text("glued"))


@pytest.fixture(scope="module")
def tokenizer():
    return words()


def tiny(tokenizer, seed=0):
    model = Language(Config(vocab=tokenizer.vocab, width=16, layers=LAYERS)).initialise(seed).requires_grad_(False)
    model.lm_head.weight.data *= 20
    return model.eval()


def other_weights(tokenizer):
    return tiny(tokenizer, 9).state_dict()


def test_every_token_has_the_version_of_the_weights_that_drew_it(tokenizer):
    async def played():
        crew = Here(tiny(tokenizer), tokenizer, PLAYING, rows=4, version=3)
        try:
            first = await crew.play(TASK, PROBLEMS[0], 3, 1)
            under_way = asyncio.create_task(crew.play(TASK, PROBLEMS[1], 16, 2))
            await asyncio.sleep(0.02)
            await crew.update(other_weights(tokenizer), 4)
            return first, await under_way, await crew.play(TASK, PROBLEMS[0], 3, 1)
        finally:
            await crew.close()

    first, between, last = asyncio.run(played())
    assert {one.version for one in first.rollouts} == {3} and {one.version for one in last.rollouts} == {4}
    assert [one.tokens for one in first.rollouts] != [one.tokens for one in last.rollouts]
    for one in (*first.rollouts, *between.rollouts, *last.rollouts):
        assert len(one.versions) == len(one.logprobs) == len(one.tokens)
        assert all((version >= 0) == drawn for version, drawn in zip(one.versions, one.drawn, strict=True))
        known = [version for version in one.versions if version >= 0]
        assert known == sorted(known) and {*known} <= {3, 4}
    assert any(one.newest == 4 for one in between.rollouts), "answers under way go on with the new weights"


@pytest.mark.skipif(native().functions is None, reason="torch adds in another order in other chunks")
def test_drafts_change_no_answer(tokenizer):
    """By a block of the model that drafts as badly as random weights do, and by copies; weights change between."""
    config = Config(vocab=tokenizer.vocab, width=16, layers=LAYERS, mtp=LAYERS)
    models = [Language(config).initialise(seed).requires_grad_(False).eval() for seed in (0, 9)]
    for model in models:
        model.lm_head.weight.data *= 20

    async def played(drafts):
        crew = Here(copy.deepcopy(models[0]), tokenizer, replace(PLAYING, drafts=drafts), rows=4)
        if speculation := crew.engine.speculation:
            make_cheap(speculation)
        try:
            before = [await crew.play(TASK, problem, 4, seed) for seed, problem in enumerate(PROBLEMS)]
            await crew.update(models[1].state_dict(), 1)
            after = [await crew.play(TASK, problem, 4, seed) for seed, problem in enumerate(PROBLEMS)]
        finally:
            await crew.close()
        tried = sum(one.drafted for one in speculation.counts.values()) if speculation else 0
        return [(one.tokens, one.logprobs, one.versions) for group in before + after for one in group.rollouts], tried

    plain, none = asyncio.run(played(0))
    drafted, tried = asyncio.run(played(6))
    assert drafted == plain and tried and not none


def test_experts_are_kept_where_they_are_asked_for(tokenizer):
    model = tiny(tokenizer)

    async def played(routes):
        crew = Here(model, tokenizer, Playing(tokens=200, turn_tokens=8, thinking=None, routes=routes), rows=4)
        try:
            return await crew.play(TASK, PROBLEMS[0], 2, 1)
        finally:
            await crew.close()

    group = asyncio.run(played(True))
    for one in group.rollouts:
        assert torch.equal(one.routes, routes_of(model, torch.tensor([one.tokens]))[0])
    (batch,) = batches_of([(one, 1.0) for one in group.rollouts], tokens=10_000, pad=0)
    assert batch.routes.shape == (*batch.tokens.shape, 1, 2)
    longest = max(len(one.tokens) for one in group.rollouts)
    for one in batch.routes:
        assert bool((one[:longest] >= -1).all())
    assert all(one.routes is None for one in asyncio.run(played(False)).rollouts)


def test_processes_play_as_this_one_does_and_one_that_dies_costs_what_it_was_at():
    """In a process of its own, as Ray reads the environment when it is imported."""
    done = subprocess.run([sys.executable, "-m", "tests.posttrain.actors"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["same"] and found["whole"] == [2] * 4
    assert found["lost"] in (2, 4) and found["replaced"] == 1
    assert found["later"] == [1, 1], "the one in its place has the newest weights"
