"""The kernels under the address and undefined-behaviour sanitizers, at sizes beside every vector width."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nautilus.ops.cpu import library

ROOT = Path(library.__file__).parents[3]
PROGRAM = """
import sys, pathlib, ctypes, torch
from nautilus.ops.cpu import library
library.FILE = pathlib.Path(sys.argv[1])
functions = library.native().functions
assert functions is not None, library.native().reason
from nautilus.ops.cpu.activation import swiglu_native
from nautilus.ops.cpu.attention import Rows, attention_native, attention_paged, kv_write, new_pool, positions_native
from nautilus.ops.cpu.experts import experts_native
from nautilus.ops.cpu.linear import linear_native
from nautilus.ops.cpu.mamba import fold_native, mamba_native, new_slots, slots_native
from nautilus.ops.cpu.norm import rms_norm_native
from nautilus.ops.cpu.quant import NUMBERS, experts_quant, linear_quant, repacked
from nautilus.ops.cpu.rotary import rotate_native
from nautilus.ops.cpu.route import route_native
from nautilus.ops.encode import encode
# rows, time, heads, head width, groups, state width, taps
MIXERS = ((2, 65, 4, 5, 2, 7, 4), (1, 1, 2, 16, 1, 3, 2), (1, 130, 2, 33, 2, 8, 4), (2, 63, 1, 1, 1, 1, 4),
          (1, 64, 3, 64, 3, 13, 2), (1, 3, 2, 70, 1, 128, 4), (2, 66, 6, 7, 2, 64, 1))
EXPERTS = ((5, 18, 34, 4, 2), (230, 66, 130, 3, 2), (1, 2, 2, 5, 1))
NORMS = ((131, 19), (1, 1), (128, 16), (300, 70))
LINEARS = ((1, 2, 1), (7, 18, 33), (200, 130, 66))
QUANTS = ((1, 16, 2), (2, 48, 18), (70, 160, 130))
# positions of each row, new ones, heads, groups, head width, window
ATTENTIONS = (((1,), (1,), 1, 1, 2, 0), ((70, 5, 130), (70, 0, 7), 6, 2, 18, 0), ((200,), (33,), 16, 1, 64, 50),
              ((65, 64), (65, 1), 5, 5, 34, 1), ((17,), (17,), 200, 2, 80, 0))
draw = lambda *shape, dtype=torch.float32: torch.randn(*shape).to(dtype).requires_grad_()


def back(results, leaves):
    # Every byte of fresh memory is 0xFF, which reads as NaN: a result that is not finite holds what nobody wrote.
    pushes = [torch.randn_like(r) for r in results]
    for tensor in (*results, *torch.autograd.grad(results, leaves, pushes)):
        assert tensor.isfinite().all()


def mixer(dtype, rows, time, heads, width, groups, state, taps):
    inner, channels = heads * width, heads * width + 2 * groups * state
    decay = (-torch.rand(heads)).requires_grad_()
    tensors = [draw(rows, time, inner + channels + heads, dtype=dtype), draw(channels, taps), draw(channels),
               draw(heads), decay, draw(heads), draw(inner)]
    back(mamba_native(*tensors, groups=groups, eps=1e-5), tensors)
    tail, before = draw(rows, taps - 1, channels, dtype=dtype), draw(rows, heads, width, state)
    named = {"tail_BRC": tail, "state_BHPN": before, "reach_BT": torch.arange(time)[None] % 9}
    back(mamba_native(*tensors, groups=groups, eps=1e-5, **named), [*tensors, tail, before])
    with torch.no_grad():
        assert all(t.isfinite().all() for t in mamba_native(*tensors, groups=groups, eps=1e-5, **named))
        trial(dtype, [t[:, :9] if t is tensors[0] else t for t in tensors], heads, width, groups, state, taps)


def trial(dtype, tensors, heads, width, groups, state, taps):
    (rows, time), sizes = tensors[0].shape[:2], {"heads": heads, "head_width": width, "groups": groups, "state": state}
    slots = new_slots(rows, **sizes, taps=taps, window=time, dtype=dtype, wide=torch.float32)
    at = {"slots": slots, "slot_B": torch.arange(rows, dtype=torch.int32)}
    for cycle in range(3):
        out = slots_native(*tensors, **at, groups=groups, eps=1e-5, tentative=True)
        slots.pending_S.copy_((torch.arange(rows) + cycle) % (time + 1))
        assert out.isfinite().all()
    fold_native(**at)
    assert all(t.isfinite().all() for t in (slots.ssm_SHNP, slots.tail_SRC, slots.kept_SMK))


def experts(dtype, tokens, width, hidden, count, active):
    choice = torch.rand(tokens, count).topk(active).indices
    for weights in {torch.float32, dtype}:
        tensors = [draw(tokens, width, dtype=dtype), draw(tokens, active)]
        tensors += [draw(count, hidden, width, dtype=weights), draw(count, width, hidden, dtype=weights)]
        back([experts_native(tensors[0], choice, *tensors[1:])], tensors)
        tensors.append(draw(count, hidden, width, dtype=weights))
        back([experts_native(tensors[0], choice, *tensors[1:])], tensors)


def norm(dtype, rows, width):
    tensors = [draw(rows, width, dtype=dtype), draw(width)]
    back([rms_norm_native(*tensors, 1e-5)], tensors)


def number_by_number(dtype, rows, width):
    gate, up = draw(rows, width, dtype=dtype), draw(rows, width, dtype=dtype)
    back([swiglu_native(gate, up)], [gate, up])
    x = draw(1, rows, 3, 2 * width, dtype=dtype)
    back([rotate_native(x, torch.arange(rows)[None], torch.rand(width, dtype=torch.float64))], [x])


def linear(dtype, rows, inputs, outputs):
    tensors = [draw(rows, inputs, dtype=dtype), draw(outputs, inputs)]
    back([linear_native(*tensors)], tensors)


def quant(dtype, rows, inputs, outputs):
    x = torch.randn(rows, inputs).bfloat16()
    index = torch.randint(3, (rows, 1)).expand(rows, 2).contiguous()
    index[:, 1] = (index[:, 0] + 1) % 3
    for name in NUMBERS:
        up, down, gate = (repacked([encode(torch.randn(*shape), name) for _ in range(3)])
                          for shape in ((outputs, inputs), (inputs, outputs), (outputs, inputs)))
        assert linear_quant(x, repacked(encode(torch.randn(outputs, inputs), name))).isfinite().all()
        assert experts_quant(x, index, torch.rand(rows, 2), up, down).isfinite().all()
        assert experts_quant(x, index, torch.rand(rows, 2), up, down, gate).isfinite().all()


def attention(dtype, lengths, new, heads, groups, width, window):
    # Pages for every row, none to spare, and no number where a row has none.
    each = [-(-n // 16) for n in lengths]
    table = torch.full((len(lengths), max(each)), -1, dtype=torch.int32)
    for row, (count, end) in enumerate(zip(each, torch.tensor(each).cumsum(0).tolist())):
        table[row, :count] = torch.arange(end - count, end)
    places = lambda counts: Rows(begin=torch.tensor([0, *counts]).cumsum(0).int(), length=torch.tensor(lengths).int(),
                                 table_BL=table)
    k, v, q = (torch.randn(sum(c), h, width).to(dtype) for c, h in ((lengths, groups), (lengths, groups), (new, heads)))
    for format in ("f32",) if dtype == torch.float32 else ("bf16", "fp8", "int8"):
        pool = new_pool(sum(each), groups, width, format)
        kv_write(pool, places(lengths), k, v)
        first = torch.tensor([(n - c) // 3 for n, c in zip(lengths, new) for _ in range(c)]).int()
        assert attention_paged(q, pool, places(new), window=window).isfinite().all()
        assert (positions_native(places(new), sum(new)) < max(lengths)).all()
        assert attention_paged(q, pool, places(new), first_N=first, window=window).isfinite().all()
    one = lambda t: t[None, : lengths[0]]
    assert attention_native(q[None, : new[0]], one(k), one(v), window=window).isfinite().all()


torch.set_num_threads(2)
index = 0
while (name := functions.nautilus_level_name(index)) is not None:
    if functions.nautilus_choose(index) == 0:
        for kernel, sizes in ((mixer, MIXERS), (experts, EXPERTS), (norm, NORMS), (linear, LINEARS), (quant, QUANTS),
                              (attention, ATTENTIONS), (number_by_number, NORMS)):
            for size in sizes:
                kernel(torch.float32, *size)
                kernel(torch.bfloat16, *size)
        for tokens, count, active in ((1, 3, 3), (33, 128, 6), (9, 40, 1)):
            for groups, best in ((1, 1), (count, active)):
                named = {"scale": 2.0, "normalise": True, "expert_groups": groups, "active_groups": best}
                for score in ("sigmoid", "softmax"):
                    found = route_native(torch.randn(tokens, count), torch.randn(count), active, score=score, **named)
                    assert all(t.isfinite().all() for t in found)
        print(name.decode())
    index += 1
"""


@pytest.mark.slow
def test_no_kernel_touches_memory_that_is_not_its_own_or_reads_what_nobody_wrote(tmp_path, sanitizer):
    _, runtime = sanitizer("asan")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "nautilus/ops").mkdir(parents=True)
    shutil.copy(ROOT / "nautilus/__init__.py", tmp_path / "nautilus")
    shutil.copytree(ROOT / "nautilus/ops/cpu", tmp_path / "nautilus/ops/cpu", ignore=shutil.ignore_patterns("*.so"))
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -O1 -g1"
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    made = subprocess.run(
        build, cwd=tmp_path, env=os.environ | {"NAUTILUS_CXXFLAGS": flags}, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    found = tmp_path / "nautilus/ops/cpu/libnautilus.so"
    options = "detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size=1073741824"
    environment = os.environ | {"LD_PRELOAD": runtime, "ASAN_OPTIONS": options}
    ran = subprocess.run([sys.executable, "-c", PROGRAM, str(found)], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert ran.stdout.split()[-1] == "baseline" and "runtime error" not in ran.stderr
