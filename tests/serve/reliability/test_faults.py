"""Whatever breaks at one request, the others get what they would have got, and nothing is held afterwards."""

import errno
import logging
import os
import random
import time

import pytest
import torch

from nautilus.data.tokenizer import TextStream
from nautilus.ops.cpu.tape import Tape
from nautilus.runtime import UserError
from nautilus.serve import Sampling, spill
from nautilus.serve.rules import Rule
from nautilus.serve.sample import BrokenLogits, looked_at
from tests.serve.reliability.parts import Oracle, audit, engine_of, hybrid, run, some_requests, words

MODEL = hybrid()
ORACLE = Oracle(MODEL)


class Broken(RuntimeError):
    pass


@pytest.fixture(autouse=True)
def quiet(caplog):
    """What is logged of all these faults is not written out; `caplog` has it."""
    caplog.set_level(logging.CRITICAL + 1, "nautilus.serve")


def fail_at(monkeypatch, owner, name, holds, bad=Broken):
    """owner.name raises where holds(its number, its arguments) is true. Gives the list of the failures."""
    whole, calls, failures = getattr(owner, name), [0], []

    def faulty(*args, **named):
        calls[0] += 1
        if holds(calls[0], args):
            failures.append(calls[0])
            raise bad(f"{name} broke at its call {calls[0]}")
        return whole(*args, **named)

    monkeypatch.setattr(owner, name, faulty)
    return failures


def check(engine, requests, *, failed=()):
    """All but these have ended as they do alone, and so does one that comes afterwards."""
    assert [request for request in requests if request.error is not None] == [*failed]
    assert all(map(ORACLE.agrees, requests))
    after = engine.request([3, 1, 4, 1, 5], Sampling(seed=9, max_tokens=12))
    run(engine, after)
    assert after.error is None and ORACLE.agrees(after)
    assert engine.scheduler.idle and audit(engine) == []


# ----- the model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize("call", [1, 9, 40])
def test_a_layer_that_breaks_once_ends_at_most_the_request_that_was_read(monkeypatch, layer, call):
    def broken(compute, inputs):
        tape = Tape()
        tape.result, tape.broken = compute(), "every step is to go through the layers"
        return tape

    monkeypatch.setattr("nautilus.serve.recorded.record", broken)
    engine = engine_of(MODEL)
    requests = some_requests(engine, 7, seed=call)
    failures = fail_at(monkeypatch, MODEL.backbone.layers[layer], "remembering", lambda count, _: count == call)
    run(engine, *requests)
    assert failures == [call]
    failed = [request for request in requests if request.error is not None]
    assert len(failed) <= 1 and all(not request.pieces[:-1] for request in failed), "read, and not answered yet"
    check(engine, requests, failed=failed)


@pytest.mark.parametrize("call", [1, 2, 3, 9])
def test_a_recorded_step_that_breaks_once_ends_nobody(monkeypatch, call):
    engine = engine_of(MODEL)
    requests = some_requests(engine, 7, seed=call)
    failures = fail_at(monkeypatch, engine.forward, "step", lambda count, _: count == call)
    run(engine, *requests)
    assert failures
    check(engine, requests)


@pytest.mark.parametrize("victim", [0, 3, 6])
def test_a_request_at_which_every_step_breaks_ends_alone(monkeypatch, victim):
    engine = engine_of(MODEL)
    requests = some_requests(engine, 7, seed=victim)
    bad = requests[victim]
    failures = fail_at(monkeypatch, engine.forward, "step", lambda _, args: bad.berth in args[0])
    run(engine, *requests)
    assert 1 <= len(failures) <= 2, "with the others, then in a call of its own"
    check(engine, requests, failed=[bad])
    assert isinstance(bad.error, RuntimeError) and isinstance(bad.error.__cause__, Broken)


def test_states_that_cannot_be_read_again_end_with_the_step_and_no_other_does(monkeypatch):
    engine = engine_of(MODEL, state="int8", rows=2, saved_gb=0)
    requests = some_requests(engine, 4)
    for request in requests:
        engine.submit(request)
    while len(engine.scheduler.running()) < 2:
        engine.step()
    took_part = [*engine.scheduler.running()]
    fail_at(monkeypatch, engine.forward, "step", lambda count, _: count == 1)
    run(engine)
    assert [request for request in requests if request.error] == took_part
    assert audit(engine) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("step", [1, 2, 8])
def test_logits_that_are_no_numbers_end_their_row_and_are_not_gone_on_from(monkeypatch, value, step):
    engine = engine_of(MODEL)
    prompts = [words(random.Random(row), 40) for row in range(3)]
    requests = [engine.request(prompt, Sampling(seed=1, max_tokens=20, ignore_eos=True)) for prompt in prompts]
    compute, calls = engine.forward.looked_at, []

    def broken():
        rows, berths = compute(), engine.forward.latest.berths
        if len(rows) == 3:
            calls.append(rows)
            if len(calls) == step:
                (rows[berths.index(requests[1].berth)],) = looked_at(torch.full((1, len(rows[0].logits_V)), value))
        return rows

    monkeypatch.setattr(engine.forward, "looked_at", broken)
    run(engine, *requests)
    check(engine, requests, failed=[requests[1]])
    assert isinstance(requests[1].error, BrokenLogits)
    known = engine.prefixes.saved.find("", requests[1].tokens, len(requests[1].tokens))
    assert known.entry is None, "nothing of it is kept"


def test_an_answer_that_ends_in_the_step_in_which_another_breaks_is_told(monkeypatch):
    engine = engine_of(MODEL, step_seconds=9.0, chunk=3)
    first, second = (engine.request([7, 8, 9 + index], Sampling(max_tokens=1)) for index in range(2))
    second.priority = 1
    fail_at(monkeypatch, engine.forward, "read", lambda count, _: count == 2)
    for request in (first, second):
        engine.submit(request)
    told = engine.step()
    assert [(request, piece.finish_reason) for request, piece in told] == [(first, "length"), (second, "error")]
    check(engine, [first, second], failed=[second])


# ----- memory ---------------------------------------------------------------------------------------------------------

POOLS = {
    "state": "berths", "put_state": "berths", "waking": "berths", "take": "berths", "copy": "pool", "read": "pool",
}  # fmt: skip


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("call, bad", [(1, MemoryError), (2, RuntimeError), (5, MemoryError)])
def test_memory_that_is_not_there_ends_at_most_one_request(monkeypatch, tmp_path, name, call, bad):
    """Conversations that go on from each other, in so little memory that saved states go to files."""
    engine = engine_of(MODEL, pages=26, saved_gb=3e-5, saved_folder=tmp_path / "saved")
    engine.scheduler.seconds_per_token = 1.0  # so that files pay
    begun = some_requests(engine, 3, longest=90)
    run(engine, *begun)
    owner = engine.berths if POOLS[name] == "berths" else engine.berths.pool
    failures = fail_at(monkeypatch, owner, name, lambda count, _: count == call, bad)
    following = [
        engine.request([*request.tokens[: cut or len(request.tokens)], 5, 6], Sampling(seed=2, max_tokens=9))
        for request in begun
        for cut in (0, 21)
    ]
    for request in following:
        request.marks = (17,)
    run(engine, *following)
    assert failures or (name, call) in (("copy", 5), ("put_state", 5), ("read", 5), ("waking", 5)), (
        "it was called less often"
    )
    failed = [request for request in following if request.error is not None]
    assert len(failed) <= (name in ("put_state", "waking", "take", "copy"))
    check(engine, following, failed=failed)
    engine.prefixes.saved.folder.close()


def test_a_state_for_which_there_is_no_memory_stays_in_its_file(monkeypatch, tmp_path):
    engine = engine_of(MODEL, saved_folder=tmp_path / "saved")
    engine.scheduler.seconds_per_token = 1.0
    (request,) = some_requests(engine, 1, longest=90)
    run(engine, request)
    while engine.prefixes.spill():
        pass
    while engine.prefixes.saved.evict():
        pass
    failures = fail_at(monkeypatch, engine.berths.pool, "write", lambda count, _: count == 1, MemoryError)
    again = [engine.request([*request.tokens, 7], Sampling(max_tokens=5)) for _ in range(2)]
    run(engine, again[0])
    run(engine, again[1])
    assert failures and (again[0].cached, again[1].cached) == (0, len(request.tokens) - 1)
    check(engine, again)
    engine.prefixes.saved.folder.close()


# ----- the disk -------------------------------------------------------------------------------------------------------


def harm(path, how):
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[len(content) * 3 // 4] ^= 1
    path.write_bytes(content if how == "flipped" else content[: len(content) // 2])


@pytest.mark.parametrize("how", ["flipped", "cut"])
def test_saved_files_that_went_bad_are_read_again_from_the_prompt(tmp_path, how):
    engine = engine_of(MODEL, saved_folder=tmp_path / "saved")
    engine.scheduler.seconds_per_token = 1.0
    begun = some_requests(engine, 4, longest=90)
    run(engine, *begun)
    while engine.prefixes.spill():
        pass
    while engine.prefixes.saved.evict():
        pass
    files = [*(tmp_path / "saved").glob("*.safetensors")]
    assert files
    for path in files:
        harm(path, how)
    again = [engine.request([*request.tokens, 7], Sampling(max_tokens=5)) for request in begun]
    run(engine, *again)
    assert all(request.cached == 0 for request in again) and engine.prefixes.saved.folder.refused > 0
    check(engine, again)
    engine.prefixes.saved.folder.close()


def test_a_disk_that_is_full_ends_writing_and_nothing_else(monkeypatch, tmp_path):
    engine = engine_of(MODEL, pages=26, saved_gb=3e-5, saved_folder=tmp_path / "saved")
    engine.scheduler.seconds_per_token = 1.0

    def full(path, *_):
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(spill, "write_file", full)
    requests = some_requests(engine, 9, longest=90)
    run(engine, *requests)
    assert engine.prefixes.saved.folder.broken and not [*(tmp_path / "saved").glob("*.safetensors")]
    check(engine, requests)
    engine.prefixes.saved.folder.close()


# ----- what belongs to one request ------------------------------------------------------------------------------------


class Fragile(Rule):
    """Breaks when it is asked for the n-th time."""

    def __init__(self, method, left, bad):
        self.method, self.left, self.bad = method, left, bad

    def asked(self, method):
        self.left -= method == self.method
        if self.left == 0:
            raise self.bad(f"the grammar broke in {method}")

    def forced(self):
        return self.asked("forced")

    def change(self, logits_V):
        self.asked("change")
        return logits_V

    def add(self, token):
        self.asked("add")


@pytest.mark.parametrize("bad", [Broken, UserError, MemoryError])
@pytest.mark.parametrize("method", ["forced", "change", "add"])
@pytest.mark.parametrize("call", [1, 4])
def test_a_grammar_that_raises_ends_its_own_request(method, call, bad):
    engine = engine_of(MODEL)
    requests = some_requests(engine, 5)
    how = Sampling(seed=4, max_tokens=20, ignore_eos=True)
    victim = engine.request([1, 2, 3], how, [Fragile(method, call, bad)])
    run(engine, *requests[:2], victim, *requests[2:])
    check(engine, requests)
    assert victim.pieces[-1].finish_reason == "error" and len(victim.completion().tokens) == call - 1
    assert isinstance(victim.error, UserError) == (bad is UserError)


@pytest.mark.parametrize("call", [1, 5])
def test_a_tokenizer_that_raises_ends_its_own_request(monkeypatch, call):
    engine = engine_of(MODEL)
    requests = some_requests(engine, 5)
    victim = engine.request([1, 2, 3], Sampling(seed=4, max_tokens=20, ignore_eos=True))
    whole, told = TextStream.push, []

    def push(stream, *tokens):
        if stream is victim.written:
            told.append(tokens)
            if len(told) == call:
                raise Broken("no such token")
        return whole(stream, *tokens)

    monkeypatch.setattr(TextStream, "push", push)
    run(engine, *requests[:2], victim, *requests[2:])
    check(engine, requests)
    assert victim.pieces[-1].finish_reason == "error" and isinstance(victim.error.__cause__, Broken)


# ----- time -----------------------------------------------------------------------------------------------------------


class Clock:
    """Time, and jumps of it."""

    def __init__(self):
        self.offset = 0.0

    def monotonic(self):
        return time.monotonic() + self.offset

    def time(self):
        return time.time() + self.offset


@pytest.mark.parametrize("jump", [3e8, -3e8])
def test_a_clock_that_jumps_changes_no_answer(monkeypatch, jump):
    clock = Clock()
    for module in ("engine", "scheduler", "request"):
        monkeypatch.setattr(f"nautilus.serve.{module}.time", clock)
    engine = engine_of(MODEL, rows=2, step_seconds=0.01)
    requests = some_requests(engine, 9)
    for index, request in enumerate(requests):
        engine.submit(request)
        clock.offset += jump * (index % 3 - 1)
        engine.step()
        assert audit(engine) == []
    run(engine)
    check(engine, requests)


def test_one_long_pause_does_not_make_all_later_pieces_short(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("nautilus.serve.engine.time", clock)
    engine = engine_of(MODEL, chunk=128, step_seconds=0.5, saved_gb=0)
    compute, sizes = engine.forward.read, []

    def read(parts):
        sizes.extend(len(part.tokens) for part in parts)
        clock.offset += 1000.0 * (len(sizes) == 1)
        return compute(parts)

    monkeypatch.setattr(engine.forward, "read", read)
    for _ in range(3):
        run(engine, engine.request(words(random.Random(0), 300), Sampling(max_tokens=2)))
    assert sizes[0] == 128 and sizes[1] == 16 and sizes[-3:-1] == [128, 128]
