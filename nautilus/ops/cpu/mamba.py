"""The Mamba-2 mixer between its projections as one native call, its backward as another; and memory for many requests,
which calls change in place. Letters: those of `ops/mamba.py`.

The forward keeps the input, the scan's output and the states between chunks; the backward computes the rest again.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nautilus.ops.conv import last_inputs
from nautilus.ops.cpu.library import call, pointer, refuses
from nautilus.ops.cpu.memory import roomy

CHUNK = 64  # MAMBA_CHUNK of kernels.h
COUNTS = ("rows", "time", "heads", "head_width", "groups", "state", "taps", "window", "bf16")
FORWARD = (
    *("input", "conv_weight", "conv_bias", "dt_bias", "a", "skip", "norm_weight", "tail", "state", "reach", "slot"),
    *("begin", "output", "last_tail", "last_state", "y", "borders"),
)
SLOTS = {"slots": ctypes.c_int64, "kept": ctypes.c_void_p, "pending": ctypes.c_void_p, "tentative": ctypes.c_int64}
BACKWARD = (
    *("doutput", "dlast_state", "dinput", "dconv_weight", "dconv_bias", "ddt_bias", "da", "dskip", "dnorm_weight"),
    *("dtail", "dstate"),
)


class Sizes(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int64) for name in COUNTS), ("eps", ctypes.c_float)]


class Forward(ctypes.Structure):
    _fields_ = [("sizes", Sizes), *((name, ctypes.c_void_p) for name in FORWARD), *SLOTS.items()]


class Backward(ctypes.Structure):
    _fields_ = [("forward", Forward), *((name, ctypes.c_void_p) for name in BACKWARD)]


@dataclass(frozen=True, kw_only=True, eq=False)
class MambaSlots:
    """The states of many requests in one layer. Letters: S slots; M tokens that each can keep, K numbers of one.

    tail_SRC: the W - 1 last inputs of the convolution. ssm_SHNP: the state, as (N, P).

    Deferred fold: tokens that may be taken back leave tail and state as they are. A tentative call keeps their inputs
    of the convolution, in tail_SRC behind the others, and in kept_SMK what the state will need: dt x, b and exp(dt a).
    pending_S is then minus their number, until the caller puts there how many of them stay. The next call of any kind
    folds those into tail and state first, to the bits that tokens read one by one would have left.
    """

    tail_SRC: Tensor
    ssm_SHNP: Tensor
    kept_SMK: Tensor | None = None
    pending_S: Tensor | None = None

    def __post_init__(self):
        if self.window > CHUNK:
            raise ValueError(f"slots that keep {self.window} tokens were asked for; they can keep {CHUNK}")
        (count, heads, state, head_width), rows = self.ssm_SHNP.shape, self.tail_SRC.shape[1]
        inner = heads * head_width + self.groups * state
        wanted = {"ssm_SHNP": (count, heads, state, head_width), "tail_SRC": (count, rows, inner + self.groups * state)}
        if self.kept_SMK is not None or self.pending_S is not None:
            wanted |= {"kept_SMK": (count, self.window, inner + heads), "pending_S": (count,)}
        for name, shape in wanted.items():
            tensor = getattr(self, name)
            if tensor is None or tensor.shape != shape or not tensor.is_contiguous():
                raise ValueError(
                    f"slots for states of shape {tuple(self.ssm_SHNP.shape)} were given {name} of shape "
                    f"{None if tensor is None else tuple(tensor.shape)}; make it contiguous, of shape {shape}"
                )

    @property
    def window(self) -> int:
        """M, 0 where no token can be taken back."""
        return 0 if self.kept_SMK is None else self.kept_SMK.shape[1]

    @property
    def taps(self) -> int:
        return self.tail_SRC.shape[1] - self.window + 1

    @property
    def groups(self) -> int:
        _, heads, state, head_width = self.ssm_SHNP.shape
        return (self.tail_SRC.shape[2] - heads * head_width) // (2 * state)

    def clear(self, slot: int) -> None:
        for tensor in (self.tail_SRC, self.ssm_SHNP, self.pending_S):
            if tensor is not None:
                tensor[slot].zero_()


def new_slots(
    count: int, *, heads: int, head_width: int, groups: int, state: int, taps: int, window: int = 0,
    dtype: torch.dtype, wide: torch.dtype, device=None,
) -> MambaSlots:  # fmt: skip
    """Of zeros. Tails are as the activations, the rest is wide."""
    zeros, inner = functools.partial(torch.zeros, device=device), heads * head_width + groups * state
    here = device is None or torch.device(device).type == "cpu"
    ssm = (roomy if here else zeros)(count, heads, state, head_width, dtype=wide)
    tail = zeros(count, taps - 1 + window, inner + groups * state, dtype=dtype)
    if window == 0:
        return MambaSlots(tail_SRC=tail, ssm_SHNP=ssm)
    kept, pending = zeros(count, window, inner + heads, dtype=wide), zeros(count, dtype=torch.int32)
    return MambaSlots(tail_SRC=tail, ssm_SHNP=ssm, kept_SMK=kept, pending_S=pending)


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


def slots_native(
    *tensors, slots: MambaSlots, slot_B: Tensor, begin: Tensor, groups: int, eps: float, tentative=False
) -> Tensor:
    sizes, inputs = prepared((*tensors, slots.tail_SRC, slots.ssm_SHNP), None, groups, eps)
    sizes.rows, sizes.window = len(slot_B), slots.window
    inputs[-2:] = slot_B, begin
    return run(sizes, inputs, slots.tail_SRC, slots.ssm_SHNP, slots=slots, tentative=tentative)[0]


def fold_native(slots: MambaSlots, slot_B: Tensor) -> None:
    """A call of no tokens."""
    _, heads, state, head_width = slots.ssm_SHNP.shape
    bf16 = slots.tail_SRC.dtype == torch.bfloat16
    sizes = Sizes(len(slot_B), 0, heads, head_width, slots.groups, state, slots.taps, slots.window, bf16)
    inputs = [*[None] * 7, slots.tail_SRC, slots.ssm_SHNP, None, slot_B, None]
    run(sizes, inputs, slots.tail_SRC, slots.ssm_SHNP, slots=slots)


def slots_refuse(
    *tensors, slots: MambaSlots, slot_B: Tensor, begin: Tensor, groups: int, eps: float, tentative=False
) -> str | None:
    if begin.shape != (len(slot_B) + 1,) or begin.dtype != torch.int32 or not begin.is_contiguous():
        return f"the rows begin at {begin.dtype} of shape {tuple(begin.shape)}, not contiguous int32, for {len(slot_B)}"
    if slots.tail_SRC.dtype != tensors[0].dtype:
        return f"tails in {slots.tail_SRC.dtype} do not fit tokens in {tensors[0].dtype}"
    one = {"tail_BRC": slots.tail_SRC[:1, : slots.taps - 1], "state_BHPN": slots.ssm_SHNP.mT[:1]}
    return mamba_refuses(*tensors, groups=groups, eps=eps, **one) or fold_refuses(slots, slot_B)


def fold_refuses(slots: MambaSlots, slot_B: Tensor) -> str | None:
    if slot_B.dtype != torch.int32 or not slot_B.is_contiguous():
        return f"the numbers of slots are {slot_B.dtype} with strides {slot_B.stride()}, not contiguous int32"
    wanted = [(slots.ssm_SHNP, torch.float32), (slots.kept_SMK, torch.float32), (slots.pending_S, torch.int32)]
    for tensor, dtype in wanted:
        if tensor is not None and tensor.dtype != dtype:
            return f"a tensor of the slots is {tensor.dtype}, not {dtype}"
    return refuses(slots.tail_SRC, slots.ssm_SHNP, slots.kept_SMK)


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
    in float32. There are no slots yet."""
    input_BTE, *parameters, tail_BRC, state_BHNP = tensors
    weight_CW, bias_C, _, a_H, _, norm_I = parameters
    rows, time, _ = input_BTE.shape
    inner, channels, dtype = len(norm_I), len(bias_C), input_BTE.dtype
    sizes = Sizes(
        rows, time, len(a_H), inner // len(a_H), groups, (channels - inner) // (2 * groups), weight_CW.shape[1], 0,
        dtype == torch.bfloat16, eps,
    )  # fmt: skip
    parameters[0] = weight_CW.mT  # a group takes some channels of all taps
    parameters[-1] = norm_I.to(dtype)  # applied in the activations' precision
    wanted = [
        (input_BTE, dtype),
        *((t, torch.float32) for t in parameters),
        (tail_BRC, dtype),
        (state_BHNP, torch.float32),
        (None if reach_BT is None else reach_BT.expand(rows, time), torch.int32),
    ]
    return sizes, [*(None if t is None else t.to(as_dtype).contiguous() for t, as_dtype in wanted), None, None]


def run(
    sizes: Sizes, inputs: list[Tensor | None], tail: Tensor | None, last: Tensor, *,
    keep: bool = False, slots: MambaSlots | None = None, tentative: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Writes tail and last state, gives the output; and, if `keep`, what the backward reads: the scan's output, the
    states before chunks."""
    s, dtype = sizes, torch.bfloat16 if sizes.bf16 else torch.float32
    tokens = (0,) if inputs[0] is None else inputs[0].shape[:2]
    output = last.new_empty(*tokens, s.heads * s.head_width, dtype=dtype)
    y = torch.empty_like(output, dtype=torch.float32) if keep else None
    borders = last.new_empty(s.rows, -(-s.time // CHUNK), *last.shape[1:]) if keep else None
    kept = (None, None) if slots is None else (slots.kept_SMK, slots.pending_S)
    tensors = map(pointer, (*inputs, output, tail, last, y, borders))
    call("nautilus_mamba_forward", Forward(sizes, *tensors, len(last), *map(pointer, kept), tentative))
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
        ctx.set_materialize_grads(False)  # most rows do not go on: zeros as large as all states would be made for them
        return output, last

    @staticmethod
    @once_differentiable
    def backward(ctx, doutput, dlast):  # type: ignore[override]
        *inputs, y, borders = ctx.saved_tensors
        input_BTE, *parameters, tail, state, _, _, _ = inputs
        dinput, dlast = torch.empty_like(input_BTE), None if dlast is None else dlast.contiguous()
        inner = ctx.sizes.heads * ctx.sizes.head_width
        doutput = input_BTE.new_zeros(*y.shape[:2], inner) if doutput is None else doutput.contiguous()
        apart = [t.new_empty(ctx.sizes.rows, *t.shape) for t in parameters]  # one gradient per row, then their sum
        dtail = None if tail is None else torch.empty_like(tail, dtype=torch.float32)
        dstate = None if state is None else torch.empty_like(state)
        record = Forward(ctx.sizes, *map(pointer, (*inputs, None, None, None, y, borders)))
        given = (doutput, dlast, dinput, *apart, dtail, dstate)
        call("nautilus_mamba_backward", Backward(record, *map(pointer, given)))
        dweight_WC, *others = (t.sum(0) for t in apart)
        found = (dinput, dweight_WC.mT, *others, dtail, dstate)
        return (
            *(None if d is None else d.to(dtype) for d, dtype in zip(found, ctx.dtypes, strict=True)),
            None,
            None,
            None,
        )
