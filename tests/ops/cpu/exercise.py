"""Every native call at sizes beside every vector width. All results must be finite: fresh memory that reads as NaN then
shows what nobody wrote.

The sanitizers run this file at every level of a library that is named on the command line; `test_arm.py` calls
`everything`.
"""

import ctypes
import pathlib
import sys

import torch

from nautilus.ops.cpu import library
from nautilus.ops.cpu.activation import swiglu_native
from nautilus.ops.cpu.attention import Rows, attention_native, attention_paged, kv_write, new_pool, positions_native
from nautilus.ops.cpu.attention_backward import Native
from nautilus.ops.cpu.draw import draw_native
from nautilus.ops.cpu.experts import experts_native
from nautilus.ops.cpu.linear import linear_native
from nautilus.ops.cpu.mamba import fold_native, mamba_native, new_slots, slots_native
from nautilus.ops.cpu.memory import ReadAll
from nautilus.ops.cpu.norm import add_native, embed_native, rms_norm_native
from nautilus.ops.cpu.packs import packed_once
from nautilus.ops.cpu.peak import peak_native
from nautilus.ops.cpu.quant import NUMBERS, experts_quant, linear_quant, repacked
from nautilus.ops.cpu.rotary import rotate_native
from nautilus.ops.cpu.route import route_native
from nautilus.ops.encode import encode
from nautilus.ops.low_precision import How, low_experts, low_linear

# rows, time, heads, head width, groups, state width, taps
MIXERS = ((2, 65, 4, 5, 2, 7, 4), (1, 1, 2, 16, 1, 3, 2), (1, 130, 2, 33, 2, 8, 4), (2, 63, 1, 1, 1, 1, 4),
          (1, 64, 3, 64, 3, 13, 2), (1, 3, 2, 70, 1, 128, 4), (2, 66, 6, 7, 2, 64, 1))  # fmt: skip
EXPERTS = ((5, 18, 34, 4, 2), (230, 66, 130, 3, 2), (1, 2, 2, 5, 1))
NORMS = ((131, 19), (1, 1), (128, 16), (300, 70))
LINEARS = ((1, 2, 1), (7, 18, 33), (200, 130, 66))
LOWBITS = ((1, 2, 2), (7, 18, 34), (200, 130, 66), (33, 16, 258))
QUANTS = ((1, 16, 2), (2, 48, 18), (70, 160, 130), (1, 2086, 66))
# positions of each row, new ones, heads, groups, head width, window
ATTENTIONS = (((1,), (1,), 1, 1, 2, 0), ((70, 5, 130), (70, 0, 7), 6, 2, 18, 0), ((200,), (33,), 16, 1, 64, 50),
              ((65, 64), (65, 1), 5, 5, 34, 1), ((17,), (17,), 200, 2, 80, 0))  # fmt: skip
PEAKS = ((1, 33), (3, 2050))  # rows, vocabulary
ROUTES = ((1, 3, 3), (33, 128, 6), (9, 40, 1))  # tokens, experts, active


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype).requires_grad_()


def finite(*tensors):
    assert all(t.isfinite().all() for t in tensors)


def back(results, leaves):
    pushes = [torch.randn_like(r) for r in results]
    finite(*results, *torch.autograd.grad(results, leaves, pushes))


def mixer(dtype, rows, time, heads, width, groups, state, taps):
    inner, channels = heads * width, heads * width + 2 * groups * state
    decay = (-torch.rand(heads)).requires_grad_()
    tensors = [draw(rows, time, inner + channels + heads, dtype=dtype), draw(channels, taps), draw(channels),
               draw(heads), decay, draw(heads), draw(inner)]  # fmt: skip
    back(mamba_native(*tensors, groups=groups, eps=1e-5), tensors)
    tail, before = draw(rows, taps - 1, channels, dtype=dtype), draw(rows, heads, width, state)
    named = {"tail_BRC": tail, "state_BHPN": before, "reach_BT": torch.arange(time)[None] % 9}
    back(mamba_native(*tensors, groups=groups, eps=1e-5, **named), [*tensors, tail, before])
    with torch.no_grad():
        finite(*mamba_native(*tensors, groups=groups, eps=1e-5, **named))
        trial(dtype, [t[:, :9] if t is tensors[0] else t for t in tensors], heads, width, groups, state, taps)


def trial(dtype, tensors, heads, width, groups, state, taps):
    (rows, time), sizes = tensors[0].shape[:2], {"heads": heads, "head_width": width, "groups": groups, "state": state}
    slots = new_slots(rows + 2, **sizes, taps=taps, window=time, dtype=dtype, wide=torch.float32)
    tensors = [t.flatten(0, 1)[None] if t is tensors[0] else t for t in tensors]
    at = {"slots": slots, "slot_B": torch.arange(rows + 1, 1, -1).int()}
    named = {**at, "begin": torch.arange(rows + 1).int() * time, "groups": groups, "eps": 1e-5}
    for cycle in range(3):
        finite(slots_native(*tensors, **named, tentative=True))
        slots.pending_S.copy_((torch.arange(rows + 2) + cycle) % (time + 1))
    fold_native(**at)
    finite(slots.ssm_SHNP, slots.tail_SRC, slots.kept_SMK, slots_native(*tensors, **named))
    ragged(tensors, named | {"slot_B": torch.arange(rows + 2).int()}, rows * time, time)


def ragged(tensors, named, tokens, window):
    """Tentative tokens of all rows but the first, then those of one row alone."""
    slots, rows = named["slots"], len(named["slot_B"])
    begin = torch.arange(rows + 1).sub(1).clamp_min(0) * (tokens // (rows - 1))
    for tentative in (True, False):
        begin[2:] = begin[2:] if tentative else tokens
        some = [t[:, : begin[-1]] if t is tensors[0] else t for t in tensors]
        finite(slots_native(*some, **named | {"begin": begin.int()}, tentative=tentative))
        assert begin.diff().max() <= window or not tentative
        slots.pending_S.neg_()
    finite(slots.ssm_SHNP, slots.tail_SRC, slots.kept_SMK)


def experts(dtype, tokens, width, hidden, count, active):
    choice = torch.rand(tokens, count).topk(active).indices
    for weights in {torch.float32, dtype}:
        tensors = [draw(tokens, width, dtype=dtype), draw(tokens, active)]
        tensors += [draw(count, hidden, width, dtype=weights), draw(count, width, hidden, dtype=weights)]
        gated = [*tensors, draw(count, hidden, width, dtype=weights)]
        for some in (tensors, gated):
            back([experts_native(some[0], choice, *some[1:])], some)
            with torch.no_grad(), packed_once({}):
                finite(experts_native(some[0], choice, *some[1:]))


def number_by_number(dtype, rows, width):
    gate, up = draw(rows, width, dtype=dtype), draw(rows, width, dtype=dtype)
    back([swiglu_native(gate, up)], [gate, up])
    x = draw(1, rows, 3, 2 * width, dtype=dtype)
    back([rotate_native(x, torch.arange(rows)[None], torch.rand(width, dtype=torch.float64))], [x])


def norm(dtype, rows, width):
    tensors = [draw(rows, width, dtype=dtype), draw(width)]
    back([rms_norm_native(*tensors, 1e-5)], tensors)
    with torch.no_grad():
        finite(add_native(tensors[0], draw(rows, width, dtype=dtype)))
        for table in (torch.float32, torch.bfloat16):
            finite(embed_native(torch.randint(9, (rows,)), torch.randn(9, width).to(table), dtype))


def linear(dtype, rows, inputs, outputs):
    tensors = [draw(rows, inputs, dtype=dtype), draw(outputs, inputs)]
    back([linear_native(*tensors)], tensors)
    with torch.no_grad():
        for named in ({"exact": True}, {"wide": True}, {"squared_relu": True}):
            finite(linear_native(*tensors, **named))
        finite(linear_native(tensors[0], tensors[1].bfloat16(), exact=True))


def lowbit(dtype, rows, inputs, outputs):
    for format in ("nvfp4", "mxfp8"):
        x, w, back_w = draw(rows, inputs, dtype=dtype), draw(outputs, inputs), draw(inputs, outputs)
        back([low_linear(x, w, How(format=format))], [x, w])
        index, weight = torch.rand(rows, 4).topk(2).indices.sort().values, draw(rows, 2)
        stacks = [torch.stack([m] * 4).detach().requires_grad_() for m in (w, back_w)]
        back([low_experts(x, index, weight, *stacks, None, How(format=format))], [x, weight, *stacks])


def quant(dtype, rows, inputs, outputs):
    x = torch.randn(rows, inputs).bfloat16()
    index = torch.randint(3, (rows, 1)).expand(rows, 2).contiguous()
    index[:, 1] = (index[:, 0] + 1) % 3
    for name in NUMBERS:
        up, down, gate = (repacked([encode(torch.randn(*shape), name) for _ in range(3)])
                          for shape in ((outputs, inputs), (inputs, outputs), (outputs, inputs)))  # fmt: skip
        one = repacked(encode(torch.randn(outputs, inputs), name))
        finite(linear_quant(x, one), linear_quant(x, one, wide=dtype == torch.float32, squared_relu=True))
        finite(experts_quant(x, index, torch.rand(rows, 2), up, down))
        finite(experts_quant(x, index, torch.rand(rows, 2), up, down, gate))
    for name, named in (("int4", {"tile": "1x32", "rule": "zero_point"}), ("int8", {"tile": "1x32"})):
        finite(linear_quant(x, repacked(encode(torch.randn(outputs, inputs), name, **named))))


def attention(dtype, lengths, new, heads, groups, width, window):
    # Pages for every row, none to spare, and no number where a row has none.
    each = [-(-n // 16) for n in lengths]
    table = torch.full((len(lengths), max(each)), -1, dtype=torch.int32)
    for row, (count, end) in enumerate(zip(each, torch.tensor(each).cumsum(0).tolist(), strict=True)):
        table[row, :count] = torch.arange(end - count, end)
    places = lambda counts: Rows(begin=torch.tensor([0, *counts]).cumsum(0).int(), length=torch.tensor(lengths).int(),
                                 table_BL=table)  # fmt: skip
    k, v, q = (torch.randn(sum(c), h, width).to(dtype) for c, h in ((lengths, groups), (lengths, groups), (new, heads)))
    for format in ("f32",) if dtype == torch.float32 else ("bf16", "fp8", "int8"):
        pool = new_pool(sum(each), groups, width, format)
        kv_write(pool, places(lengths), k, v)
        first = torch.tensor([(n - c) // 3 for n, c in zip(lengths, new, strict=True) for _ in range(c)]).int()
        finite(attention_paged(q, pool, places(new), window=window))
        finite(attention_paged(q, pool, places(new), first_N=first, window=window))
        assert (positions_native(places(new), sum(new)) < max(lengths)).all()
    one = lambda t: t[None, : lengths[0]]
    finite(attention_native(q[None, : new[0]], one(k), one(v), window=window))
    leaves = [t.detach().requires_grad_() for t in (q[None, : new[0]], one(k), one(v))]
    for first_BT in (None, torch.full((1, new[0]), (lengths[0] - new[0]) // 3)):
        back([Native.apply(*leaves, first_BT, window)], leaves)


def route(tokens, count, active):
    for groups, best in ((1, 1), (count, active)):
        named = {"scale": 2.0, "normalise": True, "expert_groups": groups, "active_groups": best}
        for score in ("sigmoid", "softmax"):
            finite(*route_native(torch.randn(tokens, count), torch.randn(count), active, score=score, **named))


def peaks(rows, vocab):
    logits_BV = torch.randn(rows, vocab)
    finite(peak_native(logits_BV)[1])
    logits_BV[0, vocab // 2] = torch.inf
    assert peak_native(logits_BV)[1].isnan().tolist() == [True] + [False] * (rows - 1)


def draws(rows, vocab):
    logits_BV = torch.randn(rows, vocab)
    heats, seeds = [0.3 + row for row in range(rows)], [2**63 + row for row in range(rows)]
    given = [*logits_BV.unbind()], logits_BV.argmax(1).tolist(), heats, seeds, [7 * row for row in range(rows)]
    assert all(0 <= token < vocab for token in draw_native(*given))


def everything():
    for kernel, sizes in ((mixer, MIXERS), (experts, EXPERTS), (norm, NORMS), (linear, LINEARS), (quant, QUANTS),
                          (attention, ATTENTIONS), (number_by_number, NORMS), (lowbit, LOWBITS)):  # fmt: skip
        for size in sizes:
            kernel(torch.float32, *size)
            kernel(torch.bfloat16, *size)
    for size in ROUTES:
        route(*size)
    for size in PEAKS:
        peaks(*size)
        draws(*size)
    numbers = torch.arange(999)
    for ahead in (0, 4096):
        read = ReadAll(library.pointer(numbers), len(numbers), ahead)
        library.call("nautilus_read_all", read)
        assert sum(read.sum) == numbers[::8].sum()


def main(file: str):
    library.FILE = pathlib.Path(file)
    functions: ctypes.CDLL | None = library.native().functions
    assert functions is not None, library.native().reason
    torch.set_num_threads(2)
    functions.nautilus_level_name.restype = ctypes.c_char_p
    index = 0
    while (name := functions.nautilus_level_name(index)) is not None:
        if functions.nautilus_choose(index) == 0:
            everything()
            print(name.decode())
        index += 1


if __name__ == "__main__":
    main(sys.argv[1])
