import pytest
import torch

from nautilus.ops.cpu.linear import linear_native, linear_refuses
from nautilus.ops.cpu.packs import packed_once
from nautilus.ops.linear import linear_torch

DTYPES = [torch.float32, torch.bfloat16]
# rows, inputs, outputs: below, at and beside tiles of rows, panels of columns and blocks of rows
SIZES = [(1, 2, 1), (3, 18, 33), (7, 130, 64), (200, 34, 65), (13, 256, 300)]


def inputs(size, dtype, seed=0, weights=torch.float32):
    rows, width, outputs = size
    draw = torch.Generator().manual_seed(seed)
    weight_OI = (torch.randn(outputs, width, generator=draw) / width**0.5).bfloat16().to(weights)
    return {"x": torch.randn(rows, width, generator=draw).to(dtype), "weight_OI": weight_OI}


@pytest.mark.parametrize("weights", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_native_equals_the_product_with_every_gradient(level, size, dtype, weights, rounds_once):
    """Sums of at most `inputs` terms (`rows` in the gradient of the matrix), in float32."""
    t = inputs(size, dtype, weights=weights)
    single = 2.0**-24 * (size[1] + size[0] + size[2])
    # The gradient of a float32 master is a product in the activations' dtype.
    rounds_once(linear_native, linear_torch, t, single=single + (dtype == torch.bfloat16) * 2.0**-8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_in_any_company(level, dtype):
    t = inputs((400, 66, 130), dtype)
    want = linear_native(**t)
    for some in (slice(7, 8), slice(0, 5), slice(190, 390)):
        assert torch.equal(linear_native(t["x"][some], t["weight_OI"]), want[some])
    assert torch.equal(linear_native(t["x"].view(4, 100, 66), t["weight_OI"]).flatten(0, 1), want)
    assert torch.equal(linear_native(t["x"].clone().requires_grad_(), t["weight_OI"]), want)


@pytest.mark.parametrize("size", [*SIZES, (5, 17, 33)], ids=str)
def test_float_rows_see_the_same_matrix_in_bf16_as_in_float(level, size):
    t = inputs(size, torch.float32, weights=torch.bfloat16)
    wide = t["weight_OI"].float()
    assert torch.equal(linear_native(**t), linear_native(t["x"], wide))
    if size[1] % 2 == 0:
        narrow = t["x"].bfloat16()
        assert torch.equal(linear_native(narrow, t["weight_OI"], exact=True), linear_native(narrow, wide, exact=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("named", [{"exact": True}, {"wide": True}, {"squared_relu": True}], ids=str)
def test_a_call_may_keep_precision_or_square_the_positive_part(level, named, dtype, rounds_once):
    """With the same bits whether a gradient is wanted or not."""
    t = inputs((7, 130, 67), dtype)
    native, reference = (lambda f: lambda **t: f(**t, **named))(linear_native), lambda **t: linear_torch(**t, **named)
    rounds_once(native, reference, t, single=2.0**-24 * 400 + (dtype == torch.bfloat16) * 2.0**-6)
    got = linear_native(**t, **named)
    assert got.dtype == (dtype if "squared_relu" in named else torch.float32)
    assert torch.equal(linear_native(**{n: v.clone().requires_grad_() for n, v in t.items()}, **named), got)
    if named.keys() & {"exact", "wide"}:
        weight = t["weight_OI"] if "exact" in named else t["weight_OI"].to(dtype)
        want = t["x"].double() @ weight.double().T
        assert (got - want).abs().max() < 1e-5 * want.abs().max()


def test_a_matrix_is_packed_once_where_that_is_said_and_anew_everywhere_else(level):
    t, packs = inputs((3, 18, 33), torch.float32), {}
    weight_OI, narrow = t["weight_OI"].clone(), t["x"].bfloat16()
    with packed_once(packs):
        for _ in range(2):
            assert torch.equal(linear_native(t["x"], weight_OI), linear_native(**t))
            assert torch.equal(linear_native(narrow, weight_OI), linear_native(narrow, t["weight_OI"]))
    assert len(packs) == 4
    weight_OI += 1
    assert torch.equal(linear_native(t["x"], weight_OI), linear_native(t["x"], t["weight_OI"] + 1))


def test_a_matrix_and_its_transpose_are_packed_apart(level):
    """They may begin at the same address and have the same shape."""
    x, weight_OI = torch.randn(2, 4), torch.randn(4, 4)
    with packed_once({}):
        linear_native(x, weight_OI)
        torch.testing.assert_close(linear_native(x, weight_OI.T), x @ weight_OI)


def test_what_native_refuses(built):
    assert linear_refuses(**inputs((3, 18, 33), torch.bfloat16)) is None
    assert linear_refuses(**inputs((3, 17, 33), torch.float32)) is None
    assert "odd" in linear_refuses(**inputs((3, 17, 33), torch.bfloat16))
    assert "float64" in linear_refuses(torch.ones(2, 2, dtype=torch.float64), torch.ones(2, 2))
    assert "18 inputs" in linear_refuses(torch.ones(3, 18), torch.ones(33, 16))
