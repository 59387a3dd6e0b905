import pytest
import torch

from nautilus.ops.activation import swiglu_torch
from nautilus.ops.cpu.activation import swiglu_native, swiglu_refuses

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def inputs(*shape, dtype=torch.float32):
    gate, up = 3 * torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    return {"gate": gate.to(dtype), "up": up.to(dtype)}


@DTYPES
@pytest.mark.parametrize("shape", [(1,), (3, 17), (2, 5, 7013)], ids=str)
def test_native_equals_the_formula_with_every_gradient_and_rounds_once(level, shape, dtype, rounds_once):
    """e^x is good to two units in the last place; a sum, a quotient and products follow."""
    rounds_once(swiglu_native, swiglu_torch, inputs(*shape, dtype=dtype), single=2.0**-24 * 16)


@DTYPES
def test_a_number_has_the_same_bits_in_any_company(level, dtype):
    t = inputs(3, 7013, dtype=dtype)
    want = swiglu_native(**t)
    assert torch.equal(swiglu_native(**{n: v[1:2, 5:40] for n, v in t.items()}), want[1:2, 5:40])
    assert torch.equal(swiglu_native(**{n: v.T for n, v in t.items()}).T, want)
    assert torch.equal(swiglu_native(**{n: v.clone().requires_grad_() for n, v in t.items()}), want)


def test_gates_far_from_zero_neither_overflow_nor_let_anything_through(level):
    gate = torch.tensor([-3e38, -200.0, -88.0, 0.0, 88.0, 3e38, float("nan")]).requires_grad_()
    y = swiglu_native(gate, torch.ones(7))
    assert y[:2].tolist() == pytest.approx([0, 0], abs=6) and abs(y[2]) < 1e-35
    assert torch.equal(y[3:6].detach(), torch.tensor([0.0, 88.0, 3e38])) and y[6].isnan()
    slope = torch.autograd.grad(y.sum(), gate)[0]
    assert slope[1:6].tolist() == pytest.approx([0, 0, 0.5, 1, 1], abs=1e-6) and slope[6].isnan()


def test_what_native_refuses(built):
    x = torch.ones(4, 6)
    assert swiglu_refuses(x, x) is None
    assert "float64" in swiglu_refuses(x.double(), x.double())
    assert "meta" in swiglu_refuses(x.to("meta"), x.to("meta"))
    for other in (x[:, :1], x.bfloat16()):
        assert "opens" in swiglu_refuses(x, other)
