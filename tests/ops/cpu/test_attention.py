"""Attention on pages: what is stored, what comes out, and that no company, cut or page number changes a bit of it."""

import math
from itertools import zip_longest
from unittest.mock import patch

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from nautilus.ops.attention import attention_reference
from nautilus.ops.cpu import attention
from nautilus.ops.cpu.attention import (
    FORMATS,
    PAGE,
    Pool,
    Rows,
    attention_native,
    attention_paged,
    attention_refuses,
    kv_write,
    new_pool,
    positions_native,
)

UNIT = 2.0**-8  # half the distance of neighbours in bf16
SCALES = {"k_scale": 0.03, "v_scale": 0.05}  # a few codes of fp8 for a number of size 1
NUMBER = {"f32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
# heads, groups, head width: one head to a group and sixteen; widths below, at and beside whole vectors
HEADS = [(4, 2, 18), (16, 1, 16), (3, 3, 34), (10, 2, 64), (32, 2, 128), (2, 1, 256), (5, 1, 80)]
# positions of each row, how many of them are new, window
ROWS = [([1], [1], 0), ([70, 5, 200], [70, 1, 6], 0), ([130, 64], [3, 64], 40), ([17, 65, 16], [17, 0, 16], 1)]


def dtype_of(format):
    return torch.float32 if format == "f32" else torch.bfloat16


def draw(*shape, seed, dtype):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def shuffled(lengths, seed, *, spare=3):
    """A table that gives each row pages in no order, and the size of the pool."""
    most, total = max(math.ceil(n / PAGE) for n in lengths), sum(math.ceil(n / PAGE) for n in lengths) + spare
    numbers = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).to(torch.int32).split(
        [*(math.ceil(n / PAGE) for n in lengths), spare]
    )  # fmt: skip
    table_BL = torch.full((len(lengths), most), -1, dtype=torch.int32)
    for row, pages in enumerate(numbers[:-1]):
        table_BL[row, : len(pages)] = pages
    return table_BL, total


def as_rows(new, lengths, table_BL):
    begin = torch.tensor([0, *new]).cumsum(0)
    return Rows(begin=begin.to(torch.int32), length=torch.tensor(lengths, dtype=torch.int32), table_BL=table_BL)


def poisoned(pages, groups, width, format):
    """Pages as an earlier owner might leave them: every byte is part of a NaN."""
    pool = new_pool(pages, groups, width, format, **(SCALES if format == "fp8" else {}))
    for bytes in (pool.keys, pool.values):
        bytes.fill_(255)
    return pool


def stored(pool, pages):
    """Keys and values of a row as its pages hold them, (positions, groups, width) in float64, decoded by torch."""
    number, wide = NUMBER[pool.format], math.ceil(pool.width / 16) * 16
    k, v = (
        t[pages.long()][..., : PAGE * wide * number.itemsize].contiguous().view(number)
        for t in (pool.keys, pool.values)
    )
    each = 1 if pool.format == "f32" else 2
    k = k.double().unflatten(-1, (wide // each, PAGE, each)).permute(0, 3, 1, 2, 4).flatten(-2).flatten(0, 1)
    v = v.double().unflatten(-1, (PAGE // each, wide, each)).permute(0, 2, 4, 1, 3).flatten(0, 2)
    if pool.format == "int8":
        scales = (t[pages.long()][..., -4 * PAGE :].contiguous().view(torch.float32) for t in (pool.keys, pool.values))
        k, v = (t * s.double().mT.flatten(0, 1)[..., None] for t, s in zip((k, v), scales, strict=True))
    return k[..., : pool.width] * pool.k_scale, v[..., : pool.width] * pool.v_scale


def scene(lengths, heads, format, seed=0):
    """A pool with all keys and values of some rows, their table, and a query for every position."""
    heads, groups, width = heads
    table_BL, pages = shuffled(lengths, seed)
    pool = poisoned(pages, groups, width, format)
    k, v = (draw(sum(lengths), groups, width, seed=seed + i, dtype=dtype_of(format)) for i in (1, 2))
    kv_write(pool, as_rows(lengths, lengths, table_BL), k, v)
    return pool, table_BL, draw(sum(lengths), heads, width, seed=seed + 3, dtype=dtype_of(format)), (k, v)


def firsts(positions, new, seed):
    """Where the document of each of the last `new` positions begins; documents are a few tokens to all of them long."""
    begins = torch.rand(positions, generator=torch.Generator().manual_seed(seed)) < 3 / positions
    return (torch.arange(positions) * begins).cummax(0).values[positions - new :].to(torch.int32)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_native_equals_the_formula_on_what_is_stored(level, heads, format, documents):
    """bf16 rounds each weight and the result once, by UNIT of what they stand for. Float32 sums of n numbers lose
    n 2^-24 of their size, an error of the scores is one of the weights, and the weights are divided by their sum."""
    for lengths, new, window in ROWS:
        pool, table_BL, q_all, _ = scene(lengths, heads, format)
        q_all = q_all * 30 if documents else q_all  # one weight far above all others, scores beyond +-100
        ends = torch.tensor(lengths).cumsum(0).tolist()
        q = [q_all[end - some : end] for end, some in zip(ends, new, strict=True)]
        first = [firsts(*pair, seed=4) for pair in zip(lengths, new, strict=True)] if documents else None
        first_N = torch.cat(first) if first else None
        out_NHP = attention_paged(torch.cat(q), pool, as_rows(new, lengths, table_BL), first_N=first_N, window=window)
        for row, got in enumerate(out_NHP.double().split(new)):
            if new[row] == 0:
                continue
            k, v = (t[None, : lengths[row]] for t in stored(pool, table_BL[row, : math.ceil(lengths[row] / PAGE)]))
            named = {"first_BT": first[row][None] if first else None, "window": window}
            want, size = (attention_reference(q[row][None].double(), k, t, **named)[0] for t in (v, v.abs()))
            share = heads[0] // heads[1]
            scores = torch.einsum("thp,shp->ths", q[row].double().abs(), k[0].abs().repeat_interleave(share, 1))
            single = 2.0**-24 * (2 * heads[2] * scores.max() / heads[2] ** 0.5 + 3 * lengths[row] + 16)
            bound = single * size + (2.0**-24 if format == "f32" else UNIT * 1.01) * want.abs()
            bound += 1e-35 if format == "f32" else 1e-35 + UNIT * 1.01 * size  # no weight is below 1e-38
            assert ((got - want).abs() <= bound).all(), (lengths, new, row)


@pytest.mark.parametrize("format", ["fp8", "int8"])
def test_pages_of_bytes_cost_no_more_than_their_format(level, format):
    """A number of size 1 moves by at most 1/16 of itself in E4M3, and by half a step of about 3 / 127 in int8."""
    pool, table_BL, q, (k, v) = scene([150], (4, 2, 64), format)
    want = attention_reference(q[None].double(), k[None].double(), v[None].double())[0]
    got = attention_paged(q, pool, as_rows([150], [150], table_BL))
    assert UNIT / 2 < (got - want).norm() / want.norm() < 1 / 16


def pieces(length, cuts):
    """The widths into which a text is cut."""
    edges = [0, *sorted(c for c in cuts if c < length), length]
    return [end - begin for begin, end in zip(edges, edges[1:], strict=False)]


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.tuples(*[st.integers(1, 150)] * 3),
    cuts=st.tuples(*[st.sets(st.integers(1, 149), max_size=6)] * 3),
    heads=st.sampled_from(HEADS[:4]),
    format=st.sampled_from(FORMATS),
    window=st.sampled_from([0, 0, 1, 30, 70]),
    documents=st.booleans(),
    split=st.booleans(),
    seed=st.integers(0, 99),
)
def test_no_cut_company_page_number_or_split_changes_a_bit(
    level, lengths, cuts, heads, format, window, documents, split, seed
):
    """Three rows, whole and alone; then piece by piece, together, on other pages, with the heads of a group apart."""
    pool, table_BL, q, (k, v) = scene(lengths, heads, format, seed)
    q, k, v = (t.split(lengths) for t in (q, k, v))
    first = [firsts(n, n, seed) if documents else torch.zeros(n, dtype=torch.int32) for n in lengths]
    whole = [
        attention_paged(q[b], pool, as_rows([n], [n], table_BL[b : b + 1].clone()), first_N=first[b], window=window)
        for b, n in enumerate(lengths)
    ]
    other_BL, pages = shuffled(lengths, seed + 1)
    other, done, parts = poisoned(pages, heads[1], heads[2], format), [0, 0, 0], [[], [], []]
    for new in zip_longest(*map(pieces, lengths, cuts), fillvalue=0):
        new_tokens = lambda rows, done=done, new=new: torch.cat(
            [t[d : d + n] for t, d, n in zip(rows, done, new, strict=True)]
        )
        done = [d + n for d, n in zip(done, new, strict=True)]
        rows = as_rows(new, done, other_BL)
        kv_write(other, rows, new_tokens(k), new_tokens(v))
        with patch.object(attention, "parts", lambda share, _: share if split else 1):
            out = attention_paged(new_tokens(q), other, rows, first_N=new_tokens(first), window=window)
        for row, piece in enumerate(out.split(new)):
            parts[row].append(piece)
    for row in range(3):
        assert torch.equal(torch.cat(parts[row]), whole[row])


@pytest.mark.parametrize("format", FORMATS)
def test_what_lies_in_unused_places_changes_no_bit(level, format):
    """Rejected tokens behind the last one, and in the next page; huge, but finite as all activations are."""
    pool, table_BL, q, (k, v) = scene([60], (4, 2, 18), format)
    want = attention_paged(q[:20], pool, as_rows([20], [20], table_BL))
    huge = torch.full((40, 2, 18), 3e38, dtype=k.dtype)
    kv_write(pool, as_rows([40], [60], table_BL), huge, -huge)
    assert torch.equal(attention_paged(q[:20], pool, as_rows([20], [20], table_BL)), want)
    kv_write(pool, as_rows([40], [60], table_BL), k[20:], v[20:])
    clean, clean_BL, _, _ = scene([60], (4, 2, 18), format)
    want = attention_paged(q, clean, as_rows([60], [60], clean_BL))
    assert torch.equal(attention_paged(q, pool, as_rows([60], [60], table_BL)), want)


@pytest.mark.parametrize("format", FORMATS)
def test_pages_that_no_token_sees_need_not_be_there(level, format):
    pool, table_BL, q, _ = scene([200], (4, 2, 18), format)
    rows = as_rows([5], [200], table_BL)
    want = attention_paged(q[:5], pool, rows, window=20)
    table_BL[0, : (200 - 5 - 19) // PAGE] = -7
    assert torch.equal(attention_paged(q[:5], pool, rows, window=20), want)
    with pytest.raises(ValueError, match="page 0 of row 0 is number -7; the pool has 0 .. 15"):
        attention_paged(q[:5], pool, rows)


@pytest.mark.parametrize("format", FORMATS)
def test_the_number_of_threads_changes_no_bit(level, format):
    pool, table_BL, q, _ = scene([90, 40], (16, 1, 16), format)
    call = lambda: attention_paged(q, pool, as_rows([90, 40], [90, 40], table_BL))
    want = call()
    torch.set_num_threads(3)
    try:
        assert torch.equal(call(), want)
    finally:
        torch.set_num_threads(1)


def test_a_scale_of_ones_own_replaces_the_root_of_the_width(level):
    pool, table_BL, q, (k, v) = scene([40], (4, 2, 64), "f32")
    got = attention_paged(q, pool, as_rows([40], [40], table_BL), scale=0.25)
    want = attention_reference(q[None] * 2, k[None], v[None])[0]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


# ----- what is stored -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [2, 18, 64])
def test_what_is_written_is_read_again_rounded_once(level, width, given):
    lengths, k_v = [37, 16], [draw(53, 3, width, seed=i, dtype=given) * 20 for i in range(2)]
    for format in FORMATS:
        table_BL, pages = shuffled(lengths, 5)
        pool = poisoned(pages, 3, width, format)
        kv_write(pool, as_rows(lengths, lengths, table_BL), *k_v)
        got = [torch.cat(part) for part in zip(
            stored(pool, table_BL[0])[0:2], stored(pool, table_BL[1, :1])[0:2], strict=True
        )]  # fmt: skip
        for got_NGP, x, scale in zip(got, k_v, SCALES.values(), strict=True):
            got_NGP = torch.cat([got_NGP[:37], got_NGP[48:]])
            if format == "int8":
                step = x.float().abs().amax(-1, keepdim=True) / 127
                assert ((got_NGP - x).abs() <= step * 0.50001).all()
                assert ((got_NGP / step).abs().amax(-1) == 127).all()
            elif format == "fp8":
                # True division: a product with 1 / scale would round some numbers to a neighbour.
                code = (x.float() / torch.tensor(scale)).clamp(-448, 448).to(torch.float8_e4m3fn)
                assert torch.equal(got_NGP, code.double() * scale)
            else:
                assert torch.equal(got_NGP, x.to(NUMBER[format]).double())


def one_token(width, format, **scales):
    """A pool of one page, and the row that has its first token."""
    table_BL = torch.zeros(1, 1, dtype=torch.int32)
    return new_pool(1, 1, width, format, **scales), as_rows([1], [1], table_BL)


def test_fp8_rounds_to_the_nearest_even_and_stops_at_the_largest(level):
    """Every finite code, all numbers half way between two, and what lies beyond."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    half = (codes[1:] + codes[:-1]) / 2
    x = torch.cat([codes, half, half * (1 + 2.0**-12), half * (1 - 2.0**-12), torch.tensor([449.0, 1e30, math.inf])])
    x = torch.cat([x, -x]).to(torch.float32)
    pool, rows = one_token(len(x), "fp8")
    kv_write(pool, rows, x[None, None], x[None, None])
    want = x.clamp(-448, 448).to(torch.float8_e4m3fn).double()
    for got in stored(pool, rows.table_BL[0]):
        assert torch.equal(got[0, 0], want)


@pytest.mark.parametrize("format", ["fp8", "int8"])
def test_every_code_is_read_as_the_number_it_stands_for(level, format):
    """One token, so that the output is its values."""
    pool, rows = one_token(256, format)
    kv_write(pool, rows, torch.zeros(1, 1, 256), torch.full((1, 1, 256), 127.0))  # an int8 step of 1
    codes = torch.arange(256).to(torch.uint8)
    pool.values[0, 0, : PAGE * 256].view(8, 256, 2)[0, :, 0] = codes
    out = attention_paged(torch.ones(1, 1, 256).bfloat16(), pool, rows)[0, 0].double()
    torch.testing.assert_close(out, codes.view(NUMBER[format]).double(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_numbers_that_are_none_are_not_hidden(level, format, wrong):
    """A token with NaN gives NaN where it is seen; one with inf NaN or, in fp8, the largest number."""
    pool, table_BL, q, (k, v) = scene([20], (4, 2, 18), format)
    bad = v[-1:].clone()
    bad[0, 1, 3] = wrong
    kv_write(pool, as_rows([1], [20], table_BL), k[-1:], bad)
    out = attention_paged(q[-1:], pool, as_rows([1], [20], table_BL))
    touched = out[0, 2:, 3] if format != "int8" else out[0, 2:]
    if format == "fp8" and wrong == math.inf:
        assert (touched > 0).all() and touched.isfinite().all()
    else:
        assert not touched.isfinite().any()
    assert out[0, :2].isfinite().all()


def test_a_token_of_zeros_is_stored_as_zeros(level):
    pool, rows = one_token(16, "int8")
    kv_write(pool, rows, torch.zeros(1, 1, 16), torch.full((1, 1, 16), 1e-42))
    assert not attention_paged(torch.ones(1, 1, 16).bfloat16(), pool, rows).any()


# ----- without pages of one's own -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_form_without_pages_gives_the_bits_of_the_one_with_them(level, dtype):
    format, width = "f32" if dtype == torch.float32 else "bf16", 18
    pool, table_BL, q, (k, v) = scene([70, 70], (4, 2, width), format)
    k, v, q = (t.unflatten(0, (2, 70)) for t in (k, v, q))
    first_BT = torch.stack([firsts(70, 9, seed) for seed in (0, 1)]).long()
    for first, window in ((None, 0), (first_BT, 0), (first_BT, 5)):
        flat = None if first is None else first.flatten().to(torch.int32)
        rows = as_rows([9, 9], [70, 70], table_BL)
        want = attention_paged(q[:, -9:].flatten(0, 1), pool, rows, first_N=flat, window=window)
        got = attention_native(q[:, -9:], k, v, first_BT=first, window=window)
        assert torch.equal(got.flatten(0, 1), want)


def test_no_tokens_give_no_output(built):
    nothing = torch.ones(2, 0, 4, 6), torch.ones(2, 5, 2, 6), torch.ones(2, 5, 2, 6)
    assert attention_native(*nothing).shape == (2, 0, 4, 6)
    assert attention_native(*(t[:, :0] for t in nothing)).shape == (2, 0, 4, 6)
    assert attention_native(*(t[:0] for t in nothing)).shape == (0, 0, 4, 6)


def test_what_the_form_without_pages_refuses(built):
    q, k = torch.ones(2, 3, 4, 6), torch.ones(2, 5, 2, 6)
    assert attention_refuses(q, k, k) is None
    assert attention_refuses(q[..., :5], k[..., :5], k[..., :5]) is None
    narrow = q.bfloat16(), k.bfloat16(), k.bfloat16()
    assert attention_refuses(*narrow) is None
    assert "head width 5" in attention_refuses(*(t[..., :5] for t in narrow))
    assert "float64" in attention_refuses(q.double(), k.double(), k.double())
    assert "queries are torch.bfloat16" in attention_refuses(q.bfloat16(), k, k)
    for wrong in ((k, q, q), (q[:, :, :3], k, k), (q, k, k[:, :4]), (q[:1], k, k)):
        assert "do not fit together" in attention_refuses(*wrong)


# ----- what does not fit ----------------------------------------------------------------------------------------------

PLACES = [
    ({"new": [2, 1], "table": [[5, 0], [1, 9]]}, "page 1 of row 1 is number 9; the pool has 0 .. 5"),
    ({"new": [2, 1], "lengths": [40, 17]}, "row 0 has 2 new tokens, 40 positions and pages for 32"),
    ({"new": [2, 1], "lengths": [1, 17]}, "row 0 has 2 new tokens, 1 positions"),
    ({"new": [2, 2]}, r"begin goes 0 .. 4 over 3 new tokens"),
    ({"new": [4, -1]}, r"begin goes 0 .. 3 over 3 new tokens"),
]


@pytest.mark.parametrize("change,message", PLACES, ids=[message[:20] for _, message in PLACES])
def test_places_that_do_not_exist_are_named(built, change, message):
    given = {"lengths": [20, 17], "table": [[5, 0], [1, 2]], **change}
    rows = as_rows(given["new"], given["lengths"], torch.tensor(given["table"], dtype=torch.int32))
    pool, x = new_pool(6, 1, 16, "f32"), torch.ones(3, 1, 16)
    for call in (lambda: kv_write(pool, rows, x, x), lambda: attention_paged(x, pool, rows)):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("new", [[2, -1, 2], [1, 1], [4, -1], [3, 1]], ids=str)
def test_rows_of_other_tokens_than_there_are_have_no_positions(built, new):
    rows = as_rows(new, [9] * len(new), torch.zeros(len(new), 1, dtype=torch.int32))
    with pytest.raises(ValueError, match="over 3 new tokens; let it rise"):
        positions_native(rows, 3)


@pytest.mark.parametrize("first", [-1, 19])
def test_a_document_that_begins_outside_what_was_said_is_named(built, first):
    pool, table_BL, q, _ = scene([20], (2, 2, 16), "f32")
    first_N = torch.tensor([0, first], dtype=torch.int32)
    with pytest.raises(ValueError, match=f"token 1 stands at position 18, its document begins at {first}"):
        attention_paged(q[:2], pool, as_rows([2], [19], table_BL), first_N=first_N)


def test_what_does_not_fit_the_pool_is_refused(built):
    pool, table_BL, q, (k, v) = scene([20], (4, 2, 16), "bf16")
    rows = as_rows([20], [20], table_BL)
    for wrong in (q[:, :3], q[:, :0], q[..., :8], q.float()):
        with pytest.raises(ValueError, match="cannot attend to 2 groups of width 16 in bf16"):
            attention_paged(wrong, pool, rows)
    for wrong_k, wrong_v in ((k, v[:, :1]), (k[..., :8], v[..., :8]), (k.float(), v), (k[:19], v)):
        with pytest.raises(ValueError, match="2 groups of width 16 take both alike"):
            kv_write(pool, rows, wrong_k, wrong_v)
    with pytest.raises(ValueError, match="float64"):
        kv_write(pool, rows, k.double(), v.double())
    for named in ({"window": -1}, {"first_N": torch.zeros(3, dtype=torch.int32)}, {"first_N": torch.zeros(20)}):
        with pytest.raises(ValueError, match=r"give int32 of shape \(20,\)"):
            attention_paged(q, pool, rows, **named)
    for format, width, scale in (("bf16", 16, 2.0), ("fp8", 16, 0.0)):
        with pytest.raises(ValueError, match=f"do not suit {format}"):
            new_pool(1, 1, width, format, k_scale=scale)
    for bytes in (pool.keys[..., :8], pool.keys.float(), pool.keys[:, :, ::2]):
        with pytest.raises(ValueError, match="make it contiguous uint8"):
            Pool(format="bf16", width=16, keys=bytes, values=bytes)
    for format, width in (("fp4", 16), ("bf16", 17), ("f32", 0)):
        with pytest.raises(ValueError, match=f"'{format}' for heads of width {width} do not exist"):
            new_pool(1, 1, width, format)


def test_rows_are_int32_and_as_many_as_they_say():
    good = {"begin": torch.tensor([0, 1]), "length": torch.tensor([1]), "table_BL": torch.tensor([[0]])}
    good = {name: value.to(torch.int32) for name, value in good.items()}
    Rows(**good)
    wrong = {"begin": good["begin"][:1], "length": good["length"].long(), "table_BL": good["begin"]}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"{name} is .*make it contiguous int32"):
            Rows(**{**good, name: value})
