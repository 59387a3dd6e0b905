"""Requests in any company, put off and taken up again, have the bits that they have alone."""

import dataclasses
import random

import pytest
import torch

from nautilus.config import Attention, Config, Experts, Mamba, lay
from nautilus.data.tokenizer import SMALLEST, train_tokenizer
from nautilus.model.language import Language
from nautilus.ops.cpu.library import native
from nautilus.serve import Engine, Sampling
from nautilus.serve.sample import looked_at

torch.set_num_threads(1)
TOKENIZER = train_tokenizer([], vocab=SMALLEST)
TOKENIZER.stop = ()
VOCAB = TOKENIZER.vocab


MAMBA = Mamba(heads=4, head_width=12, state=6, groups=2)
ATTENTION = Attention(heads=2, groups=1, head_width=16)


def model():
    layers = lay("ME*M", MAMBA, ATTENTION, Experts(experts=6, active=2, hidden=10))
    found = Language(Config(vocab=VOCAB, width=20, layers=layers, eos=())).initialise(3)
    found.head_weight.data *= 12
    return found.requires_grad_(False).eval()


MODEL = model()
PAGE_BYTES = 16 * 2 * 16 * 4  # of keys and values in float32


def engine_of(*, pages=0, **limits):
    return Engine(MODEL, TOKENIZER, **{"max_tokens": 96} | limits, cache_gb=pages * PAGE_BYTES / 1e9 if pages else None)


def answers_alone(prompts, samplings):
    return [engine_of(rows=1).generate([p], s)[0] for p, s in zip(prompts, samplings, strict=True)]


def facts(completion):
    return completion.tokens, completion.logprobs if native().functions is not None else None, completion.finish_reason


def some_requests(draw, count, longest=30):
    prompts = [[draw.randrange(VOCAB) for _ in range(draw.randint(1, 50))] for _ in range(count)]
    samplings = [Sampling(seed=draw.randrange(99), max_tokens=draw.randint(1, longest)) for _ in range(count)]
    return prompts, samplings


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("limits", [{"pages": 8}, {"pages": 14, "chunk": 7, "step_seconds": 0.0}], ids=["tight", "cut"])
def test_memory_that_runs_out_changes_no_answer(seed, limits):
    prompts, samplings = some_requests(random.Random(seed), 9, longest=90)
    engine = engine_of(rows=5, **limits)
    together = engine.generate(prompts, samplings)
    assert [facts(one) for one in together] == [facts(one) for one in answers_alone(prompts, samplings)]
    assert engine.scheduler.preempted > 0
    assert_nothing_is_held(engine)


def assert_nothing_is_held(engine):
    assert engine.scheduler.idle and len(engine.berths.slots) == engine.rows
    assert not any(engine.berths.pool.references) and engine.berths.pool.free() == len(engine.berths.pool.references)


@pytest.mark.parametrize("seed", range(4))
def test_random_operations_change_no_answer_and_leak_nothing(seed):
    """Requests come, go and are cancelled at any moment, with other chunks every time."""
    draw = random.Random(seed)
    prompts, samplings = some_requests(draw, 30)
    want = answers_alone(prompts, samplings)
    engine, requests, cancelled, next_one = engine_of(rows=4, pages=16), [], set(), 0
    for _ in range(400):
        engine.scheduler.chunk = draw.choice([1, 3, 16, 64])
        engine.scheduler.step_seconds = draw.choice([0.0, 0.001, 1.0])
        if next_one < len(prompts) and draw.random() < 0.3:
            requests.append(engine.request(prompts[next_one], samplings[next_one], tenant=draw.choice("ab")))
            engine.submit(requests[-1])
            next_one += 1
        if requests and draw.random() < 0.05:
            index = draw.randrange(len(requests))
            if not requests[index].finished:
                engine.cancel(requests[index])
                cancelled.add(index)
        before = [len(request.pieces) for request in requests]
        told = engine.step()
        assert sum(len(request.pieces) for request in requests) - sum(before) == len(told)
    while not engine.scheduler.idle:
        engine.step()
    assert next_one == len(prompts) and 0 < len(cancelled) < 20
    for index, (request, alone) in enumerate(zip(requests, want, strict=True)):
        got = request.completion()
        if index in cancelled:
            assert got.finish_reason == "cancelled" and got.tokens == alone.tokens[: len(got.tokens)]
        else:
            assert facts(got) == facts(alone)
    assert_nothing_is_held(engine)


def first_steps(engine, *requests):
    """In which order their first tokens come."""
    order = []
    for request in requests:
        engine.submit(request)
    while not engine.scheduler.idle:
        for request, _ in engine.step():
            if request in requests and request not in order:
                order.append(request)
    return [requests.index(request) for request in order]


ONE = Sampling(max_tokens=4)


def test_the_order_is_by_priority_then_by_what_a_tenant_has_had_then_by_what_is_left_to_read():
    engine = engine_of(rows=1)
    ask = lambda length, **more: engine.request([1] * length, ONE, **more)
    assert first_steps(engine, ask(40, priority=1), ask(60, priority=0)) == [1, 0]
    assert first_steps(engine, ask(60), ask(30)) == [1, 0]
    engine.submit(ask(5, tenant="modest"))  # which is there already
    engine.scheduler.served["greedy"] = 500
    assert first_steps(engine, ask(9, tenant="greedy"), ask(60, tenant="modest")) == [1, 0]


def test_who_has_waited_long_goes_before_the_shorter():
    engine = engine_of(rows=1)
    long, short = (engine.request([1] * length, ONE) for length in (60, 5))
    long.arrived -= 1
    assert first_steps(engine, short, long) == [1, 0]


def test_a_tenant_that_was_away_has_saved_nothing_up():
    engine = engine_of(rows=1)
    engine.scheduler.served["busy"] = 700
    engine.submit(engine.request([1] * 5, ONE, tenant="busy"))
    engine.submit(engine.request([1] * 5, ONE, tenant="new"))
    assert engine.scheduler.served["new"] == 700


def test_another_salt_is_no_other_tenant():
    engine = engine_of(rows=1)
    ask = lambda tenant: engine.request([1] * 9, ONE, tenant=tenant)
    engine.scheduler.served["greedy:first"] = 500
    engine.submit(ask("modest:"))
    assert first_steps(engine, ask("greedy:second"), ask("greedy:third"), ask("modest:")) == [2, 0, 1]


def test_what_tenants_have_had_is_kept_of_so_many_only(monkeypatch):
    """Clients name them (`cache_salt`)."""
    monkeypatch.setattr("nautilus.serve.scheduler.TENANTS", 8)
    engine = engine_of()
    engine.submit(engine.request([1], ONE, tenant="stays"))
    engine.scheduler.served["stays"] = 7
    for number in range(30):
        goes = engine.request([1], ONE, tenant=str(number))
        engine.submit(goes)
        engine.cancel(goes)
        assert engine.scheduler.served[goes.tenant] == 7, "no claim to what it did not ask for before"
        assert len(engine.scheduler.served) <= 9
    assert engine.scheduler.served["stays"] == 7


def test_a_measured_pace_comes_back_from_one_long_pause():
    engine = engine_of()
    scheduler, somebody = engine.scheduler, engine.request([1], ONE)
    scheduler.measured([(somebody, 64)], 0.064)
    scheduler.measured([(somebody, 64)], 500.0)
    assert scheduler.seconds_per_token > 1
    for _ in range(30):
        scheduler.measured([(somebody, 16)], 0.02)
    assert 1e-3 < scheduler.seconds_per_token < 2e-3, "short pieces say that it takes less"
    scheduler.measured([(somebody, 16)], 1.0)
    assert scheduler.seconds_per_token < 2e-3, "but not that it takes more"


def test_answers_go_on_while_a_long_prompt_is_read():
    engine = engine_of(rows=2, chunk=8, step_seconds=0.0)
    quick, long = engine.request([1, 2], dataclasses.replace(ONE, max_tokens=20)), engine.request([3] * 80, ONE)
    engine.submit(quick)
    engine.step()
    engine.submit(long)
    for _ in range(5):
        begun = len(quick.pieces)
        engine.step()
        assert len(quick.pieces) == begun + 1 and not long.pieces


def test_a_request_that_ends_in_an_error_takes_no_other_with_it(monkeypatch):
    engine = engine_of(rows=3)
    requests = [engine.request([5, index], ONE) for index in range(3)]
    for request in requests:
        engine.submit(request)
    compute = engine.forward.looked_at

    def broken():
        rows = compute()
        if len(rows) == 3:
            (rows[1],) = looked_at(torch.full((1, len(rows[1].logits_V)), float("nan")))
        return rows

    monkeypatch.setattr(engine.forward, "looked_at", broken)
    while not engine.scheduler.idle:
        engine.step()
    assert [request.pieces[-1].finish_reason for request in requests] == ["length", "error", "length"]
    assert "NaN or infinity" in str(requests[1].error)
    assert_nothing_is_held(engine)


def test_short_prompts_are_read_in_one_call_and_answers_are_those_that_each_gets_alone(monkeypatch):
    engine = engine_of(rows=6, chunk=24)
    prompts = [[1 + (7 * row + at) % 60 for at in range(size)] for row, size in enumerate((5, 9, 3, 11, 30, 2))]
    alone = [engine.generate([prompt], Sampling(max_tokens=4, seed=3))[0] for prompt in prompts]
    read, calls = engine.forward.read, list[list[int]]()

    def counted(parts):
        calls.append([len(part.tokens) for part in parts])
        return read(parts)

    monkeypatch.setattr(engine.forward, "read", counted)
    together = engine.generate(prompts, Sampling(max_tokens=4, seed=3))
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    if native().functions is not None:
        assert [one.logprobs for one in together] == [one.logprobs for one in alone]
    assert calls[0] == [2, 3, 5, 9] and sum(map(len, calls)) == 7 and all(sum(some) <= 24 for some in calls)


def test_what_fails_in_a_call_for_several_prompts_is_read_alone_and_ends_only_whose_fault_it_is(monkeypatch):
    engine = engine_of(rows=4)
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    wanted = [one.tokens for one in engine.generate(prompts, ONE)]
    read = engine.forward.read

    def failing(parts):
        if any(4 in part.tokens for part in parts):
            raise RuntimeError("the kernel fell over")
        return read(parts)

    monkeypatch.setattr(engine.forward, "read", failing)
    requests = [engine.request(prompt, ONE) for prompt in prompts]
    for request in requests:
        engine.submit(request)
    while not all(request.finished for request in requests):
        engine.step()
    assert requests[1].error is not None and requests[0].error is requests[2].error is None
    assert [requests[at].completion().tokens for at in (0, 2)] == [wanted[0], wanted[2]]
