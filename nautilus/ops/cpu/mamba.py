"""The Mamba-2 mixer between its projections as one native call, and its backward as another.

The forward keeps the input, the scan's output and the states between chunks; the backward computes the rest again.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nautilus.ops.conv import last_inputs
from nautilus.ops.cpu.library import call, pointer, refuses

CHUNK = 64  # MAMBA_CHUNK of kernels.h
COUNTS = ("rows", "time", "heads", "head_width", "groups", "state", "taps", "bf16")
FORWARD = (
    *("input", "conv_weight", "conv_bias", "dt_bias", "a", "skip", "norm_weight", "tail", "state", "reach", "slot"),
    *("output", "last_tail", "last_state", "y", "borders"),
)
BACKWARD = (
    *("doutput", "dlast_state", "dinput", "dconv_weight", "dconv_bias", "ddt_bias", "da", "dskip", "dnorm_weight"),
    *("dtail", "dstate"),
)


class Sizes(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int64) for name in COUNTS), ("eps", ctypes.c_float)]


class Forward(ctypes.Structure):
    _fields_ = [("sizes", Sizes), *((name, ctypes.c_void_p) for name in FORWARD), ("slots", ctypes.c_int64)]


class Backward(ctypes.Structure):
    _fields_ = [("forward", Forward), *((name, ctypes.c_void_p) for name in BACKWARD)]


def mamba_native(
    input_BTE, weight_CW, bias_C, dt_bias_H, a_H, skip_H, norm_I, *,
    groups: int, eps: float, tail_BRC=None, state_BHPN=None, reach_BT=None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `ops/mamba.py`. The state comes and goes as a (B, H, P, N) view of (B, H, N, P) numbers."""
    state_BHNP = None if state_BHPN is None else state_BHPN.mT
    tensors = input_BTE, weight_CW, bias_C, dt_bias_H, a_H, skip_H, norm_I, tail_BRC, state_BHNP
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        out_BTI, last_BHNP = Mixer.apply(*tensors, reach_BT, groups, eps)
        xbc_BTC = input_BTE[..., norm_I.shape[0] : norm_I.shape[0] + bias_C.shape[0]]
        return out_BTI, last_inputs(xbc_BTC, tail_BRC, weight_CW.shape[1]), last_BHNP.mT
    sizes, inputs = prepared(tensors, reach_BT, groups, eps)
    tail = inputs[0].new_empty(sizes.rows, sizes.taps - 1, len(bias_C))  # type: ignore[union-attr]
    last = torch.empty(sizes.rows, sizes.heads, sizes.state, sizes.head_width)
    return run(sizes, inputs, tail, last)[0], tail, last.mT


def slots_native(*tensors: Tensor, groups: int, eps: float) -> Tensor:
    *_, tail_SRC, state_SHNP, slot_B = tensors
    sizes, inputs = prepared(tensors[:-1], None, groups, eps)
    return run(sizes, [*inputs[:-1], slot_B], tail_SRC, state_SHNP)[0]


def slots_refuse(*tensors: Tensor, groups: int, eps: float) -> str | None:
    *of_mamba, tail_SRC, state_SHNP, slot_B = tensors
    rows, pools = tensors[0].shape[0], (tail_SRC, state_SHNP)
    if slot_B.shape != (rows,) or slot_B.dtype != torch.int32 or len(tail_SRC) != len(state_SHNP):
        return f"slots of {slot_B.dtype} and shape {tuple(slot_B.shape)} do not fit {rows} rows"
    if tail_SRC.dtype != tensors[0].dtype or not all(t.is_contiguous() for t in (*pools, slot_B)):
        return "the pools are not contiguous, or the tails not of the activations' type"
    one = {"tail_BRC": tail_SRC[:1].expand(rows, -1, -1), "state_BHPN": state_SHNP.mT[:1].expand(rows, -1, -1, -1)}
    return mamba_refuses(*of_mamba, groups=groups, eps=eps, **one)


def mamba_refuses(
    input_BTE, weight_CW, bias_C, dt_bias_H, a_H, skip_H, norm_I, *, groups, eps,
    tail_BRC=None, state_BHPN=None, reach_BT=None,
) -> str | None:  # fmt: skip
    (rows, _, width), (channels, taps), (heads,), (inner,) = (t.shape for t in (input_BTE, weight_CW, a_H, norm_I))
    if taps > CHUNK + 1:
        return f"the convolution has {taps} taps, more than {CHUNK + 1}"
    head_width, state = inner // heads, (channels - inner) // (2 * groups)
    # The kernels touch as much memory as these sizes say.
    if not (
        width == inner + channels + heads and inner == heads * head_width and heads % groups == 0
        and channels == inner + 2 * groups * state == bias_C.shape[0] and dt_bias_H.shape == skip_H.shape == a_H.shape
        and (tail_BRC is None or tail_BRC.shape == (rows, taps - 1, channels))
        and (state_BHPN is None or state_BHPN.shape == (rows, heads, head_width, state))
    ):  # fmt: skip
        return "the shapes of its tensors do not fit together"
    return refuses(input_BTE, weight_CW, bias_C, dt_bias_H, a_H, skip_H, norm_I, tail_BRC, state_BHPN)


def prepared(tensors, reach_BT: Tensor | None, groups: int, eps: float) -> tuple[Sizes, list[Tensor | None]]:
    """Sizes, and the inputs in the order of FORWARD as the library wants them: contiguous, what is not activations
    in float32."""
    input_BTE, *parameters, tail_BRC, state_BHNP = tensors
    weight_CW, bias_C, _, a_H, _, norm_I = parameters
    rows, time, _ = input_BTE.shape
    inner, channels, dtype = len(norm_I), len(bias_C), input_BTE.dtype
    sizes = Sizes(
        rows, time, len(a_H), inner // len(a_H), groups, (channels - inner) // (2 * groups), weight_CW.shape[1],
        dtype == torch.bfloat16, eps,
    )  # fmt: skip
    parameters[-1] = norm_I.to(dtype)  # applied in the activations' precision
    wanted = [
        (input_BTE, dtype),
        *((t, torch.float32) for t in parameters),
        (tail_BRC, dtype),
        (state_BHNP, torch.float32),
        (None if reach_BT is None else reach_BT.expand(rows, time), torch.int32),
    ]
    return sizes, [*(None if t is None else t.to(as_dtype).contiguous() for t, as_dtype in wanted), None]  # no slots


def run(
    sizes: Sizes, inputs: list[Tensor | None], tail: Tensor | None, last: Tensor, *, keep: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Writes tail and last state, gives the output; and, if `keep`, what the backward reads: the scan's output, the
    states before chunks."""
    s, new = sizes, inputs[0].new_empty  # type: ignore[union-attr]
    output = new(s.rows, s.time, s.heads * s.head_width)
    y = torch.empty_like(output, dtype=torch.float32) if keep else None
    borders = last.new_empty(s.rows, -(-s.time // CHUNK), *last.shape[1:]) if keep else None
    call("nautilus_mamba_forward", Forward(sizes, *map(pointer, (*inputs, output, tail, last, y, borders)), len(last)))
    return output, y, borders


class Mixer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        *tensors, reach_BT, groups, eps = arguments
        ctx.sizes, inputs = prepared(tensors, reach_BT, groups, eps)
        sizes = ctx.sizes
        last = torch.empty(sizes.rows, sizes.heads, sizes.state, sizes.head_width)
        output, y, borders = run(sizes, inputs, None, last, keep=True)
        ctx.save_for_backward(*inputs, y, borders)
        ctx.dtypes = [None if t is None else t.dtype for t in tensors]
        return output, last

    @staticmethod
    @once_differentiable
    def backward(ctx, doutput, dlast):  # type: ignore[override]
        *inputs, y, borders = ctx.saved_tensors
        input_BTE, *parameters, tail, state, _, _ = inputs
        dinput, doutput, dlast = torch.empty_like(input_BTE), doutput.contiguous(), dlast.contiguous()
        apart = [t.new_empty(ctx.sizes.rows, *t.shape) for t in parameters]  # one gradient per row, then their sum
        dtail = None if tail is None else torch.empty_like(tail, dtype=torch.float32)
        dstate = None if state is None else torch.empty_like(state)
        record = Forward(ctx.sizes, *map(pointer, (*inputs, None, None, None, y, borders)))
        given = (doutput, dlast, dinput, *apart, dtail, dstate)
        call("nautilus_mamba_backward", Backward(record, *map(pointer, given)))
        found = (dinput, *(t.sum(0) for t in apart), dtail, dstate)
        return (
            *(None if d is None else d.to(dtype) for d, dtype in zip(found, ctx.dtypes, strict=True)),
            None,
            None,
            None,
        )
