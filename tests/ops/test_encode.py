"""Numbers to codes: golden vectors, slow encoders in plain Python, and the laws of rounding."""

import hashlib
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nautilus.ops.encode import encode, hadamard, tensor_scale_of
from nautilus.ops.formats import FORMATS, unpack

FP8 = torch.float8_e4m3fn
F32 = np.float32
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
# Their codes are held against the definitions in test_formats.py.
E4M3 = torch.arange(127, dtype=torch.uint8).view(FP8).double().tolist()
E5M2 = torch.arange(124, dtype=torch.uint8).view(torch.float8_e5m2).double().tolist()
POSITIVE = {
    "fp8_e4m3": E4M3, "fp8_e5m2": E5M2, "mxfp8": E4M3, "mxfp4": E2M1, "nvfp4": E2M1, "int8": range(128),
    "int4": range(8),
}  # fmt: skip
WAYS = [(name, rule, tile) for name, kind in FORMATS.items() for rule in kind.rules for tile in kind.tiles]
SYMMETRIC = [way for way in WAYS if way[1] != "zero_point"]


def fake_quant(x, format, **how):
    """x as it looks after a trip through the format."""
    return encode(x, format, **how).decode(x.dtype)


def numbers(seed, shape, *, spread=1.0, power=0):
    """Normal numbers, blocks of 16 up to 10^spread apart; some zeros, a block of zeros, a block of the largest."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=draw)
    blocks = (*shape[:-1], -(-shape[-1] // 16))
    size = 10.0 ** (-spread * torch.rand(blocks, generator=draw))
    x = x * size.repeat_interleave(16, -1)[..., : shape[-1]]
    x = x * (torch.rand(shape, generator=draw) > 0.1)
    if shape[-1] > 32:
        x[..., 0, :16] = 0
        x[..., 0, 16:32] = x.abs().max()
    return x * 10.0**power


def scales(packed):
    """The float64 scale of every element."""
    shape, width = packed.shape, packed.shape[-1]
    scale = packed.scale.float() if packed.scale.dtype != torch.uint8 else torch.exp2(packed.scale.double() - 127)
    if packed.tile != "tensor":
        each = int(packed.tile.partition("x")[2] or width)
        scale = scale.repeat_interleave(each, -1)[..., :width]
    else:
        scale = scale.reshape(*shape[:-2], 1, 1)
    scale = scale.double().expand(shape)
    return scale if packed.tensor_scale is None else scale * packed.tensor_scale.double()[..., None, None]


# ----- golden vectors -------------------------------------------------------------------------------------------------

ROW, COLUMN = torch.arange(64)[:, None], torch.arange(64)[None]
X = ((37 * ROW + 101 * COLUMN) % 251 - 125) / 64 * 2.0 ** ((ROW + COLUMN) % 7 - 3)
BITS = ((13 * ROW + 29 * COLUMN) % 256).to(torch.uint8)


def digest(tensor):
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def test_golden_one_row():
    step = torch.arange(16) - 8
    packed = encode(torch.cat((step / 4, step / 64))[None], "nvfp4", rule="train")
    assert packed.scale.view(torch.uint8).tolist() == [[126, 94]]
    assert packed.codes.numpy().tobytes().hex() == "ffeecdab20436576ffeecdab20436576"
    assert packed.tensor_scale == torch.tensor(2 / 2688)
    third = [-2, -2, -4 / 3, -4 / 3, -1, -2 / 3, -1 / 2, -1 / 3, 0, 1 / 3, 1 / 2, 2 / 3, 1, 4 / 3, 4 / 3, 2]
    torch.testing.assert_close(packed.decode()[0, :16], torch.tensor(third), rtol=2**-23, atol=0)


def test_golden_rows_of_blocks():
    packed = encode(X, "nvfp4", rule="train")
    assert X.abs().max() == 15.625 and torch.equal(X.bfloat16().float(), X)
    assert (digest(packed.codes), digest(packed.scale)) == ("87410555c25788de", "5abad7f00c8ac0d7")
    half = encode(X.bfloat16(), "nvfp4", rule="train")
    assert (digest(half.codes), digest(half.scale)) == ("87410555c25788de", "5abad7f00c8ac0d7")


def test_golden_square_tiles():
    packed = encode(X, "nvfp4", rule="train", tile="16x16")
    top, low = 126, 125
    want = [[top, low, top, top], [top, top, low, top], [top] * 4, [top, top, top, low]]
    assert digest(packed.codes) == "ff9a75f0572a4852"
    assert packed.scale.view(torch.uint8)[::16].tolist() == want
    assert torch.equal(packed.scale.view(torch.uint8), torch.tensor(want).repeat_interleave(16, 0))


def test_golden_hadamard():
    turned = hadamard(X.mT.bfloat16())
    packed = encode(turned, "nvfp4", rule="train")
    assert turned.dtype == torch.bfloat16 and turned.abs().max() == 15.1875
    assert (digest(packed.codes), digest(packed.scale)) == ("401c7836c3e15e46", "d34b98caf533e0f2")


def test_golden_stochastic():
    packed = encode(X, "nvfp4", rule="train", rounding="stochastic", bits=BITS)
    assert digest(packed.codes) == "3a7ef0c6723e0ee6"


def test_golden_product():
    """y = amax_A amax_B / (36 448^2) sum_blocks s_A s_B sum_16 q_A q_B, the last sum exact, the others in float32."""
    a, b = encode(X, "nvfp4", rule="train"), encode(X.flip(0), "nvfp4", rule="train", tile="16x16")
    q_a, q_b = (p.values().unflatten(-1, (-1, 16)) for p in (a, b))
    y = torch.zeros(64, 64)
    for block in range(4):
        y += a.scale.float()[:, block, None] * b.scale.float()[:, block] * (q_a[:, block] @ q_b[:, block].mT)
    y *= torch.tensor(15.625) ** 2 / torch.tensor(36.0 * 448**2)
    assert [f"{v:.5f}" for v in y[0, :4].tolist()] == ["-73.70757", "50.80208", "265.13443", "-20.82946"]
    torch.testing.assert_close(a.decode() @ b.decode().mT, y, rtol=1e-5, atol=1e-3)
    exact = X.double() @ X.double().flip(0).mT
    assert f"{(y - exact).norm() / exact.norm():.4f}" == "0.0844"


# ----- slow encoders --------------------------------------------------------------------------------------------------


def closest(y, table):
    """Index of the entry nearest to y >= 0; of two, the even one."""
    y = min(float(y), table[-1])
    return min(range(len(table)), key=lambda i: (abs(table[i] - y), i % 2))


def e2m1_code(y):
    return closest(abs(y), E2M1) + 8 * bool(y < 0)


def slow_train(x, rows):
    """Section "train" of the encoder's docstring, one number at a time in float32."""
    top = F32(np.finfo(F32).max)
    amax = F32(np.abs(x).max())
    with np.errstate(over="ignore", divide="ignore"):
        big = F32(1) if amax == 0 else min(F32(2688) / amax, top)
    codes, scale = np.zeros(x.shape, np.uint8), np.zeros((len(x), x.shape[1] // 16), np.uint8)
    for r in range(0, len(x), rows):
        for b in range(0, x.shape[1], 16):
            tile = x[r : r + rows, b : b + 16]
            s = closest(min(np.abs(tile).max() * (big * F32(1 / 6)), F32(448)), E4M3)
            scale[r : r + rows, b // 16] = s
            with np.errstate(over="ignore", divide="ignore"):
                shrink = min(F32(1) / (F32(E4M3[s]) * (F32(1) / big)), top)
                y = np.clip(tile * shrink, F32(-6), F32(6))
            for place in np.ndindex(*tile.shape):
                codes[r + place[0], b + place[1]] = e2m1_code(y[place])
    return codes, scale


def slow_ptq(x):
    amax = F32(np.abs(x).max())
    whole = amax / F32(2688) if amax else F32(1)
    codes, scale = np.zeros(x.shape, np.uint8), np.zeros((len(x), x.shape[1] // 16), np.uint8)
    for r, b in np.ndindex(*scale.shape):
        block = x[r, 16 * b : 16 * b + 16]
        top = np.abs(block).max()
        s = closest(1.0 if top == 0 else max(top / (F32(6) * whole), F32(2.0**-9)), E4M3)
        scale[r, b] = s
        codes[r, 16 * b : 16 * b + 16] = [e2m1_code(v / (F32(E4M3[s]) * whole)) for v in block]
    return codes, scale


def at_ties(seed):
    """Blocks whose exact scale, and elements whose exact quotient, lie between two codes but for roundings of float32:
    only the right operations in the right order find the same code."""
    draw = np.random.default_rng(seed)
    whole = F32(draw.uniform(0.5, 2)) / F32(2688)
    code, table = draw.integers(60, 125, (16, 4)), np.array(E4M3)
    scale, between = table[code + code % 2], (table[code] + table[code + 1]) / 2
    x = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])[draw.integers(0, 7, (16, 4, 16))] * scale[..., None] * whole
    x[:, :, 0] = between * 6 * whole
    x[0, 0, 0] = whole * 2688
    return torch.tensor(x.reshape(16, 64) * draw.choice([-1, 1], (16, 64)), dtype=torch.float32)


SEEDS, SPREADS, POWERS = st.integers(0, 9999), st.sampled_from([0.5, 3.0, 9.0]), st.sampled_from([-30, -3, 0, 30])


@pytest.mark.parametrize("tile", ["1x16", "16x16"])
@pytest.mark.parametrize("spread", [None, 0.5, 3.0, 9.0])
@settings(max_examples=3)
@given(seed=SEEDS, power=POWERS)
def test_the_training_encoder_equals_a_slow_one_bit_for_bit(seed, spread, power, tile):
    x = at_ties(seed) if spread is None else numbers(seed, (32, 48), spread=spread, power=power)
    codes, scale = slow_train(x.numpy(), int(tile.partition("x")[0]))
    packed = encode(x, "nvfp4", rule="train", tile=tile)
    assert np.array_equal(packed.scale.view(torch.uint8).numpy(), scale)
    assert np.array_equal(unpack(packed.codes).numpy(), codes)
    assert packed.tensor_scale == x.abs().max() / torch.tensor(2688.0)


@pytest.mark.parametrize("spread", [None, 0.5, 3.0, 9.0])
@settings(max_examples=5)
@given(seed=SEEDS, power=POWERS)
def test_the_ptq_encoder_equals_a_slow_one_bit_for_bit(seed, spread, power):
    x = at_ties(seed) if spread is None else numbers(seed, (8, 64), spread=spread, power=power)
    codes, scale = slow_ptq(x.numpy())
    packed = encode(x, "nvfp4", rule="ptq")
    assert np.array_equal(packed.scale.view(torch.uint8).numpy(), scale)
    assert np.array_equal(unpack(packed.codes).numpy(), codes)


def test_every_tie_of_e2m1_goes_to_the_even_code():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    x = torch.cat((ties, -ties)).repeat(2)[None]
    want = [0, 1, 1, 2, 2, 4, 4, 6]
    for name, rule in (("mxfp4", "ceil"), ("nvfp4", "ptq"), ("nvfp4", "train")):
        got = encode(x, name, rule=rule, tensor_scale=1.0 if name == "nvfp4" else None)
        assert got.decode().tolist() == [[*want, *(-v for v in want)] * 2], name
    assert unpack(got.codes)[0, 8] == 8  # a negative number that rounds to zero keeps its sign


def exponent(amax, top, rule):
    """E8M0 by exact arithmetic."""
    if amax == 0:
        return -127
    amax, e = Fraction(amax), -200
    if rule == "ceil":  # the smallest power of two with nothing above the largest value
        while Fraction(top) * Fraction(2) ** e < amax:
            e += 1
    else:
        while Fraction(2) ** (e + 1) <= amax:
            e += 1
        e += rule == "half_up" and amax >= Fraction(7, 4) * Fraction(2) ** e
        e -= int(math.log2(top))
    return min(max(e, -127), 127)


EDGES = [1.0, 1.25, 1.5, 1.75, 1.9375, 2.0]
AMAX = [
    0.0,
    *(v * side for v in EDGES for side in (1 - 2**-23, 1.0, 1 + 2**-23)),
    1e-45,
    1e-38,
    3e-36,
    1e-30,
    1e30,
    3e38,
]


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8"])
@pytest.mark.parametrize("rule", ["ceil", "floor", "half_up"])
def test_powers_of_two_follow_their_rule_exactly(name, rule):
    x = torch.zeros(len(AMAX), 32)
    x[:, 5] = torch.tensor(AMAX)
    got = encode(x, name, rule=rule).scale[:, 0].int() - 127
    assert got.tolist() == [exponent(v, FORMATS[name].largest, rule) for v in x[:, 5].tolist()]


def test_powers_of_two_do_not_round_as_the_cast_does():
    """The cast to E8M0 rounds 1.1 to 1, under which an element of 1.1 * 448 would saturate."""
    x = torch.full((1, 32), 448 * 1.1)
    assert torch.tensor(1.1).to(torch.float8_e8m0fnu).float() == 1
    assert encode(x, "mxfp8").scale.item() == 128
    assert encode(x, "mxfp8").decode()[0, 0] == 480


@pytest.mark.parametrize(
    "name,top,tile,width", [("int8", 127, "row", 70), ("int8", 127, "1x32", 32), ("int4", 7, "1x64", 64)]
)
def test_integers_are_rounded_after_division_by_amax_over_the_largest(name, top, tile, width):
    x = numbers(3, (4, 70))
    packed = encode(x, name, tile=tile)
    codes = packed.codes if name == "int8" else unpack(packed.codes).int() - 8
    for r in range(4):
        for g, begin in enumerate(range(0, 70, width)):
            group = x[r, begin : begin + width].numpy()
            scale = np.abs(group).max() / F32(top) if group.any() else F32(1)
            assert packed.scale[r, g] == float(scale)
            assert codes[r, begin : begin + width].tolist() == np.rint(group / scale).astype(int).tolist()


def test_zero_points_span_what_is_there_and_hit_zero():
    x = numbers(5, (6, 64)) + 0.7
    x[0] = x[0].abs() + 1
    x[1] = -x[1].abs() - 1
    x[2] = 0
    x[3, 7] = 0
    packed = encode(x, "int4", rule="zero_point", tile="1x32")
    groups = x.unflatten(-1, (-1, 32))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    reach = torch.where(high > low, (high - low) / 15, 1.0)
    torch.testing.assert_close(packed.scale, reach, rtol=2**-22, atol=0)
    assert torch.equal(packed.zero.float(), (-low / packed.scale).round())
    assert packed.decode()[3, 7] == 0 and packed.decode()[2].eq(0).all()
    assert ((packed.decode() - x).abs() <= 1.001 * scales(packed)).all()  # half a step, and half of the zero point's
    assert (packed.decode() - x).square().sum() < (encode(x, "int4").decode() - x).square().sum()


# ----- laws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name,rule,tile", SYMMETRIC)
@settings(max_examples=4)
@given(seed=SEEDS, spread=SPREADS, power=POWERS)
def test_each_number_becomes_the_nearest_one_of_its_scale(name, rule, tile, seed, spread, power):
    x = numbers(seed, (17, 80), spread=spread, power=power)
    packed = encode(x, name, rule=rule, tile=tile)
    scale, got = scales(packed), packed.decode().double()
    every = torch.tensor([*POSITIVE[name]], dtype=torch.float64)
    least = (x.double().abs()[..., None] - every * scale[..., None]).abs().amin(-1)
    slack = 1e-6 * x.double().abs() + 1e-44  # roundings of float32, which move ties, and its smallest numbers
    assert ((got - x.double()).abs() <= least + slack).all()
    assert (got * x >= 0).all() and (got[x == 0] == 0).all()


@settings(max_examples=60)
@given(
    way=st.sampled_from(SYMMETRIC),
    seed=st.integers(0, 9999),
    spread=st.sampled_from([0.5, 3.0]),
    k=st.integers(-20, 20),
)
def test_signs_and_powers_of_two_pass_through(way, seed, spread, k):
    name, rule, tile = way
    x = numbers(seed, (17, 80), spread=spread)
    y = fake_quant(x, name, rule=rule, tile=tile)
    assert torch.equal(fake_quant(-x, name, rule=rule, tile=tile), -y)
    assert torch.equal(fake_quant(x * 2.0**k, name, rule=rule, tile=tile), y * 2.0**k)


LOSSLESS = [way for way in SYMMETRIC if way[1] != "mse" and way[:2] != ("mxfp8", "half_up")]


@pytest.mark.parametrize("name,rule,tile", LOSSLESS)
@settings(max_examples=4)
@given(seed=SEEDS)
def test_what_was_decoded_is_encoded_without_loss(name, rule, tile, seed):
    """With float32 scales up to one rounding of the scale. No law for searched integers; nor for mxfp8 under half_up,
    where a largest element that was rounded up to 448 doubles the next scale; nor for block scales of nvfp4 below 2^-6.
    """
    first = encode(numbers(seed, (17, 80), spread=1.0), name, rule=rule, tile=tile)
    again = encode(first.decode(), name, rule=rule, tile=tile, tensor_scale=first.tensor_scale)
    if FORMATS[name].scale == torch.float32:
        assert torch.equal(again.codes.view(torch.uint8), first.codes.view(torch.uint8))
        torch.testing.assert_close(again.decode(), first.decode(), rtol=2**-22, atol=0)
    else:
        assert torch.equal(again.decode(), first.decode())


@settings(max_examples=20)
@given(seed=SEEDS, spread=SPREADS, rule=st.sampled_from(["train", "ptq"]))
def test_square_tiles_commute_with_transposition(seed, spread, rule):
    x = numbers(seed, (32, 48), spread=spread)
    one, other = (encode(t, "nvfp4", rule=rule, tile="16x16") for t in (x, x.mT))
    assert torch.equal(unpack(one.codes).mT, unpack(other.codes))
    assert torch.equal(one.scale.view(torch.uint8)[::16].mT, other.scale.view(torch.uint8)[::16])
    assert torch.equal(one.decode().mT, other.decode())


def tile_errors(x, packed, rows):
    error = (packed.decode().double() - x.double()).square()
    error = torch.nn.functional.pad(error, (0, -x.shape[1] % 16, 0, -x.shape[0] % rows))
    return error.unflatten(1, (-1, 16)).unflatten(0, (-1, rows)).sum((1, 3))


@settings(max_examples=30)
@given(seed=SEEDS, spread=SPREADS, power=POWERS, tile=st.sampled_from(["1x16", "16x16"]))
def test_a_search_is_never_worse_than_what_it_starts_from(seed, spread, power, tile):
    x, rows = numbers(seed, (17, 80), spread=spread, power=power), int(tile.partition("x")[0])
    for rule in ("ptq", "four_over_six"):
        whole = tensor_scale_of(x.abs().max(), rule)
        plain, better, best = (
            tile_errors(x, encode(x, "nvfp4", rule=r, tile=tile, tensor_scale=whole), rows)
            for r in ("ptq", "four_over_six", "sweep")
        )
        top = torch.nn.functional.pad(x.double(), (0, -80 % 16, 0, -17 % rows)).abs()
        slack = 1e-6 * top.unflatten(1, (-1, 16)).unflatten(0, (-1, rows)).amax((1, 3)).square()
        assert (better <= plain + slack).all() and (best <= better + slack).all()


def test_four_over_six_is_the_better_one_of_two_and_the_sweep_the_best_of_all():
    x = numbers(7, (6, 32), spread=2.0)
    whole = tensor_scale_of(x.abs().max(), "four_over_six")
    assert whole == x.abs().max() / torch.tensor(1536.0)
    errors = {
        rule: tile_errors(x, encode(x, "nvfp4", rule=rule, tensor_scale=whole), 1)
        for rule in ("four_over_six", "sweep")
    }
    grid = [v for v in E2M1] + [-v for v in E2M1]
    for r, b in np.ndindex(6, 2):
        block = x[r, 16 * b : 16 * b + 16].double().tolist()
        top = max(map(abs, block))
        error = {
            code: sum(min((v * E4M3[code] * whole.item() - w) ** 2 for v in grid) for w in block)
            for code in range(1, 127)
        }
        six, four = (closest(max(top / (n * whole.item()), 2.0**-9), E4M3) for n in (6, 4))
        assert errors["four_over_six"][r, b].item() == pytest.approx(min(error[six], error[four]), rel=1e-4)
        assert errors["sweep"][r, b].item() == pytest.approx(min(error.values()), rel=1e-4)
    plain = encode(x, "nvfp4", rule="four_over_six")
    assert torch.equal(plain.tensor_scale, whole)
    assert torch.equal(plain.codes, encode(x, "nvfp4", rule="four_over_six", tensor_scale=whole).codes)


def test_four_over_six_spares_blocks_that_six_does_not_suit():
    """At amax / 6 a block of 4 and 3 is exact only where its scale is not rounded; 12 and 9 on the grid of 4 always."""
    block = torch.tensor([12.0] * 8 + [9.0] * 8)
    x = torch.cat((block, 1536 * torch.ones(16)))[None]
    assert encode(x, "nvfp4", rule="four_over_six").decode()[0, :16].tolist() == block.tolist()
    assert encode(x, "nvfp4", rule="ptq").decode()[0, :16].tolist() != block.tolist()


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_searching_multipliers_helps_integers_with_outliers(name):
    x = numbers(11, (8, 128), spread=0.1)
    x[:, 3] *= 8
    plain, searched = (encode(x, name, rule=rule) for rule in ("max", "mse"))
    errors = [(p.decode() - x).square().unflatten(-1, (p.scale.shape[-1], -1)).sum(-1) for p in (plain, searched)]
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
    assert name == "int8" or errors[1].sum() < errors[0].sum()


@settings(max_examples=25)
@given(seed=SEEDS, name=st.sampled_from(["nvfp4", "mxfp4"]), tile=st.sampled_from(["1x16", "16x16"]))
def test_stochastic_rounding_is_unbiased_over_all_bit_values(seed, name, tile):
    """Their mean falls short of |x| by less than 1/256 of a step: floor(256 f) of the 256 results are rounded up."""
    x, rule, tile = numbers(seed, (2, 48), spread=1.0), None, tile if name == "nvfp4" else None
    rule = "train" if name == "nvfp4" else None
    bits = torch.arange(256, dtype=torch.uint8)[:, None, None].expand(256, *x.shape)
    packed = encode(x.expand(256, *x.shape), name, rule=rule, tile=tile, rounding="stochastic", bits=bits)
    scale, mean = scales(packed)[0], packed.decode().double().mean(0)
    y = x.double().abs() / torch.where(scale > 0, scale, 1.0)
    step = torch.where(y < 2, 0.5, torch.where(y < 4, 1.0, 2.0)) * scale
    short = x.double().abs() - mean.abs()
    inside = y < 6 * (1 - 1e-6)  # a scale that was rounded down lets the largest saturate
    assert ((short >= -1e-6 * step) & (short <= step * (1 / 256 + 1e-6)))[inside].all()
    assert (mean * x >= 0).all()


def test_stochastic_rounding_draws_from_the_generator_it_is_given():
    x = torch.full((400, 256), 0.3)
    x[:, 0] = 6.0

    def drawn(seed):
        return fake_quant(
            x, "mxfp4", rounding="stochastic", bits=torch.Generator().manual_seed(seed)
        )[:, 1:]  # fmt: skip

    ones, more = drawn(1), drawn(2)
    assert torch.equal(ones, drawn(1)) and not torch.equal(ones, more)
    up = math.floor(256 * 0.6) / 256  # 0.3 lies 0.6 of the way from 0 to 0.5
    first = ones[:, :31]
    sigma = 0.5 * math.sqrt(up * (1 - up) / first.numel())
    assert set(first.unique().tolist()) == {0.0, 0.5}
    assert abs(first.mean().item() - 0.5 * up) < 4 * sigma


# ----- the largest, the smallest, nothing -----------------------------------------------------------------------------


@pytest.mark.parametrize("name,rule,tile", WAYS)
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_zeros_stay_zeros_and_blocks_of_one_size_keep_it(name, rule, tile, size):
    x = torch.zeros(32, 64)
    assert torch.equal(fake_quant(x, name, rule=rule, tile=tile), x)
    x[:16] = size
    got = fake_quant(x, name, rule=rule, tile=tile)
    near = {"mxfp4": 0.25, "mxfp8": 2.0**-4}.get(name, 2.0**-22)  # a power of two need not suit it
    assert ((got - x).abs() <= near * x).all()


@pytest.mark.parametrize("rule", ["train", "ptq"])
def test_a_block_far_below_the_largest_vanishes(rule):
    """The training encoder's smallest block scale is 0, the other's 2^-9: below half of its smallest value all is 0."""
    x = torch.zeros(1, 32)
    x[0, :16], x[0, 16:] = 2688.0, 0.9 * 2.0**-11 if rule == "ptq" else 6 * 0.9 * 2.0**-10
    packed = encode(x, "nvfp4", rule=rule)
    assert packed.scale.float()[0, 1] == (0 if rule == "train" else 2.0**-9)
    assert packed.decode()[0, 16:].eq(0).all()
    assert encode(1.3 * x, "nvfp4", rule=rule, tensor_scale=1.0).decode()[0, 16] > 0


def test_subnormal_numbers_and_scales_are_encoded():
    x = torch.tensor([[2.0**-126 * v for v in E2M1] * 2])
    assert torch.equal(encode(x, "nvfp4", rule="ptq").decode(), x)
    x = 2.0**-140 * torch.tensor([[1.0, 3.0] * 16])
    got = encode(x, "mxfp8").decode()
    assert encode(x, "mxfp8").scale.item() == 0 and (got - x).abs().max() <= 2.0**-136
    assert fake_quant(torch.full((1, 16), 1e-45), "nvfp4", rule="train").isfinite().all()


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_at_the_edge_of_float32_stay_finite(name):
    x = numbers(1, (4, 64)).clamp(-1, 1) * 1e38
    for rule in FORMATS[name].rules:
        got = fake_quant(x, name, rule=rule)
        assert got.isfinite().all()


# ----- shapes and dtypes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name,rule,tile", WAYS)
def test_a_stack_is_its_matrices_and_padding_is_cut(name, rule, tile):
    x = torch.stack([numbers(seed, (20, 70), power=seed) for seed in range(3)])
    whole = encode(x, name, rule=rule, tile=tile)
    assert whole.shape == (3, 20, 70) and whole.decode().shape == x.shape
    for one, packed in zip(x, (encode(m, name, rule=rule, tile=tile) for m in x), strict=True):
        assert one.shape == packed.shape
    want = torch.stack([fake_quant(m, name, rule=rule, tile=tile) for m in x])
    assert torch.equal(whole.decode(), want)
    long = torch.nn.functional.pad(x, (0, 58, 0, 12))
    assert torch.equal(fake_quant(long, name, rule=rule, tile=tile)[:, :20, :70], want)


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_alone_is_a_matrix_of_one_row(name):
    x = numbers(2, (1, 70))
    assert torch.equal(fake_quant(x[0], name), fake_quant(x, name)[0])
    assert encode(x[0], name).shape == (70,)


def test_input_is_taken_as_float32_and_handed_back_as_it_came():
    x = numbers(4, (6, 64))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        got = fake_quant(x.to(dtype), "nvfp4", rule="train")
        assert got.dtype == dtype
        assert torch.equal(got, encode(x.to(dtype).float(), "nvfp4", rule="train").decode(dtype))
    turned = x.mT.contiguous().mT.requires_grad_()
    assert torch.equal(fake_quant(turned, "nvfp4"), fake_quant(x, "nvfp4"))
    assert not fake_quant(turned, "nvfp4").requires_grad


@pytest.mark.parametrize("rule", ["ptq", "four_over_six", "sweep"])
def test_matrices_with_one_tensor_scale_are_encoded_as_if_joined(rule):
    q, k = numbers(1, (6, 64)), 3 * numbers(2, (4, 64))
    whole = encode(torch.cat((q, k)), "nvfp4", rule=rule)
    shared = tensor_scale_of(torch.maximum(q.abs().max(), k.abs().max()), rule)
    apart = [encode(m, "nvfp4", rule=rule, tensor_scale=shared) for m in (q, k)]
    assert torch.equal(torch.cat([p.codes for p in apart]), whole.codes)
    assert all(torch.equal(p.tensor_scale, whole.tensor_scale) for p in apart)


def test_a_tensor_scale_may_be_given_for_each_matrix():
    x = torch.stack((numbers(1, (4, 32)), numbers(2, (4, 32))))
    for rule in ("train", "ptq"):
        own = encode(x, "nvfp4", rule=rule)
        assert own.tensor_scale.shape == (2,)
        given = encode(x, "nvfp4", rule=rule, tensor_scale=own.tensor_scale * 2)
        assert torch.equal(given.tensor_scale, own.tensor_scale * 2)
        assert torch.equal(given.decode(), own.decode())


# ----- the random Hadamard transform ----------------------------------------------------------------------------------


def test_hadamard_has_the_rows_it_is_known_by():
    assert hadamard(torch.eye(16)[:1]).tolist() == [[0.25] * 16]
    assert hadamard(torch.ones(1, 16)).tolist() == [[-1, 0, 1, 0, 1, 0, -1, 0, 1, 2, 1, 0, 1, 0, 1, -2]]
    matrix = torch.ones(1, 1)
    while len(matrix) < 16:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    signs = torch.tensor([-1.0 if 55272 >> i & 1 else 1.0 for i in range(16)])
    assert torch.equal(hadamard(torch.eye(16)), signs[:, None] * matrix / 4)


def test_hadamard_leaves_products_as_they_are():
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, 48, generator=draw, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(hadamard(x) @ hadamard(y).mT, x @ y.mT, rtol=1e-12, atol=1e-12)
    half = x.bfloat16()
    assert torch.equal(hadamard(half), hadamard(half.double()).bfloat16())


# ----- what is refused ------------------------------------------------------------------------------------------------

OK = torch.ones(4, 32)
BITS_OK = torch.zeros(4, 32, dtype=torch.uint8)
REFUSED = [
    (dict(x=OK, format="nvpf4"), "number format: there is none called 'nvpf4'; did you mean nvfp4"),
    (dict(x=OK, format="nvfp4", rule="four_over_sex"), "has no rule 'four_over_sex'; did you mean 'four_over_six'"),
    (dict(x=OK, format="mxfp4", rule="train"), "encode to mxfp4: it has no rule 'train'; it has ceil, floor, half_up"),
    (dict(x=OK, format="int4", tile="row"), "it has no tile 'row'; it has 1x32, 1x64, 1x128"),
    (dict(x=OK.long(), format="nvfp4"), "x is torch.int64; convert it to a float dtype"),
    (dict(x=torch.ones(4, 31), format="mxfp4"), "31 columns do not fill bytes of two codes; pad"),
    (dict(x=torch.ones(0, 32), format="nvfp4"), r"x of shape \(0, 32\) holds no row of numbers"),
    (dict(x=torch.tensor(1.0), format="nvfp4"), r"x of shape \(\) holds no row"),
    (dict(x=OK[0], format="nvfp4", tile="16x16"), "no rows for tiles of 16x16; use 1x16"),
    (dict(x=OK / torch.tensor([0.0, 1.0]).repeat(16), format="int8"), "64 of 128 numbers are NaN or infinite"),
    (dict(x=OK * math.nan, format="mxfp8"), "128 of 128 numbers are NaN or infinite"),
    (dict(x=OK.double() * 1e300, format="nvfp4"), "128 of 128 numbers are NaN or infinite in float32"),
    (dict(x=OK, format="nvfp4", rounding="up"), "rounding is 'up'; choose nearest or stochastic"),
    (dict(x=OK, format="nvfp4", bits=BITS_OK), "random bits are given for rounding to the nearest; say"),
    (dict(x=OK, format="int8", rounding="stochastic", bits=BITS_OK), "stochastic rounding is for E2M1; use nvfp4"),
    (dict(x=OK, format="nvfp4", rounding="stochastic"), "bits are missing; hand over a generator, or uint8 of shape"),
    (dict(x=OK, format="nvfp4", rounding="stochastic", bits=OK), r"bits are torch.float32 of shape \(4, 32\); hand"),
    (dict(x=OK, format="nvfp4", rounding="stochastic", bits=BITS_OK[0]), r"bits are torch.uint8 of shape \(32,\)"),
    (dict(x=OK, format="int4", tensor_scale=1.0), "a tensor_scale is given; only nvfp4 has one"),
    (dict(x=OK, format="nvfp4", tensor_scale=0.0), r"tensor_scale is \[0.0\]; it must be positive"),
    (dict(x=OK, format="nvfp4", tensor_scale=math.inf), r"tensor_scale is \[inf\]; it must be positive and finite"),
    (dict(x=OK, format="nvfp4", tensor_scale=-torch.tensor(1.0)), r"tensor_scale is \[-1.0\]; it must be positive"),
    (dict(x=OK, format="nvfp4", tensor_scale=torch.ones(4)), r"shape \(4,\) for x of shape \(4, 32\); give one number"),
]  # fmt: skip


@pytest.mark.parametrize("given,message", REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_encoded_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        encode(**given)
    with pytest.raises(ValueError, match=message):
        fake_quant(**given)


def test_a_tensor_scale_by_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="it has no rule 'four_over_sex'; did you mean 'four_over_six'"):
        tensor_scale_of(torch.tensor(1.0), "four_over_sex")


def test_hadamard_refuses_what_is_no_group_of_sixteen():
    with pytest.raises(ValueError, match="24 columns are not groups of 16; pad"):
        hadamard(torch.ones(2, 24))
    with pytest.raises(ValueError, match="x is torch.int64; convert"):
        hadamard(torch.ones(2, 16).long())
