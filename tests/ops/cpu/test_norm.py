import pytest
import torch

from nautilus.ops.cpu.norm import (
    BLOCK,
    add_native,
    embed_native,
    joined_norms_native,
    joined_norms_refuse,
    rms_norm_native,
    rms_norm_refuses,
)
from nautilus.ops.norm import joined_norms, rms_norm_reference

EPS = 1e-5


def inputs(rows, width, dtype):
    draw = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(2, rows, width, generator=draw).to(dtype),
        "weight_D": torch.randn(width, generator=draw),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows,width", [(1, 3), (3, 17), (BLOCK // 2, 64), (BLOCK, 33)])
def test_native_equals_the_formula_with_every_gradient(level, rows, width, dtype, rounds_once):
    native, reference = (
        (lambda f: lambda **t: f(**t, eps=EPS))(rms_norm_native),
        lambda **t: rms_norm_reference(**t, eps=EPS),
    )
    rounds_once(native, reference, inputs(rows, width, dtype), single=2.0**-24 * (width + 2 * rows + 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_has_the_same_bits_in_any_company(level, dtype):
    t = inputs(BLOCK + 5, 50, dtype)
    want = rms_norm_native(**t, eps=EPS)
    assert torch.equal(rms_norm_native(t["hidden"][:, 9:11], t["weight_D"], EPS), want[:, 9:11])
    learning = {n: v.clone().requires_grad_() for n, v in t.items()}
    assert torch.equal(rms_norm_native(**learning, eps=EPS), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows,width", [(1, 3), (3, 17), (BLOCK, 33)])
def test_two_norms_stand_beside_each_other(level, rows, width, dtype):
    one, two = inputs(rows, width, dtype), {name: t.flip(-1) for name, t in inputs(rows, width, dtype).items()}
    joined = joined_norms_native(*one.values(), *two.values(), EPS)
    assert torch.equal(
        joined, torch.cat([rms_norm_native(*one.values(), EPS), rms_norm_native(*two.values(), EPS)], -1)
    )
    assert torch.equal(joined_norms(*one.values(), *two.values(), EPS), joined)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_and_embeddings_are_those_of_torch(level, dtype):
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 7013, generator=draw).to(dtype) for _ in range(2))
    assert torch.equal(add_native(a, b), a + b)
    index = torch.randint(40, (2, 5), generator=draw)
    for table in (torch.randn(40, 19, generator=draw), torch.randn(40, 19, generator=draw).bfloat16()):
        assert torch.equal(embed_native(index, table, dtype), torch.nn.functional.embedding(index, table).to(dtype))
        for strange in (-1, 40):
            with pytest.raises(IndexError):
                embed_native(torch.tensor([[strange]]), table, dtype)


def test_what_native_refuses(built):
    x, weight = torch.ones(4, 6), torch.ones(6)
    assert rms_norm_refuses(x, weight, EPS) is None
    assert "float64" in rms_norm_refuses(x.double(), weight, EPS)
    assert "meta" in rms_norm_refuses(x, weight.to("meta"), EPS)
    assert "12" in rms_norm_refuses(x, torch.ones(12), EPS)
    assert joined_norms_refuse(x, weight, x, weight, EPS) is None
    assert "differ" in joined_norms_refuse(x, weight, x[:2], weight, EPS)
    assert "gradient" in joined_norms_refuse(x, weight.clone().requires_grad_(), x, weight, EPS)
