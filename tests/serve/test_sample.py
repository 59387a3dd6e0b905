import dataclasses
import math
import re
from fractions import Fraction

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from nautilus.ops.draw import uniform
from nautilus.serve import sample
from nautilus.serve.rules import Bias
from nautilus.serve.sample import candidates, draw
from nautilus.serve.sampling import VALID, Sampling
from tests.serve.drawing import draw_one

torch.set_num_threads(1)
WHOLE = ("top_k", "seed", "max_tokens", "min_tokens", "thinking_grace", "top_logprobs")
REAL = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
CHI_SQUARE_7 = 24.3  # the 0.1 % point with 7 degrees of freedom

# Whole numbers of halvings: probabilities are ratios of small integers, so that the laws can be checked exactly.
halvings = st.lists(st.integers(-6, 0), min_size=1, max_size=9)


def logits_of(powers):
    return torch.tensor(powers, dtype=torch.float64) * math.log(2)


def by_definition(powers, *, top_k=0, top_p=1.0, min_p=0.0):
    """The filters in exact arithmetic, one at a time, over tokens ranked by probability, then id."""
    weight = {token: Fraction(2) ** power for token, power in enumerate(powers)}
    rank = sorted(weight, key=lambda token: (-weight[token], token))
    kept = rank[: top_k or None]
    mass, held = sum(weight[token] for token in kept), Fraction(0)
    for count, token in enumerate(kept, 1):
        held += weight[token]
        if held >= Fraction(top_p) * mass:
            kept = kept[:count]
            break
    return sorted(token for token in kept if weight[token] >= Fraction(min_p) * weight[kept[0]])


@settings(max_examples=200, deadline=None)
@given(
    powers=halvings,
    top_k=st.integers(0, 10),
    # 13 / 2^k-style shares never tie with a sum of powers of two by rounding alone
    top_p=st.sampled_from([0.0137, 0.21, 0.43, 0.61, 0.83, 0.987, 1.0]),
    min_p=st.sampled_from([0.0, 0.03, 0.13, 0.3, 0.7, 1.0]),
    pool=st.sampled_from([1, 2, 4, 1024]),
)
def test_the_filters_keep_what_their_definition_says(powers, top_k, top_p, min_p, pool):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "POOL", pool)
        chosen = Sampling(top_k=top_k, top_p=top_p, min_p=min_p)
        id_K, probs_K = candidates(logits_of(powers), chosen)
    assert id_K.tolist() == by_definition(powers, top_k=top_k, top_p=top_p, min_p=min_p)
    want = torch.tensor([2.0 ** powers[token] for token in id_K.tolist()], dtype=torch.float64)
    torch.testing.assert_close(probs_K / probs_K.sum(), want / want.sum())


@given(powers=halvings, top_p=st.floats(0.01, 1))
def test_top_p_keeps_the_smallest_set_that_reaches_the_share(powers, top_p):
    id_K, _ = candidates(logits_of(powers), Sampling(top_p=top_p))
    probs_V = logits_of(powers).softmax(0)
    share_K = probs_V[id_K].sort(descending=True).values
    assert share_K.sum() >= top_p - 1e-12, "reaches it"
    assert share_K[:-1].sum() < top_p + 1e-12, "and would not without its last member"
    left_out = probs_V[[token not in id_K for token in range(len(powers))]]
    assert left_out.numel() == 0 or left_out.max() <= share_K[-1], "no more probable token is left out"


@given(powers=halvings, temperature=st.sampled_from([0.25, 0.5, 1.0, 2.0]), top_p=st.sampled_from([0.43, 0.83]))
def test_temperature_comes_before_the_filters(powers, temperature, top_p):
    warm, _ = candidates(logits_of(powers), Sampling(temperature=temperature, top_p=top_p))
    scaled, _ = candidates(logits_of(powers) / temperature, Sampling(top_p=top_p))
    assert warm.tolist() == scaled.tolist()


def test_top_p_counts_the_share_of_what_top_k_left():
    id_K, _ = candidates(torch.tensor([0.4, 0.3, 0.2, 0.1]).log(), Sampling(top_k=2, top_p=0.55))
    assert id_K.tolist() == [0], "0.4 of 0.7 reaches 0.55, though 0.4 of 1 does not"


def test_min_p_measures_against_the_most_probable_token():
    id_K, _ = candidates(torch.tensor([0.1, 0.5, 0.06, 0.34]).log(), Sampling(min_p=0.15))
    assert id_K.tolist() == [0, 1, 3]


def test_equally_probable_tokens_are_ranked_by_id():
    flat = torch.zeros(5000)
    for chosen in (Sampling(top_k=3), Sampling(top_p=3 / 5000 - 1e-9)):
        assert candidates(flat, chosen)[0].tolist() == [0, 1, 2]
    assert draw_one(torch.tensor([1.0, 7.0, 7.0]), Sampling(temperature=0), 0)[0] == 1


@given(powers=halvings, seed=st.integers(0, 2**64 - 1), position=st.integers(0, 2**40))
def test_neutral_filters_change_no_draw(powers, seed, position):
    plain = Sampling(seed=seed)
    neutral = Sampling(seed=seed, top_k=len(powers), top_p=math.nextafter(1, 0), min_p=1e-9)
    assert draw_one(logits_of(powers), plain, position) == draw_one(logits_of(powers), neutral, position)


@pytest.mark.parametrize(
    "chosen",
    [
        Sampling(seed=3),
        Sampling(seed=4, temperature=0.7),
        Sampling(seed=5, temperature=1.6),
        Sampling(seed=6, top_k=4, top_p=0.97, min_p=0.01, temperature=1.3),
    ],
    ids=str,
)
def test_draws_are_distributed_as_the_model_says(chosen):
    logits = torch.tensor([0.3, -1.2, 2.0, 0.9, -0.4, 1.1, -2.0, 0.0], dtype=torch.float64)
    id_K, weight_K = candidates(logits, chosen)
    expected = dict(zip(id_K.tolist(), (4000 * weight_K / weight_K.sum()).tolist(), strict=True))
    drawn = [draw_one(logits, chosen, position)[0] for position in range(4000)]
    assert set(drawn) <= set(expected)
    chi_square = sum((drawn.count(token) - count) ** 2 / count for token, count in expected.items())
    assert chi_square < CHI_SQUARE_7, f"chi-square {chi_square:.1f}; at most 7 degrees of freedom"


def test_the_random_numbers_are_uniform_and_differ_between_neighbouring_seeds_and_positions():
    numbers = [uniform(seed, position) for seed in range(40) for position in range(40)]
    assert len(set(numbers)) == 1600 and 0 <= min(numbers) and max(numbers) < 1
    tenths = [sum(int(10 * number) == tenth for number in numbers) for tenth in range(10)]
    assert sum((count - 160) ** 2 / 160 for count in tenths) < 27.9, "chi-square, 9 degrees of freedom, 0.1 % point"
    pairs = torch.tensor(numbers).view(40, 40)
    assert abs(float(torch.corrcoef(torch.stack([pairs[:, :-1].flatten(), pairs[:, 1:].flatten()]))[0, 1])) < 0.1
    assert abs(float(torch.corrcoef(torch.stack([pairs[:-1].flatten(), pairs[1:].flatten()]))[0, 1])) < 0.1


@pytest.mark.parametrize("u, token", [(0.0, 1), (1 - 2.0**-52, 3)])
def test_the_smallest_and_the_largest_random_number_draw_tokens_that_are_possible(monkeypatch, u, token):
    monkeypatch.setattr(sample, "uniform", lambda seed, position: u)
    logits = torch.tensor([-torch.inf, 0.3, 0.2, 0.1, -torch.inf])
    assert draw_one(logits, Sampling(min_p=1e-9), 0)[0] == token


def test_a_seed_gives_the_same_numbers_on_every_machine_and_in_every_version():
    assert [uniform(7, position) for position in (0, 1, 2**33)] == [
        0.8720734548204871,
        0.08284268702737618,
        0.07055307710606518,
    ]


@settings(deadline=None)
@given(rows=st.lists(st.tuples(halvings, st.integers(0, 9), st.integers(0, 99)), min_size=1, max_size=5))
def test_a_request_draws_the_same_in_every_batch(rows):
    width = max(len(powers) for powers, _, _ in rows)
    logits = torch.stack([logits_of(powers + [-9] * (width - len(powers))) for powers, _, _ in rows])
    samplings = [Sampling(seed=seed, top_p=0.9) for _, seed, _ in rows]
    positions = [position for _, _, position in rows]
    together = draw(logits, samplings, positions)
    alone = [draw(logits[i : i + 1], samplings[i : i + 1], positions[i : i + 1])[0] for i in range(len(rows))]
    assert together == alone


@given(powers=halvings, temperature=st.sampled_from([0.0, 0.5, 3.0]), top_k=st.integers(0, 3), shift=st.floats(-50, 50))
def test_the_log_prob_is_the_models_own_before_temperature_and_filters(powers, temperature, top_k, shift):
    chosen = Sampling(temperature=temperature, top_k=top_k)
    token, logprob, _ = draw_one(logits_of(powers) + shift, chosen, 5)
    assert logprob == pytest.approx(float(logits_of(powers).log_softmax(0)[token]), abs=1e-12)


@given(powers=halvings, temperature=st.sampled_from([0.0, 0.5]), top_k=st.integers(0, 3), count=st.integers(0, 12))
def test_the_most_probable_tokens_are_told_best_first_then_by_id(powers, temperature, top_k, count):
    drawn = draw_one(logits_of(powers), Sampling(temperature=temperature, top_k=top_k, top_logprobs=count), 5)
    best = sorted(range(len(powers)), key=lambda token: (-powers[token], token))[:count]
    logprob_V = logits_of(powers).log_softmax(0)
    assert [token for token, _ in drawn.top] == best
    assert [logprob for _, logprob in drawn.top] == pytest.approx(logprob_V[best].tolist(), abs=1e-12)
    assert all(logprob == drawn.logprob for token, logprob in drawn.top if token == drawn.token)


@given(rows=st.integers(1, 3), position=st.integers(0, 99))
def test_each_row_has_its_own_rules(rows, position):
    logits_BV = torch.randn(rows, 9, generator=torch.Generator().manual_seed(position))
    rules = [[Bias({row: 500.0})] for row in range(rows)]
    assert [drawn.token for drawn in draw(logits_BV, [Sampling()] * rows, [position] * rows, rules)] == [*range(rows)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_takes_the_first_of_the_most_probable_in_every_format(dtype):
    logits_BV = (torch.randn(40, 2000, generator=torch.Generator().manual_seed(0)) * 2).to(dtype)
    logits_BV[:, 1500:] = logits_BV[:, :500]
    found = [drawn.token for drawn in draw(logits_BV, [Sampling(temperature=0)] * 40, range(40))]
    assert found == [int((row == row.max()).nonzero()[0, 0]) for row in logits_BV]


@pytest.mark.parametrize("temperature", [5e-324, 1e-9, 1e300])
def test_extreme_temperatures_are_the_limits_and_never_nan(temperature):
    logits = torch.tensor([1.0, 3.0, 2.0, -torch.inf])
    weight_K = candidates(logits, Sampling(temperature=temperature))[1]
    assert weight_K.isfinite().all()
    drawn = {draw_one(logits, Sampling(temperature=temperature), position)[0] for position in range(60)}
    assert drawn == ({1} if temperature < 1 else {0, 1, 2}), "a token of probability 0 is never drawn"


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error_that_says_where(value, temperature):
    with pytest.raises(ValueError, match=r"token 12 .* NaN or infinity .* earlier checkpoint"):
        draw_one(torch.tensor([0.0, value]), Sampling(temperature=temperature), 12)


@pytest.mark.parametrize(
    "name, value",
    [
        *[("temperature", value) for value in (-0.1, math.nan, math.inf)],
        ("top_k", -1),
        *[("top_p", value) for value in (0.0, 1.1, math.nan)],
        *[("min_p", value) for value in (-0.1, 1.1, math.nan)],
        *[("seed", value) for value in (-1, 2**64)],
        ("max_tokens", 0),
        *[(name, -1) for name in ("min_tokens", "thinking_budget", "thinking_grace", "top_logprobs")],
        *[("repetition_penalty", value) for value in (0.0, -1.0, 5e-324, 1e308, math.inf, math.nan)],
        *[(name, value) for name in ("presence_penalty", "frequency_penalty") for value in (-2.1, 2.1, math.nan)],
        *[("logit_bias", value) for value in ({-1: 0.0}, {"a": 0.0}, {1: 101.0}, {1: math.nan}, {1: "a"}, [(1, 2)])],
        *[("bad_tokens", value) for value in ((1, 2), ((),), ((-1,),), (("a",),), "ab", None)],
        *[("ignore_eos", value) for value in (0, "no", None)],
        *[("stop", value) for value in ("word", ("a", ""), (3,), None)],
        *[("stop_tokens", value) for value in (5, "ab", ("x",), (1.5,))],
        *[(name, value) for name in WHOLE for value in (1.5, True, "a", None)],
        *[(name, value) for name in REAL for value in ("a", None, True)],
    ],
)
def test_a_bad_value_is_refused_with_its_name_and_its_value(name, value):
    with pytest.raises(ValueError, match=rf"sampling\.{name}=.*{re.escape(repr(value))}"):
        dataclasses.replace(Sampling(), **{name: value})


def test_an_answer_with_more_tokens_at_least_than_at_most_is_refused():
    with pytest.raises(ValueError, match=r"sampling\.min_tokens=9 .* max_tokens=8"):
        Sampling(min_tokens=9, max_tokens=8)
    Sampling(min_tokens=8, max_tokens=8)


def test_every_field_is_checked():
    assert {field.name for field in dataclasses.fields(Sampling)} == set(VALID)


def test_what_ends_an_answer():
    assert Sampling(stop_tokens=(4, 5)).ends([1, 2]) == {1, 2, 4, 5}
    assert Sampling(stop_tokens=(4, 5), ignore_eos=True).ends([1, 2]) == {4, 5}


def test_a_sampling_is_a_key():
    assert len({Sampling(logit_bias={1: 2.0}), Sampling(logit_bias={1: 2.0}), Sampling()}) == 2
