import pytest
import torch

from nautilus.ops.attention import attention_reference
from nautilus.ops.cpu.attention import attention_paged as paged_native
from nautilus.ops.cpu.attention import kv_write
from nautilus.ops.cpu.library import native
from nautilus.ops.pages import PAGE, Rows, new_pool, paged_torch, positions, positions_torch, write_torch

GROUPS, HEADS, WIDTH = 2, 6, 18


def call(format, draw, *, lengths=(37, 5, 16), new=(3, 5, 1)):
    """Rows that were read in two calls, in pages that lie anywhere."""
    dtype = {"bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64}[format]
    k, v = (torch.randn(sum(lengths), GROUPS, WIDTH, generator=draw).to(dtype) for _ in range(2))
    q = torch.randn(sum(new), HEADS, WIDTH, generator=draw).to(dtype)
    table = torch.randperm(12, generator=draw).int().view(3, 4)
    ints = lambda values: torch.tensor(values, dtype=torch.int32)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    begins = [0, *torch.tensor(new).cumsum(0).tolist()]
    olds = [length - fresh for length, fresh in zip(lengths, new, strict=True)]
    rows_of = [torch.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    old = torch.cat([mine[:o] for mine, o in zip(rows_of, olds, strict=True)])
    fresh = torch.cat([mine[o:] for mine, o in zip(rows_of, olds, strict=True)])
    before = Rows(begin=ints([0, *torch.tensor(olds).cumsum(0).tolist()]), length=ints(olds), table_BL=table)
    now = Rows(begin=ints(begins), length=ints(lengths), table_BL=table)
    return (
        q,
        [(before, k[old], v[old]), (now, k[fresh], v[fresh])],
        now,
        [(k[mine], v[mine]) for mine in rows_of],
        begins,
    )


@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("format", ["bf16", "f32", "f64"])
def test_rows_attend_to_what_they_wrote_wherever_it_lies(format, window):
    q, writes, now, contents, begins = call(format, torch.Generator().manual_seed(0))
    pool = new_pool(12, GROUPS, WIDTH, format)
    for rows, k, v in writes:
        write_torch(pool, rows, k, v)
    out = paged_torch(q, pool, now, window=window)
    for row, (k, v) in enumerate(contents):
        mine = slice(begins[row], begins[row + 1])
        want = attention_reference(q[None, mine], k[None], v[None], window=window)[0]
        torch.testing.assert_close(
            out[mine], want, rtol=2e-2 if format == "bf16" else 1e-5, atol=1e-2 if format == "bf16" else 1e-5
        )


@pytest.mark.skipif(native().functions is None, reason="compares with native kernels")
@pytest.mark.parametrize("format", ["bf16", "f32"])
def test_both_ways_write_the_same_bytes_and_read_each_others_pages(format):
    q, writes, now, _, _ = call(format, torch.Generator().manual_seed(1))
    pools = [new_pool(12, GROUPS, WIDTH, format) for _ in range(2)]
    for pool, write in zip(pools, (write_torch, kv_write), strict=True):
        pool.keys.zero_(), pool.values.zero_()
        for rows, k, v in writes:
            write(pool, rows, k, v)
    assert torch.equal(pools[0].keys, pools[1].keys) and torch.equal(pools[0].values, pools[1].values)
    got, want = paged_native(q, pools[0], now), paged_torch(q, pools[1], now)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-2 if format == "bf16" else 1e-5)


def test_what_only_native_code_reads_is_refused_elsewhere():
    _, writes, *_ = call("bf16", torch.Generator())
    with pytest.raises(ValueError, match="fp8 was asked for; only native"):
        write_torch(new_pool(12, GROUPS, WIDTH, "fp8"), *writes[0])
    assert PAGE == 16


def as_rows(begin, length):
    ints = lambda values: torch.tensor(values, dtype=torch.int32)
    return Rows(begin=ints(begin), length=ints(length), table_BL=torch.zeros(len(length), 1, dtype=torch.int32))


def test_new_tokens_stand_at_the_last_positions_of_their_rows():
    rows = as_rows([0, 3, 3, 4, 9], [37, 5, 1, 5])
    want = torch.tensor([34, 35, 36, 0, 0, 1, 2, 3, 4])
    for function in (positions, positions_torch):
        assert torch.equal(function(rows, 9), want), function
    assert positions(as_rows([0], []), 0).shape == (0,)
