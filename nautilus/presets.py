"""Named configurations. Real models carry their published sizes; `shrink` gives any of them a toy twin."""

from __future__ import annotations

import dataclasses
import difflib

from nautilus.config import Attention, Config, Experts, Layer, Linear, Mamba, Mlp, Nothing, PrecisionTable, Rotary, lay

NANO_PATTERN = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
SUPER_PATTERN = "MEMEMEM*E" + "MEMEMEM*E" * 2 + "MEMEMEMEM*E" * 4 + "MEMEMEM*EMEMEMEME"
ULTRA_PATTERN = "MEMEME" + "M*EMEMEM*EMEMEMEM*EMEMEME" * 4 + "ME"


def toy(vocab: int = 4096) -> Config:
    """Every part of the family at a size that trains in minutes on two cores."""
    mamba = Mamba(heads=8, head_width=64, state=64, groups=2, chunk=64)
    attention = Attention(heads=4, groups=2, head_width=64)
    experts = Experts(experts=16, active=4, hidden=128, shared=384, latent=128, scale=2.5)
    return Config(
        vocab=vocab,
        width=256,
        layers=lay("MEM*EME", mamba, attention, experts),
        mtp=lay("*E", attention, experts),
        positions=1 << 20,
    )


def starter(vocab: int = 4096) -> Config:
    """The model of the demo, 2.2M weights beside the embeddings. With two layers of attention, one after the other, a
    model as small as this learns to look up what stood before; with one it learns the form of answers and not more."""
    mamba = Mamba(heads=6, head_width=64, state=64, groups=2, chunk=64)
    attention = Attention(heads=4, groups=2, head_width=48)
    experts = Experts(experts=8, active=2, hidden=128, shared=256, latent=128, scale=2.5)
    return Config(
        vocab=vocab,
        width=192,
        layers=lay("M*EM*E", mamba, attention, experts),
        mtp=lay("*E", attention, experts),
        positions=1 << 20,
    )


def toy_1m(vocab: int = 512) -> Config:
    """A million tokens in one row on a CPU: narrow, with one attention layer of one head, whose work is the square."""
    mamba = Mamba(heads=4, head_width=32, state=32, groups=1, chunk=64)
    attention = Attention(heads=1, groups=1, head_width=16)
    experts = Experts(experts=8, active=2, hidden=64, shared=64, latent=32, scale=2.5)
    return Config(vocab=vocab, width=64, layers=lay("MEM*ME", mamba, attention, experts), positions=1 << 20)


def nano() -> Config:
    """Nemotron 3 Nano 30B-A3B (arXiv 2512.20848)."""
    mamba = Mamba(heads=64)
    attention = Attention(heads=32, groups=2)
    experts = Experts(experts=128, active=6, hidden=1856, shared=3712, scale=2.5)
    return Config(vocab=131072, width=2688, layers=lay(NANO_PATTERN, mamba, attention, experts), init_std=0.0173)


def lightning() -> Config:
    """Nemotron 3.5 Lightning 30B-A3B: Nano with a multi-token-prediction block."""
    base = nano()
    return dataclasses.replace(base, mtp=lay("*E", *base.layers), positions=1 << 20)


def super_() -> Config:
    """Nemotron 3 Super 120B-A12B (arXiv 2604.12374)."""
    mamba = Mamba(heads=128)
    attention = Attention(heads=32, groups=2)
    experts = Experts(experts=512, active=22, hidden=2688, shared=5376, latent=1024, scale=5.0)
    layers = lay(SUPER_PATTERN, mamba, attention, experts)
    return Config(vocab=131072, width=4096, layers=layers, mtp=lay("*E", *layers), init_std=0.014)


def ultra() -> Config:
    """Nemotron 3 Ultra 550B-A55B (arXiv 2606.15007)."""
    mamba = Mamba(heads=256)
    attention = Attention(heads=64, groups=2)
    experts = Experts(experts=512, active=22, hidden=5120, shared=10240, latent=2048, scale=5.0)
    layers = lay(ULTRA_PATTERN, mamba, attention, experts)
    return Config(vocab=131072, width=8192, layers=layers, mtp=lay("*E", *layers), init_std=0.0099)


def dense(pattern: str, width: int, hidden: int, attention: Attention, mamba: Mamba) -> Config:
    """A dense relative: Mamba-2, attention and MLP layers (arXiv 2504.03624, 2508.14444)."""
    return Config(vocab=131072, width=width, layers=lay(pattern, mamba, attention, Mlp(hidden=hidden)))


def nemotron_h_4b() -> Config:
    pattern = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
    return dense(pattern, 3072, 12288, Attention(heads=32, groups=8), Mamba(heads=112))


def nemotron_h_8b() -> Config:
    pattern = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
    return dense(pattern, 4096, 21504, Attention(heads=32, groups=8), Mamba(heads=128))


def nemotron_h_47b() -> Config:
    pattern = "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-"
    return dense(pattern, 8192, 30720, Attention(heads=64, groups=8), Mamba(heads=256, state=256))


def nemotron_h_56b() -> Config:
    pattern = "M-M-M-M*-" + "M-M-M-M-M*-" * 9 + "M-M-M-M-M-"
    return dense(pattern, 8192, 32768, Attention(heads=64, groups=8), Mamba(heads=256, state=256))


def nano_9b_v2() -> Config:
    pattern = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"
    return dense(pattern, 4480, 15680, Attention(heads=40, groups=8), Mamba(heads=128, head_width=80))


def nano_12b_v2() -> Config:
    pattern = "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-"
    return dense(pattern, 5120, 20480, Attention(heads=40, groups=8), Mamba(heads=128, head_width=80))


def nano_4b() -> Config:
    """Nemotron 3 Nano 4B, the dense one."""
    pattern = "M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-"
    return dense(pattern, 3136, 12544, Attention(heads=40, groups=8), Mamba(heads=96, head_width=80))


def llama_3_1_8b() -> Config:
    """Llama 3.1 8B, the parent of the Llama-Nemotron models: one attention and one gated MLP layer per block."""
    rotary = Rotary(theta=500000.0, factor=8.0)
    attention, mlp = Attention(heads=32, groups=8, rotary=rotary), Mlp(hidden=14336, gated=True)
    return Config(
        vocab=128256, width=4096, layers=lay("*-" * 32, attention, mlp), positions=131072, bos=128000, eos=(128001,)
    )


def qwen3_30b_a3b() -> Config:
    """The shape of Qwen3-30B-A3B: attention-only mixture of gated experts; a yardstick for Nano."""
    attention = Attention(heads=32, groups=4, rotary=Rotary(theta=1e6), head_norm=True)
    experts = Experts(experts=128, active=8, hidden=768, gated=True, score="softmax")
    return Config(vocab=151936, width=2048, layers=lay("*E" * 48, attention, experts), norm_eps=1e-6)


def gpt_oss_20b() -> Config:
    """The shape of GPT-OSS-20B, its window on every second attention layer; biases and attention sinks left out."""
    full = Attention(heads=64, groups=8, head_width=64, rotary=Rotary(theta=150000.0))
    near = dataclasses.replace(full, window=128)
    experts = Experts(experts=32, active=4, hidden=2880, gated=True, score="softmax")
    return Config(vocab=201088, width=2880, layers=(near, experts, full, experts) * 12)


PRESETS = {
    "toy": toy,
    "starter": starter,
    "toy_1m": toy_1m,
    "nano": nano,
    "lightning": lightning,
    "super": super_,
    "ultra": ultra,
    "nemotron_h_4b": nemotron_h_4b,
    "nemotron_h_8b": nemotron_h_8b,
    "nemotron_h_47b": nemotron_h_47b,
    "nemotron_h_56b": nemotron_h_56b,
    "nano_9b_v2": nano_9b_v2,
    "nano_12b_v2": nano_12b_v2,
    "nano_4b": nano_4b,
    "llama_3_1_8b": llama_3_1_8b,
    "qwen3_30b_a3b": qwen3_30b_a3b,
    "gpt_oss_20b": gpt_oss_20b,
}


# How the published models were trained; the others in bf16 (Nano) or unknown.
PRECISION = {
    "super": PrecisionTable(format="nvfp4", last_layers=14),
    "ultra": PrecisionTable(format="nvfp4", last_layers=16),
}


def preset(name: str) -> Config:
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]!r}? Have" if near else "have"
        raise ValueError(f"no preset {name!r}; {hint} {', '.join(PRESETS)}")
    return PRESETS[name]()


def shrink(config: Config, *, layers: int = 8, width: int = 48) -> Config:
    """A toy twin with the same kinds, ratios and switches: what holds for it is a fact about the code path.

    Every kind of layer of the original survives, each at sizes of at most a few dozen.
    """
    kept = list(config.layers[:layers])
    seen = {layer.letter for layer in kept}
    kept += [layer for layer in dict.fromkeys(config.layers) if layer.letter not in seen]
    small = {layer: shrink_layer(layer) for layer in {*kept, *config.mtp}}
    return dataclasses.replace(
        config,
        vocab=97,
        width=width,
        layers=tuple(small[layer] for layer in kept),
        mtp=tuple(small[layer] for layer in config.mtp),
        init_std=0.0,
        bos=1,
        eos=(2,),
    )


def shrink_layer(layer: Layer) -> Layer:
    match layer:
        case Mamba():
            return dataclasses.replace(layer, heads=6, head_width=8, state=16, groups=2, chunk=8)
        case Attention():
            heads = 2 if layer.heads == layer.groups else 4
            window = min(layer.window, 5)
            return dataclasses.replace(layer, heads=heads, groups=2, head_width=16, window=window)
        case Experts():
            latent = 20 if layer.latent else 0
            shared = 40 if layer.shared else 0
            return dataclasses.replace(layer, experts=8, active=3, hidden=24, shared=shared, latent=latent)
        case Mlp():
            return dataclasses.replace(layer, hidden=64)
        case Linear() | Nothing():
            return layer
