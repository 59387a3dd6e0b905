"""Stored numbers to numbers: every code by its definition, scales in their order, files of two families, bad parts."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nautilus.ops.encode import encode
from nautilus.ops.formats import (
    FORMATS,
    Packed,
    from_compressed_tensors,
    from_modelopt,
    pack,
    scale_shape,
    to_modelopt,
    unpack,
    unusable,
    usable,
)

FP8 = torch.float8_e4m3fn
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def small_float(code, exponent_bits, mantissa_bits, infinite):
    """The value of an 8-bit float by its definition: (-1)^s 2^(e - bias) (1 + m / 2^bits), without 1 and from e = 1
    where e = 0. `infinite`: the largest e holds infinity and NaN (E5M2); otherwise only its last code is NaN (E4M3)."""
    sign = -1.0 if code >> 7 else 1.0
    e = code >> mantissa_bits & (1 << exponent_bits) - 1
    m = code & (1 << mantissa_bits) - 1
    bias = (1 << exponent_bits - 1) - 1
    if e == (1 << exponent_bits) - 1 and (infinite or m == (1 << mantissa_bits) - 1):
        return sign * math.inf if infinite and m == 0 else math.nan
    return sign * math.ldexp((e > 0) + m / (1 << mantissa_bits), max(e, 1) - bias)


E4M3 = [small_float(code, 4, 3, False) for code in range(256)]
E5M2 = [small_float(code, 5, 2, True) for code in range(256)]
BYTES = torch.arange(256, dtype=torch.uint8)


def assert_bits(got, want):
    """Equal down to the sign of zero; NaN equals NaN."""
    want = torch.tensor(want, dtype=torch.float32).reshape(got.shape)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(0.0), want.nan_to_num(0.0))
    assert torch.equal(got.signbit() & ~got.isnan(), want.signbit() & ~want.isnan())


# ----- every code -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name,table", [("fp8_e4m3", E4M3), ("fp8_e5m2", E5M2)])
def test_every_float8_code_decodes_by_its_definition(name, table):
    codes = BYTES.view(FORMATS[name].codes)[None]
    assert_bits(Packed(format=name, shape=(1, 256), codes=codes, scale=torch.tensor(1.0)).decode(), table)
    finite = [abs(v) for v in table if math.isfinite(v)]
    assert FORMATS[name].largest == max(finite) == {"fp8_e4m3": 448, "fp8_e5m2": 57344}[name]
    assert min(v for v in finite if v) == {"fp8_e4m3": 2.0**-9, "fp8_e5m2": 2.0**-16}[name]


def test_every_byte_of_e2m1_holds_its_even_element_in_the_low_half():
    want = [E2M1[half] for byte in range(256) for half in (byte & 15, byte >> 4)]
    scale = torch.full((1, 32), 1.0).to(FP8)
    packed = Packed(format="nvfp4", shape=(1, 512), codes=BYTES[None], scale=scale, tensor_scale=torch.tensor(1.0))
    assert_bits(packed.decode(), want)
    scale = torch.full((1, 16), 127, dtype=torch.uint8)
    assert_bits(Packed(format="mxfp4", shape=(1, 512), codes=BYTES[None], scale=scale).decode(), want)


def test_every_e8m0_scale_is_its_power_of_two():
    codes = torch.full((255, 16), 0x22, dtype=torch.uint8)  # ones
    got = Packed(format="mxfp4", shape=(255, 32), codes=codes, scale=BYTES[:255, None]).decode()
    assert_bits(got[:, 7], [math.ldexp(1.0, e - 127) for e in range(255)])
    ones = torch.ones(255, 32).to(FP8)
    assert torch.equal(Packed(format="mxfp8", shape=(255, 32), codes=ones, scale=BYTES[:255, None]).decode(), got)


def test_every_block_scale_of_nvfp4_is_its_e4m3_number():
    codes = torch.full((127, 8), 0x22, dtype=torch.uint8)
    scale = BYTES[:127, None].view(FP8)
    one = torch.tensor(1.0)
    got = Packed(format="nvfp4", shape=(127, 16), codes=codes, scale=scale, tensor_scale=one).decode()
    assert_bits(got[:, 3], E4M3[:127])


def test_integers_decode_from_their_whole_range():
    one = torch.ones(1, 1)
    codes = BYTES.view(torch.int8)[None]
    want = [*range(128), *range(-128, 0)]
    assert_bits(Packed(format="int8", shape=(1, 256), codes=codes, scale=one).decode(), want)
    low = pack(torch.arange(16, dtype=torch.uint8))[None]
    assert_bits(Packed(format="int4", shape=(1, 16), codes=low, scale=one).decode(), range(-8, 8))
    zero = torch.tensor([[3]], dtype=torch.uint8)
    assert_bits(Packed(format="int4", shape=(1, 16), codes=low, scale=one, zero=zero).decode(), range(-3, 13))


@given(codes=st.lists(st.integers(0, 15), min_size=2, max_size=40).filter(lambda codes: len(codes) % 2 == 0))
def test_unpacking_undoes_packing(codes):
    codes = torch.tensor(codes, dtype=torch.uint8)
    assert unpack(pack(codes)).tolist() == codes.tolist()
    assert pack(codes).tolist() == [a + 16 * b for a, b in zip(codes[::2].tolist(), codes[1::2].tolist(), strict=True)]


# ----- codes with scales ----------------------------------------------------------------------------------------------


def stored(name, shape, tile, seed, zero=False):
    """A Packed with random codes (no NaN) and random scales of every size."""
    draw = torch.Generator().manual_seed(seed)
    kind, blocks = FORMATS[name], scale_shape(shape, tile)
    size = (*shape[:-1], shape[-1] // 2) if kind.nibbles else shape
    codes = torch.randint(0, 256, size, generator=draw, dtype=torch.uint8)
    if kind.codes.is_floating_point:
        codes = torch.where((codes & 0x7F) < 0x7B, codes, 0)
    scale = torch.randint(0, 127, blocks, generator=draw, dtype=torch.uint8)
    if kind.scale == torch.float32:
        scale = torch.rand(blocks, generator=draw) * 2.0 ** torch.randint(-30, 30, blocks, generator=draw)
    return Packed(
        format=name,
        shape=shape,
        codes=codes if kind.nibbles else codes.view(kind.codes),
        scale=scale if scale.dtype == kind.scale else scale.view(kind.scale),
        tensor_scale=torch.rand(shape[:-2], generator=draw) if name == "nvfp4" else None,
        zero=torch.randint(0, 16, blocks, generator=draw, dtype=torch.uint8) if zero else None,
    )


def one_number(packed, tile, place):
    """Element `place`, with one rounding to float32 after each product."""
    *lead, k = place
    byte = packed.codes.view(torch.uint8)
    if FORMATS[packed.format].nibbles:
        code = int(byte[(*lead, k // 2)]) >> 4 * (k % 2) & 15
    else:
        code = int(byte[place])
    if packed.format == "int4":
        block = (*lead, k // int(tile[2:]))
        value = code - (8 if packed.zero is None else int(packed.zero[block]))
    else:
        signed = code - 256 if code > 127 else code
        value = {"fp8_e5m2": E5M2, "int8": None}.get(packed.format, E2M1 if FORMATS[packed.format].nibbles else E4M3)
        value = signed if value is None else value[code]
    width = int(tile.partition("x")[2]) if "x" in tile else packed.shape[-1]
    where = tuple(lead[:-1]) if tile == "tensor" else (*lead, k // width)
    scale = packed.scale[where]
    scale = 2.0 ** (int(scale) - 127) if scale.dtype == torch.uint8 else float(scale)
    result = np.float32(value) * np.float32(scale)
    return result if packed.tensor_scale is None else result * np.float32(float(packed.tensor_scale[tuple(lead[:-1])]))


SHAPES = [(1, 2), (3, 16), (2, 34), (5, 130), (2, 3, 40), (2, 2, 2, 18), (70,)]
KINDS = [(name, tile) for name, kind in FORMATS.items() for tile in kind.tiles if tile != "16x16"]


@pytest.mark.parametrize("name,tile", KINDS)
@settings(max_examples=7)
@given(shape=st.sampled_from(SHAPES), seed=st.integers(0, 999), zero=st.booleans())
def test_decoding_is_value_times_scale_times_tensor_scale_in_float32(name, tile, shape, seed, zero):
    packed = stored(name, shape, tile, seed, zero and name == "int4")
    got = packed.decode()
    assert got.shape == shape and got.dtype == torch.float32
    want = [one_number(packed, tile, place) for place in np.ndindex(*shape)]
    assert torch.equal(got.flatten(), torch.tensor(np.array(want)))
    assert torch.equal(packed.decode(torch.bfloat16), got.bfloat16())


# ----- files ----------------------------------------------------------------------------------------------------------


def same(one, other):
    for field in ("codes", "scale", "tensor_scale", "zero"):
        a, b = getattr(one, field), getattr(other, field)
        assert (a is None) == (b is None), field
        if a is not None:
            assert a.dtype == b.dtype and a.shape == b.shape, field
            assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)), field
    assert (one.format, one.shape) == (other.format, other.shape)


@pytest.mark.parametrize("shape", [(6, 160), (4, 6, 160)])
@pytest.mark.parametrize("name,tile", [kind for kind in KINDS if kind[0] != "int4"])
def test_model_optimizer_names_there_and_back_change_no_bit(name, tile, shape):
    packed = stored(name, shape, tile, 1)
    tensors = to_modelopt(packed)
    same(from_modelopt(tensors), packed)
    assert set(tensors) == {"weight", "weight_scale"} | ({"weight_scale_2"} if name == "nvfp4" else set())
    assert tensors["weight_scale"].shape == (shape[:-1] if tile == "row" else packed.scale.shape)
    same(from_modelopt({**tensors, "input_scale": torch.tensor(0.5)}), packed)


def test_the_global_scale_of_compressed_tensors_is_a_reciprocal():
    packed = stored("nvfp4", (6, 96), "1x16", 2)
    tensor_scale = torch.tensor(2.0**-9)
    names = {"weight": "weight_packed", "weight_scale": "weight_scale"}
    tensors = {names[k]: v for k, v in to_modelopt(packed).items() if k in names}
    theirs = from_compressed_tensors({**tensors, "weight_global_scale": torch.tensor([512.0])})
    ours = from_modelopt({**to_modelopt(packed), "weight_scale_2": tensor_scale})
    same(theirs, ours)


@pytest.mark.parametrize("scale", [0.0, 2.0**-9, 0.125, 1.0, 448.0])
def test_a_block_of_zeros_is_zero_whatever_scale_its_writer_chose(scale):
    tensors = {
        "weight_packed": torch.zeros(2, 16, dtype=torch.uint8),
        "weight_scale": torch.full((2, 2), scale).to(FP8),
        "weight_global_scale": torch.tensor([1.0]),
    }
    assert torch.equal(from_compressed_tensors(tensors).decode(), torch.zeros(2, 32))


@pytest.mark.parametrize("name,tile,names", [
    ("mxfp4", "1x32", "weight_packed"), ("mxfp8", "1x32", "weight"), ("fp8_e4m3", "row", "weight"),
    ("fp8_e4m3", "tensor", "weight"), ("int8", "row", "weight"), ("int8", "1x32", "weight"),
])  # fmt: skip
def test_compressed_tensors_of_other_formats_are_read(name, tile, names):
    packed = stored(name, (6, 96), tile, 3)
    scale = packed.scale.reshape(1) if tile == "tensor" else packed.scale
    same(from_compressed_tensors({names: packed.codes, "weight_scale": scale}), packed)


def test_scales_in_bfloat16_are_widened_exactly():
    scale = torch.rand(6, 1).bfloat16()
    codes = stored("int8", (6, 96), "row", 4).codes
    read = from_compressed_tensors({"weight": codes, "weight_scale": scale})
    assert read.scale.dtype == torch.float32 and torch.equal(read.scale, scale.float())


def words(values, axis):
    """Integers 0 to 15 as compressed-tensors packs them: eight in an int32 along `axis`, least significant first."""
    values = np.moveaxis(values.numpy().astype(np.uint32), axis, -1)
    out = np.zeros((*values.shape[:-1], -(-values.shape[-1] // 8)), dtype=np.uint32)
    for place in np.ndindex(*values.shape):
        out[(*place[:-1], place[-1] // 8)] |= values[place] << 4 * (place[-1] % 8)
    return torch.from_numpy(np.moveaxis(out.view(np.int32), -1, axis).copy())


@pytest.mark.parametrize("shape", [(6, 96), (3, 70)])
@pytest.mark.parametrize("zero", [False, True])
def test_int4_words_of_compressed_tensors_are_unpacked(shape, zero):
    packed = stored("int4", shape, "1x32", 5, zero)
    codes = unpack(packed.codes)
    tensors = {
        "weight_packed": words(codes, 1),
        "weight_scale": packed.scale.bfloat16(),
        "weight_shape": torch.tensor(shape),
    }
    if zero:
        tensors["weight_zero_point"] = words(packed.zero, 0)
    read = from_compressed_tensors(tensors)
    offset = packed.zero.repeat_interleave(32, 1)[:, : shape[1]] if zero else 8
    scale = packed.scale.bfloat16().float().repeat_interleave(32, 1)[:, : shape[1]]
    assert torch.equal(read.decode(), (codes.float() - offset) * scale)


# ----- parts that do not belong together -----------------------------------------------------------------------------


def parts(name="nvfp4", shape=(4, 32), tile="1x16"):
    packed = stored(name, shape, tile, 0)
    return {f: getattr(packed, f) for f in ("format", "shape", "codes", "scale", "tensor_scale", "zero")}


def spoilt(name, tile, value):
    """Parts of format `name` whose second scale has the bits or the value `value`."""
    given = parts(name, (4, 64), tile)
    given["scale"].view(torch.uint8 if given["scale"].element_size() == 1 else torch.float32).view(-1)[1] = value
    return given


BAD = [
    ({**parts(), "format": "nvfp5"}, "number format: there is none called 'nvfp5'; did you mean nvfp4"),
    ({**parts(), "format": "?"}, "choose one of fp8_e4m3, fp8_e5m2, mxfp8, mxfp4, nvfp4, int8, int4"),
    ({**parts(), "shape": (4, 31)}, "31 columns do not fill bytes of two codes; pad"),
    ({**parts(), "shape": ()}, "a single number has no row"),
    ({**parts(), "codes": torch.zeros(4, 16, dtype=torch.int8)}, "its codes is torch.int8 of shape .4, 16.; it must"),
    ({**parts(), "codes": torch.zeros(4, 32, dtype=torch.uint8)}, r"must be torch.uint8 of shape \(4, 16\)"),
    ({**parts(), "scale": torch.ones(4, 2)}, "its scale is torch.float32.*must be torch.float8_e4m3fn of shape"),
    ({**parts(), "scale": torch.ones(4, 1).to(FP8)}, r"scale is .* of shape \(4, 1\); it must be .* \(4, 2\)"),
    ({**parts(), "tensor_scale": None}, "its tensor_scale is missing"),
    ({**parts(), "tensor_scale": torch.ones(4)}, r"tensor_scale is .*\(4,\); it must be torch.float32 of shape \(\)"),
    ({**parts(), "tensor_scale": torch.tensor(-1.0)}, "1 of its tensor_scale numbers are negative"),
    ({**parts(), "tensor_scale": torch.tensor(math.nan)}, "1 of its tensor_scale numbers are negative"),
    ({**parts(), "zero": torch.zeros(4, 2, dtype=torch.uint8)}, "zero points are given; only int4 has them"),
    ({**parts("mxfp4", tile="1x32"), "tensor_scale": torch.tensor(1.0)}, "a tensor scale is given; only nvfp4 has one"),
    ({**parts("int8", tile="row"), "scale": torch.ones(4, 3)}, r"must be torch.float32 of shape \(4, 1\)"),
    ({**parts("int4", tile="1x32"), "zero": torch.zeros(4, 1)}, "its zero is torch.float32"),
    (spoilt("nvfp4", "1x16", 0x7F), "1 of its scale numbers are negative, NaN or infinite; the file is damaged"),
    (spoilt("nvfp4", "1x16", 0x81), "1 of its scale numbers are negative"),
    (spoilt("mxfp8", "1x32", 255), "1 of its scale numbers are negative"),
    (spoilt("int8", "row", -1.0), "1 of its scale numbers are negative"),
    (spoilt("int4", "1x32", math.inf), "1 of its scale numbers are negative"),
]  # fmt: skip


@pytest.mark.parametrize("given,message", BAD, ids=range(len(BAD)))
def test_parts_that_do_not_belong_together_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Packed(**given)


NVFP4 = to_modelopt(stored("nvfp4", (4, 32), "1x16", 0))
CODES = torch.zeros(4, 4, dtype=torch.int32)
UNREADABLE = [
    (from_modelopt, {"weight": NVFP4["weight"]}, "weight_scale absent from ..weight"),
    (from_modelopt, {**NVFP4, "pre_quant_scale": torch.ones(32)}, "pre_quant_scale would change its meaning; known"),
    (from_modelopt, {**NVFP4, "weight": NVFP4["weight"].long()}, "int64 with scales in torch.float8_e4m3fn; readable"),
    (from_modelopt, {**NVFP4, "weight_scale": torch.ones(4, 2)}, "uint8 with scales in torch.float32; .* no int4"),
    (from_modelopt, {k: v for k, v in NVFP4.items() if k != "weight_scale_2"}, "its tensor_scale is missing"),
    (from_modelopt, {**NVFP4, "weight_scale_2": torch.ones(3)}, r"tensor_scale is torch.float32 of shape \(3,\)"),
    (from_compressed_tensors, {"weight_scale": torch.ones(4, 1)}, "compressed-tensors weight: weight absent"),
    (from_compressed_tensors, {**NVFP4}, "weight_scale_2 would change its meaning"),
    (from_compressed_tensors, {"weight_packed": CODES, "weight_scale": torch.ones(4, 1)}, "weight_shape says nothing"),
    (
        from_compressed_tensors,  # 8 bits: four to an int32
        {"weight_packed": CODES, "weight_scale": torch.ones(4, 1), "weight_shape": torch.tensor([4, 16])},
        "only 4 bits are read",
    ),
    *[
        (
            from_compressed_tensors,
            {"weight_packed": NVFP4["weight"], "weight_scale": NVFP4["weight_scale"], "weight_global_scale": scale},
            "weight_global_scale is .*; it must be positive",
        )
        for scale in (torch.tensor([0.0]), torch.tensor([-2.0]), torch.tensor([math.nan]), torch.tensor([math.inf]))
    ],
]  # fmt: skip


@pytest.mark.parametrize("reader,tensors,message", UNREADABLE, ids=range(len(UNREADABLE)))
def test_tensors_that_cannot_be_read_are_refused(reader, tensors, message):
    with pytest.raises(ValueError, match=message):
        reader(tensors)


def test_int4_has_no_model_optimizer_form():
    with pytest.raises(ValueError, match="packed along the other axis"):
        to_modelopt(stored("int4", (4, 64), "1x32", 0))


# ----- rows, and the quick look at scales ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tile", [0, -1])
def test_rows_of_a_matrix_are_rows_of_its_numbers(name, tile):
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    packed = encode(x, name, tile=FORMATS[name].tiles[tile])
    index = torch.tensor([3, 0, 3, 8])
    assert torch.equal(packed.rows(index).decode(), packed.decode()[index])
    zeros = encode(x, "int4", rule="zero_point")
    assert torch.equal(zeros.rows(index).decode(), zeros.decode()[index])


@given(data=st.binary(min_size=4, max_size=64), kind=st.sampled_from([torch.uint8, FP8, torch.float32]))
def test_the_quick_look_finds_whatever_the_slow_one_finds(data, kind):
    scale = torch.frombuffer(bytearray(data[: len(data) // 4 * 4]), dtype=torch.uint8).view(kind)
    assert usable(scale) == (not unusable(scale).any())


@pytest.mark.parametrize("value", [-0.0, -1e-45, math.inf, -math.inf, math.nan, -math.nan])
def test_every_float_that_is_no_scale_is_found_among_many(value):
    scale = torch.ones(100, 3)
    assert usable(scale) and usable(torch.empty(0)) and usable(torch.tensor([0.0, 3e38]))
    scale[57, 1] = value
    assert not usable(scale) and not usable(scale[57:, 1])
