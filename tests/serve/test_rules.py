import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from nautilus.serve.rules import BadTokens, Bias, Penalties, Rule, rules_of
from nautilus.serve.sampling import Sampling
from tests.serve.drawing import draw_one

torch.set_num_threads(1)
V = 8
tokens = st.integers(0, V - 1)
texts = st.lists(tokens, max_size=12)
logits = st.lists(st.floats(-9, 9), min_size=V, max_size=V).map(lambda row: torch.tensor(row, dtype=torch.float64))
sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple), min_size=1, max_size=4)


def biased(logits_V, answer, *, bias, ends, min_tokens):
    values = [value + bias.get(token, 0) for token, value in enumerate(logits_V.tolist())]
    early = len(answer) < min_tokens
    return [-math.inf if early and token in ends else value for token, value in enumerate(values)]


def penalised(logits_V, prompt, answer, *, repetition, presence, frequency):
    values = logits_V.tolist()
    for token in {*prompt, *answer}:
        values[token] = values[token] / repetition if values[token] > 0 else values[token] * repetition
    for token in set(answer):
        values[token] -= presence + frequency * answer.count(token)
    return values


def completed(text, sequences):
    """The tokens with which the text would end with one of the sequences."""
    return {t for t in range(V) if any((*text, t)[-len(bad) :] == bad for bad in sequences)}


def told(rule, answer):
    for token in answer:
        rule.add(token)
    return rule


def of_every_kind(prompt=()):
    return [
        Bias({1: 2.5, 3: -math.inf}, ends=(4,), min_tokens=3),
        BadTokens([(0,), (1, 2), (1, 1, 2)], prompt),
        Penalties(repetition=1.7, presence=0.5, frequency=0.3, prompt=prompt),
    ]


@given(
    logits_V=logits,
    answer=texts,
    bias=st.dictionaries(tokens, st.floats(-100, 100), max_size=4),
    ends=st.sets(tokens, max_size=3),
    min_tokens=st.integers(0, 12),
)
def test_biases_are_added_and_no_end_comes_before_its_time(logits_V, answer, bias, ends, min_tokens):
    rule = told(Bias(bias, ends, min_tokens), answer)
    assert rule.change(logits_V).tolist() == biased(logits_V, answer, bias=bias, ends=ends, min_tokens=min_tokens)


@given(
    logits_V=logits,
    prompt=texts,
    answer=texts,
    repetition=st.sampled_from([0.5, 1.0, 1.3]),
    presence=st.sampled_from([-2.0, 0.0, 0.7]),
    frequency=st.sampled_from([-0.5, 0.0, 1.1]),
)
def test_penalties_are_those_of_their_definition(logits_V, prompt, answer, repetition, presence, frequency):
    how = dict(repetition=repetition, presence=presence, frequency=frequency)
    rule = told(Penalties(**how, prompt=prompt), answer)
    want = penalised(logits_V, prompt, answer, **how)
    assert rule.change(logits_V).tolist() == pytest.approx(want, abs=1e-12)


def test_a_penalised_token_that_may_not_come_still_may_not():
    changed_V = Penalties(repetition=2.0, presence=-2.0, prompt=[0, 1]).change(torch.tensor([-math.inf, 1.0]).double())
    assert changed_V.tolist() == [-math.inf, 0.5]


@pytest.mark.slow  # to import
def test_the_repetition_penalty_is_the_one_of_transformers():
    transformers = pytest.importorskip("transformers")
    logits_V = torch.randn(50, generator=torch.Generator().manual_seed(0))
    prompt, answer = [3, 9, 9, 30], [1, 3, 4]
    theirs = transformers.RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([prompt + answer]), logits_V[None])
    ours = told(Penalties(repetition=1.3, prompt=prompt), answer).change(logits_V.double())
    torch.testing.assert_close(ours.float(), theirs[0])


@settings(max_examples=200)
@given(prompt=texts, answer=texts, sequences=sequences)
def test_exactly_the_tokens_that_would_complete_a_bad_sequence_are_barred(prompt, answer, sequences):
    rule = told(BadTokens(sequences, prompt), answer)
    changed = rule.change(torch.ones(V, dtype=torch.float64))
    assert set((changed == -math.inf).nonzero()[:, 0].tolist()) == completed((*prompt, *answer), sequences)
    assert set(changed.tolist()) <= {1.0, -math.inf}


@given(prompt=texts, seed=st.integers(0, 99), temperature=st.sampled_from([0.0, 1.0]))
def test_no_drawn_answer_holds_a_bad_sequence(prompt, seed, temperature):
    bad = ((0, 0), (1, 2, 1), (3,))
    sampling, answer = Sampling(bad_tokens=bad, temperature=temperature, seed=seed), []
    rules = rules_of(sampling, prompt, ends=(), vocab=5)
    logits_TV = torch.randn(30, 5, generator=torch.Generator().manual_seed(seed))
    for logits_V in logits_TV:
        answer.append(draw_one(logits_V, sampling, len(prompt) + len(answer), rules).token)
        [rule.add(answer[-1]) for rule in rules]
    ends = range(len(prompt) + 1, len(prompt) + len(answer) + 1)
    assert not any(tuple([*prompt, *answer][:end][-len(one) :]) == one for one in bad for end in ends)


@given(logits_V=logits, prompt=texts, before=texts, here=texts, there=texts)
def test_a_fork_and_its_origin_do_not_see_what_the_other_is_told(logits_V, prompt, before, here, there):
    for index, rule in enumerate(of_every_kind(prompt)):
        fork = told(rule, before).fork()
        told(rule, here), told(fork, there)
        for one, answer in ((rule, before + here), (fork, before + there)):
            fresh = told(of_every_kind(prompt)[index], answer)
            assert torch.equal(one.change(logits_V), fresh.change(logits_V)), type(rule).__name__


@given(logits_V=logits, prompt=texts, answer=texts)
def test_rules_change_logits_never_in_place_and_neither_force_nor_end(logits_V, prompt, answer):
    before = logits_V.clone()
    for rule in of_every_kind(prompt):
        told(rule, answer).change(logits_V)
        assert torch.equal(logits_V, before) and rule.forced() is None and not rule.ended


def test_a_sampling_that_asks_for_no_bounds_has_no_rules():
    assert rules_of(Sampling(), [1, 2], ends=(3,), vocab=V) == []


def kinds(prompt=(), **asked):
    return [type(rule) for rule in rules_of(Sampling(**asked), prompt, ends=(3,), vocab=V)]


def test_a_sampling_has_the_rules_it_asks_for_in_their_order():
    assert kinds(min_tokens=1) == [Bias] and kinds(logit_bias={1: 2.0}) == [Bias]
    assert kinds(bad_tokens=((1, 2),)) == [BadTokens]
    for penalty in (dict(repetition_penalty=1.1), dict(presence_penalty=1), dict(frequency_penalty=-1)):
        assert kinds(**penalty) == [Penalties]
    assert kinds(frequency_penalty=1, bad_tokens=((1,),), min_tokens=2) == [Bias, BadTokens, Penalties]


@given(logits_V=logits, prompt=texts, answer=texts)
def test_all_that_a_sampling_asks_for_is_done(logits_V, prompt, answer):
    sampling = Sampling(
        logit_bias={2: 3.0, 5: -100.0}, min_tokens=4, bad_tokens=((6,), (1, 7)), repetition_penalty=1.5,
        presence_penalty=0.25, frequency_penalty=-0.5,
    )  # fmt: skip
    got_V = logits_V
    for rule in rules_of(sampling, prompt, ends=(3, 4, 99), vocab=V):
        got_V = told(rule, answer).change(got_V)
    want = biased(logits_V, answer, bias=sampling.logit_bias, ends=(3, 4), min_tokens=4)
    want_V = torch.tensor(want, dtype=torch.float64)
    want_V[[*completed((*prompt, *answer), sampling.bad_tokens)]] = -math.inf
    want = penalised(want_V, prompt, answer, repetition=1.5, presence=0.25, frequency=-0.5)
    assert got_V.tolist() == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("asked", [dict(logit_bias={V: 1.0}), dict(bad_tokens=((1, V), (0,)))])
def test_a_token_that_the_model_does_not_have_is_an_error_that_names_it(asked):
    with pytest.raises(ValueError, match=rf"sampling.{[*asked][0]} names token {V}, the model knows 0 to {V - 1}"):
        rules_of(Sampling(**asked), [1], ends=(), vocab=V)


# ----- drawing under rules -------------------------------------------------------------------------------------------


class Forcing(Rule):
    def __init__(self, token):
        self.token = token

    def forced(self):
        return self.token


class Barring(Rule):
    def change(self, logits_V):
        return torch.full_like(logits_V, -math.inf)


@given(logits_V=logits, temperature=st.sampled_from([0.0, 1.0]), token=tokens)
def test_a_forced_token_is_taken_undrawn_with_the_log_prob_of_the_model(logits_V, temperature, token):
    rules = [Barring(), Forcing(7), Forcing(token), Forcing(None), Bias({token: -9.0})]
    drawn = draw_one(logits_V, Sampling(temperature=temperature), 4, rules)
    assert drawn.token == token, "the last that forces one counts, whatever others bar"
    assert drawn.logprob == pytest.approx(float(logits_V.log_softmax(0)[token]), abs=1e-12)


@given(logits_V=logits, temperature=st.sampled_from([0.0, 1.0]), top_k=st.integers(0, 3), position=st.integers(0, 99))
def test_rules_change_what_is_drawn_and_not_the_log_prob(logits_V, temperature, top_k, position):
    sampling = Sampling(temperature=temperature, top_k=top_k)
    rules = [Bias({0: 50.0, 3: -3.0}), Penalties(presence=1.0), BadTokens([(0,), (1,)])]
    changed_V = torch.tensor(logits_V.tolist(), dtype=torch.float64)
    changed_V[3] -= 3
    changed_V[:2] = -math.inf
    drawn = draw_one(logits_V, sampling, position, rules)
    assert drawn.token == draw_one(changed_V, sampling, position).token and drawn.token > 1
    assert drawn.logprob == pytest.approx(float(logits_V.log_softmax(0)[drawn.token]), abs=1e-12)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rules_that_leave_no_token_are_an_error_that_names_them(temperature):
    rules = [Bias({}, ends=(0,), min_tokens=3), BadTokens([(1,), (2,)])]
    with pytest.raises(ValueError, match=r"token 12 .*\(Bias, BadTokens\) bar every token"):
        draw_one(torch.zeros(3), Sampling(temperature=temperature), 12, rules)


def test_rules_may_leave_one_token():
    rules = [Bias({}, ends=(0,), min_tokens=1), BadTokens([(1,)])]
    assert draw_one(torch.tensor([5.0, 5.0, -90.0]), Sampling(), 0, rules).token == 2
