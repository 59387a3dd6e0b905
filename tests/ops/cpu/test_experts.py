"""Experts as one native call against one expert after another in float64, and the laws of the native form."""

import pytest
import torch

from nautilus.ops.cpu.experts import experts_native, experts_refuse
from nautilus.ops.cpu.packs import packed_once
from nautilus.ops.experts import experts_reference

# tokens, width, hidden, experts, active; widths below, at and beside whole vectors and panels of columns; pairs of an
# expert in one chunk and in several
GATED = pytest.mark.parametrize("gated", [False, True], ids=["ungated", "gated"])
SIZES = [(1, 2, 4, 3, 1), (5, 18, 34, 4, 2), (70, 64, 130, 3, 2), (450, 66, 20, 2, 2), (230, 16, 16, 9, 4)]


def inputs(size, seed=0, weights=torch.float32, dtype=torch.bfloat16, gated=False):
    tokens, width, hidden, count, active = size
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw)
    return {
        "x_RX": normal(tokens, width).to(dtype),
        "index_RK": torch.rand(tokens, count, generator=draw).topk(active).indices,
        "weight_RK": torch.rand(tokens, active, generator=draw),
        # Already at the precision in which they are used, so that rounding them is no part of the comparison.
        "up_EFX": (normal(count, hidden, width) / width**0.5).bfloat16().to(weights),
        "down_EXF": (normal(count, width, hidden) / hidden**0.5).bfloat16().to(weights),
        "gate_EFX": (normal(count, hidden, width) / width**0.5).bfloat16().to(weights) if gated else None,
    }


@GATED
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_native_equals_one_expert_after_another(level, size, weights, gated, rounds_once):
    """Rounded on the way: up (twice its share through the square), the activation, down, the sum; as many back. In
    float32 three products follow each other; the longest sums run over all tokens, or over a width; silu and its slope
    are a few roundings more."""
    narrow, wide = (
        inputs(size, weights=weights, dtype=dtype, gated=gated) for dtype in (torch.bfloat16, torch.float32)
    )
    rounds_once(experts_native, experts_reference, narrow, single=6 * 2.0**-8)
    rounds_once(experts_native, experts_reference, wide, single=2.0**-24 * (3 * max(size) + 16 * gated))


def test_gates_that_are_wide_open_are_exact(level, pushed):
    """silu is the identity far above 0: what is left is a product of whole numbers, and each pair is counted once."""
    draw = torch.Generator().manual_seed(0)
    whole = lambda *shape: torch.randint(-1, 2, shape, generator=draw).float()
    t = inputs((230, 2, 2, 5, 2), gated=True) | {"x_RX": whole(230, 2).bfloat16(), "weight_RK": torch.ones(230, 2)}
    t |= {"up_EFX": whole(5, 2, 2), "down_EXF": whole(5, 2, 2), "gate_EFX": torch.zeros(5, 2, 2)}
    t["x_RX"][:, 1], t["gate_EFX"][:, :, 1] = 1, 32
    ungated = t | {"up_EFX": 32 * t["up_EFX"], "gate_EFX": None}
    identity = lambda x_RX, index_RK, weight_RK, up_EFX, down_EXF, gate_EFX: torch.einsum(
        "rk,rkxf,rkfy,ry->rx", weight_RK, down_EXF[index_RK], up_EFX[index_RK], x_RX
    )
    exact = {n: v.double() if v is not None and v.is_floating_point() else v for n, v in ungated.items()}
    (got,), grads = pushed(experts_native, t)
    (want,), want_grads = pushed(identity, exact, [torch.bfloat16])
    assert torch.equal(got.double(), want)
    for name in ("weight_RK", "down_EXF"):
        assert torch.equal(grads[name].double(), want_grads[name].float().double()), name


def test_whole_numbers_are_exact_so_each_pair_is_counted_once(level):
    draw = torch.Generator().manual_seed(0)
    whole = lambda *shape: torch.randint(-1, 2, shape, generator=draw).float()
    t = inputs((230, 2, 2, 5, 2)) | {"x_RX": whole(230, 2).bfloat16(), "weight_RK": torch.ones(230, 2)}
    t |= {"up_EFX": whole(5, 2, 2), "down_EXF": whole(5, 2, 2)}
    results = []
    for function, dtype in ((experts_native, torch.bfloat16), (experts_reference, torch.float64)):
        leaves = {n: v.to(dtype if n == "x_RX" or dtype == torch.float64 else v.dtype).requires_grad_()
                  for n, v in t.items() if n not in ("index_RK", "gate_EFX")}  # fmt: skip
        out = function(index_RK=t["index_RK"], **leaves)
        results.append([out, *torch.autograd.grad(out.sum(), list(leaves.values()))])
    assert all(torch.equal(g.double(), w.double()) for g, w in zip(*results, strict=True))


@GATED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_has_the_same_bits_in_any_company(level, dtype, gated):
    """Alone, in a batch, in another order, on more threads, with a gradient wanted or not."""
    t = inputs((300, 66, 130, 5, 2), dtype=dtype, gated=gated)
    want = experts_native(**t)
    for some in (torch.tensor([7]), torch.arange(299, -1, -1), torch.arange(40, 53)):
        few = t | {n: t[n][some] for n in ("x_RX", "index_RK", "weight_RK")}
        assert torch.equal(experts_native(**few), want[some])
    fixed = {"index_RK"} if gated else {"index_RK", "gate_EFX"}
    learning = {n: v if n in fixed else v.clone().requires_grad_() for n, v in t.items()}
    assert torch.equal(experts_native(**learning), want)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(experts_native(**t), want)
    finally:
        torch.set_num_threads(threads)


def test_masters_in_float32_are_rounded_like_a_cast(level):
    t = inputs((9, 6, 10, 3, 2), gated=True)
    for name in ("up_EFX", "gate_EFX"):
        t[name] += torch.randn(t[name].shape) * 2.0**-12
    narrow = t | {n: t[n].bfloat16() for n in ("up_EFX", "down_EXF", "gate_EFX")}
    assert torch.equal(experts_native(**t), experts_native(**narrow))


@GATED
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_once_keeps_the_bits(level, dtype, weights, gated):
    for size in SIZES:
        tensors, packs = inputs(size, weights=weights, dtype=dtype, gated=gated), {}
        anew = experts_native(**tensors)
        with packed_once(packs):
            first, again = experts_native(**tensors), experts_native(**tensors)
        assert torch.equal(anew, first) and torch.equal(anew, again)
        assert len(packs) == 2 + gated


def test_what_native_refuses(built):
    t = inputs((5, 18, 34, 4, 2), gated=True)
    assert experts_refuse(**t) is None and experts_refuse(**t | {"gate_EFX": None}) is None
    assert experts_refuse(**t | {"x_RX": t["x_RX"].float()}) is None
    for name, value in t.items():
        for grown in (torch.cat([value, value[..., :2]], -1), torch.cat([value, value[:1]])):
            assert "shapes" in experts_refuse(**t | {name: grown}), name
    assert "int64" in experts_refuse(**t | {"index_RK": t["index_RK"].int()})
    assert "float64" in experts_refuse(**t | {"x_RX": t["x_RX"].double()})
    assert "65 experts are active" in experts_refuse(**inputs((2, 2, 4, 70, 65)))
    assert "even" in experts_refuse(**inputs((5, 17, 34, 4, 2)))


@pytest.mark.parametrize("wrong", [-1, 4])
def test_an_index_that_names_no_expert_is_an_error(level, wrong):
    t = inputs((5, 18, 34, 4, 2))
    t["index_RK"][3, 1] = wrong
    with pytest.raises(IndexError, match="outside the matrix"):
        experts_native(**t)
