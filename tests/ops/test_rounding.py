"""Random bits by address against a slow generator, and rounding against its definition, bit by bit."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nautilus.ops.rounding import bits_at, philox, stochastic_e4m3, stochastic_half, stochastic_int8

WORD = 0xFFFFFFFF
words, patterns = st.integers(0, WORD), st.integers(0, WORD)
# Their codes are held against the definition in test_formats.py.
E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().tolist()
ALL_HALF, ALL_CODE = torch.arange(1 << 13), torch.arange(1 << 16)


def slow_philox(counter, key, rounds):
    """The definition with whole numbers of any length, one word at a time."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(rounds):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & WORD, (p0 >> 32) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return [c0, c1, c2, c3]


def ours(counter, key, rounds):
    return [int(word) for word in philox([torch.tensor(word) for word in counter], key, rounds)]


ZEROS, ONES = ([0] * 4, (0, 0)), ([WORD] * 4, (WORD, WORD))
PI = ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], (0xA4093822, 0x299F31D0))


@pytest.mark.parametrize(
    "given_words, rounds, answer",
    [
        (ZEROS, 7, "5f6fb709 0d893f64 4f121f81 4f730a48"),
        (ONES, 7, "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (PI, 7, "4dfccaba 190a87f0 c47362ba b6b5242a"),
        (ZEROS, 10, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (ONES, 10, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (PI, 10, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_answers_of_random123(given_words, rounds, answer):
    assert " ".join(f"{word:08x}" for word in ours(*given_words, rounds)) == answer


@given(counter=st.lists(words, min_size=4, max_size=4), key=st.tuples(words, words), rounds=st.integers(1, 10))
def test_philox_equals_the_slow_one_for_any_words_and_rounds(counter, key, rounds):
    assert ours(counter, key, rounds) == slow_philox(counter, key, rounds)


@settings(max_examples=50)
@given(
    positions=st.lists(st.integers(0, 1 << 21), min_size=1, max_size=4),
    size=st.integers(1, 70),
    seed=st.integers(0, (1 << 64) - 1),
    stream=st.integers(0, 200),
    data=st.data(),
)
def test_bits_depend_on_their_address_alone(positions, size, seed, stream, data):
    bits = bits_at(torch.tensor(positions), size, seed=seed, stream=stream)
    assert bits.shape == (len(positions), size)
    row, element = data.draw(st.integers(0, len(positions) - 1)), data.draw(st.integers(0, size - 1))
    k0, k1, c1, c3 = slow_philox([positions[row], stream, 0, 0], (seed & WORD, seed >> 32), 10)
    block = slow_philox([element // 8, c1, element // 8, c3], (k0, k1), 5)
    word = block[element % 8 // 2]
    assert bits[row, element] == (word >> 16 if element % 2 else word & 0xFFFF)


def test_other_addresses_have_other_bits():
    base = {"position": 7, "seed": 3, "stream": 2}
    seen = []
    for change in ({}, {"position": 8}, {"seed": 4}, {"seed": 3 + (1 << 32)}, {"stream": 3}):
        at = base | change
        seen.append(bits_at(torch.tensor([at["position"]]), 4096, seed=at["seed"], stream=at["stream"]))
    for i, one in enumerate(seen):
        assert all((one == other).sum() < 20 for other in seen[:i]), "4096 / 65536 equal ones are expected by chance"


def test_five_rounds_are_uniform():
    """Every bit, and 256 bins: within 4.5 standard deviations."""
    bits = bits_at(torch.arange(256), 1024, seed=1, stream=5)
    signs = (bits[..., None] >> torch.arange(16) & 1) * 2.0 - 1
    assert (signs.double().mean((0, 1)).abs() * math.sqrt(bits.numel())).max() < 4.5
    counts = torch.bincount((bits >> 8).flatten(), minlength=256).double()
    expected = bits.numel() / 256
    chi = ((counts - expected).square() / expected).sum()
    assert abs(chi - 255) < 4.5 * math.sqrt(2 * 255)


def share_of(used, **address):
    """The last `used` bits as numbers between -1/2 and 1/2: (positions, elements / 8, the eight of a counter)."""
    at = {"positions": torch.arange(1024), "seed": 3, "stream": 2} | address
    bits = bits_at(at["positions"], 512, seed=at["seed"], stream=at["stream"]) & (1 << used) - 1
    return ((bits + 0.5) / (1 << used)).view(-1, 64, 8) - 0.5


@pytest.mark.parametrize("used", [13, 16])
def test_nothing_is_seen_of_the_neighbours_after_five_rounds(used):
    """Correlations of 65,536 independent pairs are below 5 / 256. Without the ten rounds before them some are 0.3."""
    share = share_of(used)
    correlation = lambda a, b: (12 * (a * b).mean((0, 1))).abs().max()
    for far in (1, 2, 3, 8):
        assert correlation(share[far:], share[:-far]) < 5 / 256, "positions"
        assert correlation(share[:, far:], share[:, :-far]) < 5 / 256, "elements"
    for other in ({"seed": 2}, {"seed": 3 + (1 << 32)}, {"stream": 3}, {"positions": torch.arange(1024) + (1 << 20)}):
        assert correlation(share, share_of(used, **other)) < 5 / 256, other


@pytest.mark.parametrize("rate", [1 / 64, 1 / 4, 1 / 2, 9 / 10])
def test_how_often_an_element_is_rounded_up_varies_as_independent_draws_do(rate):
    ups_E = (share_of(13) + 0.5 < rate).double().sum(0).flatten()
    assert ups_E.var() == pytest.approx(1024 * rate * (1 - rate), rel=0.3)
    assert ups_E.mean() == pytest.approx(1024 * rate, rel=0.02)


# ----- float16 --------------------------------------------------------------------------------------------------------


def floats(pattern_list):
    """float32 numbers by their bit patterns: every exponent is as likely as any other."""
    return torch.from_numpy(np.array(pattern_list, dtype=np.uint32).view(np.float32))


def half_neighbours(x):
    """The float16 numbers below and above (or twice x itself, where it is one), as float64."""
    inside = x.double().clamp(-65504, 65504)
    close = inside.numpy().astype(np.float16)
    with np.errstate(over="ignore"):
        down, up = np.nextafter(close, np.float16(-np.inf)), np.nextafter(close, np.float16(np.inf))
    near = close.astype(np.float64)
    low = np.where(near <= inside.numpy(), near, down.astype(np.float64))
    high = np.where(near >= inside.numpy(), near, up.astype(np.float64))
    return torch.from_numpy(low), torch.from_numpy(high)


many = st.lists(patterns, min_size=1, max_size=40)


@given(numbers=many, bits=st.integers(0, (1 << 13) - 1))
def test_any_number_becomes_one_of_its_two_neighbours_in_float16(numbers, bits):
    x = floats(numbers)
    got = stochastic_half(x, torch.tensor(bits))
    assert got.dtype == torch.float16
    finite = x.isfinite()
    low, high = half_neighbours(x[finite])
    value = got[finite].double()
    assert ((value == low) | (value == high)).all()
    assert torch.equal(got[~finite].float().nan_to_num(7.0), x[~finite].nan_to_num(7.0))


@given(numbers=many, bits=st.integers(0, (1 << 13) - 1))
def test_in_the_normal_range_it_is_thirteen_bits_added_to_the_pattern_and_the_rest_cut_off(numbers, bits):
    x = floats(numbers)
    x = x[x.isfinite() & (x.abs() >= 2.0**-14) & (x.abs() <= 65504)]
    cut = ((x.view(torch.int32) + bits) & ~0x1FFF).view(torch.float32)
    assert torch.equal(stochastic_half(x, torch.tensor(bits)).float(), cut)


def test_the_mean_over_all_bits_is_the_number_itself():
    draw = torch.Generator().manual_seed(0)
    exponent = torch.randint(-14, 16, (200,), generator=draw)
    x = (1 + torch.rand(200, generator=draw)) * 2.0**exponent * (torch.randint(0, 2, (200,), generator=draw) * 2 - 1)
    x = x.clamp(-65504, 65504)
    mean = stochastic_half(x[:, None].expand(-1, 1 << 13), ALL_HALF).double().mean(1)
    assert torch.equal(mean, x.double()), "float32 has exactly 13 bits below the cut, so nothing is lost"


def test_subnormals_are_right_on_average_too():
    """Their neighbours are 2^-24 apart. The smallest have bits below the 13 that are used: off by less than 2^-37."""
    draw = torch.Generator().manual_seed(0)
    x = torch.cat([torch.rand(200, generator=draw) * 2.0**-14, torch.tensor([2.0**-25, 3e-8, 1e-9, -(2.0**-24)])])
    got = stochastic_half(x[:, None].expand(-1, 1 << 13), ALL_HALF).double()
    assert ((got.mean(1) - x).abs() <= 2.0**-37).all()
    assert (got[200:203].unique() == torch.tensor([0, 2.0**-24])).all(), "not lost, as rounding to the nearest has it"
    assert (got[203] == -(2.0**-24)).all(), "what float16 holds stays"


def test_what_float16_holds_already_stays_whatever_the_bits():
    pattern = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    every = pattern.view(torch.float16)
    for bits in (0, 1, 4096, 8191):
        got = stochastic_half(every.float(), torch.tensor(bits))
        assert torch.equal(got.view(torch.int16)[~every.isnan()], pattern[~every.isnan()])
        assert got[every.isnan()].isnan().all()


def test_beyond_the_largest_it_stays_the_largest_but_infinity_and_nan_are_not_hidden():
    x = torch.tensor([65504.0, 65519.0, 1e9, -3e38, math.inf, -math.inf, math.nan])
    for bits in (0, 8191):
        got = stochastic_half(x, torch.tensor(bits)).tolist()
        assert got[:6] == [65504, 65504, 65504, -65504, math.inf, -math.inf] and math.isnan(got[6])


# ----- FP8 E4M3 and int8 ----------------------------------------------------------------------------------------------


def between(value, table):
    """The entries of an ascending table below and above."""
    value = min(value, table[-1])
    return max(entry for entry in table if entry <= value), min(entry for entry in table if entry >= value)


@settings(max_examples=50)
@given(
    size=st.floats(0, 500, width=32) | st.floats(0, 2.0**-6, width=32),
    negative=st.booleans(),
    bits=st.integers(0, 65535),
)
def test_any_number_becomes_one_of_its_two_neighbours_in_e4m3_and_int8(size, negative, bits):
    sign = -1 if negative else 1
    for rounded, table in ((stochastic_e4m3, E4M3), (stochastic_int8, range(128))):
        got = float(rounded(torch.tensor(sign * size), torch.tensor(bits)).float()) * sign
        assert got in between(size, table)


@pytest.mark.parametrize("rounded, table", [(stochastic_e4m3, E4M3), (stochastic_int8, list(map(float, range(128))))])
def test_the_mean_over_all_bits_is_the_number_to_a_part_in_131072_of_a_step(rounded, table):
    draw = torch.Generator().manual_seed(0)
    table = torch.tensor(table)
    place = torch.randint(0, len(table) - 1, (60,), generator=draw)
    step = table[place + 1] - table[place]
    x = table[place] + torch.rand(60, generator=draw) * step
    for sign in (1, -1):
        mean = rounded(sign * x[:, None].expand(-1, 1 << 16), ALL_CODE).double().mean(1)
        assert ((mean - sign * x).abs() <= 2.0**-17 * step * 1.001).all()


@pytest.mark.parametrize("rounded, table", [(stochastic_e4m3, E4M3), (stochastic_int8, list(map(float, range(128))))])
def test_what_the_format_holds_already_stays(rounded, table):
    x = torch.tensor(table)
    for bits in (0, 32768, 65535):
        assert torch.equal(rounded(x, torch.tensor(bits)).float(), x)
        assert torch.equal(rounded(-x, torch.tensor(bits)).float(), -x)


def test_eight_bits_saturate_and_say_where_there_is_no_number():
    x, bits = torch.tensor([449.0, -1e30, math.inf, math.nan]), torch.tensor(65535)
    e4m3 = stochastic_e4m3(x, bits).float()
    assert e4m3[:2].tolist() == [448, -448] and e4m3[2:].isnan().all()
    assert stochastic_int8(x, bits).tolist() == [127, -127, 127, 0]
