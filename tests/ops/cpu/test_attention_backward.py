"""The backward of attention: every gradient is the formula's, and what it must not depend on changes no bit of it."""

from functools import partial

import pytest
import torch

from nautilus.ops.attention import attention_reference
from nautilus.ops.cpu import attention_backward
from nautilus.ops.cpu.attention_backward import BLOCK, TILE, Native, pieces

# T new of S positions, heads, groups, head width: blocks and tiles that are full, nearly so, and of one; several slabs
# and strips, heads that cut blocks; widths below, at and beside whole vectors
SIZES = [
    (1, 1, 1, 1, 2), (1, 130, 3, 1, 16), (48, 48, 1, 1, 16), (49, 97, 1, 1, 18), (70, 70, 4, 2, 64),
    (33, 200, 6, 2, 34), (150, 150, 5, 1, 6), (20, 60, 64, 2, 80), (35, 50, 2, 2, 128), (3, 101, 4, 4, 256),
]  # fmt: skip
ODD = [(50, 60, 3, 3, 1), (31, 99, 2, 1, 5), (100, 100, 4, 2, 33)]
CASES = [
    *((size, dtype) for dtype in (torch.float32, torch.bfloat16) for size in SIZES),
    *((s, torch.float32) for s in ODD),
]


def draw(time, positions, heads, groups, width, dtype=torch.float32, *, batch=2):
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(time + width))
    q_BTHP, dout_BTHP = (normal(batch, time, heads, width).to(dtype) for _ in range(2))
    k_BSGP, v_BSGP = (normal(batch, positions, groups, width).to(dtype) for _ in range(2))
    return [q_BTHP, k_BSGP, v_BSGP], dout_BTHP


def documents(time, positions, batch=2):
    """The rows' documents begin at other places; every third one is of a single token."""
    marks = [[0, positions // 3, positions - 2, positions - 1], [0, positions // 2]]
    begins = [
        [max(m for m in marks[b % 2] if m <= s) for s in range(positions - time, positions)] for b in range(batch)
    ]
    return torch.tensor(begins)


def gradients(function, tensors, dout_BTHP, first_BT=None, window=0):
    leaves = [t.detach().requires_grad_() for t in tensors]
    out_BTHP = function(*leaves, first_BT, window)
    return torch.autograd.grad(out_BTHP, leaves, dout_BTHP.to(out_BTHP.dtype))


def formula(q, k, v, first_BT, window):
    return attention_reference(q, k, v, first_BT=first_BT, window=window)


@pytest.fixture
def small(monkeypatch):
    """One tile to a strip and one block to a slab."""
    monkeypatch.setattr(attention_backward, "STRIP", 0)
    monkeypatch.setattr(attention_backward, "PARTS", 0)


@pytest.mark.parametrize(("size", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "in pieces"])
def test_every_gradient_is_the_formulas(level, request, size, dtype, cut):
    """A chain of n multiply-adds loses n roundings at most; in bf16, out, p, ds and the result are rounded as well."""
    if cut:
        request.getfixturevalue("small")
    (time, positions, *_), (tensors, dout) = size, draw(*size, dtype=dtype)
    allowed = 2.0**-24 * sum(size) + (4 * 2.0**-8 if dtype == torch.bfloat16 else 0)
    for first_BT in (None, documents(time, positions), documents(time, positions, 1)):
        for window in (0, 1, 17, 1000):
            want = gradients(formula, [t.double() for t in tensors], dout, first_BT, window)
            got = gradients(Native.apply, tensors, dout, first_BT, window)
            for name, g, w in zip("qkv", got, want, strict=True):
                # dq and dk of tokens that see only themselves are zero: what is lost is held to their usual size.
                error = (g.double() - w).norm() / w.norm().clamp_min(w.numel() ** 0.5 / 4)
                assert g.dtype == dtype and error <= allowed, f"d{name}, window {window}: {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [0, 40])
def test_neither_threads_nor_slabs_nor_company_change_a_bit(level, monkeypatch, dtype, window):
    monkeypatch.setattr(attention_backward, "STRIP", 0)
    size = time, positions, *_ = 150, 170, 4, 2, 18
    (tensors, dout), first_BT = draw(*size, dtype=dtype, batch=3), documents(time, positions, 3)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = gradients(Native.apply, tensors, dout, first_BT, window)
        for threads, parts in ((2, 1 << 22), (1, 0), (3, 1 << 13)):
            torch.set_num_threads(threads)
            monkeypatch.setattr(attention_backward, "PARTS", parts)
            got = gradients(Native.apply, tensors, dout, first_BT, window)
            assert all(map(torch.equal, got, want)), (threads, parts)
    finally:
        torch.set_num_threads(before)
    for b in range(3):
        one = slice(b, b + 1)
        alone = gradients(Native.apply, [t[one] for t in tensors], dout[one], first_BT[one], window)
        assert all(torch.equal(a, w[one]) for a, w in zip(alone, want, strict=True)), b


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_cut_of_the_queries_gives_the_same_bits_of_dq(level, dtype, monkeypatch):
    monkeypatch.setattr(attention_backward, "STRIP", 0)
    (q, k, v), dout = draw(130, 130, 4, 2, 16, dtype)
    want = gradients(Native.apply, (q, k, v), dout)[0]
    for begin, end in ((0, 1), (1, 60), (60, 61), (61, 130)):
        some = slice(begin, end)
        got = gradients(Native.apply, (q[:, some], k[:, :end], v[:, :end]), dout[:, some])[0]
        assert torch.equal(got, want[:, some])


def test_tensors_may_lie_in_any_order_and_be_empty(level):
    (q, k, v), dout = draw(20, 50, 4, 2, 16)
    want = gradients(Native.apply, (q, k, v), dout)
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v, dout)]
    assert all(map(torch.equal, gradients(Native.apply, turned[:3], turned[3]), want))
    same = dout[:1, :1, :1, :1].expand(dout.shape)
    assert all(
        map(torch.equal, gradients(Native.apply, (q, k, v), same), gradients(Native.apply, (q, k, v), same.clone()))
    )
    for dq, dk, dv in (
        gradients(Native.apply, (q[:, :0], k, v), dout[:, :0]),
        gradients(Native.apply, (q[:0], k[:0], v[:0]), dout[:0]),
    ):
        assert not dq.numel() and not dk.any() and not dv.any()


def test_strips_depend_on_the_width_alone_and_slabs_fit():
    for width in (1, 16, 64, 100, 256, 4096):
        (_, wide, strip, _), *others = (
            pieces(p, r, s, width) for p in (1, 16) for r in (5, 9999) for s in (1, 1 << 20)
        )
        assert wide >= width and strip % TILE == 0 and all((w, s) == (wide, strip) for _, w, s, _ in others)
        for pairs, wide, _, slab in others:
            assert slab % BLOCK == 0 and (slab == BLOCK or slab <= 9999 + BLOCK)
            assert slab == BLOCK or pairs * (slab - BLOCK) * wide < attention_backward.PARTS
