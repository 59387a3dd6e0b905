"""What layers keep for their backward, in bytes per token: of native kernels, and of PyTorch's autograd.

Formulas, one for each kind of layer; `tests/train/test_plan.py` compares them with what trainings keep. A training's
rows hold several documents, and PyTorch's fused attention, which runs on GPUs, then keeps a mask as long as the row for
every token, and the logarithm of each softmax's sum.
"""

from __future__ import annotations

from nautilus.config import Attention, Config, Experts, Layer, Mamba, Mlp, Nothing
from nautilus.train.layout import Work

SEGMENT = 64  # tokens between kept states of the scan


def kept_by(layer: Layer, width: int, work: Work, *, kernels: str, ranks: int = 1) -> float:
    """What enters the layer, its normed copy, and the mixer's own. kernels: as in `Machine`. ranks: of tensor
    parallelism, which divides all but the mask; the mask is counted so many times."""
    if isinstance(layer, Nothing):
        return 0.0
    both, native = 2 * width * work.compute + 4, kernels == "native"
    match layer:
        case Mamba():
            return both + kept_by_mamba(layer, work.compute, native)
        case Attention():
            fused = 4 * layer.heads + ranks * work.compute * work.length if kernels == "torch" else 0
            return both + kept_by_attention(layer, work.compute, native) + fused
        case Experts():
            return both + kept_by_experts(layer, width, work.compute, native)
        case Mlp():
            return both + kept_by_mlp(layer.hidden, layer.gated, work.compute, native)
    return both


def kept_by_mamba(layer: Mamba, compute: int, native: bool) -> float:
    """PyTorch also keeps the convolution's padded input, its sums and its output, the steps before and after softplus,
    the scan's output, wide and with the skip added, and where documents begin."""
    projected, states = layer.inner + layer.conv_width + layer.heads, 4 * layer.inner * layer.state / SEGMENT
    own = compute * (projected + layer.inner) + 4 * layer.inner + states
    if native:
        return own
    return (
        own
        + compute * (2 * layer.conv_width + layer.inner)
        + 4 * (layer.conv_width + 2 * layer.heads + layer.groups)
        + 9
    )


def kept_by_attention(layer: Attention, compute: int, native: bool) -> float:
    """Queries, keys, values and the output, and queries and keys before their norm; of PyTorch sines and cosines."""
    own = compute * 2 * (layer.heads + layer.groups) * layer.head_width
    if layer.head_norm:
        own += (layer.heads + layer.groups) * (compute * layer.head_width + 4)
    return own if native or not layer.rotary else own + 8 * layer.head_width


def kept_by_experts(layer: Experts, width: int, compute: int, native: bool) -> float:
    """The balance loss keeps three numbers; the router reads float32."""
    pair = (2 if layer.gated else 1) * layer.hidden * compute + (20 if native else 36)
    shared = kept_by_mlp(layer.shared, layer.gated, compute, native) + 2 * layer.latent * compute
    router = 4 * layer.experts + 12 + (4 * width if compute < 4 else 0) + (0 if native else 4)
    return layer.active * pair + shared + router


def kept_by_mlp(hidden: int, gated: bool, compute: int, native: bool) -> int:
    """What enters and leaves the activation; of PyTorch also the gates' silu."""
    return hidden * compute * (2 + gated * (1 if native else 2))


def kept_at_the_ends(config: Config, compute: int, depths: int) -> float:
    """Of tokens, the final norm and the loss, and of each prediction depth but for its layers."""
    return 8 + 2 * config.width * compute + 4 + depths * (6 * config.width * compute + 12)
