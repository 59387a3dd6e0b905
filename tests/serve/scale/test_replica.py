"""A replica and its router in this process, with what would travel between processes pickled as Ray does it."""

import asyncio
import dataclasses
import functools
from types import SimpleNamespace

import pytest

from nautilus.data.tokenizer import SMALLEST, train_tokenizer
from nautilus.model.language import Language
from nautilus.presets import preset, shrink
from nautilus.serve import Engine, Sampling
from nautilus.serve.grammar import compile_grammar
from nautilus.serve.job import Job
from nautilus.serve.scale.routes import Known
from tests.serve.test_prefixes import engine_of
from tests.serve.test_scheduler import VOCAB

pytest.importorskip("ray.serve")

from ray import cloudpickle

from nautilus.serve.scale import replica, router
from nautilus.serve.scale.replica import Replica
from nautilus.serve.scale.router import PrefixRouter

LONG = Sampling(max_tokens=200, temperature=0, ignore_eos=True)


def make(rank, **limits):
    assert rank == 3
    return engine_of(**limits)


@pytest.fixture
def asked(monkeypatch):
    """asked(work): what the coroutine gives of a replica, which comes and goes with it."""
    context = SimpleNamespace(rank=SimpleNamespace(rank=3))
    monkeypatch.setattr(replica.serve, "get_replica_context", lambda: context)

    async def run(work, limits):
        one = Replica(functools.partial(make, rows=2, **limits))
        try:
            return await work(one)
        finally:
            await one.service.close()

    return lambda work, **limits: asyncio.run(run(work, limits))


def travelled(value):
    return cloudpickle.loads(cloudpickle.dumps(value))


def test_an_answer_in_parts_is_that_of_the_engine(asked):
    job = Job(tokens=[*range(1, 40)], sampling=Sampling(max_tokens=20, temperature=0), marks=(16,), tenant="x")

    async def work(one):
        return [travelled(part) async for part in one.answer(travelled(job), [])]

    parts, (alone,) = asked(work), engine_of().generate([job.tokens], job.sampling)
    pieces = [piece for part in parts for piece in part.pieces]
    assert tuple(piece.token for piece in pieces) == alone.tokens and pieces[-1].finish_reason == alone.finish_reason
    assert {part.rank for part in parts} == {3} and parts[0].cached == 0


def test_what_drafts_came_to_travels_with_its_state_and_its_answers(asked):
    job = Job(tokens=[*range(1, 9)] * 4, sampling=Sampling(max_tokens=20, temperature=0))

    async def work(one):
        parts = [travelled(part) async for part in one.answer(travelled(job), [])]
        return travelled(await one.state()).load, {part.drafted for part in parts}

    load, drafted = asked(work, drafts=4)
    assert load.arms is not None and load.drafts == load.arms["cache"].drafts and None not in drafted
    load, drafted = asked(work)
    assert load.arms is load.drafts is None and drafted == {None}


def test_what_it_read_ahead_is_known(asked):
    job = Job(tokens=[*range(1, 60)], sampling=Sampling(max_tokens=2), marks=(50,))

    async def work(one):
        await one.warm(job)
        while not len(one.service.engine.prefixes.saved.tree):
            await asyncio.sleep(0.01)
        return [part async for part in one.answer(job, [])]

    assert asked(work)[0].cached == 50


def test_grammars_are_compiled_where_they_are_used(asked):
    pytest.importorskip("llguidance")
    tokenizer = train_tokenizer([], vocab=SMALLEST)
    config = dataclasses.replace(shrink(preset("lightning")), vocab=tokenizer.vocab, eos=tokenizer.stop)
    engine = Engine(Language(config).initialise(1), tokenizer, max_tokens=100, rows=1)
    rule = compile_grammar("choice", '["yes"]', tokenizer)
    job = Job(tokens=[1, 2, 3], sampling=Sampling(max_tokens=50))

    async def work(one):
        one.service.engine = engine
        return [part async for part in one.answer(job, travelled([rule.source]))]

    assert "".join(piece.text for part in asked(work) for piece in part.pieces) == "yes"


def test_who_stops_reading_stops_the_engine(asked):
    async def work(one):
        answer = one.answer(Job(tokens=[1, 2, 3], sampling=LONG), [])
        await anext(answer)
        assert (await one.state()).load.running == 1
        await answer.aclose()
        while (await one.state()).load.running:
            await asyncio.sleep(0.01)
        return travelled(await one.state())

    state = asked(work)
    assert (state.rank, state.max_tokens, state.vocab, state.most_waiting) == (3, 320, VOCAB, 258)


def test_at_the_end_it_tells_what_did_not_finish(asked):
    async def work(one):
        answer = one.answer(Job(tokens=[1, 2, 3], sampling=LONG), [])
        first = await anext(answer)
        assert not await one.drain(0)
        return [first, *[part async for part in answer]]

    assert asked(work)[-1].pieces[-1].finish_reason == "cancelled"


def test_one_with_a_broken_engine_is_not_healthy(asked):
    async def work(one):
        one.check_health()
        one.service.broken = ValueError("x")
        with pytest.raises(RuntimeError, match="stopped"):
            one.check_health()

    asked(work)


class Sent:
    """A request as Ray's routers see it."""

    def __init__(self, id, job, method="answer"):
        self.args, self.future = [job, []], asyncio.Future()
        self.metadata = SimpleNamespace(internal_request_id=id, call_method=method)


def test_the_router_asks_the_routes(monkeypatch):
    monkeypatch.setattr(router.RequestRouter, "update_replicas", lambda self, replicas: None)
    names = lambda ranked: [[one.replica_id.unique_id for one in rank] for rank in ranked]

    async def work():
        mine = travelled(PrefixRouter).__new__(PrefixRouter)
        mine.initialize_state()
        ids = [SimpleNamespace(unique_id=name) for name in ("one", "two")]
        candidates = [SimpleNamespace(replica_id=id) for id in ids]
        job, other = Job(tokens=[*range(500)]), Job(tokens=[*range(500, 900)])
        first = Sent("a", job)
        assert names(await mine.choose_replicas(candidates, first)) == [["one"], ["two"]]
        assert names(await mine.choose_replicas(candidates, Sent("b", other))) == [["two"], ["one"]]
        ahead = Sent("c", Job(tokens=[*range(510)]), "warm")
        assert names(await mine.choose_replicas(candidates[::-1], ahead)) == [["one"], ["two"]], "however busy it is"
        mine.on_request_routed(ahead, ids[1], None)
        mine.on_request_routed(first, ids[1], None)
        assert mine.routes.under_way == {"a": "two", "b": "two"}
        mine.on_request_completed(ids[1], "b")
        first.future.cancel()
        await asyncio.sleep(0)
        assert mine.routes.under_way == {}
        mine.on_request_completed(ids[0], "of a broadcast, which nobody routed")
        mine.update_replicas(candidates[:1])
        assert [*mine.routes.known] == ["one"] and isinstance(mine.routes.known["one"], Known)
        assert await mine.choose_replicas(candidates) == [candidates]

    asyncio.run(work())
