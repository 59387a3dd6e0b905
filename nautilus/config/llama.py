"""config.json of attention-only families: llama (gated MLP) and qwen3_moe (gated experts, normed heads).

Their files count blocks of an attention and a feed-forward half; here each half is a layer, so block i is the layers
2i and 2i + 1.
"""

from __future__ import annotations

from nautilus.config.keys import (
    FRAME,
    HARMLESS,
    canonical,
    depth,
    group,
    items,
    read_frame,
    real,
    refuse_others,
    refuse_unknown,
    switch,
    whole,
    write_frame,
)
from nautilus.config.layer import Attention, Experts, Mlp, Rotary, require
from nautilus.config.model import Config

SIZES = frozenset(
    """
    num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size rms_norm_eps
    rope_theta rope_scaling rope_parameters
    """.split()
)
ROTARY = {
    "factor": "factor",
    "low_freq_factor": "low",
    "high_freq_factor": "high",
    "original_max_position_embeddings": "original",
}

LLAMA_FIXED = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0,),
    "pretraining_tp": (1,),
    "partial_rotary_factor": (1,),
}
LLAMA_KNOWN = HARMLESS | FRAME | SIZES | set(LLAMA_FIXED)

QWEN_FIXED = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "attention_dropout": (0,),
    "use_sliding_window": (False,),
}
QWEN_ALIASES = {"num_local_experts": "num_experts"}
QWEN_SIZES = frozenset(
    "num_experts num_experts_per_tok moe_intermediate_size norm_topk_prob decoder_sparse_step mlp_only_layers".split()
)
# The window keys steer nothing while use_sliding_window is false; the router keys belong to transformers' own training.
QWEN_IGNORED = frozenset("sliding_window max_window_layers router_aux_loss_coef output_router_logits".split())
QWEN_KNOWN = HARMLESS | FRAME | SIZES | QWEN_SIZES | QWEN_IGNORED | set(QWEN_FIXED) | set(QWEN_ALIASES)


def read_llama(document: dict) -> Config:
    settings = canonical(document, {})
    refuse_unknown(settings, LLAMA_KNOWN)
    refuse_others(settings, LLAMA_FIXED)
    block = (read_attention(settings), Mlp(hidden=whole(settings, "intermediate_size"), gated=True))
    layers = block * depth(settings)
    return Config(layers=layers, norm_eps=real(settings, "rms_norm_eps", 1e-6), **read_frame(settings))


def read_qwen3_moe(document: dict) -> Config:
    settings = canonical(document, QWEN_ALIASES)
    refuse_unknown(settings, QWEN_KNOWN)
    refuse_others(settings, QWEN_FIXED)
    attention = read_attention(settings, head_norm=True)
    step, dense_layers = whole(settings, "decoder_sparse_step", 1), items(settings, "mlp_only_layers", int)
    require(step >= 1, f"config.json has decoder_sparse_step={step}; at least 1 is needed")
    layers: list = []
    for block in range(depth(settings)):
        sparse = block not in dense_layers and (block + 1) % step == 0
        layers += [attention, read_experts(settings) if sparse else dense(settings)]
    return Config(layers=tuple(layers), norm_eps=real(settings, "rms_norm_eps", 1e-6), **read_frame(settings))


def read_attention(settings: dict, *, head_norm: bool = False) -> Attention:
    heads, width = whole(settings, "num_attention_heads"), whole(settings, "hidden_size")
    return Attention(
        heads=heads,
        groups=whole(settings, "num_key_value_heads", heads),
        head_width=whole(settings, "head_dim", width // max(heads, 1)),
        rotary=read_rotary(settings),
        head_norm=head_norm,
    )


def read_experts(settings: dict) -> Experts:
    return Experts(
        experts=whole(settings, "num_experts"),
        active=whole(settings, "num_experts_per_tok"),
        hidden=whole(settings, "moe_intermediate_size"),
        gated=True,
        score="softmax",
        normalise=switch(settings, "norm_topk_prob", False),
    )


def dense(settings: dict) -> Mlp:
    return Mlp(hidden=whole(settings, "intermediate_size"), gated=True)


def read_rotary(settings: dict) -> Rotary:
    """Both spellings: `rope_theta` beside `rope_scaling`, or all in `rope_parameters`."""
    rope = canonical(group(settings, "rope_parameters") or group(settings, "rope_scaling"), {"type": "rope_type"})
    kind = rope.get("rope_type") or "default"
    theta = real(rope, "rope_theta", real(settings, "rope_theta", 10000.0))
    require(
        kind in ("default", "llama3"),
        f"config.json has rope_type={kind!r}; only 'default' and 'llama3' can be computed here; use another package",
    )
    if kind == "default":
        return Rotary(theta=theta)
    unknown = sorted(set(rope) - {*ROTARY, "rope_type", "rope_theta"})
    require(
        not unknown, f"config.json has {', '.join(unknown)} in its llama3 rope settings; known: {', '.join(ROTARY)}"
    )
    return Rotary(
        theta=theta,
        factor=real(rope, "factor"),
        low=real(rope, "low_freq_factor"),
        high=real(rope, "high_freq_factor"),
        original=whole(rope, "original_max_position_embeddings"),
    )


def write_llama(config: Config) -> dict | None:
    """None when the layers are no alternation of attention and MLP, or the family has no word for their sizes."""
    attention, mlp = config.layers[0], config.layers[-1]
    if not isinstance(attention, Attention) or not isinstance(mlp, Mlp) or config.width % attention.heads:
        return None
    document = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | write_frame(config)
    document |= write_attention(config, attention) | {"intermediate_size": mlp.hidden}
    return document | {name: allowed[0] for name, allowed in LLAMA_FIXED.items() if name != "partial_rotary_factor"}


def write_qwen3_moe(config: Config) -> dict | None:
    attention, halves = config.layers[0], config.layers[1::2]
    experts = next((half for half in halves if isinstance(half, Experts)), None)
    if not isinstance(attention, Attention) or experts is None:
        return None
    document = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"} | write_frame(config)
    mlp = next((half for half in halves if isinstance(half, Mlp)), Mlp(hidden=experts.hidden))
    return (
        document
        | write_attention(config, attention)
        | {name: allowed[0] for name, allowed in QWEN_FIXED.items()}
        | {
            "intermediate_size": mlp.hidden,
            "num_experts": experts.experts,
            "num_experts_per_tok": experts.active,
            "moe_intermediate_size": experts.hidden,
            "norm_topk_prob": experts.normalise,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [block for block, half in enumerate(halves) if isinstance(half, Mlp)],
            "sliding_window": None,
        }
    )


def write_attention(config: Config, attention: Attention) -> dict:
    return {
        "num_hidden_layers": len(config.layers) // 2,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.groups,
        "head_dim": attention.head_width,
        "rms_norm_eps": config.norm_eps,
    } | write_rotary(attention.rotary or Rotary())


def write_rotary(rotary: Rotary) -> dict:
    if rotary == Rotary(theta=rotary.theta):
        return {"rope_theta": rotary.theta, "rope_scaling": None}
    numbers = {theirs: getattr(rotary, ours) for theirs, ours in ROTARY.items()}
    return {"rope_theta": rotary.theta, "rope_scaling": {"rope_type": "llama3"} | numbers}
