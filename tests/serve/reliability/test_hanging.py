"""An engine that hangs or fails as a whole: nothing new is taken, and nobody waits for ever."""

import asyncio
import functools
import logging
import threading

import pytest

from nautilus.serve import Sampling
from nautilus.serve.job import Draining, Job
from nautilus.serve.service import Service
from tests.serve.reliability.parts import Oracle, audit, engine_of, hybrid

MODEL = hybrid()
ORACLE = Oracle(MODEL)
HOW = Sampling(seed=5, max_tokens=12, ignore_eos=True)
PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]


def inside_a_loop(test):
    @functools.wraps(test)
    def run(*args, **named):
        asyncio.run(asyncio.wait_for(test(*args, **named), 120))

    return run


async def tokens_of(reply):
    return tuple([piece.token async for pieces in reply for piece in pieces])


async def until(holds):
    while not holds():
        await asyncio.sleep(0.01)


@inside_a_loop
async def test_a_step_that_hangs_is_told_and_nothing_new_is_taken_until_it_ends(monkeypatch, caplog):
    service, hangs, may_go = Service(engine_of(MODEL), step_limit=60), threading.Event(), threading.Event()
    compute = service.engine.forward.step

    def hang(*args):
        hangs.set()
        may_go.wait(60)
        return compute(*args)

    monkeypatch.setattr(service.engine.forward, "step", hang)
    replies = [asyncio.ensure_future(tokens_of(service.submit(Job(tokens=p, sampling=HOW)))) for p in PROMPTS]
    await until(hangs.is_set)
    assert service.ready
    service.watchdog.limit = 0.01  # not before: on a busy machine any step may take long
    await until(lambda: "may_go.wait" in caplog.text)  # where it hangs
    assert "a step has taken more than 0.01 seconds" in caplog.text and "thread engine:" in caplog.text
    assert not service.ready and service.broken is None
    with pytest.raises(Draining, match="the engine has stopped"):
        service.submit(Job(tokens=[1], sampling=HOW))
    service.watchdog.limit = 60
    may_go.set()
    got = await asyncio.gather(*replies)
    assert got == [ORACLE.answer(prompt, HOW).tokens for prompt in PROMPTS]
    assert service.ready
    await until(lambda: "has ended" in caplog.text)
    assert caplog.text.count("may_go.wait") == 1
    await service.close()
    assert audit(service.engine) == []


@inside_a_loop
async def test_a_server_ends_although_its_engine_hangs(monkeypatch, caplog):
    service, hangs, may_go = Service(engine_of(MODEL)), threading.Event(), threading.Event()
    monkeypatch.setattr(service.engine.forward, "read", lambda *_, **__: (hangs.set(), may_go.wait(60)))
    reply = service.submit(Job(tokens=[1, 2], sampling=HOW))
    await until(hangs.is_set)
    assert not await service.drain(0.05)
    await service.close(0.1)
    assert service.thread.is_alive() and "left behind" in caplog.text
    may_go.set()
    await asyncio.to_thread(service.thread.join)
    await reply.aclose()


def raising(*_, **__):
    raise ValueError("what nobody thought of")


@pytest.mark.parametrize("owner, name", [("engine", "admit"), ("engine", "submit"), ("scheduler", "running")])
@inside_a_loop
async def test_what_is_no_request_s_fault_ends_all_and_is_told(monkeypatch, caplog, owner, name):
    caplog.set_level(logging.CRITICAL + 1, "nautilus.serve")
    service = Service(engine_of(MODEL))
    first = service.submit(Job(tokens=[1, 2], sampling=Sampling(max_tokens=300, ignore_eos=True)))
    await anext(first)
    monkeypatch.setattr(service.engine if owner == "engine" else service.engine.scheduler, name, raising)
    others = [service.submit(Job(tokens=prompt, sampling=HOW)) for prompt in PROMPTS]
    for reply in (first, *others):
        with pytest.raises(RuntimeError, match="the engine failed"):
            await tokens_of(reply)
    assert isinstance(service.broken, ValueError) and not service.ready
    with pytest.raises(Draining, match="the engine has stopped"):
        service.submit(Job(tokens=[1], sampling=HOW))
    assert not service.replies and not service.queued and service.load().running == service.load().waiting == 0
    assert await service.drain(5)
    await service.close()
    assert audit(service.engine) == []


@inside_a_loop
async def test_a_fault_in_idle_time_is_told_too(monkeypatch, caplog):
    caplog.set_level(logging.CRITICAL + 1, "nautilus.serve")
    service = Service(engine_of(MODEL))
    monkeypatch.setattr(service.engine.prefixes, "spill", raising)
    service.order(lambda: None)
    await until(lambda: service.broken is not None)
    assert not service.ready
    await service.close()
