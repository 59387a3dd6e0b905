"""Who plays: versions of weights, experts, and processes that die or hang."""

import asyncio
import copy
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nautilus.config import Attention, Config, Experts, lay
from nautilus.data.template import template_text
from nautilus.data.tokenizer import SMALLEST, Tokenizer, train_tokenizer
from nautilus.model.language import Language
from nautilus.ops.cpu.library import native
from nautilus.posttrain.blend import Blend, domain
from nautilus.posttrain.crew import Actors, Here
from nautilus.posttrain.onpolicy import Ahead, Fresh, Plan
from nautilus.posttrain.rollout import Playing
from nautilus.posttrain.stream import batches_of, checked, told_of
from nautilus.runtime import UserError
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


class Dead(Exception):
    """As Ray tells that a process has died."""


class Full(Exception):
    """That it was ended as memory was short."""


class Process:
    """What Ray makes of an actor, here in this process; fate: what becomes of it, or a problem that kills it."""

    def __init__(self, actor, fate):
        self.actor, self.fate, self.killed = actor, fate, asyncio.Event()
        for name in ("play", "update", "alive"):
            setattr(self, name, SimpleNamespace(remote=partial(self.call, name)))

    async def call(self, name, *given):
        """Of one that is dead, or dies meanwhile, as Ray says so."""
        done, under_way = await asyncio.wait(
            [asyncio.ensure_future(self.done(name, *given)), asyncio.ensure_future(self.killed.wait())],
            return_when=asyncio.FIRST_COMPLETED,
        )
        for one in under_way:
            one.cancel()
        if self.killed.is_set():
            raise Full("of memory") if self.fate == "fills" else Dead("by a signal\nand so on")
        return done.pop().result()

    async def done(self, name, *given):
        if self.fate in ("dies", "fills") or (name == "play" and given[1] is self.fate):
            self.killed.set()
        if self.fate == "hangs" or self.killed.is_set():
            await asyncio.Event().wait()
        if self.fate == "slow" and name == "play":
            await asyncio.sleep(0.5)
        return await getattr(self.actor, name)(*given)


class Ray:
    """As much of the library as `Actors` uses. fates: of its processes, in the order in which they are started; those
    after them are well."""

    exceptions = SimpleNamespace(RayActorError=Dead, OutOfMemoryError=Full)

    def __init__(self, *fates):
        self.fates, self.processes = [*fates], []

    def remote(self, **how):
        return lambda kind: SimpleNamespace(remote=partial(self.start, kind))

    def start(self, kind, *given):
        self.processes.append(Process(kind(*given), self.fates.pop(0) if self.fates else "well"))
        return self.processes[-1]

    def put(self, value):
        return value

    def get(self, value):
        return value

    def kill(self, process):
        process.killed.set()

    def cluster_resources(self):
        return {"CPU": 2}


async def all_played(crew):
    try:
        return await asyncio.gather(*(crew.play(TASK, one, 2, seed) for seed, one in enumerate(PROBLEMS)))
    finally:
        await crew.close()


def drawn_by(groups):
    return [(one.tokens, one.logprobs, one.versions) for group in groups for one in group.rollouts]


def acted(tokenizer, ray, count=1, **how):
    """What so many processes play, and who they are."""

    async def played():
        crew = Actors(ray, count, tiny(tokenizer), tokenizer, PLAYING, rows=4, silence=0.1, **how)
        return await all_played(crew), crew

    return asyncio.run(played())


async def played_here(tokenizer):
    return await all_played(Here(tiny(tokenizer), tokenizer, PLAYING, rows=4))


@pytest.mark.parametrize("fate", ["dies", "fills", "hangs"])
def test_a_process_that_is_gone_costs_its_own_rollouts_and_another_draws_the_same(tokenizer, fate):
    ray = Ray(fate)
    groups, crew = acted(tokenizer, ray)
    assert drawn_by(groups) == drawn_by(asyncio.run(played_here(tokenizer)))
    assert [group.lost for group in groups] == [Counter(actor=2)] * 4 and told_of(groups)["lost"] == (8, 16)
    assert crew.lost == 1 and [one.killed.is_set() for one in ray.processes] == [True, True], "before the end, the one"
    why = {"dies": "died: by a signal", "fills": "died: of memory", "hangs": "gave no sign of life"}[fate]
    assert {group.why["actor"] for group in groups} == {f"process 0 of Ray {why}"}
    more = [replace(groups[0], lost=groups[0].lost + Counter(time=3)), *groups[1:]]
    assert checked(more) == more, "though more is counted as lost than was drawn"


def test_processes_that_die_again_and_again_end_the_training(tokenizer):
    groups, _ = acted(tokenizer, Ray(*["dies"] * 9))
    assert not drawn_by(groups)
    with pytest.raises(UserError, match=r"8 of 8 rollouts .*\(8 to actor: process 0 of Ray died: by a signal\)"):
        checked(groups)


def test_where_one_process_dies_again_and_again_the_other_draws_all(tokenizer):
    groups, crew = acted(tokenizer, Ray("well", *["dies"] * 9), 2)
    assert drawn_by(groups) == drawn_by(asyncio.run(played_here(tokenizer)))
    assert crew.lost == 1 and sum((group.lost for group in groups), Counter()) == {"actor": 4}


@pytest.mark.parametrize("count", [1, 2])
def test_a_problem_that_kills_whoever_plays_it_is_lost_and_no_other_with_it(tokenizer, count):
    groups, crew = acted(tokenizer, Ray(*[PROBLEMS[2]] * 9), count)
    assert not groups[2].rollouts and groups[2].lost == {"actor": 2} and crew.lost == 3
    others = [group for group in asyncio.run(played_here(tokenizer)) if group.problem is not PROBLEMS[2]]
    assert drawn_by(groups) == drawn_by(others) and checked(groups) == groups


def test_who_is_slow_but_gives_a_sign_of_life_is_waited_for(tokenizer):
    groups, crew = acted(tokenizer, Ray("slow"))
    assert crew.lost == 0 and len(drawn_by(groups)) == 8 and not any(group.lost for group in groups)


@pytest.mark.parametrize("fate", ["dies", "hangs"])
def test_one_that_is_gone_when_new_weights_come_is_replaced_by_one_that_has_them(tokenizer, fate):
    async def played():
        ray = Ray(fate)
        crew = Actors(ray, 1, tiny(tokenizer), tokenizer, PLAYING, rows=4, silence=0.1)
        await crew.update(other_weights(tokenizer), 5)
        return await all_played(crew), crew.lost

    groups, lost = asyncio.run(played())
    assert lost == 1 and {one.version for group in groups for one in group.rollouts} == {5}
    assert not any(group.lost for group in groups)


@pytest.mark.parametrize("kind", [Fresh, Ahead])
def test_processes_of_a_training_that_goes_on_know_the_version_of_their_weights(tokenizer, kind):
    model, seen = tiny(tokenizer), []
    plan = Plan(blend=Blend(domains=[domain(TASK, 8)], prompts=2, steps=9), group=2)
    make = lambda version: Actors(Ray(), 1, model, tokenizer, PLAYING, rows=4, version=version)
    stream = kind(model, plan, make, lambda groups: [groups], lambda step, groups: seen.append((step, groups)))
    stream.restore({"step": 7})
    try:
        next(stream)
    finally:
        stream.close()
    ((step, groups),) = seen
    assert step == 7 and {one.version for group in groups for one in group.rollouts} == {7}


def test_processes_play_as_this_one_does_and_one_that_dies_costs_what_it_was_at():
    """In a process of its own, as Ray reads the environment when it is imported."""
    done = subprocess.run([sys.executable, "-m", "tests.posttrain.actors"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["same"] and found["replaced"] == 1
    assert found["lost"] in (2, 4) and found["again"], "others have drawn what was lost, and the same"
    assert found["later"] == [1, 1], "the one in its place has the newest weights"
