"""What to watch while a mixture-of-experts hybrid trains: the signs that came before the published divergences.

    grad_norm.<role>    norm of the gradient, by layer kind and weight, before clipping
    zero_grad.<role>    share of its elements that are exactly zero
    residual_rms.<i>    root mean square of the residual after layer i
    flush.<role>.<x>    share of an operand's numbers that few bits made zero, where the model trains in few bits
    max_vio.<mixer>     largest load of an expert over the mean load; 1 is perfect balance
    dead_experts        experts, over all mixers in use, that saw no token in this step

Growing zero gradients, early layers' residual norms and the worst layer's MaxVio are the ones to look at first (arXiv
2604.12374, 2606.15007); the losses of each prediction depth are terms and logged at every step anyway.
"""

from __future__ import annotations

import math
import resource
import sys

import torch
from torch import Tensor, nn

from nautilus.config import Config, weight_count
from nautilus.data.batch import Batch
from nautilus.model.language import Language
from nautilus.model.layout import role
from nautilus.train.balance import max_violation
from nautilus.train.optim import gradient_norm
from nautilus.train.ranks import ALONE, Ranks


def gradient_health(model: nn.Module, config: Config, ranks: Ranks = ALONE) -> dict[str, float]:
    """Norm and share of exact zeros of the gradient, per role."""
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            groups.setdefault(role(name, config), []).append(parameter)
    out = {}
    for group in sorted(ranks.union(dict.fromkeys(groups))):
        parameters = groups.get(group, [])
        gradients = [ranks.own(p.grad) for p in parameters]  # type: ignore[arg-type]
        zeros = torch.tensor([float((g == 0).sum()) for g in gradients], dtype=torch.float64)
        sizes = torch.tensor([float(g.numel()) for g in gradients], dtype=torch.float64)
        out[f"grad_norm.{group}"] = gradient_norm(parameters, ranks).item()
        out[f"zero_grad.{group}"] = ranks.whole(parameters, zeros).item() / ranks.whole(parameters, sizes).item()
    return out


@torch.no_grad()
def residual_rms(model, batch: Batch, ranks: Ranks = ALONE) -> dict[str, float]:
    """Size of the residual after each layer, from one extra forward that leaves no trace in the model."""
    seen: dict[str, Tensor] = {}

    def tap(index: int, residual_BTD: Tensor) -> None:
        size = residual_BTD.new_tensor(residual_BTD.numel(), dtype=torch.float64)
        seen[f"residual_rms.{index}"] = torch.stack([residual_BTD.double().square().sum(), size])

    training = model.training
    model.eval()
    model.hidden(batch.tokens, document_BT=batch.document, taps=(tap,))
    model.train(training)
    ranks.forget(model)
    sums = ranks.union({name: ranks.total(pair).tolist() for name, pair in seen.items()})
    return {name: math.sqrt(squares / size) for name, (squares, size) in sums.items()}


def load_health(loads: dict[str, Tensor]) -> dict[str, float]:
    """MaxVio of each mixer and the number of dead experts; mixers that saw no token at all are left out."""
    used = {short(name): load_E for name, load_E in loads.items() if load_E.sum() > 0}
    out = {f"max_vio.{name}": max_violation(load_E) for name, load_E in used.items()}
    if used:
        out["dead_experts"] = sum((load_E == 0).sum().item() for load_E in used.values())
    return out


def short(mixer: str) -> str:
    """`backbone.layers.3.mixer` → `3`, `mtp.layers.1.mixer` → `mtp.1`: the residual's numbers."""
    return mixer.removeprefix("backbone.").replace("layers.", "").removesuffix(".mixer")


def speed(model: Language, tokens_per_s: float, peak_flops: float = 0.0) -> dict[str, float]:
    """tokens_per_s, memory_gb (the peak so far) and, where the device's peak is known, mfu.

    Model FLOPs are 6 per token and active weight: attention scores and prediction depths are left out.
    """
    device = next(model.parameters()).device
    # The kernel reports kilobytes, except on macOS.
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident
    found = {"tokens_per_s": tokens_per_s, "memory_gb": peak / 1e9}
    if peak_flops:
        found["mfu"] = 6 * weight_count(model.config)["active"] * tokens_per_s / peak_flops
    return found
