"""What a prompt costs is what the same tokens cost as an answer, and what held-out loss finds, in any chunks."""

import dataclasses
import math
import random

import pytest
import torch

from nautilus.eval.loss import document_nats
from nautilus.model.language import Language
from nautilus.ops.cpu.library import native
from nautilus.presets import preset, shrink
from nautilus.runtime import UserError
from nautilus.serve import Engine, Sampling
from tests.serve.test_prefixes import audit, engine_of, run, words
from tests.serve.test_scheduler import MODEL, TOKENIZER, VOCAB, assert_nothing_is_held
from tests.serve.test_scheduler import engine_of as small_engine

torch.set_num_threads(1)
ONE = Sampling(max_tokens=1, temperature=0)


def scores(engine, prompt, tops=1, sampling=ONE, **more):
    request = engine.request(prompt, sampling, prompt_logprobs=tops, **more)
    run(engine, request)
    return request.pieces[0].prompt


def nats(model, prompt):
    """By the measure of held-out loss; the first token stands before the text."""
    return document_nats(model, [prompt[1:]], start=prompt[0])[0]


@pytest.mark.parametrize("name", ["lightning", "super", "llama_3_1_8b"])
def test_they_are_those_of_held_out_loss(name):
    config = dataclasses.replace(shrink(preset(name)), vocab=VOCAB)
    model = Language(config, dtype=torch.float64).initialise(3).requires_grad_(False).eval()
    model.head_weight.data *= 12
    prompt = words(random.Random(1), 70)
    told = scores(Engine(model, TOKENIZER, chunk=16), prompt)
    assert [one.token for one in told] == prompt and math.isnan(told[0].logprob) and told[0].top == ()
    assert [-one.logprob for one in told[1:]] == pytest.approx(nats(model, prompt).tolist(), abs=1e-9)


def test_they_are_those_of_held_out_loss_in_float32():
    prompt = words(random.Random(2), 90)
    told = scores(engine_of(), prompt)
    assert [-one.logprob for one in told[1:]] == pytest.approx(nats(MODEL, prompt).tolist(), abs=2e-5)


def same(logprobs):
    """The same bits; where torch computes, float32 logits of up to 40 summed in another order: 2^-24 x 40 x 20."""
    return [*logprobs] if native().functions is not None else pytest.approx([*logprobs], abs=5e-5)


def test_an_answer_that_is_scored_afterwards_costs_what_it_was_said_to():
    engine = engine_of(chunk=48)
    prompt = words(random.Random(3), 60)
    answer = engine.generate([prompt], Sampling(max_tokens=40, seed=1))[0]
    told = scores(engine, [*prompt, *answer.tokens], tops=3)[len(prompt) :]
    assert [one.logprob for one in told] == same(answer.logprobs)
    audit(engine)


@pytest.mark.parametrize("chunk", [3, 64])
def test_chunks_and_what_is_known_of_the_prompt_change_no_bit(chunk, monkeypatch):
    monkeypatch.setattr("nautilus.serve.forward.ELEMENTS", 20 * VOCAB)  # several blocks of logits in a chunk
    prompt, engine = words(random.Random(4), 100), engine_of(chunk=chunk)
    want = scores(engine_of(), prompt, tops=5)
    for _ in range(2):
        got = scores(engine, prompt, tops=5, marks=(48,))
        if native().functions is not None:
            assert repr(got) == repr(want)  # nan is not nan
        assert [one.token for one in got] == prompt
    assert engine.generate([prompt], ONE)[0].cached == 48, "it was kept, and scores did not go on from it"


def test_the_alternatives_are_the_most_probable_tokens_best_first():
    prompt = words(random.Random(5), 40)
    logprob_TV = MODEL(torch.tensor([prompt]))[0][0].double().log_softmax(-1)
    for tops in (0, 1, 4):
        told = scores(engine_of(), prompt, tops=tops)
        for one, row_V in zip(told[1:], logprob_TV[:-1], strict=True):
            best = row_V.topk(max(tops, 1))
            assert [token for token, _ in one.top] == best.indices.tolist()[:tops]
            assert [value for _, value in one.top] == pytest.approx(best.values.tolist()[:tops], abs=1e-5)
            assert tops != 1 or (one.token == one.top[0][0]) == (one.logprob == one.top[0][1]), "greedy, by equality"


def test_a_prompt_may_be_scored_without_an_answer():
    engine, prompt = engine_of(), words(random.Random(6), 33)
    request = engine.request(prompt, ONE, prompt_logprobs=0, answer=False)
    (done,) = run(engine, request)
    assert done.tokens == () and done.finish_reason == "length" and len(request.pieces[0].prompt) == 33
    audit(engine)


def test_scores_survive_being_put_off():
    draw = random.Random(7)
    prompts = [words(draw, 50) for _ in range(6)]
    engine, how = small_engine(rows=5, pages=10, chunk=7, step_seconds=0.0), Sampling(max_tokens=40, ignore_eos=True)
    requests = [engine.request(prompt, how, prompt_logprobs=1) for prompt in prompts]
    run(engine, *requests)
    assert engine.scheduler.preempted > 0
    for prompt, request in zip(prompts, requests, strict=True):
        want = scores(small_engine(rows=1), prompt)
        got = request.pieces[0].prompt
        assert [one.token for one in got] == prompt and not any(piece.prompt for piece in request.pieces[1:])
        assert [one.logprob for one in got[1:]] == same(one.logprob for one in want[1:])
    assert_nothing_is_held(engine)


def test_a_prompt_without_numbers_is_an_error_of_its_own(monkeypatch):
    engine, plain = engine_of(), MODEL.head
    prompts = [words(random.Random(8), 30), words(random.Random(9), 20)]
    spoil = lambda hidden: plain(hidden) * (float("nan") if hidden.shape[1] == 30 else 1)
    monkeypatch.setattr(MODEL, "head", spoil)
    bad, good = (engine.request(prompt, ONE, prompt_logprobs=1) for prompt in prompts)
    run(engine, bad, good)
    with pytest.raises(UserError, match="log-prob of token 1 of the prompt was asked for, .* NaN"):
        bad.raise_error()
    assert len(good.pieces[0].prompt) == 20 and good.error is None
    audit(engine)
