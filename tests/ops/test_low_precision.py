"""Products in few bits: native code against `encode`, both gradients against float64, and the laws of rounding."""

import concurrent.futures
import dataclasses
import hashlib
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nautilus.ops import low_precision
from nautilus.ops.cpu.library import native
from nautilus.ops.cpu.lowbit import Trip, product_native, quantise_native
from nautilus.ops.encode import encode, hadamard
from nautilus.ops.experts import experts_reference
from nautilus.ops.low_precision import (
    How,
    low_experts,
    low_linear,
    product_reference,
    quantise_reference,
    random_bits,
)

BUILT = pytest.mark.skipif(native().functions is None, reason="there is no native library")
ROW, COLUMN = torch.arange(64)[:, None], torch.arange(64)[None]
X = (((37 * ROW + 101 * COLUMN) % 251 - 125) / 64 * 2.0 ** ((ROW + COLUMN) % 7 - 3)).bfloat16()
BITS = ((13 * ROW + 29 * COLUMN) % 256).to(torch.uint8)
WHOLE = torch.tensor([0, 64])
GROUPS = torch.tensor([0, 32, 32, 80, 288])  # one is empty, one is longer than a piece of work
WHERE = (2**63 + 12345, 7, 4, 16)
BLOCKS = torch.tensor([9, 3, 40, 41, 2])
TRIPS = [
    *(Trip(format=f, axis=a, zipped=z) for f in ("nvfp4", "mxfp8") for a in ("rows", "columns") for z in (False, True)),
    Trip(format="nvfp4", axis="tiles"),
    Trip(format="nvfp4", axis="columns", turn=True, zipped=True),
    Trip(format="nvfp4", axis="rows", address=WHERE),
    Trip(format="nvfp4", axis="columns", turn=True, address=WHERE),
    Trip(format="nvfp4", axis="rows", address=WHERE, group=7, blocks=BLOCKS, over=lambda t: 3 * t),
    Trip(format="nvfp4", axis="columns", turn=True, over=lambda t: t + 1e30),
    Trip(format="nvfp4", axis="tiles", over=lambda t: 2 * t),
]  # fmt: skip


def numbers(seed, rows, columns, spread=3.0):
    """Normal numbers, of which those of different rows and columns differ much in size; a block of zeros."""
    draw = torch.Generator().manual_seed(seed)
    size = torch.exp(spread * torch.randn(rows, columns, generator=draw))
    x = torch.randn(rows, columns, generator=draw) * size
    x[3:19, :20] = 0
    return x


def unzip(y):
    return y.view(-1, y.shape[-1], 2).mT.reshape(y.shape)


def zipped(y):
    return y.view(-1, 2, y.shape[-1]).mT.reshape(y.shape)


# ----- what is quantised ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trip",
    TRIPS,
    ids=lambda t: f"{t.format}-{t.axis}-{t.turn:d}{t.zipped:d}{t.address is not None:d}{t.over is not None:d}",
)
@pytest.mark.parametrize("columns", [64, 70, 10])
def test_native_values_equal_the_reference_bit_for_bit(level, trip, columns):
    for x in (numbers(0, 288, columns).bfloat16(), numbers(1, 288, columns) * 1e-30, torch.zeros(288, columns)):
        values, top, flushed = quantise_native(x, GROUPS, trip)
        want, want_top, want_flushed = quantise_reference(x, GROUPS, trip)
        got = unzip(values) if trip.zipped else values
        assert torch.equal(got.float(), want), f"{(got != want).sum()} of {want.numel()} values differ"
        assert torch.equal(top, want_top) and flushed == want_flushed


@BUILT
@settings(max_examples=20)
@given(seed=st.integers(0, 9999), spread=st.sampled_from([0.5, 3.0, 9.0]), power=st.sampled_from([-100, -20, 0, 90]))
def test_native_values_equal_the_reference_at_any_size(seed, spread, power):
    x = (numbers(seed, 48, 34, spread) * 2.0**power).clamp(-1e38, 1e38)
    first = torch.tensor([0, 16, 48])
    for trip in TRIPS:
        got, top, _ = quantise_native(x, first, dataclasses.replace(trip, zipped=False))
        want, want_top, _ = quantise_reference(x, first, trip)
        # Of bf16 numbers below 2^-126 the reference's decoder and native code both keep every bit.
        assert torch.equal(got.float(), want.bfloat16().float()) and torch.equal(top, want_top)


def digest(tensor):
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


GOLDEN = {
    "rows": ("87410555c25788de", Trip(format="nvfp4", axis="rows")),
    "tiles": ("ff9a75f0572a4852", Trip(format="nvfp4", axis="tiles")),
    "turned": ("401c7836c3e15e46", Trip(format="nvfp4", axis="columns", turn=True)),
    "stochastic": ("3a7ef0c6723e0ee6", Trip(format="nvfp4", axis="rows", bits=BITS)),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_native_values_are_those_of_the_golden_vectors(level, name):
    """V2 to V5 of the published checks; the codes by `encode`, whose digests they are."""
    want, trip = GOLDEN[name]
    x = hadamard(X.mT) if trip.turn else X
    stochastic = {"rounding": "stochastic", "bits": BITS} if trip.bits is not None else {}
    packed = encode(x, "nvfp4", rule="train", tile="16x16" if name == "tiles" else "1x16", **stochastic)
    assert digest(packed.codes) == want
    values, top, _ = quantise_native(X, WHOLE, trip)
    values = values.mT if trip.turn else values
    assert torch.equal(values.float() * (top / 2688), packed.decode())


def test_the_golden_product(level):
    """V6: rows of X times X upside down in square tiles."""
    engine = low_precision.engine_for(X, X[None])
    a, sa, _ = engine.quantise(X, WHOLE, Trip(format="nvfp4", axis="rows"))
    b, sb, _ = engine.quantise(X.flip(0), WHOLE, Trip(format="nvfp4", axis="tiles"))
    y = engine.product("forward", a, b[None], (sa, sb), WHOLE, torch.float32)
    assert [f"{v:.5f}" for v in y[0, :4].tolist()] == ["-73.70757", "50.80208", "265.13443", "-20.82946"]


@pytest.mark.parametrize("format", ["nvfp4", "mxfp8"])
def test_what_is_not_finite_becomes_nan_and_goes_no_further_than_its_group(level, format):
    for bad in (torch.nan, torch.inf):
        x = numbers(0, 288, 64).bfloat16()
        x[40, 5] = bad
        for quantise in (quantise_native, quantise_reference):
            values, top, _ = quantise(x, GROUPS, Trip(format=format, axis="rows"))
            parts = [v.float() * t for v, t in zip(values.split(GROUPS.diff().tolist()), top, strict=True)]
            assert [bool(p.isnan().any()) for p in parts] == [False, False, True, False]


def test_masters_are_rounded_to_bf16_before_anything_else(level):
    x = numbers(2, 64, 64)
    for trip in (Trip(format="nvfp4", axis="tiles"), Trip(format="mxfp8", axis="columns")):
        got, want = quantise_native(x, WHOLE, trip), quantise_native(x.bfloat16(), WHOLE, trip)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


# ----- stochastic rounding --------------------------------------------------------------------------------------------


def test_stochastic_rounding_is_unbiased(level):
    """Mean error below 1/256 of a step over 1e6 draws: what is lost by 8 random bits, and chance."""
    x = torch.full((16384, 64), 1.3).bfloat16()
    x[:, ::16] = 6  # every block's largest, so that scales are 448 and a step is known
    values, top, _ = quantise_native(x, torch.tensor([0, 16384]), Trip(format="nvfp4", axis="rows", address=WHERE))
    mask = torch.arange(64) % 16 != 0
    y = (values.float() * (top / 2688))[:, mask].double()
    step, true = 0.5, x[0, 1].double()
    assert {round(v, 6) for v in y.unique().tolist()} == {1.0, 1.5}
    assert abs((y.mean() - true) / step) < 1 / 256 + 4 * 0.5 / y.numel() ** 0.5
    # Each bit pattern of a byte is as frequent as the others, and neighbours know nothing of each other.
    bits = random_bits(WHERE, 0, 1024, 1024).double()
    assert (bits.flatten().long().bincount(minlength=256) - 4096).abs().max() < 6 * 64
    for one, other in ((bits[:, 1:], bits[:, :-1]), (bits[1:], bits[:-1])):
        assert abs(torch.corrcoef(torch.stack((one.flatten(), other.flatten())))[0, 1]) < 5e-3


def test_the_two_products_of_a_gradient_draw_bits_of_their_own():
    streams = {How(format="nvfp4", stream=s).trip("rows", noise=n).address[2] for s in (0, 2, 8) for n in (0, 1)}
    assert len(streams) == 6 and How(format="mxfp8").trip("rows", noise=0).address is None


def test_bits_are_those_of_an_address():
    seed, step, stream, row = WHERE
    whole = random_bits((seed, step, stream, 0), 2, 64, 100)
    assert torch.equal(whole[32:, :48], random_bits((seed, step, stream, 32), 2, 32, 48))
    for other in ((seed + 1, step, stream, 0), (seed, step + 1, stream, 0), (seed, step, stream + 1, 0)):
        assert (random_bits(other, 2, 64, 100) == whole).double().mean() < 0.02
    assert (random_bits((seed, step, stream, 0), 3, 64, 100) == whole).double().mean() < 0.02


# ----- products -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs,inputs", [(38, 70), (130, 64), (2, 258)])
def test_products_of_whole_numbers_are_exact(level, outputs, inputs):
    draw = torch.Generator().manual_seed(0)
    x, dy = (torch.randint(-9, 10, (288, n), generator=draw).bfloat16() for n in (inputs, outputs))
    w = torch.randint(-9, 10, (4, outputs, inputs), generator=draw).bfloat16()
    tops = [torch.tensor(t) * 2688 for t in ([1.0, 0.5, 2.0, 0.25], [2.0, 2.0, 4.0, 1.0])]
    for kind, a, b in (("forward", x, w), ("inputs", dy, w), ("weights", dy, x)):
        native = (zipped(a), zipped(b)) if kind == "weights" else (a, b)
        for dtype in (torch.float32, torch.bfloat16):
            got = product_native(kind, *native, tops, GROUPS, dtype)
            want = product_reference(kind, a.double(), b.double(), tops, GROUPS, torch.float32)
            assert torch.equal(got, want.to(got.dtype)), kind


def chain_bound(magnitudes, terms):
    """Of a float32 sum of exact products in any order, and two more products."""
    return (terms + 2) * 2.0**-24 * magnitudes + 1e-45


@pytest.mark.parametrize("format", ["nvfp4", "mxfp8"])
@pytest.mark.parametrize("rows", [64, 37])
def test_both_gradients_are_products_of_what_the_table_says(level, format, rows):
    """Each result against float64 on operands from `encode`, within what float32 sums and one rounding may lose."""
    x = numbers(0, rows, 70, 1.0).bfloat16().requires_grad_()
    w = numbers(1, 38, 70, 4.0).requires_grad_()  # so that MXFP8 along outputs is not MXFP8 along inputs
    dy = numbers(2, rows, 38, 1.0).bfloat16()
    how = How(format=format, seed=5, step=3, stream=8, row=32)
    y = low_linear(x, w, how)
    y.backward(dy)

    full = [torch.nn.functional.pad(t.detach(), (0, 0, 0, -rows % 16)) for t in (x, dy)]
    first, one = torch.tensor([0, len(full[0])]), torch.tensor([0, 38])

    def operand(t, bounds, *args, **named):
        values, top, _ = quantise_reference(t, bounds, how.trip(*args, **named))
        return values.double() * top.double() / 2688

    tile, back = ("tiles", "tiles") if format == "nvfp4" else ("rows", "columns")
    cases = (
        ("y", y, operand(full[0], first, "rows"), operand(w, one, tile).mT),
        ("dx", x.grad, operand(full[1], first, "rows", noise=0), operand(w, one, back)),
        ("dW", w.grad, operand(full[1], first, "columns", turn=True, noise=1).mT,
         operand(full[0], first, "columns", turn=True)),
    )  # fmt: skip
    for name, got, a, b in cases:
        want, bound = a @ b, chain_bound(a.abs() @ b.abs(), a.shape[1])
        want, bound = (t if name == "dW" else t[:rows] for t in (want, bound))
        rounding = 0 if name == "dW" else 2.0**-8 * (want.abs() + bound)
        assert got.dtype == (torch.float32 if name == "dW" else torch.bfloat16)
        assert ((got.double() - want).abs() <= bound + rounding).all(), name


def test_the_backward_multiplies_with_the_same_weight_as_the_forward(level):
    """One hot rows read the weight's values out of both products; other copies for the backward harm training."""
    w = numbers(3, 32, 32, 2.0)
    eye = torch.eye(32).bfloat16()
    x = eye.clone().requires_grad_()
    y = low_linear(x, w, How(format="nvfp4"))
    y.backward(eye)
    assert torch.equal(y.detach().mT, x.grad)


def test_a_rotation_of_both_sides_leaves_the_weight_gradient_alone():
    dy, x = (torch.randn(64, n, dtype=torch.float64) for n in (24, 40))
    turned = hadamard(dy.mT) @ hadamard(x.mT).mT
    torch.testing.assert_close(turned, dy.mT @ x, rtol=0, atol=1e-13)


def test_a_row_has_the_same_bits_in_any_company(level):
    """Under given scales: those are the operand's, so company that changes the largest number does change a row."""
    x, w = numbers(4, 208, 64, 0.5).bfloat16(), numbers(5, 48, 64, 0.5)
    x[0, 0] = x[16, 0] = 1e3
    whole = low_linear(x, w, How(format="nvfp4"))
    assert torch.equal(low_linear(x[16:], w, How(format="nvfp4")), whole[16:])
    assert torch.equal(low_linear(x[:16], w, How(format="nvfp4")), whole[:16])


@BUILT
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(threads):
    def run():
        x, w = numbers(6, 420, 130, 1.0).bfloat16().requires_grad_(), numbers(7, 200, 130, 1.0).requires_grad_()
        y = low_linear(x, w, How(format="nvfp4"))
        y.backward(y.detach())
        return y.detach(), x.grad, w.grad

    alone = run()
    torch.set_num_threads(threads)
    try:
        assert all(torch.equal(a, b) for a, b in zip(alone, run(), strict=True))
    finally:
        torch.set_num_threads(1)


def test_the_forward_alone_in_bf16(level):
    x, w = numbers(8, 32, 64, 1.0).bfloat16().requires_grad_(), numbers(9, 48, 64, 1.0).requires_grad_()
    grads = []
    for forward in (True, False):
        y = low_linear(x, w, How(format="nvfp4", forward=forward))
        grads.append(torch.autograd.grad(y, (x, w), torch.ones_like(y)))
    exact = x.detach().double() @ w.detach().bfloat16().double().mT
    assert ((y.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-5 * exact.abs().max()).all()
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_an_odd_side_is_computed_all_the_same():
    x, w = numbers(8, 20, 33, 1.0).requires_grad_(), numbers(9, 21, 33, 1.0).requires_grad_()
    y = low_linear(x, w, How(format="nvfp4"))
    y.sum().backward()
    assert y.shape == (20, 21) and x.grad.shape == x.shape and w.grad.shape == w.shape
    assert y.dtype == x.grad.dtype == torch.float32


# ----- pieces of a matrix on several processes ------------------------------------------------------------------------


class Meeting:
    """Threads that add up and compare tensors, as processes do."""

    def __init__(self, ranks):
        self.met, self.slots = threading.Barrier(ranks, timeout=60), [None] * ranks

    def all(self, rank, tensor, reduce):
        self.slots[rank] = tensor
        self.met.wait()
        found = reduce(torch.stack([*self.slots]))
        self.met.wait()
        return found


def cut_linear(x, w, dy, how, axis, lengths):
    """(y, dx, dW) of two threads that hold halves of each of the sections `lengths`, put together again."""
    meeting, dim = Meeting(2), int(axis == "inputs")
    take = lambda t, d, rank: torch.cat([part.chunk(2, d)[rank] for part in t.split(lengths, d)], d)

    def work(rank):
        torch.set_num_threads(1)
        starts = [sum(lengths[:i]) + rank * length // 2 for i, length in enumerate(lengths)]
        blocks = [torch.arange(length // 32) + start // 16 for start, length in zip(starts, lengths, strict=True)]
        piece = low_precision.Piece(
            axis=axis, lengths=tuple(length // 2 for length in lengths), blocks=torch.cat(blocks), first=rank == 1,
            largest=lambda t: meeting.all(rank, t, lambda ts: ts.amax(0)),
            total=lambda t: meeting.all(rank, t, lambda ts: ts.sum(0)),
        )  # fmt: skip
        own_x = (take(x, 1, rank) if dim else x).detach().clone().requires_grad_()
        own_w = take(w, dim, rank).detach().clone().requires_grad_()
        y = low_linear(own_x, own_w, dataclasses.replace(how, piece=piece))
        y.backward(dy if dim else take(dy, 1, rank))
        return y.detach(), own_x.grad, own_w.grad

    def join(pieces, d):
        halves = [piece.split([length // 2 for length in lengths], d) for piece in pieces]
        return torch.cat([half[i] for i in range(len(lengths)) for half in halves], d)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        (y, dx, dw), (y1, dx1, dw1) = pool.map(work, range(2))
    if dim:
        return y + y1, join([dx, dx1], 1), join([dw, dw1], 1)
    return join([y, y1], 1), dx + dx1, join([dw, dw1], 0)


@pytest.mark.parametrize("format", ["nvfp4", "mxfp8"])
@pytest.mark.parametrize("axis", ["outputs", "inputs"])
def test_pieces_of_a_matrix_give_the_bits_of_the_whole(level, axis, format):
    """Scales and random bits are the whole's, and sums that are cut are added before they are rounded."""
    sizes = (40, 64 if axis == "outputs" else 192, 192 if axis == "outputs" else 64)
    draw = torch.Generator().manual_seed(1)
    x, w, dy = (torch.randn(*shape, generator=draw) for shape in ((40, sizes[1]), (sizes[2], sizes[1]), (40, sizes[2])))
    x[:, -16:] *= 3  # so that the halves have other largest numbers
    dy[:, :16] *= 3
    x, dy, how = x.bfloat16(), dy.bfloat16(), How(format=format, seed=5, step=3, stream=8, row=32)
    leaves = [t.clone().requires_grad_() for t in (x, w)]
    y = low_linear(*leaves, how)
    y.backward(dy)
    got = cut_linear(x, w, dy, how, axis, [128, 64])
    for name, one, want in zip(("y", "dx", "dW"), got, (y.detach(), *(t.grad for t in leaves)), strict=True):
        if format == "nvfp4" or name == "dW":  # whose sums float32 holds, or which are not cut
            assert torch.equal(one, want), f"{name}: {(one != want).sum()} of {want.numel()} differ"
        else:
            torch.testing.assert_close(one, want, rtol=2**-7, atol=1e-4)


# ----- experts --------------------------------------------------------------------------------------------------------


def expert_tensors(gated):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(50, 24, generator=draw).bfloat16()
    index = torch.stack([torch.randperm(5, generator=draw)[:2].sort().values for _ in range(50)])  # of 6: one is idle
    weight = torch.rand(50, 2, generator=draw)
    up, gate = (torch.randn(6, 40, 24, generator=draw) / 5 for _ in range(2))
    down = torch.randn(6, 24, 40, generator=draw) / 6
    return x, index, weight, up, down, gate if gated else None


@pytest.mark.parametrize("gated", [False, True])
def test_experts_without_rounding_are_the_experts(gated, close, monkeypatch):
    """The way there and back, with an engine that quantises nothing: against the reference and its gradients."""
    plain = low_precision.Engine(
        lambda x, first, trip: (x.detach().float(), torch.full((len(first) - 1,), 2688.0), 0), product_reference
    )
    monkeypatch.setattr(low_precision, "engine_for", lambda *args: plain)
    results = []
    for function, exact in ((lambda *t: low_experts(*t, How(format="nvfp4")), False), (experts_reference, True)):
        x, index, *others = expert_tensors(gated)
        leaves = [t if t is None else t.detach().requires_grad_() for t in (x, *others)]
        wide = [t.double() if exact and t is not None else t for t in leaves]
        out = function(wide[0], index, *wide[1:])
        wanted = [t for t in leaves if t is not None]
        results.append([out, *torch.autograd.grad(out.double().square().sum(), wanted)])
    for place, (got, want) in enumerate(zip(*results, strict=True)):
        close(f"result {place}", got, want, 0.02)  # bf16 between the products


@pytest.mark.parametrize("format", ["nvfp4", "mxfp8"])
def test_experts_have_scales_of_their_own(level, format):
    """An expert whose numbers are 2^20 times as large changes nothing for the others, forward or backward."""
    x, index, weight, up, down, _ = expert_tensors(False)
    grads = []
    for factor in (1.0, 2.0**20):
        matrices = [t.clone() for t in (up, down)]
        matrices[0][0] *= factor
        leaves = [t.requires_grad_() for t in matrices]
        out = low_experts(x, index, weight, *leaves, None, How(format=format, seed=1))
        away = (index != 0).all(-1)
        grads.append((out[away], *(g[1:] for g in torch.autograd.grad(out[away].sum(), leaves))))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert (grads[0][1][-1] == 0).all()  # the idle one


def test_experts_equal_linear_maps_one_by_one(level):
    """The grouped form against a product of its own for each expert, bit for bit."""
    x, index, _, up, down, _ = expert_tensors(False)
    how = How(format="nvfp4")
    out = low_experts(x, index[:, :1], torch.ones(50, 1), up, down, None, how)
    for expert in range(6):
        rows = x[index[:, 0] == expert]
        if len(rows):
            hidden = low_linear(rows, up[expert], how).relu().square()
            assert torch.equal(out[index[:, 0] == expert], low_linear(hidden, down[expert], how))
