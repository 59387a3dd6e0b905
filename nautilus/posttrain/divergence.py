"""KL between the distributions of two heads, without ever holding the logits of a whole batch.

    forward   sum_kr weight_kr KL(p_r || q_kr)      p   = softmax(teacher logits / T)
    reverse   sum_kr weight_kr KL(q_kr || p_r)      q_k = softmax(student k's logits / T)

Letters: K students of one teacher, R rows (positions), D and E widths of what the two heads read, V vocabulary. Logits
are float32 (float64 for float64 input); the teacher's are computed once for all students. The gradient with respect to
a student's logit is weight (q - p) / T, reverse weight q (log q - log p - KL) / T, and there is none for the teacher.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nautilus.ops.formats import Packed
from nautilus.ops.loss import ELEMENTS, chunk_logits, rows_for
from nautilus.ops.shapes import checked
from nautilus.ops.ssd import wide


@checked
def weighted_kl(
    student_KRD: Tensor, student_VD: Tensor | Packed, teacher_RE: Tensor, teacher_VE: Tensor | Packed,
    weight_KR: Tensor, *, temperature: float = 1.0, reverse: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The sum, a scalar, and total_K, the part of each student in it, for people to see: no gradient goes through.

    Rows that weigh 0 for all students cost nothing. Gradients go to the students' rows and matrix.
    """
    used = weight_KR.any(0).nonzero()[:, 0]
    student_KRD, teacher_RE, weight_KR = student_KRD[:, used], teacher_RE[used].detach(), weight_KR[:, used]
    own = student_VD.decode(student_KRD.dtype) if isinstance(student_VD, Packed) else student_VD
    other = teacher_VE.decode(teacher_RE.dtype) if isinstance(teacher_VE, Packed) else teacher_VE.detach()
    given = student_KRD, own, teacher_RE, other, weight_KR, temperature, reverse
    return WeightedKl.apply(*given)  # type: ignore[return-value]


def weighted_kl_reference(
    student_KRD: Tensor, student_VD: Tensor, teacher_RE: Tensor, teacher_VE: Tensor, weight_KR: Tensor,
    *, temperature: float = 1.0, reverse: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The formulas."""
    dtype = wide(student_KRD.dtype)
    log_q = (student_KRD.to(dtype) @ student_VD.to(dtype).T / temperature).log_softmax(-1)
    log_p = (teacher_RE.detach().to(dtype) @ teacher_VE.detach().to(dtype).T / temperature).log_softmax(-1)
    kl_KR = (log_q.exp() * (log_q - log_p) if reverse else log_p.exp() * (log_p - log_q)).sum(-1)
    total_K = (weight_KR * kl_KR).sum(-1)
    return total_K.sum(), total_K.detach()


class WeightedKl(torch.autograd.Function):
    """Each logit is computed once: the gradient is taken while it is at hand."""

    @staticmethod
    def forward(ctx, student_KRD, student_VD, teacher_RE, teacher_VE, weight_KR, temperature, reverse):
        dtype = wide(student_KRD.dtype)
        own_VD, other_VE = student_VD.to(student_KRD.dtype), teacher_VE.to(teacher_RE.dtype)
        total_K = torch.zeros(len(student_KRD), dtype=dtype, device=student_KRD.device)
        dstudent_KRD = torch.empty_like(student_KRD)
        dmatrix_VD = torch.zeros_like(own_VD, dtype=dtype) if ctx.needs_input_grad[1] else None
        chunk = rows_for(ELEMENTS, len(own_VD))
        for begin in range(0, len(teacher_RE), chunk):
            part = slice(begin, begin + chunk)
            log_p = (chunk_logits(teacher_RE[part], other_VE) / temperature).log_softmax(-1)
            there = () if reverse else (p := log_p.exp(), torch.linalg.vecdot(p, log_p))
            for k, hidden in enumerate(student_KRD[:, part]):
                weight_R = weight_KR[k, part].to(dtype)
                log_q = (chunk_logits(hidden, own_VD) / temperature).log_softmax(-1)
                kl_R, dlogits_RV = (reverse_part if reverse else forward_part)(log_q, log_p, *there)
                total_K[k] += torch.dot(weight_R, kl_R)
                dlogits = dlogits_RV.to(hidden.dtype)
                # The weight multiplies the narrow factors, never the wide logits.
                push_R1 = (weight_R / temperature)[:, None].to(hidden.dtype)
                dstudent_KRD[k, part] = (dlogits @ own_VD) * push_R1
                if dmatrix_VD is not None:
                    dmatrix_VD += dlogits.T @ (hidden * push_R1)
        ctx.save_for_backward(dstudent_KRD, dmatrix_VD)
        ctx.matrix_dtype = student_VD.dtype
        ctx.mark_non_differentiable(total_K)
        return total_K.sum(), total_K

    @staticmethod
    @once_differentiable
    def backward(ctx, push, _):  # type: ignore[override]
        dstudent_KRD, dmatrix_VD = ctx.saved_tensors
        dmatrix = None if dmatrix_VD is None else (dmatrix_VD * push).to(ctx.matrix_dtype)
        return dstudent_KRD * push.to(dstudent_KRD.dtype), dmatrix, None, None, None, None, None


def forward_part(log_q_RV: Tensor, _: Tensor, p_RV: Tensor, negentropy_R: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence of each row, and T times its gradient with respect to the student's logits. Takes log_q over."""
    kl_R = negentropy_R - torch.linalg.vecdot(p_RV, log_q_RV)
    return kl_R, log_q_RV.exp_().sub_(p_RV)


def reverse_part(log_q_RV: Tensor, log_p_RV: Tensor) -> tuple[Tensor, Tensor]:
    q_RV, apart_RV = log_q_RV.exp(), log_q_RV.sub_(log_p_RV)
    kl_R = torch.linalg.vecdot(q_RV, apart_RV)
    return kl_R, q_RV.mul_(apart_RV.sub_(kl_R[:, None]))
