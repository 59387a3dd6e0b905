"""Drafts change no answer, whatever they are; they are tried where that pays."""

import random

import pytest
import torch

from nautilus.config import Config, Experts, lay
from nautilus.model.language import Language
from nautilus.ops.cpu.library import native
from nautilus.runtime import UserError
from nautilus.serve import Engine, Sampling
from nautilus.serve.draft.costs import Costs
from nautilus.serve.draft.policy import PATIENCE, Speculation
from nautilus.serve.draft.suffix import Draft
from tests.serve.test_scheduler import ATTENTION, MAMBA, TOKENIZER, VOCAB, assert_nothing_is_held, facts

torch.set_num_threads(1)
NATIVE = pytest.mark.skipif(native().functions is None, reason="torch adds in another order in other chunks")
DRAFTS = 8


def model_of(pattern, dtype=torch.float32):
    layers = lay(pattern, MAMBA, ATTENTION, Experts(experts=6, active=2, hidden=32))
    model = Language(Config(vocab=VOCAB, width=64, positions=320, layers=layers), dtype=dtype).initialise(3)
    model.head_weight.data *= 6  # so that greedy answers run into circles, which can be copied
    return model.requires_grad_(False).eval()


MODELS = {pattern: model_of(pattern) for pattern in ("ME*M", "MM", "*E*")}


def engine_of(model, drafts=DRAFTS, *, cheap=True, **limits):
    """cheap: passes over any number of tokens are said to cost the same, so that all drafts are tried."""
    engine = Engine(model, TOKENIZER, **{"max_tokens": 300, "rows": 3} | limits, drafts=drafts)
    if drafts and cheap:
        make_cheap(engine.speculation)
    return engine


def make_cheap(speculation):
    costs = speculation.costs.seconds, speculation.steps.seconds
    costs[0].update(dict.fromkeys(range(1, 64), 1.0))
    costs[1].update({rows: float(rows) for rows in range(1, 9)})
    speculation.costs.add = speculation.steps.add = lambda *_: None


def prompts_of(seed, count=4):
    draw = random.Random(seed)
    for _ in range(count):
        text = [draw.randrange(VOCAB) for _ in range(draw.randint(3, 30))]
        yield text + text[: draw.randint(0, len(text))]


SAMPLINGS = [
    Sampling(temperature=0, max_tokens=60),
    Sampling(temperature=0.3, seed=4, max_tokens=40),
    Sampling(temperature=0, max_tokens=50, repetition_penalty=1.1, top_logprobs=3),
    Sampling(temperature=0.2, seed=1, top_p=0.9, max_tokens=30, presence_penalty=0.2, min_tokens=9),
]


@NATIVE
@pytest.mark.parametrize("pattern", MODELS)
@pytest.mark.parametrize("seed", range(3))
def test_answers_are_those_without_drafts(pattern, seed):
    prompts = [*prompts_of(seed)]
    plain, engine = engine_of(MODELS[pattern], 0), engine_of(MODELS[pattern])
    for _ in range(2):  # the second time the answers are known to the tenant
        expected, got = (one.generate(prompts, SAMPLINGS) for one in (plain, engine))
        assert [facts(one) for one in got] == [facts(one) for one in expected]
    counts = engine.speculation.counts
    assert counts.accepted > 60 and counts.drafts < counts.accepted, counts
    assert_nothing_is_held(engine)
    assert not engine.speculation.known and not engine.speculation.asked


class Adversary:
    """In the place of what is copied: drafts that are right, wrong, random, or right for some tokens.

    tokens_of(request): the answer that it will have."""

    def __init__(self, kind, tokens_of):
        self.kind, self.tokens_of, self.draw = kind, tokens_of, random.Random(0)

    def best(self, request, known, most):
        at = len(request.tokens) - request.prompt
        right = [*self.tokens_of(request)[at : at + most]]
        made = {
            "right": right,
            "wrong": [(token + 1) % VOCAB for token in right],
            "random": [self.draw.randrange(VOCAB) for _ in range(self.draw.randint(1, most))],
            "half": [token if self.draw.random() < 0.7 else (token + 1) % VOCAB for token in right],
        }[self.kind]
        return draft_of(made) if made else None

    def speak(self, speculation):
        speculation.best, speculation.truth = self.best, lambda *_: 1.0


def draft_of(tokens):
    return Draft(tokens=tuple(tokens), probs=(1.0,) * len(tokens), match=20, places=1, kinds=1, entropy=0.0, age=1)


@NATIVE
@pytest.mark.parametrize("pattern", MODELS)
@pytest.mark.parametrize("kind", ["right", "wrong", "random", "half"])
def test_no_draft_however_bad_changes_an_answer(kind, pattern):
    prompts = [*prompts_of(7)]
    expected = engine_of(MODELS[pattern], 0).generate(prompts, SAMPLINGS)
    answers = {tuple(one.prompt): one.tokens for one in expected}
    engine = engine_of(MODELS[pattern], saved_gb=1e-2, chunk=11)
    Adversary(kind, lambda request: answers.get(tuple(request.tokens[: request.prompt]), ())).speak(engine.speculation)
    got = engine.generate(prompts, SAMPLINGS)
    assert [facts(one) for one in got] == [facts(one) for one in expected]
    counts = engine.speculation.counts
    assert counts.drafts and (counts.accepted == counts.drafted) == (kind == "right")
    assert counts.accepted > 50 or kind in ("wrong", "random")
    for one, sampling in zip(got, SAMPLINGS, strict=True):  # states that were kept are those of the tokens that stayed
        following = [*one.prompt, *one.tokens, 5]
        again = engine.generate([following], sampling)[0]
        assert again.cached == len(following) - 2
        assert facts(again) == facts(engine_of(MODELS[pattern], 0).generate([following], sampling)[0])
    assert engine.scheduler.idle and len(engine.berths.slots) == engine.rows


@NATIVE
def test_stop_strings_limits_and_put_off_requests_end_where_they_would_have_ended():
    model, prompts = MODELS["ME*M"], [prompt[:9] for prompt in prompts_of(2, 6)]
    samplings = [Sampling(temperature=0, max_tokens=size) for size in (1, 2, 3, 60, 90, 120)]
    plain = engine_of(model, 0).generate(prompts, samplings)
    tight = engine_of(model, max_tokens=130, cache_gb=1e-9, rows=6)
    for _ in range(2):
        assert [facts(one) for one in tight.generate(prompts, samplings)] == [facts(one) for one in plain]
    assert tight.scheduler.preempted > 0 and tight.speculation.counts.accepted > 0
    text = plain[-1].text
    stop = text[len(text) // 2 :][:2]
    stopping = Sampling(temperature=0, max_tokens=120, stop=(stop,))
    assert engine_of(model).generate(prompts, stopping) == engine_of(model, 0).generate(prompts, stopping)


def test_the_length_that_is_tried_is_the_one_that_pays_most():
    speculation = Speculation(most=32)
    speculation.steps.seconds[1] = 1.0
    speculation.best = lambda *_: draft_of([1] * 32)
    speculation.truth = lambda *_: 0.9

    def proposed(slope):
        speculation.costs.seconds = {1 + size: 1.0 + slope * size for size in range(33)}
        speculation.known.clear()
        return len(speculation.propose(request(), 1, 32))

    def best(slope):
        rate = lambda size: (1 + sum(0.9**at for at in range(1, size + 1))) / (1 + slope * size)  # noqa: E731
        sizes = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
        found = max(sizes, key=rate)
        return found if rate(found) > 1.03 else 0

    request = lambda: engine_of(MODELS["MM"]).request([1, 2, 3], Sampling())  # noqa: E731
    assert [proposed(slope) for slope in (0.0, 0.05, 0.3, 0.6, 0.85, 2.0)] == [
        best(slope) for slope in (0.0, 0.05, 0.3, 0.6, 0.85, 2.0)
    ]
    assert best(0.0) == 32 and best(2.0) == 0 and 0 < best(0.3) < 12


@pytest.mark.parametrize(("step_seconds", "least", "most"), [(1e-9, 15, 25), (1e9, 500, 500)])
def test_a_request_without_use_for_drafts_is_looked_at_as_often_as_it_costs_little(step_seconds, least, most):
    speculation, looked = Speculation(most=8), []
    speculation.steps.seconds[1] = step_seconds
    speculation.best = lambda *_: looked.append(1)
    request = engine_of(MODELS["MM"]).request([1, 2, 3], Sampling())
    assert all(speculation.propose(request, 1, 32) == () for _ in range(1000))
    assert least <= len(looked) <= most and 1000 // (PATIENCE + 1) == 15


@pytest.mark.parametrize("two", [0.5, 1.0])
def test_where_a_row_more_seems_to_take_no_time_nothing_is_tried(two):
    speculation = Speculation(most=8)
    make_cheap(speculation)
    speculation.best = lambda *_: draft_of([1] * 8)
    request = engine_of(MODELS["MM"]).request([1, 2, 3], Sampling())
    assert len(speculation.propose(request, 2, 32)) == 8
    speculation.steps.seconds[2] = two
    assert speculation.propose(request, 2, 32) == ()


def test_costs_between_two_sizes_lie_on_a_line_and_outside_they_are_not_known():
    costs, calls = Costs(), []
    costs.measure([1, 3], calls.append)
    assert calls == [1] * 5 + [3] * 5 and costs.seconds[3] >= costs.seconds[1] > 0
    costs.seconds = {1: 1.0, 3: 2.0}
    assert costs.of(2) == 1.5 and costs.of(0) is None and costs.of(4) is None
    costs.add(1, 100.0)
    assert costs.of(1) == pytest.approx(1.05), "one odd timing moves it little"


def test_costs_are_measured_before_the_first_request_and_drafts_of_bad_sizes_refused():
    engine = engine_of(MODELS["ME*M"], 4, cheap=False)
    engine.generate([[1, 2, 3]], Sampling(max_tokens=3))
    assert set(engine.speculation.costs.seconds) >= {1, 2, 3, 4, 5} and engine.speculation.steps.seconds[1] > 0
    with pytest.raises(UserError, match="drafts=64 was asked for"):
        engine_of(MODELS["MM"], 64)
    with pytest.raises(ValueError, match="take states in fp32"):
        engine_of(MODELS["MM"], 4, state="int8")


def test_answers_are_copied_from_within_a_tenant_only():
    model, prompt = MODELS["ME*M"], [*range(40, 60)]
    sampling = Sampling(temperature=1.0, seed=3, max_tokens=40)
    engine = engine_of(model)

    def accepted(tenant):
        before = engine.speculation.counts.accepted
        request = engine.request(prompt, sampling, tenant=tenant)
        engine.submit(request)
        while not engine.scheduler.idle:
            engine.step()
        return engine.speculation.counts.accepted - before

    first, again, other = accepted("a"), accepted("a"), accepted("b")
    assert again > first + 20 and other == first
