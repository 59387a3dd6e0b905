"""Mamba-2's selective state space (SSD): the recurrence, and the chunked form with its own backward.

Letters: B batch, T time, H heads, P head width, G groups, N state width, Q chunk, M chunks of all rows (B times T/Q).

    S_t = exp(dt_t a) S_{t-1} + dt_t x_t b_t^T        y_t = S_t c_t        (a < 0, dt > 0; arXiv 2405.21060)

Where `start` is true a document begins and S_{t-1} counts as zero. The state is float32, or float64 for float64 input.
The skip D x is not part of the scan.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nautilus.ops.dispatch import Impl, choose
from nautilus.ops.shapes import checked


def wide(dtype: torch.dtype) -> torch.dtype:
    """What statistics and states are kept in: float64 stays, everything else becomes float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@checked
def ssd(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    a_H: Tensor,
    b_BTGN: Tensor,
    c_BTGN: Tensor,
    *,
    state_BHPN: Tensor | None = None,
    start_BT: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """The scan of the module's formula; gives y_BTHP in x's dtype and the state after the last token (wide).

    dt and a are wide. Any T, any number of groups that divides H, any chunk: the chunk changes rounding only.
    """
    function = choose("ssd", SSD_IMPLS, x_BTHP)
    return function(x_BTHP, dt_BTH, a_H, b_BTGN, c_BTGN, state_BHPN=state_BHPN, start_BT=start_BT, chunk=chunk)


def ssd_reference(
    x_BTHP, dt_BTH, a_H, b_BTGN, c_BTGN, *, state_BHPN=None, start_BT=None, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """The recurrence as the paper writes it, one step at a time. `chunk` has no meaning here."""
    share = x_BTHP.shape[2] // b_BTGN.shape[2]
    dtype = wide(x_BTHP.dtype)
    x, b, c = x_BTHP.to(dtype), b_BTGN.to(dtype), c_BTGN.to(dtype)
    b_BTHN, c_BTHN = b.repeat_interleave(share, dim=2), c.repeat_interleave(share, dim=2)
    if state_BHPN is None:
        state_BHPN = x.new_zeros(x.shape[0], *x.shape[2:], b.shape[3])
    out = []
    for t in range(x.shape[1]):
        keep_BH = torch.exp(dt_BTH[:, t] * a_H)
        if start_BT is not None:
            keep_BH = torch.where(start_BT[:, t, None], torch.zeros_like(keep_BH), keep_BH)
        write_BHPN = torch.einsum("bh,bhp,bhn->bhpn", dt_BTH[:, t], x[:, t], b_BTHN[:, t])
        state_BHPN = keep_BH[..., None, None] * state_BHPN + write_BHPN
        out.append(torch.einsum("bhpn,bhn->bhp", state_BHPN, c_BTHN[:, t]))
    return torch.stack(out, dim=1).to(x_BTHP.dtype), state_BHPN


def ssd_chunked(
    x_BTHP, dt_BTH, a_H, b_BTGN, c_BTGN, *, state_BHPN=None, start_BT=None, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """Quadratic inside a chunk, recurrent across chunks. The tail of the last chunk is padded with dt = 0."""
    time = x_BTHP.shape[1]
    if time == 1:
        return ssd_reference(x_BTHP, dt_BTH, a_H, b_BTGN, c_BTGN, state_BHPN=state_BHPN, start_BT=start_BT)
    chunk = min(chunk, time)
    short = -time % chunk
    if state_BHPN is None:
        batch, _, heads, head_width = x_BTHP.shape
        state_BHPN = dt_BTH.new_zeros(batch, heads, head_width, b_BTGN.shape[3])
    y, state = Chunked.apply(*(pad_time(t, short) for t in (x_BTHP, dt_BTH)), a_H, pad_time(b_BTGN, short),
                             pad_time(c_BTGN, short), state_BHPN, pad_time(start_BT, short), chunk)  # fmt: skip
    return y[:, :time], state


def pad_time(tensor: Tensor | None, short: int) -> Tensor | None:
    if tensor is None or short == 0:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(tensor.shape[0], short, *tensor.shape[2:])], dim=1)


class Decay:
    """How much of each token reaches each later token, the chunk's end, and how much of the entering state stays.

    log_keep_MHQ is the cumulative sum of dt * a inside the chunk; every factor below is the exponential of a difference
    of two of its entries, never a ratio of exponentials. Factors across a document border are zero.
    """

    def __init__(self, dt_MQH: Tensor, a_H: Tensor, start_MQ: Tensor | None):
        self.log_keep_MHQ = (dt_MQH * a_H).transpose(1, 2).cumsum(-1)
        self.since_entry_MHQ = self.log_keep_MHQ.exp()
        self.to_end_MHQ = (self.log_keep_MHQ[..., -1:] - self.log_keep_MHQ).exp()
        self.through_MH = self.since_entry_MHQ[..., -1]
        self.document_MQ = None
        if start_MQ is not None:
            self.document_MQ = start_MQ.cumsum(-1)
            self.since_entry_MHQ = self.since_entry_MHQ * (self.document_MQ == 0)[:, None]
            self.to_end_MHQ = self.to_end_MHQ * (self.document_MQ == self.document_MQ[:, -1:])[:, None]
            self.through_MH = self.through_MH * (self.document_MQ[:, -1] == 0)[:, None]

    def inside_MHQQ(self) -> Tensor:
        """exp of the decay from column's token to row's token; zero above the diagonal."""
        size = self.log_keep_MHQ.shape[-1]
        gap = self.log_keep_MHQ[..., :, None] - self.log_keep_MHQ[..., None, :]
        hidden_QQ = torch.ones(size, size, dtype=torch.bool, device=gap.device).triu(1)
        if self.document_MQ is None:
            gap.masked_fill_(hidden_QQ, float("-inf"))
        else:
            apart_MQQ = self.document_MQ[:, :, None] != self.document_MQ[:, None, :]
            gap.masked_fill_((apart_MQQ | hidden_QQ)[:, None], float("-inf"))
        return gap.exp_()


def by_group(tensor_MQHP: Tensor, groups: int) -> Tensor:
    """(M, Q, H, P) to (M*G, Q, heads of a group times P), contiguous."""
    m, q, heads, head_width = tensor_MQHP.shape
    split = tensor_MQHP.view(m, q, groups, heads // groups * head_width)
    return split.transpose(1, 2).reshape(m * groups, q, heads // groups * head_width)


def from_group(tensor: Tensor, m: int, heads: int) -> Tensor:
    """The inverse of `by_group`, as a view (M, Q, H, P)."""
    groups = tensor.shape[0] // m
    split = tensor.view(m, groups, tensor.shape[1], heads // groups, -1)
    return split.transpose(1, 2).flatten(2, 3) if groups == 1 else split.permute(0, 2, 1, 3, 4).flatten(2, 3)


class Chunked(torch.autograd.Function):
    """All heads at once with batched matmuls; the (Q, Q) matrices are rebuilt in the backward, never stored."""

    @staticmethod
    def forward(ctx, x_BTHP, dt_BTH, a_H, b_BTGN, c_BTGN, state_BHPN, start_BT, chunk):
        batch, time, heads, head_width = x_BTHP.shape
        m, groups, width = batch * time // chunk, b_BTGN.shape[2], b_BTGN.shape[3]
        cut = Cut(x_BTHP, dt_BTH, a_H, b_BTGN, c_BTGN, start_BT, chunk)
        mix = cut.mix().view(m * heads, chunk, chunk)
        y = torch.bmm(mix, cut.x_MHQP.view(m * heads, chunk, head_width)).view(m, heads, chunk, head_width)
        added = torch.bmm(by_group(cut.to_end_MQHP(), groups).transpose(1, 2), cut.b_RQN)
        enter, last = pass_states(added.view(batch, -1, heads, head_width, width), state_BHPN, cut.decay.through_MH)
        before = torch.bmm(cut.c_RQN, enter.view(m * groups, -1, width).transpose(1, 2))
        since = cut.decay.since_entry_MHQ.transpose(1, 2)[..., None]
        y_MQHP = torch.addcmul(y.transpose(1, 2), from_group(before, m, heads), since)
        y_BTHP = y_MQHP.reshape(batch, time, heads, head_width)
        ctx.save_for_backward(x_BTHP, dt_BTH, a_H, b_BTGN, c_BTGN, start_BT, y_BTHP, enter)
        ctx.chunk = chunk
        return y_BTHP.to(x_BTHP.dtype), last

    @staticmethod
    def backward(ctx, dy_BTHP, dlast_BHPN):  # type: ignore[override]
        x_BTHP, dt_BTH, a_H, b_BTGN, c_BTGN, start_BT, y_BTHP, enter = ctx.saved_tensors
        batch, time, heads, head_width = x_BTHP.shape
        chunk, m, groups, width = ctx.chunk, batch * time // ctx.chunk, b_BTGN.shape[2], b_BTGN.shape[3]
        cut = Cut(x_BTHP, dt_BTH, a_H, b_BTGN, c_BTGN, start_BT, chunk)
        dy_MQHP = dy_BTHP.to(y_BTHP.dtype).reshape(m, chunk, heads, head_width)
        dy_MHQP = dy_MQHP.transpose(1, 2).contiguous()

        # through the state that entered each chunk
        since = cut.decay.since_entry_MHQ.transpose(1, 2)[..., None]
        dbefore = by_group(dy_MQHP * since, groups)
        enter_R = enter.view(m * groups, -1, width)
        dc = torch.bmm(dbefore, enter_R)
        denter = torch.bmm(dbefore.transpose(1, 2), cut.c_RQN).view(batch, -1, heads, head_width, width)
        dadded, dstate = pass_states_back(denter, dlast_BHPN, cut.decay.through_MH)
        dadded_R = dadded.view(m * groups, -1, width)
        db = torch.bmm(by_group(cut.to_end_MQHP(), groups), dadded_R)
        to_end = cut.decay.to_end_MHQ.transpose(1, 2)[..., None]
        dx_end = from_group(torch.bmm(cut.b_RQN, dadded_R.transpose(1, 2)), m, heads) * to_end

        # inside the chunk
        inside = cut.decay.inside_MHQQ()
        dmix = torch.bmm(dy_MHQP.view(m * heads, chunk, -1), cut.x_MHQP.view(m * heads, chunk, -1).transpose(1, 2))
        dmix = dmix.view(m, groups, -1, chunk, chunk)
        dpair = (dmix * inside.view(m, groups, -1, chunk, chunk)).sum(2).view(m * groups, chunk, chunk)
        dc.baddbmm_(dpair, cut.b_RQN)
        db.baddbmm_(dpair.transpose(1, 2), cut.c_RQN)
        mix = cut.mix(inside).view(m * heads, chunk, chunk)
        dx_in = torch.bmm(mix.transpose(1, 2), dy_MHQP.view(m * heads, chunk, -1))
        dxdt = dx_end + dx_in.view(m, heads, chunk, -1).transpose(1, 2)

        # Every weight of y_i holds exp(log_keep_i) and every use of x_j holds exp(-log_keep_j), so the gradient of
        # log_keep needs no (Q, Q) matrix: rows give dy*y, columns give dx*x, and the chunk's end collects the rest.
        xdt = cut.x_MHQP.transpose(1, 2)
        dlog = (dy_MQHP * y_BTHP.view_as(dy_MQHP)).sum(-1) - (dxdt * xdt).sum(-1)
        kept = (dadded * enter).sum((-1, -2)).view(m, heads) * cut.decay.through_MH
        dlog[:, -1] += (dx_end * xdt).sum((1, -1)) + kept
        dstep = dlog.flip(1).cumsum(1).flip(1)
        x_MQHP = x_BTHP.reshape(m, chunk, heads, head_width)
        dt_MQH = dt_BTH.reshape(m, chunk, heads)
        ddt = (dxdt * x_MQHP).sum(-1) + dstep * a_H
        da = (dstep * dt_MQH).sum((0, 1))
        dx = (dxdt * dt_MQH[..., None]).to(x_BTHP.dtype).reshape(x_BTHP.shape)
        db, dc = (from_group(t, m, groups).reshape(b_BTGN.shape).to(b_BTGN.dtype) for t in (db, dc))
        return dx, ddt.reshape(dt_BTH.shape), da, db, dc, dstate, None, None


class Cut:
    """The inputs cut into chunks, wide, in the layouts of the batched matmuls. x_MHQP already holds dt * x."""

    def __init__(self, x_BTHP, dt_BTH, a_H, b_BTGN, c_BTGN, start_BT, chunk):
        batch, time, heads, head_width = x_BTHP.shape
        m, groups, width = batch * time // chunk, *b_BTGN.shape[2:]
        dtype = wide(x_BTHP.dtype)
        dt_MQH = dt_BTH.reshape(m, chunk, heads)
        self.decay = Decay(dt_MQH, a_H, None if start_BT is None else start_BT.reshape(m, chunk))
        scaled = x_BTHP.reshape(m, chunk, heads, head_width) * dt_MQH[..., None]
        self.x_MHQP = scaled.to(dtype).transpose(1, 2).contiguous()
        self.b_RQN, self.c_RQN = (
            by_group(t.reshape(m, chunk, groups, width), groups).to(dtype) for t in (b_BTGN, c_BTGN)
        )

    def mix(self, inside_MHQQ: Tensor | None = None) -> Tensor:
        """(c_i . b_j) times the decay from j to i: what y_i takes of dt_j x_j. Overwrites `inside_MHQQ`."""
        inside_MHQQ = self.decay.inside_MHQQ() if inside_MHQQ is None else inside_MHQQ
        m, heads, chunk, _ = inside_MHQQ.shape
        pair = torch.bmm(self.c_RQN, self.b_RQN.transpose(1, 2)).view(m, -1, 1, chunk, chunk)
        inside_MHQQ.view(m, pair.shape[1], heads // pair.shape[1], chunk, chunk).mul_(pair)
        return inside_MHQQ

    def to_end_MQHP(self) -> Tensor:
        return (self.x_MHQP * self.decay.to_end_MHQ[..., None]).transpose(1, 2).contiguous()


def pass_states(added: Tensor, first_BHPN: Tensor, through_MH: Tensor) -> tuple[Tensor, Tensor]:
    """The state entering each chunk (same shape as `added`: batch, chunks, H, P, N) and the one after the last."""
    through = through_MH.view(added.shape[0], added.shape[1], -1, 1, 1)
    enter, state = torch.empty_like(added), first_BHPN.to(added.dtype)
    for k in range(added.shape[1]):
        enter[:, k] = state
        state = torch.addcmul(added[:, k], through[:, k], state)
    return enter, state


def pass_states_back(denter: Tensor, dlast_BHPN: Tensor, through_MH: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of what each chunk added to the state, and of the state that entered the first chunk."""
    through = through_MH.view(denter.shape[0], denter.shape[1], -1, 1, 1)
    dadded, dstate = torch.empty_like(denter), dlast_BHPN
    for k in reversed(range(denter.shape[1])):
        dadded[:, k] = dstate
        dstate = torch.addcmul(denter[:, k], through[:, k], dstate)
    return dadded, dstate


SSD_IMPLS = (Impl("torch", ssd_chunked), Impl("reference", ssd_reference))
