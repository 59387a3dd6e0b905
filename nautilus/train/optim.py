"""AdamW, the learning-rate schedule as a pure function, and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nautilus.config import setting
from nautilus.model.held import refuse_training
from nautilus.train.ranks import ALONE, Ranks

SHAPES: dict[str, Callable[[float], float]] = {
    "minus_sqrt": lambda x: 1 - math.sqrt(x),
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
}


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its warm-up, stable, decay (WSD) schedule; the defaults follow the published runs.

    `warmup` is in updates, `decay` is the share of the horizon over which the rate falls from `lr` to `min_lr` along
    `shape`. decay=0 holds `lr` to the end. `clip` bounds the norm of the gradient; 0 leaves it alone.
    """

    lr: float = setting(1e-3, "learning rate between warm-up and decay")
    min_lr: float = setting(1e-5, "learning rate at the end")
    warmup: int = setting(0, "updates over which the rate rises, -1: a fourteenth of them, at most 50")
    decay: float = setting(0.2, "share of all updates over which the rate falls")
    shape: str = setting("minus_sqrt", "of the fall: minus_sqrt, linear or cosine")
    betas: tuple[float, float] = setting((0.9, 0.95), "AdamW's two memories")
    eps: float = setting(1e-8, "beside the root of the second memory")
    weight_decay: float = setting(0.1, "of matrices; vectors and biases have none")
    clip: float = setting(1.0, "largest norm of the gradient, 0: any")

    def __post_init__(self):
        if self.shape not in SHAPES:
            raise ValueError(f"optim.shape={self.shape!r} is unknown; have {', '.join(SHAPES)}")
        if not all(map(math.isfinite, (self.lr, self.min_lr, self.eps, self.weight_decay, self.clip, *self.betas))):
            raise ValueError(f"optim has a setting that is no finite number: {self}; give finite ones")
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"optim.min_lr={self.min_lr} must lie in 0..optim.lr={self.lr}")
        if not (0 <= self.decay <= 1 and self.warmup >= -1):
            raise ValueError(f"optim.decay={self.decay} must lie in 0..1 and optim.warmup={self.warmup} not below -1")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas={self.betas} must be two numbers in [0, 1)")
        if min(self.eps, self.weight_decay, self.clip) < 0:
            raise ValueError(
                f"optim.eps={self.eps}, optim.weight_decay={self.weight_decay} and optim.clip={self.clip} "
                f"must not be negative"
            )


def learning_rate(t: float, horizon: float, optim: OptimConfig) -> float:
    """The rate after t of `horizon` updates (or tokens, if `warmup` is counted in tokens too).

    peak * t / W up to the end of warm-up W; the peak until N - D, the start of the decay; then
    min + (peak - min) * (1 - sqrt((t - (N - D)) / D)) until the horizon N; min beyond it. (Warm-up, stable, decay with
    minus-sqrt, as in Nemotron 3 Super and Ultra; `shape` offers others to compare with.)
    """
    span = optim.decay * horizon
    if t <= optim.warmup and optim.warmup > 0:
        return optim.lr * t / optim.warmup
    if t <= horizon - span or span == 0:
        return optim.lr
    gone = min(1.0, (t - (horizon - span)) / span)
    return optim.min_lr + (optim.lr - optim.min_lr) * SHAPES[optim.shape](gone)


def schedule(optim: OptimConfig, steps: int) -> Callable[[int], float]:
    """The learning rate of each update, numbered from 0, of a run of `steps` updates.

    Update 0 already has t = 1, so that no step is spent at rate zero and the last one runs at `min_lr`.
    """
    optim = replace(optim, warmup=optim.warmup if optim.warmup >= 0 else min(50, steps // 14))
    if optim.warmup + optim.decay * steps > steps:
        raise ValueError(
            f"optim.warmup={optim.warmup} and optim.decay={optim.decay} of steps={steps} do not fit one after the "
            f"other; lower one of them or raise steps"
        )
    return lambda step: learning_rate(step + 1, steps, optim)


def adamw(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that are trained: no weight decay on one-dimensional parameters and biases."""
    refuse_training(model)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise ValueError("adamw was asked to train a model whose parameters are all frozen; unfreeze some of them")
    groups = [
        {"params": [p for name, p in trained if decays(name, p)], "weight_decay": optim.weight_decay},
        {"params": [p for name, p in trained if not decays(name, p)], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cpu", "cuda") for _, p in trained)
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=fused)


def decays(name: str, parameter: Tensor) -> bool:
    return parameter.ndim > 1 and not name.endswith("bias")


def gradient_norm(parameters: Iterable[Tensor], ranks: Ranks = ALONE) -> Tensor:
    """The norm of all gradients as one vector, float64. Summed in it too, so that what clipping multiplies with, a
    float32, is the same however the parameters are shared out."""
    trained = [p for p in parameters if p.grad is not None]
    norms = [torch.linalg.vector_norm(ranks.own(p.grad), dtype=torch.float64) for p in trained]  # type: ignore[arg-type]
    squares = torch.stack(norms).square() if norms else torch.zeros(0, dtype=torch.float64)
    return ranks.whole(trained, squares).sqrt()


def clip_gradients(parameters: Iterable[Tensor], limit: float, norm: Tensor, ranks: Ranks = ALONE) -> None:
    """Scales all gradients by limit / norm where the norm exceeds the limit; limit = 0 leaves them alone."""
    if limit > 0:
        gradients = [ranks.own(p.grad) for p in parameters if p.grad is not None]
        torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
