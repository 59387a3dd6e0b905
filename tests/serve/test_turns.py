"""An engine in the event loop itself: the answers of one in a thread, and no reader that waits for ever."""

import asyncio
import random

import pytest
import torch

from nautilus.serve import Engine, Sampling
from nautilus.serve.job import Draining, Job
from nautilus.serve.turns import Turns
from tests.serve.test_scheduler import MODEL, TOKENIZER, VOCAB, assert_nothing_is_held, facts
from tests.serve.test_service import SHORT, inside_a_loop, text_of

torch.set_num_threads(1)


def turns_of(*, rows=4):
    return Turns(Engine(MODEL, TOKENIZER, max_tokens=96, rows=rows))


@inside_a_loop
async def test_each_of_many_gets_what_it_gets_alone_also_after_a_pause():
    draw, service = random.Random(2), turns_of()
    for _ in range(2):
        jobs = [Job(tokens=[draw.randrange(VOCAB)] * draw.randint(1, 40), sampling=SHORT) for _ in range(9)]
        replies = await asyncio.gather(*(text_of(service.submit(job)) for job in jobs))
        for job, tokens in zip(jobs, replies, strict=True):
            alone = Engine(MODEL, TOKENIZER, max_tokens=96).generate([list(job.tokens)], SHORT)[0]
            assert tuple(tokens) == facts(alone)[0]
        await asyncio.sleep(0.01)
    assert not service.replies and not service.queued
    await service.close()
    assert_nothing_is_held(service.engine)


@inside_a_loop
async def test_the_loop_goes_on_between_two_steps():
    service, seen = turns_of(), []
    answer = asyncio.create_task(text_of(service.submit(Job(tokens=[1, 2], sampling=Sampling(max_tokens=60)))))
    while not answer.done():
        seen.append(service.steps)
        await asyncio.sleep(0)
    assert len({*seen}) > 20
    await service.close()


@inside_a_loop
async def test_an_engine_that_fails_ends_every_answer_and_takes_nothing_new(monkeypatch):
    service = turns_of()
    monkeypatch.setattr(service.engine, "step", lambda: 1 / 0)
    with pytest.raises(RuntimeError, match="engine failed"):
        await text_of(service.submit(Job(tokens=[1, 2], sampling=SHORT)))
    with pytest.raises(Draining):
        service.submit(Job(tokens=[3], sampling=SHORT))
    await service.close()


@inside_a_loop
async def test_closing_ends_what_is_under_way():
    service = turns_of(rows=1)
    replies = [service.submit(Job(tokens=[1, number], sampling=Sampling(max_tokens=90))) for number in range(3)]
    waiting = [asyncio.create_task(text_of(reply)) for reply in replies]
    await asyncio.sleep(0.01)
    await service.close()
    await asyncio.gather(*waiting)
    assert all(reply.over for reply in replies)
    assert_nothing_is_held(service.engine)
