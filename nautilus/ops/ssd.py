"""Mamba-2's selective state space (SSD): the recurrence, and the chunked form with its own backward.

Letters: B batch, T time, H heads, P head width, G groups, N state width, Q chunk, M chunks of all rows (B times T/Q).

    S_t = exp(dt_t a) S_{t-1} + dt_t x_t b_t^T        y_t = S_t c_t        (a < 0, dt > 0; arXiv 2405.21060)

Where `start` is true a document begins and S_{t-1} counts as zero. The state is float32, or float64 for float64 input.
The skip D x is not part of the scan.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nautilus.ops.dispatch import Impl, choose
from nautilus.ops.shapes import checked
from nautilus.ops.tiles import tiles


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
        write_BHPN = torch.einsum("bhp,bhn->bhpn", dt_BTH[:, t, :, None] * x[:, t], b_BTHN[:, t])
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
        self.document_MQ = None
        total_MHQ = (dt_MQH * a_H).transpose(1, 2).double().cumsum(-1)
        if start_MQ is not None:
            self.document_MQ = start_MQ.cumsum(-1)
            # Sums start again with each document: small ones must not drown in what an earlier document added up to.
            first_MQ = torch.searchsorted(self.document_MQ, self.document_MQ)
            base = total_MHQ.gather(-1, first_MQ[:, None].expand_as(total_MHQ))
            total_MHQ = total_MHQ - base.masked_fill_((self.document_MQ == 0)[:, None], 0)
        self.log_keep_MHQ = total_MHQ.to(dt_MQH.dtype)
        self.since_entry_MHQ = self.log_keep_MHQ.exp()
        self.to_end_MHQ = (self.log_keep_MHQ[..., -1:] - self.log_keep_MHQ).exp()
        self.through_MH = self.since_entry_MHQ[..., -1]
        if self.document_MQ is not None:
            # Filled, not multiplied: between documents, whose sums are unrelated, an exponential may be infinite.
            self.since_entry_MHQ.masked_fill_((self.document_MQ != 0)[:, None], 0)
            self.to_end_MHQ.masked_fill_((self.document_MQ != self.document_MQ[:, -1:])[:, None], 0)
            self.through_MH = self.since_entry_MHQ[..., -1]

    def inside_MHQQ(self) -> Tensor:
        """exp of the decay from column's token to row's token; zero above the diagonal and across documents."""
        gap = self.log_keep_MHQ[..., :, None] - self.log_keep_MHQ[..., None, :]
        if self.document_MQ is not None:
            apart_MQQ = self.document_MQ[:, :, None] != self.document_MQ[:, None, :]
            gap.masked_fill_(apart_MQQ[:, None], float("-inf"))
        return gap.exp_().tril_()

    def from_here(self, each_MQH: Tensor) -> Tensor:
        """Each token's value plus those of all later tokens of its document in the chunk."""
        total = each_MQH.double().flip(1).cumsum(1).flip(1)
        if self.document_MQ is not None:
            after = torch.nn.functional.pad(total, (0, 0, 0, 1))
            beyond_MQ = torch.searchsorted(self.document_MQ, self.document_MQ, right=True)
            total = total - after.gather(1, beyond_MQ[..., None].expand_as(total))
        return total.to(each_MQH.dtype)


class Layout:
    """Sizes of one call, and views that put tokens (M, Q, H, P) into the orders the batched matmuls want.

    Heads apart: (M*H, Q, P). Groups apart: (M*G, Q, heads of the group times P).
    """

    def __init__(self, x_BTHP: Tensor, b_BTGN: Tensor, chunk: int):
        batch, time, self.heads, self.head_width = x_BTHP.shape
        self.groups, self.width = b_BTGN.shape[2:]
        self.batch, self.chunk, self.m = batch, chunk, batch * time // chunk
        self.share = self.heads // self.groups
        self.dtype = wide(x_BTHP.dtype)

    def tokens(self, tensor: Tensor) -> Tensor:
        """(B, T, ...) as (M, Q, ...)."""
        return tensor.reshape(self.m, self.chunk, *tensor.shape[2:])

    def scaled(self, x_MQHP: Tensor, factor_MHQ: Tensor, *, order: str) -> Tensor:
        """x times a factor per token and head, written once in the order asked for: by "head" or by "group"."""
        out = torch.empty(x_MQHP.numel(), dtype=self.dtype, device=x_MQHP.device)
        if order == "head":
            out = out.view(self.m, self.heads, self.chunk, self.head_width)
            torch.mul(x_MQHP.transpose(1, 2), factor_MHQ[..., None], out=out)
            return out.view(self.m * self.heads, self.chunk, self.head_width)
        out = out.view(self.m, self.groups, self.chunk, self.share, self.head_width)
        source = x_MQHP.unflatten(2, (self.groups, self.share)).transpose(1, 2)
        torch.mul(source, factor_MHQ.unflatten(1, (self.groups, self.share)).transpose(2, 3)[..., None], out=out)
        return out.view(self.m * self.groups, self.chunk, self.share * self.head_width)

    def group_rows(self, b_BTGN: Tensor) -> Tensor:
        """(B, T, G, N) as (M*G, Q, N), wide."""
        return self.tokens(b_BTGN).transpose(1, 2).to(self.dtype).reshape(self.m * self.groups, self.chunk, self.width)

    def back(self, tensor: Tensor) -> Tensor:
        """The inverse of `group_rows`."""
        rows = tensor.view(self.m, self.groups, self.chunk, self.width).transpose(1, 2)
        return rows.reshape(self.batch, -1, self.groups, self.width)

    def join(self, by_head: Tensor, by_group: Tensor, factor_MHQ: Tensor, out_BTHP: Tensor | None = None) -> Tensor:
        """by_head + factor * by_group as (M, Q, H, P)."""
        size = self.m, self.chunk, self.groups, self.share, self.head_width
        out = by_head.new_empty(size) if out_BTHP is None else out_BTHP.view(size)
        heads = by_head.view(self.m, self.groups, self.share, self.chunk, self.head_width).permute(0, 3, 1, 2, 4)
        groups = by_group.view(self.m, self.groups, self.chunk, self.share, self.head_width).transpose(1, 2)
        factor = factor_MHQ.unflatten(1, (self.groups, self.share)).permute(0, 3, 1, 2)[..., None]
        return torch.addcmul(heads, groups, factor, out=out).view(self.m, self.chunk, self.heads, self.head_width)

    def states(self, tensor: Tensor) -> Tensor:
        """(M*G, heads of the group times P, N) as (batch, chunks, H, P, N)."""
        return tensor.view(self.batch, -1, self.heads, self.head_width, self.width)

    def flat_states(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.m * self.groups, self.share * self.head_width, self.width)


class Chunked(torch.autograd.Function):
    """All heads at once with batched matmuls; the (Q, Q) matrices are rebuilt in the backward, never stored."""

    @staticmethod
    def forward(ctx, x_BTHP, dt_BTH, a_H, b_BTGN, c_BTGN, state_BHPN, start_BT, chunk):
        y_BTHP = torch.empty(x_BTHP.shape, dtype=wide(x_BTHP.dtype), device=x_BTHP.device)
        states = []
        for rows in tiles(x_BTHP):
            piece = Piece(x_BTHP[rows], dt_BTH[rows], a_H, b_BTGN[rows], c_BTGN[rows], at(start_BT, rows), chunk)
            states.append(piece.forward(state_BHPN[rows], y_BTHP[rows]))
        ctx.save_for_backward(x_BTHP, dt_BTH, a_H, b_BTGN, c_BTGN, start_BT, y_BTHP, *states)
        ctx.chunk = chunk
        return y_BTHP.to(x_BTHP.dtype), torch.cat([part[:, -1] for part in states])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BTHP, dlast_BHPN):  # type: ignore[override]
        x_BTHP, dt_BTH, a_H, b_BTGN, c_BTGN, start_BT, y_BTHP, *states = ctx.saved_tensors
        inputs = x_BTHP, dt_BTH, b_BTGN, c_BTGN
        dx, ddt, db, dc = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in inputs)
        da, dstate = torch.zeros_like(a_H), torch.empty_like(dlast_BHPN)
        for rows, known in zip(tiles(x_BTHP), states, strict=True):
            piece = Piece(x_BTHP[rows], dt_BTH[rows], a_H, b_BTGN[rows], c_BTGN[rows], at(start_BT, rows), ctx.chunk)
            dx[rows], ddt[rows], da_H, db[rows], dc[rows], dstate[rows] = piece.backward(
                dy_BTHP[rows], dlast_BHPN[rows], y_BTHP[rows], known
            )
            da += da_H
        return dx, ddt, da, db, dc, dstate, None, None


def at(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]


class Piece:
    """The chunked scan of some rows, forward and backward, outside of autograd."""

    def __init__(self, x_BTHP, dt_BTH, a_H, b_BTGN, c_BTGN, start_BT, chunk: int):
        self.lay = lay = Layout(x_BTHP, b_BTGN, chunk)
        self.x_MQHP, self.dt_MQH, self.a_H = lay.tokens(x_BTHP), lay.tokens(dt_BTH), a_H
        self.b, self.c = lay.group_rows(b_BTGN), lay.group_rows(c_BTGN)
        self.decay = Decay(self.dt_MQH, a_H, None if start_BT is None else lay.tokens(start_BT))
        self.dt_MHQ = self.dt_MQH.transpose(1, 2)

    def forward(self, state_BHPN: Tensor, y_BTHP: Tensor) -> Tensor:
        """Writes y; gives the states at the borders of the chunks."""
        lay, decay = self.lay, self.decay
        inside = torch.bmm(
            mixing(decay.inside_MHQQ(), self.b, self.c), lay.scaled(self.x_MQHP, self.dt_MHQ, order="head")
        )
        written = lay.scaled(self.x_MQHP, self.dt_MHQ * decay.to_end_MHQ, order="group")
        added = lay.states(torch.bmm(written.transpose(1, 2), self.b))
        states = pass_states(added, state_BHPN, decay.through_MH)
        before = torch.bmm(self.c, lay.flat_states(states[:, :-1]).transpose(1, 2))
        lay.join(inside, before, decay.since_entry_MHQ, out_BTHP=y_BTHP)
        return states

    def backward(self, dy_BTHP: Tensor, dlast_BHPN: Tensor, y_BTHP: Tensor, states: Tensor) -> tuple[Tensor, ...]:
        """Gradients of x, dt, a, b, c and of the state that entered."""
        lay, decay, b, c = self.lay, self.decay, self.b, self.c
        dy_MQHP, x_MQHP, dt_MQH = lay.tokens(dy_BTHP), self.x_MQHP, self.dt_MQH

        # through the state that entered each chunk, and the one that left it
        dbefore = lay.scaled(dy_MQHP, decay.since_entry_MHQ, order="group")
        dc = torch.bmm(dbefore, lay.flat_states(states[:, :-1]))
        denter = lay.states(torch.bmm(dbefore.transpose(1, 2), c))
        dadded, dstate = pass_states_back(denter, dlast_BHPN, decay.through_MH)
        flat_dadded = lay.flat_states(dadded)
        db = torch.bmm(lay.scaled(x_MQHP, self.dt_MHQ * decay.to_end_MHQ, order="group"), flat_dadded)
        dx_end = torch.bmm(b, flat_dadded.transpose(1, 2))

        # inside the chunk
        dy_head = lay.scaled(dy_MQHP, torch.ones_like(self.dt_MHQ), order="head")
        x_head = lay.scaled(x_MQHP, self.dt_MHQ, order="head")
        inside = decay.inside_MHQQ()
        dmix = torch.bmm(dy_head, x_head.transpose(1, 2)).view_as(inside).mul_(inside)
        dpair = dmix.unflatten(1, (lay.groups, lay.share)).sum(2).flatten(0, 1)
        dc.baddbmm_(dpair, b)
        db.baddbmm_(dpair.transpose(1, 2), c)
        dx_in = torch.bmm(mixing(inside, b, c).transpose(1, 2), dy_head)
        dxdt = lay.join(dx_in, dx_end, decay.to_end_MHQ)

        # Every weight of y_i holds exp(log_keep_i) and every use of x_j holds exp(-log_keep_j), so the gradient of
        # log_keep needs no (Q, Q) matrix: rows give dy*y, columns give dx*x, and the chunk's end has the state's share.
        dx_dot_x = (dxdt * x_MQHP).sum(-1)
        dlog = (dy_MQHP * lay.tokens(y_BTHP)).sum(-1).sub_(dx_dot_x * dt_MQH)
        dlog[:, -1] += (dadded * states[:, 1:]).sum((-1, -2)).view(lay.m, lay.heads)
        dstep = decay.from_here(dlog)
        ddt = (dx_dot_x + dstep * self.a_H).view(lay.batch, -1, lay.heads)
        dx = dxdt.mul_(dt_MQH[..., None]).view(dy_BTHP.shape)
        return dx, ddt, (dstep * dt_MQH).sum((0, 1)), lay.back(db), lay.back(dc), dstate


def mixing(inside_MHQQ: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """(c_i . b_j) times the decay from j to i: what y_i takes of dt_j x_j, (M*H, Q, Q). Overwrites `inside_MHQQ`."""
    m, heads, chunk, _ = inside_MHQQ.shape
    pair = torch.bmm(c, b.transpose(1, 2)).view(m, -1, 1, chunk, chunk)
    inside_MHQQ.unflatten(1, (pair.shape[1], -1)).mul_(pair)
    return inside_MHQQ.view(m * heads, chunk, chunk)


def pass_states(added: Tensor, first_BHPN: Tensor, through_MH: Tensor) -> Tensor:
    """The states at the borders of the chunks: (batch, chunks + 1, H, P, N), the first one included."""
    batch, chunks = added.shape[:2]
    through = through_MH.view(batch, chunks, -1, 1, 1)
    states = added.new_empty(batch, chunks + 1, *added.shape[2:])
    states[:, 0] = first_BHPN
    for k in range(chunks):
        torch.addcmul(added[:, k], through[:, k], states[:, k], out=states[:, k + 1])
    return states


def pass_states_back(denter: Tensor, dlast_BHPN: Tensor, through_MH: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of what each chunk added to the state, and of the state that entered the first chunk."""
    through = through_MH.view(denter.shape[0], denter.shape[1], -1, 1, 1)
    dadded, dstate = torch.empty_like(denter), dlast_BHPN
    for k in reversed(range(denter.shape[1])):
        dadded[:, k] = dstate
        dstate = torch.addcmul(denter[:, k], through[:, k], dstate)
    return dadded, dstate


SSD_IMPLS = (Impl("torch", ssd_chunked), Impl("reference", ssd_reference))
