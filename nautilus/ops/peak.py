"""What a draw needs of logits. Letters: B rows, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from nautilus.ops.cpu.peak import peak_native, peak_refuses
from nautilus.ops.dispatch import Impl, choose


def peak(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    """best_B, the index of the largest logit, the first of equals; total_B = log sum exp logits, float64.

    The log-probability of token t is logits[t] - total. A row's numbers do not depend on the rows beside it. Where one
    of them is NaN or infinity, or all are -infinity, total is NaN and best of no use.
    """
    return choose("peak", PEAK_IMPLS, logits_BV)(logits_BV)


def peak_torch(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    wide_BV = logits_BV.double()
    total_B = wide_BV.logsumexp(1)
    total_B = total_B.where(total_B.isfinite(), float("nan"))
    # numpy has the first of equals, as torch on a CPU does, but six times faster.
    return torch.from_numpy(wide_BV.cpu().numpy().argmax(1)).to(logits_BV.device), total_B


PEAK_IMPLS = (
    Impl("native", peak_native, peak_refuses),
    Impl("torch", peak_torch),
    Impl("reference", peak_torch),
)
