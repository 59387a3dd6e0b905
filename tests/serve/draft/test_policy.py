"""Drafts change no answer, whatever they are; they are tried where that pays."""

import random
from types import SimpleNamespace

import pytest
import torch

from nautilus.config import Config, Experts, lay
from nautilus.model.language import Language
from nautilus.ops.cpu.library import native
from nautilus.runtime import UserError
from nautilus.serve import Engine, Sampling
from nautilus.serve.draft.copies import Copied
from nautilus.serve.draft.costs import Costs
from nautilus.serve.draft.features import Spelling
from nautilus.serve.draft.policy import PATIENCE, SPREAD, Judge, Speculation
from nautilus.serve.draft.proposal import Candidate, Counts
from nautilus.serve.draft.suffix import Draft
from nautilus.serve.rules import Rule
from tests.serve.reliability.parts import hybrid
from tests.serve.test_scheduler import ATTENTION, MAMBA, TOKENIZER, VOCAB, assert_nothing_is_held, facts

torch.set_num_threads(1)
NATIVE = pytest.mark.skipif(native().functions is None, reason="torch adds in another order in other chunks")
DRAFTS = 8


def model_of(pattern, dtype=torch.float32, positions=320):
    layers = lay(pattern, MAMBA, ATTENTION, Experts(experts=6, active=2, hidden=32))
    model = Language(Config(vocab=VOCAB, width=64, positions=positions, layers=layers), dtype=dtype).initialise(3)
    model.head_weight.data *= 6  # so that greedy answers run into circles, which can be copied
    return model.requires_grad_(False).eval()


MODELS = {pattern: model_of(pattern) for pattern in ("ME*M", "MM", "*E*")}
LONG = model_of("*E*", positions=8192)


def engine_of(model, drafts=DRAFTS, *, cheap=True, **limits):
    """cheap: passes over any number of tokens are said to cost the same, so that all drafts are tried."""
    engine = Engine(model, TOKENIZER, **{"max_tokens": 300, "rows": 3} | limits, drafts=drafts)
    if drafts and cheap:
        make_cheap(engine.speculation)
    return engine


def make_cheap(speculation):
    price(speculation, dict.fromkeys(range(1, 64), 1.0))


def price(speculation, seconds):
    speculation.costs.seconds, speculation.costs.line = seconds, None
    speculation.costs.each = speculation.costs.apiece = 0.0
    speculation.costs.add = speculation.drafting.add = lambda *_: None
    speculation.drafting.seconds, speculation.drafting.line = dict.fromkeys(range(1, 9), 0.0), None


def total(engine):
    counts = engine.speculation.counts.values()
    return Counts(**{name: sum(getattr(one, name) for one in counts) for name in ("drafts", "drafted", "accepted")})


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
    counts = total(engine)
    assert counts.accepted > 60 and counts.drafts < counts.accepted, counts
    assert_nothing_is_held(engine)
    assert not engine.speculation.known and not engine.speculation.copies.own


class Adversary:
    """In the place of what is copied: drafts that are right, wrong, random, or right for some tokens.

    tokens_of(request): the answer that it will have."""

    def __init__(self, kind, tokens_of):
        self.kind, self.tokens_of, self.draw = kind, tokens_of, random.Random(0)

    def candidates(self, request):
        at = len(request.tokens) - request.prompt
        most = min(self.speculation.most, request.limit - len(request.tokens) - 1) if not request.apart else 0
        self.speculation.of(request)
        right = [*self.tokens_of(request)[at : at + most]] if most > 0 else []
        made = {
            "right": right,
            "wrong": [(token + 1) % VOCAB for token in right],
            "random": [self.draw.randrange(VOCAB) for _ in range(self.draw.randint(1, most))] if most > 0 else [],
            "half": [token if self.draw.random() < 0.7 else (token + 1) % VOCAB for token in right],
        }[self.kind]
        return [candidate_of(made)] if made else []

    def speak(self, speculation):
        speculation.candidates, self.speculation = self.candidates, speculation


class Mixed(Adversary):
    """Now such a draft, now one of the block, now none."""

    def candidates(self, request):
        kind = self.draw.choice(["copied", "block", "none"])
        if kind == "copied":
            return super().candidates(request)
        room = min(4, request.limit - len(request.tokens) - 1) if not request.apart else 0
        self.speculation.of(request)
        return [Candidate(source="mtp", survival=[1.0] * room)] if kind == "block" and room > 0 else []


def candidate_of(tokens, rate=1.0):
    named = {"match": 20, "places": 1, "kinds": 1, "entropy": 0.0, "age": 1}
    draft = Draft(tokens=tuple(tokens), probs=(1.0,) * len(tokens), **named)
    survival = [rate ** (at + 1) for at in range(len(tokens))]
    copied = Copied(draft=draft, origin="own")
    return Candidate(source="cache", survival=survival, tokens=draft.tokens, copied=copied)


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
    counts = total(engine)
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
    assert tight.scheduler.preempted > 0 and total(tight).accepted > 0
    text = plain[-1].text
    stop = text[len(text) // 2 :][:2]
    stopping = Sampling(temperature=0, max_tokens=120, stop=(stop,))
    assert engine_of(model).generate(prompts, stopping) == engine_of(model, 0).generate(prompts, stopping)


def running(engine, prompts):
    """Requests that have read their prompts, with the first token of their answers."""
    requests = [engine.request(prompt, Sampling(max_tokens=200)) for prompt in prompts]
    for request in requests:
        engine.submit(request)
    while engine.step() and not all(request.pieces for request in requests):
        pass
    return requests


@pytest.mark.parametrize(("slope", "tokens"), [(0.0, 16), (0.1, 8), (0.3, 4), (0.6, 2), (0.95, 0)])
def test_the_length_that_is_tried_is_the_one_that_pays_most(slope, tokens):
    engine = engine_of(MODELS["MM"], 16)
    (request,), speculation = running(engine, [[1, 2, 3]]), engine.speculation
    price(speculation, {1 + size: 1.0 + slope * size for size in range(33)})
    speculation.candidates = lambda request: [candidate_of([1] * 16, rate=0.85)]
    rate = lambda size: (1 + sum(0.85**at for at in range(1, size + 1))) / (1 + slope * size)  # noqa: E731
    best = max((1, 2, 3, 4, 6, 8, 12, 16), key=rate)
    proposals = speculation.propose([request])
    assert len(proposals[request].tokens if proposals else ()) == (best if rate(best) > 1.03 else 0)
    assert tokens == (best if rate(best) > 1.03 else 0)


def test_requests_that_run_together_share_the_tokens_of_a_pass_out():
    engine = engine_of(MODELS["MM"], 16)
    requests, speculation = running(engine, [[1, 2, 3], [4, 5], [6]]), engine.speculation
    price(speculation, {size: 1.0 + 0.2 * size for size in range(1, 64)})
    rates = dict(zip(requests, (0.95, 0.6, 0.1), strict=True))
    speculation.candidates = lambda request: [candidate_of([1] * 16, rate=rates[request])]
    sizes = [len(one.tokens) for one in speculation.propose(requests).values()]
    assert len(sizes) == 2 and sizes[0] > sizes[1] > 0, "none for the one of which little comes true"


@pytest.mark.parametrize(("step_seconds", "least", "most"), [(1e-9, 15, 25), (1e9, 500, 500)])
def test_a_request_without_use_for_drafts_is_looked_at_as_often_as_it_costs_little(step_seconds, least, most):
    engine, looked = engine_of(MODELS["MM"]), []
    (request,), speculation = running(engine, [[1, 2, 3]]), engine.speculation
    price(speculation, {1: step_seconds, 9: 9 * step_seconds})
    speculation.copies.draft = lambda *_: looked.append(1) or candidate_of([5], rate=0.0).copied
    speculation.of(request).trust.survival = lambda draft: [0.0]
    assert all(speculation.propose([request]) == {} for _ in range(1000))
    assert least <= len(looked) <= most and 1000 // (PATIENCE + 1) == 15


def test_drafts_that_cost_more_than_they_bring_pause():
    """Whatever is expected of them: what counts is what they took."""
    engine = engine_of(MODELS["MM"], 4)
    (request,), speculation = running(engine, [[1, 2, 3]]), engine.speculation
    speculation.copies.draft = lambda *_: candidate_of([5, 6, 7, 8]).copied
    speculation.of(request).trust.survival = lambda draft: [1.0] * 4
    tried = []
    for _ in range(300):
        proposals = speculation.propose([request])
        tried.append(bool(proposals))
        if proposals:
            speculation.began -= 3.0  # the cycle took as long as three steps
            speculation.learn(request, proposals[request], 1)
    assert all(tried[:30]) and sum(tried) < 150


def test_a_rule_that_leaves_no_choice_is_a_draft():
    engine = engine_of(MODELS["ME*M"])
    sampling = Sampling(temperature=0, max_tokens=40)

    class Certain(Rule):
        run = (9, 8, 7, 6, 5)

        def __init__(self):
            self.out = 0

        def forced(self):
            return self.run[self.out] if self.out < 5 else None

        def coming(self):
            return self.run[self.out :]

        def add(self, token):
            self.out += 1

    requests = [one.request([1, 2, 3], sampling, [Certain()]) for one in (engine, engine_of(MODELS["ME*M"], 0))]
    plain = engine_of(MODELS["ME*M"], 0)
    answers = [[*one.follow(request)] for one, request in zip((engine, plain), requests, strict=True)]
    assert [piece.token for piece in answers[0]] == [piece.token for piece in answers[1]]
    assert [piece.source for piece in answers[0][:5]] == ["plain", *["grammar"] * 4]
    assert engine.speculation.counts["grammar"].accepted == 4


def test_costs_between_two_sizes_lie_on_a_line_and_outside_they_are_not_known():
    costs, calls = Costs(), []
    costs.measure([1, 3], calls.append)
    assert calls == [1, 1, 3, 3] + [1, 3] * 9 and costs.of(3) >= costs.of(1) > 0
    costs.seconds, costs.line = {1: 1.0, 3: 2.0}, None
    assert costs.of(2) == 1.5 and costs.of(0) is None and costs.of(5) == 3.0
    costs.add(1, 100.0)
    assert costs.of(1) == pytest.approx(1.05 * 1.02), "one odd timing moves it little"
    assert costs.of(3) == pytest.approx(1.05 * 2.0), "but all sizes alike"
    for _ in range(100):
        costs.add(1, 4.0)
        costs.add(3, 8.0)
    assert costs.of(1) == pytest.approx(4.0, rel=0.05) and costs.of(3) == pytest.approx(8.0, rel=0.05)
    costs.add(2, 0.1)
    assert costs.of(2) == costs.of(1), "more tokens are never less work"


def test_tokens_before_a_pass_make_it_longer(monkeypatch):
    """By what is read once for each request, and by what each of its tokens is compared with."""
    timed = lambda run, sizes: {size: run(size) for size in sizes}
    monkeypatch.setattr("nautilus.serve.draft.costs.timed", timed)
    costs = Costs()
    costs.measure([1, 5], {1: 1.0, 5: 3.0}.get)
    costs.measure_context(100, 5, {1: 1.0 + 100 * 0.003, 5: 3.0 + 100 * 0.007}.get)
    assert (costs.each, costs.apiece) == pytest.approx((0.002, 0.001))
    assert costs.of(1) == 1.0
    costs.context = 500
    assert costs.of(1) == pytest.approx(1 + 500 * 0.003) and costs.of(5) == pytest.approx(3 + 500 * 0.007)
    costs.rows = 3
    assert costs.of(5) == pytest.approx(3 + 500 * 0.011)
    costs.add(5, 3 + 500 * 0.011)
    assert costs.pace == pytest.approx(1) and costs.seconds[5] == pytest.approx(3), "as foretold: nothing is learned"
    costs.measure_context(100, 5, {1: 0.9, 5: 2.0}.get)
    assert costs.each == costs.apiece == 0, "nothing is faster for it, whatever a noisy machine says"


def test_costs_are_measured_far_behind_the_beginning_too_where_requests_may_be_long(monkeypatch):
    asked = []
    monkeypatch.setattr(Costs, "measure_context", lambda self, context, size, run: asked.append((context, size)))
    engine_of(MODELS["*E*"], 4, cheap=False)
    assert not asked, "300 tokens are nothing"
    Engine(LONG, TOKENIZER, max_tokens=2000, rows=1, drafts=4)
    assert asked == [(2000 - 5 - 8, 5)]
    monkeypatch.undo()
    long = Engine(LONG, TOKENIZER, max_tokens=6000, rows=1, drafts=4)
    assert long.speculation.costs.each >= 0 and long.speculation.costs.apiece >= 0
    assert len(long.generate([[1, 2, 3]], Sampling(temperature=0, max_tokens=20))[0].tokens) == 20
    assert_nothing_is_held(long)


def test_costs_are_measured_before_the_first_request_and_drafts_of_bad_sizes_refused():
    engine = engine_of(MODELS["ME*M"], 4, cheap=False)
    assert set(engine.speculation.costs.seconds) == {1, 2, 3, 4, 5} and engine.speculation.costs.of(1) > 0
    with pytest.raises(UserError, match="drafts=64 was asked for"):
        engine_of(MODELS["MM"], 64)
    with pytest.raises(ValueError, match="take states in fp32"):
        engine_of(MODELS["MM"], 4, state="int8")


def test_answers_are_copied_from_within_a_tenant_only():
    model, prompt = MODELS["ME*M"], [*range(40, 60)]
    sampling = Sampling(temperature=1.0, seed=3, max_tokens=40)
    engine = engine_of(model)

    def accepted(tenant):
        before = total(engine).accepted
        request = engine.request(prompt, sampling, tenant=tenant)
        engine.submit(request)
        while not engine.scheduler.idle:
            engine.step()
        return total(engine).accepted - before

    first, again, other = accepted("a"), accepted("a"), accepted("b")
    assert again > first + 20 and other == first


@NATIVE
def test_a_block_that_nobody_asks_follows_no_longer(monkeypatch):
    """What it has still to be told of takes memory for every token, and must not grow with an answer."""
    monkeypatch.setattr("nautilus.serve.draft.policy.FOLLOWED", 100)
    engine, most = Engine(hybrid(mtp=True), TOKENIZER, max_tokens=300, drafts=4), []
    engine.speculation.choose = lambda *_: {}
    request = engine.request([1, 2, 3], Sampling(max_tokens=290, ignore_eos=True))
    plain = Engine(hybrid(), TOKENIZER, max_tokens=300).generate([[1, 2, 3]], request.sampling)[0]
    engine.submit(request)
    while not request.finished:
        most.append(request.berth and request.berth.behind and len(request.berth.behind))
        engine.step()
    counts = [count for count in most if count]
    assert 98 <= max(counts) <= 100 + PATIENCE + 1 and most[-1] is None
    assert request.completion().tokens == plain.tokens
    again = engine.generate([[5, 4, 3]], Sampling(max_tokens=20, ignore_eos=True))[0]
    assert len(again.tokens) == 20


@NATIVE
def test_what_a_block_has_yet_to_be_told_counts_against_its_drafts():
    engine = Engine(hybrid(mtp=True), TOKENIZER, max_tokens=300, drafts=4)
    make_cheap(engine.speculation)
    request = engine.request([1, 2, 3], Sampling(max_tokens=100, ignore_eos=True))
    engine.submit(request)
    while len(request.tokens) < 10:
        engine.step()
    offered = lambda: next(one for one in engine.speculation.candidates(request) if one.source == "mtp")
    engine.speculation.of(request).asked = len(request.tokens) - 21
    engine.speculation.catching = 0.0
    assert offered().late == 0
    engine.speculation.catching = 0.8
    assert offered().late == pytest.approx(20 * 0.8 / SPREAD)
    assert offered().seconds(engine.speculation.drafting, 2) == pytest.approx(1.0)
    request.berth.behind = None
    assert all(one.source != "mtp" for one in engine.speculation.candidates(request))
    engine.cancel(request)


@NATIVE
@pytest.mark.parametrize("drafts_pay", [False, True])
def test_a_block_is_told_of_the_end_of_an_answer_only_if_it_drafted_for_it(drafts_pay):
    engine, told = Engine(hybrid(mtp=True), TOKENIZER, max_tokens=300, drafts=4, saved_gb=0.01), []
    if drafts_pay:
        make_cheap(engine.speculation)
        engine.speculation.copies.draft = lambda *_: None  # the block's own drafts alone
    else:
        engine.speculation.choose = lambda *_: {}
    catch_up = engine.speculation.chain.catch_up

    def watched(requests, *, leaving=False):
        told.append(leaving)
        return catch_up(requests, leaving=leaving)

    engine.speculation.chain.catch_up = watched
    how = Sampling(max_tokens=40, ignore_eos=True)
    first = engine.generate([[1, 2, 3]], how)[0]
    assert (True in told) == drafts_pay
    more = [1, 2, 3, *first.tokens, 9, 8]
    assert engine.generate([more], how)[0].tokens == Engine(hybrid(), TOKENIZER).generate([more], how)[0].tokens


def test_no_copied_draft_is_longer_than_what_its_predictor_knows():
    predictor = SimpleNamespace(header=SimpleNamespace(grid=(1, 2, 4)), survival=lambda _, length: [0.9] * length)

    def longest(judge):
        engine = engine_of(MODELS["ME*M"])
        engine.speculation = Speculation(engine.forward, DRAFTS, judge=judge)
        request = engine.request([*range(5, 25), *range(5, 25), 5], Sampling(max_tokens=30))
        (offered,) = engine.speculation.candidates(request)
        return len(offered.tokens)

    assert longest(Judge(predictor=predictor, spelling=Spelling(TOKENIZER))) == 4
    assert longest(None) == DRAFTS
