from dataclasses import replace

import pytest
import torch

from nautilus.ops.cpu.nvfp4 import linear_nvfp4, nvfp4_refuses, repacked
from nautilus.ops.encode import encode

# rows, inputs, outputs: below, at and beside groups of inputs, panels of outputs and tiles of rows
SIZES = [(1, 16, 1), (2, 48, 17), (15, 64, 64), (70, 160, 130), (1, 1856, 80)]


def inputs(size, seed=0):
    rows, width, outputs = size
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=draw).bfloat16(), encode(
        torch.randn(outputs, width, generator=draw), "nvfp4"
    )


def as_int8(x):
    """The activations as the kernel sees them, in float64: int8 with one scale for 32 neighbours."""
    wide = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % 32)).unflatten(1, (-1, 32))
    most = wide.abs().amax(-1, keepdim=True)
    whole = (wide * torch.where(most > 0, torch.tensor(127.0) / most, 0)).round()  # 127 / x would be 127 times 1 / x
    return (whole.double() * (most / 127).double()).flatten(1)[:, : x.shape[1]]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_weights_are_exact_and_activations_are_int8(level, size):
    x, matrix = inputs(size)
    got, weight = linear_nvfp4(x, repacked(matrix)).double(), matrix.decode().double()
    want = as_int8(x) @ weight.T
    bound = 2.0**-8 * want.abs() + 2.0**-24 * size[1] * (as_int8(x).abs() @ weight.abs().T)
    assert ((got - want).abs() <= bound).all()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_int8_activations_cost_less_than_a_hundredth(level, size):
    """Half a step of amax / 127 in each: about 0.6 % of a group's root mean square for normal numbers."""
    x, matrix = inputs(size)
    want = x.double() @ matrix.decode().double().T
    assert (linear_nvfp4(x, repacked(matrix)) - want).norm() < 0.01 * (x.double().norm() * matrix.decode().norm()) / 2


def test_a_row_has_the_same_bits_in_any_company(level):
    x, matrix = inputs((150, 96, 130))
    packed = repacked(matrix)
    want = linear_nvfp4(x, packed)
    for some in (slice(9, 10), slice(0, 2), slice(40, 47), slice(63, 149)):
        assert torch.equal(linear_nvfp4(x[some], packed), want[some])
    assert torch.equal(linear_nvfp4(x.view(3, 50, 96), packed).flatten(0, 1), want)


def test_zeros_largest_values_and_every_code_are_read(level):
    """All sixteen codes, scales from the smallest to the largest; a row of zeros gives zeros."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(16, 2)
    scale = torch.arange(0, 127, 4).clamp(max=126).to(torch.uint8).view(16, 2).view(torch.float8_e4m3fn)
    matrix = encode(torch.ones(16, 32), "nvfp4")
    matrix = replace(matrix, codes=codes[:, 0::2] | codes[:, 1::2] << 4, scale=scale)
    got = linear_nvfp4(torch.eye(32).bfloat16(), repacked(matrix))
    assert torch.equal(got, matrix.decode().T.bfloat16())
    assert not linear_nvfp4(torch.zeros(1, 32).bfloat16(), repacked(matrix)).any()


def test_what_is_refused(built):
    x, matrix = inputs((1, 32, 16))
    assert nvfp4_refuses(x, repacked(matrix)) is None
    for wrong, message in ((x.float(), "float32"), (torch.ones(2, 16).bfloat16(), "16 numbers, the matrix takes 32")):
        with pytest.raises(ValueError, match=message):
            linear_nvfp4(wrong, repacked(matrix))
    with pytest.raises(ValueError, match="int8 of shape .*one nvfp4 matrix"):
        repacked(encode(torch.ones(16, 32), "int8"))
    with pytest.raises(ValueError, match="nvfp4 of shape"):
        repacked(encode(torch.ones(2, 16, 32), "nvfp4"))
