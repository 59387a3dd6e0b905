"""Prefixes that are known are not read again, and nobody can tell from the answers."""

import random

import pytest
import torch

from nautilus.config import Config, lay
from nautilus.model.language import Language
from nautilus.ops.cpu.library import native
from nautilus.serve import Engine, Sampling
from nautilus.serve.prefixes import fingerprint
from tests.serve.disagreements import disagreements
from tests.serve.test_scheduler import ATTENTION, MAMBA, MODEL, PAGE_BYTES, TOKENIZER, VOCAB, facts

torch.set_num_threads(1)
SHORT = Sampling(max_tokens=8)


def engine_of(*, model=MODEL, pages=0, saved_gb=1e-2, **limits):
    cache_gb = pages * PAGE_BYTES / 1e9 if pages else None
    return Engine(model, TOKENIZER, **{"max_tokens": 320, "rows": 4} | limits, saved_gb=saved_gb, cache_gb=cache_gb)


def alone(prompt, sampling, model=MODEL):
    return Engine(model, TOKENIZER, max_tokens=320, rows=1).generate([prompt], sampling)[0]


def audit(engine):
    assert engine.scheduler.idle and len(engine.berths.slots) == engine.rows
    assert disagreements(engine.prefixes.saved, dict(enumerate(engine.berths.pool.references))) == []


def words(draw, count):
    return [draw.randrange(VOCAB) for _ in range(count)]


def run(engine, *requests):
    for request in requests:
        engine.submit(request)
    while not engine.scheduler.idle:
        engine.step()
    return [request.completion() for request in requests]


def test_the_next_turn_of_a_conversation_reads_only_what_is_new():
    draw, engine = random.Random(0), engine_of()
    prompt = words(draw, 100)
    first = engine.generate([prompt], SHORT)[0]
    following = [*prompt, *first.tokens, *words(draw, 20)]
    second = engine.generate([following], SHORT)[0]
    assert (first.cached, second.cached) == (0, 107), "all but the last token of the answer, which was not read"
    assert facts(second) == facts(alone(following, SHORT))
    audit(engine)


@pytest.mark.parametrize("mark", [1, 16, 37, 64, 99])
def test_a_state_after_a_mark_serves_all_who_begin_alike(mark):
    draw, engine = random.Random(mark), engine_of(chunk=48)
    begun = words(draw, 100)
    run(engine, engine.request(begun, SHORT, marks=(mark,)))
    for _ in range(3):
        prompt = [*begun[:mark], *words(draw, 30)]
        assert prompt[mark] != begun[mark]
        (got,) = run(engine, engine.request(prompt, SHORT))
        assert got.cached == (mark if mark >= 16 else 0)
        assert facts(got) == facts(alone(prompt, SHORT))
    audit(engine)


def test_where_two_prompts_part_a_state_is_kept_for_the_third():
    draw, engine = random.Random(5), engine_of()
    common = words(draw, 270)
    for cached in (0, 0, 270):
        prompt = [*common, *words(draw, 9)]
        got = engine.generate([prompt], SHORT)[0]
        assert got.cached == cached and facts(got) == facts(alone(prompt, SHORT))
    audit(engine)


def test_tenants_share_nothing():
    engine, prompt = engine_of(), words(random.Random(0), 50)
    asked = [engine.request(prompt, SHORT, tenant=tenant, marks=(49,)) for tenant in ("a", "a", "b")]
    assert [run(engine, one)[0].cached for one in asked] == [0, 49, 0]
    audit(engine)


def test_a_warm_request_reads_and_says_nothing_and_the_next_one_finds_it_read():
    engine, prompt = engine_of(), words(random.Random(0), 60)
    (warm,) = run(engine, engine.request(prompt, SHORT, warm=True, marks=(60,)))
    assert (warm.tokens, warm.text, warm.finish_reason) == ((), "", "length")
    following = [*prompt, 7, 8]
    got = engine.generate([following], SHORT)[0]
    assert got.cached == 60 and facts(got) == facts(alone(following, SHORT))
    audit(engine)


def test_what_is_known_but_for_its_last_token_goes_on_with_all_others(monkeypatch):
    draw, engine, reads = random.Random(5), engine_of(), []
    prompt = words(draw, 50)
    run(engine, engine.request(prompt, SHORT, marks=(49,)))
    plain = engine.forward.read
    monkeypatch.setattr(engine.forward, "read", lambda parts: reads.append(parts) or plain(parts))
    found = run(engine, engine.request(prompt, SHORT), engine.request(prompt, SHORT))
    assert [one.cached for one in found] == [49, 49] and not reads
    assert [facts(one) for one in found] == 2 * [facts(alone(prompt, SHORT))]
    audit(engine)


@pytest.mark.parametrize("size", [1, 2, 20])
def test_a_prompt_that_is_not_to_be_answered_gets_no_token(size):
    engine = engine_of()
    asked = engine.request(words(random.Random(size), size), SHORT, answer=False), engine.request([1, 2], SHORT)
    silent, other = run(engine, *asked)
    assert (silent.tokens, silent.finish_reason) == ((), "length") and len(other.tokens) == 8
    audit(engine)


def test_who_begins_like_one_that_is_being_read_waits_for_its_mark():
    draw, engine = random.Random(3), engine_of(chunk=16, step_seconds=0.0)
    begun = words(draw, 80)
    prompts = [[*begun, *words(draw, 9)] for _ in range(3)]
    got = run(engine, *(engine.request(prompt, SHORT, marks=(80,)) for prompt in prompts))
    assert sorted(one.cached for one in got) == [0, 80, 80]
    assert [facts(one) for one in got] == [facts(alone(prompt, SHORT)) for prompt in prompts]
    audit(engine)


def test_answers_to_one_prompt_read_it_once_and_leave_nothing_else_where_no_turn_follows():
    draw, engine = random.Random(4), engine_of(rows=16)
    prompts = [words(draw, 40), words(draw, 33)]
    how = [Sampling(max_tokens=6, temperature=1.0, seed=seed) for seed in range(6)]
    asked = [(prompt, one) for prompt in prompts for one in how]
    got = run(engine, *(engine.request(p, one, marks=(len(p) - 1,), kept=False) for p, one in asked))
    assert [one.cached for one in got] == [0, *[39] * 5, 0, *[32] * 5]
    assert [facts(one) for one in got] == [facts(alone(*pair)) for pair in asked]
    assert len(engine.prefixes.saved.tree) == 2
    audit(engine)


def test_where_nothing_is_kept_a_mark_does_not_cut_the_prompt(monkeypatch):
    engine, sizes = engine_of(saved_gb=0), []
    read = engine.forward.read
    monkeypatch.setattr(engine.forward, "read", lambda parts: sizes.append(len(parts[0].tokens)) or read(parts))
    prompt = words(random.Random(5), 40)
    (got,) = run(engine, engine.request(prompt, SHORT, marks=(39,)))
    assert sizes == [40] and facts(got) == facts(alone(prompt, SHORT))


def test_a_model_without_states_finds_any_common_beginning():
    config = Config(vocab=VOCAB, width=20, layers=lay("**", MAMBA, ATTENTION), eos=())
    model = Language(config).initialise(3).requires_grad_(False).eval()
    draw, engine = random.Random(2), engine_of(model=model)
    begun = words(draw, 90)
    engine.generate([begun], SHORT)
    prompt = [*begun[:41], *words(draw, 30)]
    got = engine.generate([prompt], SHORT)[0]
    assert got.cached == 41 and facts(got) == facts(alone(prompt, SHORT, model))
    audit(engine)


@pytest.mark.parametrize("seed", range(3))
def test_a_tree_of_conversations_in_little_memory_changes_no_answer(seed):
    """Prompts go on from each other at random, memory of pages and states runs out, requests are put off."""
    draw, engine = random.Random(seed), engine_of(pages=30, saved_gb=6e-5, chunk=20, step_seconds=0.0)
    known, want, cached = [[]], {}, 0
    for _ in range(14):
        requests = []
        for _ in range(draw.randint(1, 5)):
            before = draw.choice(known)
            kept = draw.choice([len(before), draw.randint(0, len(before))])
            prompt = [*before[:kept], *words(draw, draw.randint(1, 40))][:200]
            marks = tuple(sorted(draw.sample(range(1, len(prompt) + 1), min(2, len(prompt)))))[:1]
            requests.append(engine.request(prompt, Sampling(seed=1, max_tokens=draw.randint(1, 60)), marks=marks))
        for request, got in zip(requests, run(engine, *requests), strict=True):
            want[request] = facts(alone(list(got.prompt), request.sampling))
            assert facts(got) == want[request]
            cached += got.cached
            known.append([*got.prompt, *got.tokens])
    assert cached > 0 and engine.prefixes.saved.counts.evictions > 0
    audit(engine)


def test_what_was_known_is_found_again_after_a_restart(tmp_path):
    prompt = words(random.Random(0), 100)
    how = {"saved_folder": tmp_path / "saved", "saved_gb": 1e-2}
    engine = engine_of(**how)
    engine.scheduler.seconds_per_token = 1.0  # so that a file pays
    first = engine.generate([prompt], SHORT)[0]
    while engine.prefixes.saved.spill():
        pass
    engine.prefixes.saved.folder.close()
    again = engine_of(**how)
    following = [*prompt, *first.tokens, 5]
    got = again.generate([following], SHORT)[0]
    assert got.cached == 107 and facts(got) == facts(alone(following, SHORT))
    audit(again)
    again.prefixes.saved.folder.close()


def test_other_weights_find_nothing(tmp_path):
    model = Language(MODEL.config).initialise(4)
    assert fingerprint(model) != fingerprint(MODEL) == fingerprint(MODEL)
    engine, prompt = engine_of(model=model.requires_grad_(True)), words(random.Random(0), 50)
    before = engine.generate([prompt], SHORT)[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    after = engine.generate([prompt], SHORT)[0]
    assert after.cached == 0 and after.logprobs != before.logprobs


def test_what_weights_that_changed_under_way_had_a_part_in_serves_no_other(tmp_path):
    old, new, model = (Language(MODEL.config).initialise(seed).requires_grad_(False) for seed in (4, 5, 4))
    prompt = words(random.Random(0), 100)
    engine = engine_of(model=model, saved_folder=tmp_path / "saved")
    engine.scheduler.seconds_per_token = 1.0  # so that a file pays
    under_way = engine.request(prompt, Sampling(max_tokens=20), marks=(64,))
    engine.submit(under_way)
    while len(under_way.pieces) < 6:
        engine.step()
    engine.update(new.state_dict())
    read, mixed = run(engine, engine.request(prompt, SHORT, marks=(64,)))[0], under_way.completion()
    before, after = alone(prompt, Sampling(max_tokens=20), old), alone(prompt, SHORT, new)
    assert mixed.logprobs[:6] == before.logprobs[:6] and mixed.logprobs[6:] != before.logprobs[6:]
    assert read.cached == 0 and facts(read) == facts(after)
    following = [*prompt, *mixed.tokens, 7]
    followed = engine.generate([following], SHORT)[0]
    assert facts(followed) == facts(alone(following, SHORT, new))
    following += [*followed.tokens, 7]
    while engine.prefixes.saved.spill():
        pass
    engine.prefixes.saved.folder.close()
    for model in (new, old):
        again = engine_of(model=model, saved_folder=tmp_path / "saved")
        got = again.generate([following], SHORT)[0]
        assert facts(got) == facts(alone(following, SHORT, model))
        assert (got.cached > 0) == (model is new)
        again.prefixes.saved.folder.close()


@pytest.mark.skipif(native().functions is None, reason="torch adds in another order in other chunks")
def test_states_that_are_rounded_as_they_rest_are_kept_as_they_were_read():
    draw, engine = random.Random(0), engine_of(state="int8")
    prompt = words(draw, 60)
    run(engine, engine.request(prompt, SHORT, marks=(40,)))
    following = [*prompt[:40], *words(draw, 9)]
    (got,) = run(engine, engine.request(following, SHORT))
    want = Engine(MODEL, TOKENIZER, max_tokens=320, state="int8").generate([following], SHORT)[0]
    assert got.cached == 40 and facts(got) == facts(want)
