"""Thinking budgets through engine and service, in batches, with drafts: reasoning ends in time, or as it would have
anyway."""

import asyncio
import dataclasses
import random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from nautilus.ops.cpu.library import native
from nautilus.serve import Sampling
from nautilus.serve.job import Job
from nautilus.serve.service import Service
from tests.serve.draft.test_policy import make_cheap, total
from tests.serve.reliability.parts import TOKENIZER, Oracle, audit, engine_of, facts, hybrid, run, words

MODEL = hybrid()
ORACLE = Oracle(MODEL)
OPEN = TOKENIZER.encode("<think>\n", control=True)
(CLOSE,) = TOKENIZER.encode("</think>", control=True)
CALL = TOKENIZER.control["<tool_call>"]

asked = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 1.0, 2.0]),
    seed=st.integers(0, 99),
    max_tokens=st.integers(1, 40),
    thinking_budget=st.integers(0, 25),
    thinking_grace=st.integers(0, 10),
    # Some models end their thoughts soon, some never do; lines end often or never.
    logit_bias=st.fixed_dictionaries(
        {CLOSE: st.sampled_from([-50.0, 3.0, 6.0]), TOKENIZER.encode("\n")[0]: st.sampled_from([-50.0, 0.0, 6.0])}
    ),
)
NATIVE = pytest.mark.skipif(native().functions is None, reason="torch adds in another order in other chunks")
batches = st.lists(asked, min_size=1, max_size=5)


def check(prompt, sampling, tokens):
    """By the definition: what came, and what would have come without a budget."""
    most = sampling.thinking_budget + sampling.thinking_grace + 1
    ends = [place for place, token in enumerate(tokens, 1) if token in (CLOSE, CALL)]
    size = ends[0] if ends else len(tokens)
    assert size <= most
    free = ORACLE.answer(prompt, dataclasses.replace(sampling, thinking_budget=None)).tokens
    natural = [place for place, token in enumerate(free, 1) if token in (CLOSE, CALL)]
    if natural and natural[0] <= sampling.thinking_budget:
        assert tokens == free, "an answer that closes in time is not touched"
    before = min(size, len(free), sampling.thinking_budget)
    assert tokens[:before] == free[:before], "nothing is written before the budget is out"


def prompt_of(index):
    return [*words(random.Random(index), 3 + 7 * index), *OPEN]


def answered(engine, samplings):
    """As they would be alone and without drafts, and within their budgets."""
    requests = [engine.request(prompt_of(index), sampling) for index, sampling in enumerate(samplings)]
    run(engine, *requests)
    for request in requests:
        got = request.completion()
        assert facts(got) == facts(ORACLE.answer(got.prompt, request.sampling))
        check(got.prompt, request.sampling, got.tokens)


@settings(max_examples=25, deadline=None)
@given(samplings=batches, cached=st.booleans())
def test_reasoning_in_a_batch_is_never_longer_than_its_budget(samplings, cached):
    answered(engine_of(MODEL, rows=3, pages=40, saved_gb=1e-3 * cached), samplings)


def drafting(drafts=6):
    """An engine in which all drafts are tried, whatever they cost."""
    engine = engine_of(MODEL, rows=3, pages=40, drafts=drafts)
    make_cheap(engine.speculation)
    return engine


@NATIVE
@settings(max_examples=10, deadline=None)
@given(samplings=batches)
def test_drafts_go_no_further_than_a_budget(samplings):
    """The second time the answers are known and come as drafts: across the end of a budget and what it writes there."""
    engine = drafting()
    for _ in range(2):
        answered(engine, samplings)


@NATIVE
@pytest.mark.parametrize("bias", [-50.0, 4.0])
def test_drafts_of_what_was_answered_before_are_taken_on_both_sides_of_a_budget(bias):
    """And those of other budgets before: they are right up to the smaller of both, and wrong behind it."""
    engine = drafting()
    for budget in (9, 4, 15, 4):
        answered(engine, [Sampling(seed=1, max_tokens=40, thinking_budget=budget, logit_bias={CLOSE: bias})])
    counts = total(engine)
    assert counts.accepted > 30 and counts.drafted > counts.accepted, counts


@settings(max_examples=10, deadline=None)
@given(samplings=batches)
def test_streams_of_a_service_keep_their_budgets(samplings):
    async def streamed(reply):
        return [piece async for pieces in reply for piece in pieces]

    async def together():
        service = Service(engine_of(MODEL, rows=3))
        jobs = [Job(tokens=prompt_of(index), sampling=sampling) for index, sampling in enumerate(samplings)]
        replies = await asyncio.gather(*(streamed(service.submit(job)) for job in jobs))
        await service.close()
        assert audit(service.engine) == []
        return replies

    for index, (sampling, pieces) in enumerate(zip(samplings, asyncio.run(together()), strict=True)):
        tokens = tuple(piece.token for piece in pieces)
        want = ORACLE.answer(prompt_of(index), sampling)
        assert tokens == want.tokens and "".join(piece.text for piece in pieces) == want.text
        check(prompt_of(index), sampling, tokens)
