"""What a step of decoding costs by the sizes of a model alone: bytes that it reads, arithmetic, users that fit.

A step of B users reads every weight that one of them needs once, each user's keys and values, and reads and writes each
user's recurrent states. It takes as long as the slower of memory and arithmetic:

    seconds = max(bytes / bandwidth, flops / peak)
    bytes   = dense + routed * (1 - (1 - active / experts)^B) + B * (2 * state + kv(context))
    flops   = B * (2 * active weights + 4 * heads * head width * context, summed over attention layers)

Nothing here is measured. A device reaches some share of this, which a ratio of two models on it does not feel as long
as both reach the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nautilus.config import Attention, Config, Experts, Mamba, weight_count

SHARE = 0.9  # of a device's memory for weights, states, keys and values


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Counts of numbers, not bytes. kv, near: of keys and values of a token in layers that see all tokens, and in those
    that see `window` of them; keeps_near: the latter are kept for all tokens all the same. work: multiplications and
    additions of attention for each token seen, in all layers that see all; near_work in the others."""

    weights: float
    active: float
    routed: float = 0.0
    experts: int = 1
    chosen: int = 1
    kv: float = 0.0
    near: float = 0.0
    window: int = 0
    keeps_near: bool = False
    work: float = 0.0
    near_work: float = 0.0
    state: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """Of one number."""

    weight: float
    kv: float
    state: float = 4.0


@dataclass(frozen=True, kw_only=True)
class Device:
    """memory in bytes, bandwidth in bytes per second, peak in operations per second; of so many devices together."""

    memory: float
    bandwidth: float
    peak: float

    def times(self, count: int) -> Device:
        return Device(memory=count * self.memory, bandwidth=count * self.bandwidth, peak=count * self.peak)


def sizes_of(config: Config) -> Sizes:
    """Of a model that our configs can spell."""
    count = weight_count(replace(config, mtp=()))
    experts = [layer for layer in config.layers if isinstance(layer, Experts)]
    far = [layer for layer in config.layers if isinstance(layer, Attention) and not layer.window]
    near = [layer for layer in config.layers if isinstance(layer, Attention) and layer.window]
    mamba = [layer for layer in config.layers if isinstance(layer, Mamba)]
    some = experts[0] if experts else Experts(experts=1, active=1, hidden=1)
    routed = sum(
        layer.experts * (3 if layer.gated else 2) * layer.hidden * (layer.latent or config.width) for layer in experts
    )
    return Sizes(
        weights=count["main"], active=count["active"], routed=routed, experts=some.experts, chosen=some.active,
        kv=sum(2 * layer.groups * layer.head_width for layer in far),
        near=sum(2 * layer.groups * layer.head_width for layer in near),
        window=near[0].window if near else 0,
        work=sum(4 * layer.heads * layer.head_width for layer in far),
        near_work=sum(4 * layer.heads * layer.head_width for layer in near),
        state=sum(layer.inner * layer.state + layer.conv_width * (layer.taps - 1) for layer in mamba),
    )  # fmt: skip


def parts(sizes: Sizes, stored: Bytes, users: int, context: float) -> dict[str, float]:
    """Bytes of a step, by what they are."""
    touched = 1 - (1 - sizes.chosen / sizes.experts) ** users
    near = min(context, sizes.window)
    return {
        "weights": stored.weight * (sizes.weights - sizes.routed + sizes.routed * touched),
        "states": stored.state * users * 2 * sizes.state,
        "keys and values": stored.kv * users * (sizes.kv * context + sizes.near * near),
    }


def flops(sizes: Sizes, users: int, context: float) -> float:
    seen = sizes.work * context + sizes.near_work * min(context, sizes.window)
    return users * (2 * sizes.active + seen)


def step_seconds(sizes: Sizes, stored: Bytes, device: Device, users: int, context: float) -> float:
    bytes = sum(parts(sizes, stored, users, context).values())
    return max(bytes / device.bandwidth, flops(sizes, users, context) / device.peak)


def user_bytes(sizes: Sizes, stored: Bytes, tokens: float) -> float:
    """Memory that one user's conversation takes."""
    near = tokens if sizes.keeps_near else min(tokens, sizes.window)
    return stored.state * sizes.state + stored.kv * (sizes.kv * tokens + sizes.near * near)


def most_users(sizes: Sizes, stored: Bytes, device: Device, tokens: float) -> int:
    """That fit beside the weights; 0 where not even these fit."""
    left = SHARE * device.memory - stored.weight * sizes.weights
    return max(0, int(left / user_bytes(sizes, stored, tokens)))


def tokens_per_second(sizes: Sizes, stored: Bytes, device: Device, prompt: int, answer: int, users: int) -> float:
    """Of users each of whom has a prompt read and an answer written again and again."""
    step = step_seconds(sizes, stored, device, users, prompt + answer / 2)
    reading = prompt * 2 * sizes.active / device.peak
    return answer * users / (answer * step + users * reading)
