"""The replicas as one service, over a handle that says what Ray's would."""

import asyncio

import pytest

from nautilus.data.tokenizer import SMALLEST, train_tokenizer
from nautilus.runtime import UserError
from nautilus.serve.draft.proposal import Counts
from nautilus.serve.grammar import compile_grammar
from nautilus.serve.job import Busy, Draining, Job, Lost
from nautilus.serve.load import Load
from nautilus.serve.request import Piece

pytest.importorskip("ray.serve")

from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError

from nautilus.serve.api.errors import described
from nautilus.serve.scale import front
from nautilus.serve.scale.front import Replicas
from nautilus.serve.scale.replica import Part, State

TOKENIZER = train_tokenizer([], vocab=SMALLEST)
ARMS = {"cache": Counts(drafts=1, drafted=5, accepted=2)}
LOAD = Load(running=1, waiting=2, waiting_tokens=3, slots=1, pages=0.5, preempted=0, steps=7, arms=ARMS)
WORD, END = [
    Piece(text=text, token=5, logprob=0.0, finish_reason=reason) for text, reason in (("a", None), ("b", "stop"))
]


def state(rank):
    return State(
        rank=rank, load=LOAD, max_tokens=100, vocab=TOKENIZER.vocab, positions=200, most_waiting=4
    )  # fmt: skip


class Stream:
    def __init__(self, parts):
        self.parts, self.cancelled = iter(parts), False

    def __aiter__(self):
        return self

    async def __anext__(self):
        for part in self.parts:
            if isinstance(part, BaseException):
                raise part
            return part
        raise StopAsyncIteration

    def cancel(self):
        self.cancelled = True


class Handle:
    def __init__(self, parts=(), states=(0, 1)):
        self.parts, self.states, self.asked, self.told, self.stream = parts, [*map(state, states)], [], [], None
        self.answer = self.warm = self

    def options(self, stream):
        assert stream
        return self

    def remote(self, *given):
        self.asked.append(given)
        self.stream = Stream(self.parts)
        return self.stream

    def broadcast(self, name, *given):
        self.told.append((name, *given))
        return self

    async def results_async(self, timeout_s, return_exceptions):
        if self.told[-1][0] == "drain":
            return [True] * len(self.states)
        if not self.states:
            raise DeploymentUnavailableError("gone")
        return self.states


def asked(handle, work):
    async def run():
        service = await Replicas.connected(handle, TOKENIZER)
        try:
            return await work(service)
        finally:
            await service.close()

    return asyncio.run(run())


def part(*pieces, cached=3, rank=1):
    return Part(rank=rank, cached=cached, drafted=7, pieces=list(pieces))


def test_an_answer_comes_from_a_replica_with_what_it_found():
    async def work(service):
        reply = service.submit(Job(tokens=range(10)))
        assert [pieces async for pieces in reply] == [[WORD], [END]]
        return reply

    reply = asked(Handle([part(WORD), part(END)]), work)
    assert (reply.prompt_tokens, reply.cached_tokens, reply.replica) == (10, 3, "1") and not reply.front.replies
    assert reply.drafted_tokens == 7


def test_grammars_are_asked_for_again_over_there():
    pytest.importorskip("llguidance")
    handle = Handle([part(END)])
    rule = compile_grammar("regex", "[ab]+", TOKENIZER)

    async def work(service):
        service.submit(Job(tokens=[1, 2], rules=[rule], tenant="x", marks=(1,)))

    asked(handle, work)
    job, (source,) = handle.asked[0]
    assert job == Job(tokens=[1, 2], tenant="x", marks=(1,))
    assert source == {"kind": "regex", "text": "[ab]+", "thinking": False, "parallel": True}


@pytest.mark.parametrize("raised", [UserError("too long"), Busy("full", 7.0), Draining("bye")])
def test_errors_of_the_replica_are_told_in_its_own_words(raised):
    async def work(service):
        with pytest.raises(type(raised)) as told:
            await anext(service.submit(Job(tokens=[1])))
        assert told.value is raised and not service.replies
        return told.value

    asked(Handle([RayTaskError("answer", "a traceback", raised)]), work)


def test_a_replica_that_dies_costs_its_answers_only():
    async def work(service):
        reply, other = service.submit(Job(tokens=[1])), service.submit(Job(tokens=[2]))
        assert await anext(reply) == [WORD]
        with pytest.raises(Lost) as told:
            await anext(reply)
        assert service.replies == {other} and service.ready
        return described(told.value)

    error = asked(Handle([part(WORD), ActorDiedError()]), work)
    assert (error.status, error.code) == (503, "lost") and error.retry


def test_who_leaves_cancels_the_work():
    async def work(service):
        reply = service.submit(Job(tokens=[1]))
        await reply.aclose()
        assert service.handle.stream.cancelled and not service.replies
        with pytest.raises(StopAsyncIteration):
            await anext(reply)

    asked(Handle([part(WORD)]), work)


def test_bad_jobs_are_refused_here_and_nobody_is_asked():
    async def work(service):
        for tokens in ([], [TOKENIZER.vocab], range(100)):
            with pytest.raises(UserError):
                service.submit(Job(tokens=tokens))

    handle = Handle()
    asked(handle, work)
    assert handle.asked == []


def test_too_many_are_refused():
    async def work(service):
        for _ in range(8):
            service.submit(Job(tokens=[1]))
        with pytest.raises(Busy):
            service.submit(Job(tokens=[1]))
        assert await anext(next(iter(service.replies))) == [WORD]
        service.submit(Job(tokens=[1]))

    asked(Handle([part(WORD)]), work)


def test_at_the_end_the_replicas_are_told_when_all_that_was_taken_has_ended():
    async def work(service):
        reply = service.submit(Job(tokens=[1]))  # of which no replica has said anything yet
        draining = asyncio.ensure_future(service.drain(60))
        await asyncio.sleep(0.05)
        assert not service.ready and not draining.done() and "drain" not in [name for name, *_ in service.handle.told]
        with pytest.raises(Draining):
            service.submit(Job(tokens=[1]))
        assert [pieces async for pieces in reply] == [[WORD], [END]]
        assert await draining

    handle = Handle([part(WORD), part(END)])
    asked(handle, work)
    assert handle.told[-1] == ("drain", 0)


def test_at_the_end_the_replicas_end_what_takes_too_long():
    async def work(service):
        service.submit(Job(tokens=[1]))
        assert not await service.drain(0.05)

    handle = Handle([part(WORD)])
    asked(handle, work)
    assert handle.told[-1] == ("drain", 0)


def test_it_is_ready_while_one_is_up_and_again_when_one_has_come_back(monkeypatch):
    monkeypatch.setattr(front, "WATCH", 0.001)

    async def work(service):
        for states in ([state(1)], [], [state(0), state(1)]):
            service.handle.states = states
            await asyncio.sleep(0.05)
            assert service.ready == bool(states) and [*service.loads()] == [str(one.rank) for one in states]
            if not states:
                with pytest.raises(Lost, match="no replica is up"):
                    service.submit(Job(tokens=[1]))

    asked(Handle(), work)


def test_loads_are_told_by_rank_and_together():
    async def work(service):
        return service.load(), service.loads()

    total, each = asked(Handle(), work)
    assert each == {"0": LOAD, "1": LOAD}
    assert (total.running, total.waiting, total.waiting_tokens, total.pages) == (2, 4, 6, 0.5)
    assert (total.drafts, total.draft_tokens, total.accepted_tokens) == (2, 10, 4)
