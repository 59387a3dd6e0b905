from dataclasses import replace

import pytest
import torch

from nautilus.ops.cpu.activation import swiglu_native
from nautilus.ops.cpu.quant import experts_quant, linear_quant, quant_refuses, repack_refuses, repacked
from nautilus.ops.encode import encode
from nautilus.ops.experts import experts_reference
from nautilus.ops.formats import unpack

# rows, inputs, outputs: below, at and beside groups of inputs, panels and blocks of outputs, tiles and spans of rows
SIZES = [(1, 16, 1), (2, 48, 17), (8, 64, 20), (9, 96, 45), (15, 64, 64), (70, 160, 130), (1, 1856, 80)]
KINDS = [
    *(("nvfp4", None, None), ("mxfp4", None, None), ("int4", "1x32", None), ("int4", "1x128", "zero_point")),
    *(("int8", "row", None), ("int8", "1x64", None), ("fp8_e4m3", "tensor", None), ("fp8_e4m3", "row", None)),
]
EXACT = 2.0**-8  # one rounding to bf16


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantised(kind, outputs, inputs, seed=0):
    name, tile, rule = kind
    return encode(
        draw(outputs, inputs, seed=seed), name, **({"tile": tile} if tile else {}), **({"rule": rule} if rule else {})
    )


def seen(kind, x):
    """The activations as the kernel sees them, in float64: bf16, or int8 with one scale for 32 neighbours."""
    if kind[0] == "fp8_e4m3":
        return x.double()
    wide = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % 32)).unflatten(1, (-1, 32))
    most = wide.abs().amax(-1, keepdim=True)
    whole = (wide * torch.where(most > 0, torch.tensor(127.0) / most, 0)).round()  # 127 / x would be 127 times 1 / x
    return (whole.double() * (most / 127).double()).flatten(1)[:, : x.shape[1]]


def bound(kind, want, x, weight):
    return EXACT * want.abs() + 2.0**-23 * x.shape[1] * (seen(kind, x).abs() @ weight.abs().T)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_weights_are_exact_and_activations_are_int8_or_bf16(level, kind, size):
    rows, inputs, outputs = size
    x, matrix = draw(rows, inputs, seed=1).bfloat16(), quantised(kind, outputs, inputs)
    weight, packed = matrix.decode().double(), repacked(matrix)
    want = seen(kind, x) @ weight.T
    assert ((linear_quant(x, packed).double() - want).abs() <= bound(kind, want, x, weight)).all()
    squared = want.clamp(min=0).square()
    wrong = (linear_quant(x, packed, squared_relu=True).double() - squared).abs()
    assert (wrong <= EXACT * squared + 3 * want.abs() * bound(kind, 0 * want, x, weight) + 1e-6).all()


def laid_out(matrix):
    """Codes and scales in the order that quant.cpp describes, number by number."""
    (outputs, inputs), name = matrix.shape, matrix.format
    unit, size, bits = {"int8": (32, 512, 8), "fp8_e4m3": (4, 64, 8)}.get(name, (32, 256, 4))
    number = unpack(matrix.codes) if bits == 4 else matrix.codes.view(torch.uint8)
    units, blocks = -(-inputs // unit), -(-outputs // 64)
    outside = 8 if name == "int4" else 0
    number = torch.nn.functional.pad(number, (0, units * unit - inputs, 0, blocks * 64 - outputs), value=outside).long()
    n, k = torch.arange(blocks * 64)[:, None], torch.arange(units * unit)
    r, i = n % 16, k % unit
    place = {
        "int8": 64 * (i // 4) + 4 * r + i % 4,
        "fp8_e4m3": 16 * (r // 4) + 8 * (i // 2) + 2 * (r % 4) + i % 2,
    }.get(name, 64 * (i // 8) + 4 * r + i % 4)
    place = ((n // 64 * units + k // unit) * 4 + n % 64 // 16) * size + place
    codes = torch.zeros(blocks * units * 4 * size, dtype=torch.int64)
    codes.index_add_(0, place.flatten(), (number << 4 * (i % 8 // 4) if bits == 4 else number).flatten())
    scale = matrix.scale.expand(outputs, 1) if matrix.tile == "tensor" else matrix.scale
    scales = 2 * units if name == "nvfp4" else scale.shape[1]

    def columns(t):
        padded = torch.nn.functional.pad(t, (0, scales - t.shape[1], 0, blocks * 64 - outputs))
        return padded.unflatten(0, (blocks, 64)).mT.flatten()

    scale = scale.view(torch.uint8) if name == "nvfp4" else scale
    return codes.to(torch.uint8), columns(scale), None if matrix.zero is None else columns(matrix.zero.int())


# outputs, inputs: at and beside bytes, words, units, panels and blocks, and more than is moved at a time
@pytest.mark.parametrize("size", [(1, 2), (17, 50), (64, 32), (70, 62), (130, 2048), (64, 2086), (200, 4160)], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_matrices_are_repacked_to_the_last_byte(level, kind, size):
    matrices = [quantised(kind, *size, seed=seed) for seed in range(3)]
    packed = repacked(matrices)
    for number, matrix in enumerate(matrices):
        codes, scale, zero = laid_out(matrix)
        assert torch.equal(packed.codes[number], codes)
        assert torch.equal(packed.scale[number], scale)
        assert zero is None or torch.equal(packed.zero[number], zero)


@pytest.mark.parametrize("outputs", [3, 80])
def test_a_row_of_bytes_may_end_anywhere(level, outputs):
    for inputs in (1, 3, 33, 1025, 1031):
        matrix = quantised(("int8", "row", None), outputs, inputs)
        assert torch.equal(repacked(matrix).codes[0], laid_out(matrix)[0])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_int8_activations_cost_less_than_a_hundredth(level, kind):
    """Half a step of amax / 127 in each: about 0.6 % of a group's root mean square for normal numbers."""
    x, matrix = draw(30, 320, seed=1).bfloat16(), quantised(kind, 64, 320)
    want = x.double() @ matrix.decode().double().T
    assert (linear_quant(x, repacked(matrix)) - want).norm() < 0.01 * want.norm()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_row_has_the_same_bits_in_any_company(level, kind):
    x, packed = draw(150, 96, seed=1).bfloat16(), repacked(quantised(kind, 130, 96))
    want = linear_quant(x, packed)
    for some in (slice(9, 10), slice(0, 2), slice(40, 47), slice(63, 149)):
        assert torch.equal(linear_quant(x[some], packed), want[some])
    assert torch.equal(linear_quant(x.view(3, 50, 96), packed).flatten(0, 1), want)


@pytest.mark.parametrize(
    ("kind", "codes"), [("nvfp4", 16), ("mxfp4", 16), ("int4", 16), ("int8", 255), ("fp8_e4m3", 254)]
)
def test_every_code_and_extreme_scales_are_read(level, kind, codes):
    """On the identity: activations that are exact, so that the weights come out as they were decoded."""
    matrix = encode(torch.ones(16, 256), kind)
    if codes == 16:
        every = torch.arange(16, dtype=torch.uint8).repeat(16, 16)
        matrix = replace(matrix, codes=every[:, 0::2] | every[:, 1::2] << 4)
    elif kind == "int8":
        matrix = replace(matrix, codes=torch.arange(256).sub(128).clamp(min=-127).to(torch.int8).repeat(16, 1))
    else:
        every = torch.tensor([code for code in range(256) if code & 127 != 127] + [0, 0], dtype=torch.uint8)
        matrix = replace(matrix, codes=every.repeat(16, 1).view(torch.float8_e4m3fn))
    if kind == "nvfp4":
        scale = torch.arange(0, 127).repeat(3)[: 16 * 16].to(torch.uint8).view(16, 16)
        matrix = replace(matrix, scale=scale.view(torch.float8_e4m3fn))
    elif kind == "mxfp4":  # up to 2^103: integers times larger scales may overflow
        matrix = replace(matrix, scale=torch.arange(16 * 8, dtype=torch.uint8).mul(2).clamp(max=230).view(16, 8))
    got = linear_quant(torch.eye(256).bfloat16(), repacked(matrix))
    normal = matrix.decode().T.abs() >= 2.0**-126  # bf16 instructions and their inputs: no subnormal numbers
    assert torch.equal(got[normal], matrix.decode().T.bfloat16()[normal])
    assert not linear_quant(torch.zeros(1, 256).bfloat16(), repacked(matrix)).any()


GATED = pytest.mark.parametrize("gated", [False, True], ids=["ungated", "gated"])


def expert_call(kind, tokens, experts=6, active=3, width=96, hidden=80, gated=False):
    up, gate = ([quantised(kind, hidden, width, seed=first + e) for e in range(experts)] for first in (0, 200))
    down = [quantised(kind, width, hidden, seed=100 + e) for e in range(experts)]
    # The last expert is nobody's choice.
    index = torch.stack(
        [torch.randperm(experts - 1, generator=torch.Generator().manual_seed(t))[:active] for t in range(tokens)]
    )
    matrices = (up, down, gate) if gated else (up, down)
    return draw(tokens, width, seed=1).bfloat16(), index, draw(tokens, active, seed=2).abs(), *matrices


@GATED
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 150])
def test_experts_follow_the_reference(level, kind, tokens, gated):
    x, index, weight, *sides = expert_call(kind, tokens, gated=gated)
    stacks = (torch.stack([m.decode() for m in side]).double() for side in sides)
    want = experts_reference(x.double(), index, weight.double(), *stacks)
    got = experts_quant(x, index, weight, *map(repacked, sides)).double()
    assert (got - want).norm() < (0.008 if kind[0] == "fp8_e4m3" else 0.02) * want.norm()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gated_experts_are_two_products_and_one_rounding_of_what_they_make(level, kind):
    """One expert for all: the very numbers of its three products, the first two of which are not rounded."""
    x, index, weight, up, down, gate = expert_call(kind, 40, experts=2, active=1, gated=True)
    hidden, opening = (linear_quant(x, repacked(side[0]), wide=True) for side in (up, gate))
    act = swiglu_native(opening, hidden)
    got = experts_quant(x, 0 * index, torch.ones_like(weight), *map(repacked, (up, down, gate))).double()
    weights = down[0].decode().double()
    seen_act = act.bfloat16().double() if kind[0] == "fp8_e4m3" else seen(kind, act)
    want = seen_act @ weights.T
    assert ((got - want).abs() <= EXACT * want.abs() + 2.0**-23 * 80 * (seen_act.abs() @ weights.abs().T)).all()


@GATED
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[6]], ids=str)
def test_a_token_meets_its_experts_alike_in_any_company(level, kind, gated):
    x, index, weight, *sides = expert_call(kind, 200, gated=gated)
    sides = [*map(repacked, sides)]
    want = experts_quant(x, index, weight, *sides)
    for some in (slice(0, 1), slice(17, 19), slice(50, 180)):
        assert torch.equal(experts_quant(x[some], index[some], weight[some], *sides), want[some])


def test_what_is_refused(built):
    x, matrix = draw(1, 32).bfloat16(), quantised(KINDS[0], 16, 32)
    assert quant_refuses(x, repacked(matrix)) is None
    for wrong, message in ((x.float(), "float32"), (torch.ones(2, 16).bfloat16(), "16 numbers, the matrix takes 32")):
        with pytest.raises(ValueError, match=message):
            linear_quant(wrong, repacked(matrix))
    assert "no kernel for mxfp8" in (repack_refuses([encode(torch.ones(16, 32), "mxfp8")]) or "")
    assert "odd" in (repack_refuses([encode(torch.ones(16, 33), "fp8_e4m3")]) or "")
    with pytest.raises(ValueError, match="no single ones of one kind"):
        repacked([matrix, quantised(KINDS[0], 32, 32)])
    x, index, weight, up, down = expert_call(KINDS[0], 4)
    other = repacked([quantised(KINDS[1], 80, 96) for _ in range(6)])
    up, down = repacked(up), repacked(down)
    for arguments, message in (
        ((x, index, weight, up, down, down), "must be alike"),
        ((x, index, weight, up, down, other), "gates are .'mxfp4', 6, 96, 80., what they open .'nvfp4'"),
        ((x[:, :64], index, weight, up, down), "do not fit 64"),
        ((x, index, weight, up, up), "do not fit"),
        ((x, index.int(), weight, up, down), "int64"),
        ((x, index[:2], weight, up, down), "do not fit together"),
    ):
        with pytest.raises(ValueError, match=message):
            experts_quant(*arguments)
    with pytest.raises(IndexError, match="index lies outside"):
        experts_quant(x, index + 5, weight, up, down)
