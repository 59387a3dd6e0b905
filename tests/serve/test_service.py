"""Many jobs from an event loop to one engine."""

import asyncio
import functools
import random

import pytest
import torch

from nautilus.model.language import Language
from nautilus.runtime import UserError
from nautilus.serve import Engine, Sampling
from nautilus.serve.job import Busy, Draining, Job
from nautilus.serve.service import Service
from tests.serve.test_scheduler import MODEL, TOKENIZER, VOCAB, assert_nothing_is_held, facts

torch.set_num_threads(1)
SHORT = Sampling(max_tokens=8)


def inside_a_loop(test):
    @functools.wraps(test)
    def run(*args, **named):
        asyncio.run(asyncio.wait_for(test(*args, **named), 60))

    return run


async def text_of(reply):
    return [piece.token async for pieces in reply for piece in pieces]


def service_of(*, rows=4, **limits):
    return Service(Engine(MODEL, TOKENIZER, max_tokens=96, rows=rows, step_seconds=0.01), **limits)


async def ended(service):
    await service.close()
    assert not service.thread.is_alive()
    assert_nothing_is_held(service.engine)


@inside_a_loop
async def test_each_of_many_gets_what_it_gets_alone():
    draw, service = random.Random(1), service_of()
    jobs = [Job(tokens=[draw.randrange(VOCAB)] * draw.randint(1, 40), sampling=SHORT) for _ in range(20)]
    replies = await asyncio.gather(*(text_of(service.submit(job)) for job in jobs))
    for job, tokens in zip(jobs, replies, strict=True):
        alone = Engine(MODEL, TOKENIZER, max_tokens=96).generate([list(job.tokens)], SHORT)[0]
        assert tuple(tokens) == facts(alone)[0]
    assert service.load().running == service.load().waiting == 0 and not service.replies and not service.queued
    await ended(service)


@inside_a_loop
async def test_an_answer_that_is_left_is_cancelled_and_its_memory_free():
    service = service_of(rows=1)
    endless = service.submit(Job(tokens=[1, 2], sampling=Sampling(max_tokens=90)))
    assert await anext(endless)
    other = service.submit(Job(tokens=[3], sampling=SHORT))
    await endless.aclose()
    assert len(await text_of(other)) == 8
    assert endless.request.pieces[-1].finish_reason == "cancelled"
    await ended(service)


@inside_a_loop
async def test_too_many_are_refused_with_a_time_to_come_again():
    service = service_of(rows=1, most_waiting=2)
    replies = [service.submit(Job(tokens=[1], sampling=SHORT)) for _ in range(3)]
    with pytest.raises(Busy, match="3 requests of 3 tokens wait already, and at most 2") as refused:
        service.submit(Job(tokens=[1], sampling=SHORT))
    assert 1 <= refused.value.retry_after <= 60
    await asyncio.gather(*map(text_of, replies))
    assert len(await text_of(service.submit(Job(tokens=[1], sampling=SHORT)))) == 8
    await ended(service)


@inside_a_loop
async def test_many_tokens_are_refused_too_but_never_the_first():
    service = service_of(rows=1, most_waiting_tokens=20)
    first = service.submit(Job(tokens=[1] * 30, sampling=SHORT))
    with pytest.raises(Busy, match="20 may"):
        service.submit(Job(tokens=[1], sampling=SHORT))
    await text_of(first)
    await ended(service)


@inside_a_loop
async def test_a_bad_job_is_refused_at_once():
    service = service_of()
    with pytest.raises(UserError, match=f"token {VOCAB}, the model knows"):
        service.submit(Job(tokens=[VOCAB]))
    with pytest.raises(UserError, match="0 tokens"):
        service.submit(Job(tokens=[]))
    assert not service.replies
    await ended(service)


@inside_a_loop
async def test_a_step_that_fails_ends_those_that_took_part_twice_and_no_other(monkeypatch):
    service = service_of(rows=1)
    compute, refused = service.engine.forward.step, []

    def fail(*args):
        if first.request in service.engine.scheduler.active:
            refused.append(args)
            raise RuntimeError("a layer broke")
        return compute(*args)

    monkeypatch.setattr(service.engine.forward, "step", fail)
    first, second = (service.submit(Job(tokens=[1, 2], sampling=SHORT)) for _ in range(2))
    with pytest.raises(RuntimeError, match="the engine failed at this request"):
        await text_of(first)
    assert len(await text_of(second)) == 8 and service.ready and len(refused) == 2
    await ended(service)


@inside_a_loop
async def test_a_service_that_drains_takes_nothing_new_and_ends_what_it_has():
    service = service_of()
    reply = service.submit(Job(tokens=[1], sampling=SHORT))
    draining = asyncio.create_task(service.drain(30))
    await asyncio.sleep(0)
    with pytest.raises(Draining, match="stopping"):
        service.submit(Job(tokens=[1]))
    assert len(await text_of(reply)) == 8 and await draining
    await ended(service)


@inside_a_loop
async def test_what_does_not_end_in_time_is_cancelled():
    service = service_of()
    reply = service.submit(Job(tokens=[1], sampling=Sampling(max_tokens=90)))
    assert not await service.drain(0)
    assert [piece.finish_reason async for pieces in reply for piece in pieces][-1] == "cancelled"
    await ended(service)


@inside_a_loop
async def test_closing_ends_all_at_once():
    service = service_of(rows=1)
    replies = [service.submit(Job(tokens=[1], sampling=Sampling(max_tokens=90))) for _ in range(3)]
    await service.close()
    for reply in replies:
        assert [piece.finish_reason async for pieces in reply for piece in pieces][-1] == "cancelled"
    assert_nothing_is_held(service.engine)


@inside_a_loop
async def test_a_prompt_is_warmed_in_idle_time_and_gives_way_to_a_request():
    service = Service(Engine(MODEL, TOKENIZER, max_tokens=300, chunk=8, step_seconds=0.0, saved_gb=1e-2))
    long, short = [1, 2, 3, 4] * 50, [5, 6, 7, 8] * 5
    service.warm(Job(tokens=long, marks=(200,)))
    service.warm(Job(tokens=short, marks=(20,)))
    service.warm(Job(tokens=[]))  # which cannot be
    reply = service.submit(Job(tokens=[9], sampling=SHORT))
    assert len(await text_of(reply)) == 8
    while service.warming or not service.engine.scheduler.idle:
        await asyncio.sleep(0.01)
    found = service.submit(Job(tokens=[*short, 1], sampling=SHORT))
    await text_of(found)
    assert found.cached_tokens == 20
    await service.close()


@inside_a_loop
async def test_a_request_that_goes_on_from_what_is_warmed_waits_for_it():
    service = Service(Engine(MODEL, TOKENIZER, max_tokens=300, chunk=8, step_seconds=0.0, saved_gb=1e-2))
    long = [1, 2, 3, 4] * 50
    service.warm(Job(tokens=long, marks=(200,)))
    while not any(one.berth and one.berth.length > 8 for one in service.engine.scheduler.active):
        await asyncio.sleep(0)
    goes_on = service.submit(Job(tokens=[*long, 5], sampling=SHORT))
    await text_of(goes_on)
    assert goes_on.cached_tokens == 200
    await service.close()


@inside_a_loop
async def test_weights_change_between_two_steps_and_answers_under_way_go_on():
    old, new = Language(MODEL.config).initialise(8), Language(MODEL.config).initialise(9)
    model = Language(MODEL.config).initialise(8).requires_grad_(False)
    service = Service(Engine(model, TOKENIZER, max_tokens=96))
    under_way = service.submit(Job(tokens=[1, 2], sampling=Sampling(max_tokens=90)))
    told = await anext(under_way)
    await service.update(new.state_dict())
    with pytest.raises(UserError, match="names none so"):
        await service.update({"nothing": torch.zeros(1)})
    later = await text_of(service.submit(Job(tokens=[3, 4], sampling=SHORT)))
    told += [piece async for pieces in under_way for piece in pieces]
    assert len(told) == 90 and told[-1].finish_reason == "length"
    assert told[0].logprob == Engine(old, TOKENIZER).generate([[1, 2]], SHORT)[0].logprobs[0]
    assert tuple(later) == Engine(new, TOKENIZER).generate([[3, 4]], SHORT)[0].tokens
    await service.close()
    with pytest.raises(Draining, match="has stopped"):
        await service.update(new.state_dict())
