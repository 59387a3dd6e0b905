import pytest
import torch

from nautilus.ops.encode import encode
from nautilus.ops.formats import FORMATS, dense
from nautilus.ops.linear import linear


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("forced", ["torch", "reference", None])
@pytest.mark.parametrize("format", FORMATS)
def test_a_matrix_in_few_bits_gives_what_its_numbers_give(format, forced, dtype, monkeypatch):
    if forced or dtype == torch.bfloat16:  # native products round activations: tests/ops/cpu/test_quant.py
        monkeypatch.setenv("NAUTILUS_OPS", forced or "torch")
    weight, x = encode(draw(24, 64), format), draw(2, 3, 64, seed=1).to(dtype)
    got = linear(x, weight)
    assert got.dtype == dtype
    assert torch.equal(got, torch.nn.functional.linear(x, weight.decode(dtype)))


def test_the_gradient_passes_through_a_matrix_in_few_bits():
    weight = encode(draw(24, 64), "nvfp4")
    x = draw(5, 64, seed=1).requires_grad_()
    (got,) = torch.autograd.grad(linear(x, weight).square().sum(), x)
    (want,) = torch.autograd.grad(torch.nn.functional.linear(x, weight.decode()).square().sum(), x)
    assert torch.equal(got, want)


def test_numbers_are_cast_and_codes_decoded():
    weight = draw(24, 64)
    assert dense(weight, torch.bfloat16).dtype == torch.bfloat16
    packed = encode(weight, "int8")
    assert torch.equal(dense(packed, torch.float32), packed.decode())
    assert packed.device == weight.device
