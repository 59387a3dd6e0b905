"""config.json of the families nemotron_h (equal layers of a kind) and nemotron_h_puzzle (sizes of each layer's own)."""

from __future__ import annotations

from nautilus.config.keys import (
    FRAME,
    HARMLESS,
    canonical,
    group,
    items,
    read_frame,
    real,
    refuse_others,
    refuse_unknown,
    short,
    switch,
    whole,
    write_frame,
)
from nautilus.config.layer import MOST_LAYERS, Attention, Experts, Layer, Mamba, Mlp, require
from nautilus.config.model import Config

WORDS = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}
LETTERS = {word: letter for letter, word in WORDS.items()} | {"linear_attention": "M", "full_attention": "*"}

ALIASES = {
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_expand": "expand",
    "mamba_dt_min": "time_step_min",
    "mamba_dt_max": "time_step_max",
    "mamba_dt_limit": "time_step_limit",
    "mamba_dt_init_floor": "time_step_floor",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_chunk_size": "chunk_size",
    "attention_head_dim": "head_dim",
    "rms_norm_eps": "layer_norm_epsilon",
    "norm_eps": "layer_norm_epsilon",
    "num_local_experts": "n_routed_experts",
    "layer_types": "layers_block_type",
}

# Sizes and switches of a layer, by kind. In heterogeneous models any of them may be a layer's own.
MAMBA = ("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel", "chunk_size")
ATTENTION = ("num_attention_heads", "num_key_value_heads", "head_dim")
EXPERTS = (
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "moe_latent_size",
    "routed_scaling_factor",
    "n_group",
    "topk_group",
    "norm_topk_prob",
)
MLP = ("intermediate_size",)
LAYER_KEYS = frozenset((*MAMBA, *ATTENTION, *EXPERTS, *MLP))

# Any other value would change what is computed, and nothing here computes it.
FIXED = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_bias": (False,),
    "mamba_proj_bias": (False,),
    "use_conv_bias": (True,),
    "mamba_hidden_act": ("silu",),
    "mlp_hidden_act": ("relu2",),
    "hidden_act": ("relu2",),
    "residual_in_fp32": (False,),
    "attention_dropout": (0,),
    "hidden_dropout": (0,),
    "n_shared_experts": (1,),
    "sliding_window": (),
    "rope_scaling": (),
}

# Initialisation and scheduling hints, and keys of other families that files carry along: `expand` never sets a width,
# there is no rotary embedding for the rotary keys to steer, and depth is the length of the layer list.
IGNORED = frozenset(
    """
    time_step_min time_step_max time_step_floor time_step_rank expand rescale_prenorm_residual mamba_ssm_cache_dtype
    moe_shared_expert_overlap output_router_logits num_hidden_layers rope_theta partial_rotary_factor
    """.split()
)

STRUCTURE = frozenset(
    """
    layers_block_type hybrid_override_pattern num_nextn_predict_layers mtp_layers_block_type
    mtp_hybrid_override_pattern layer_norm_epsilon time_step_limit block_configs mtp_block_configs per_layer_config
    """.split()
)
KNOWN = HARMLESS | FRAME | LAYER_KEYS | set(FIXED) | IGNORED | STRUCTURE | set(ALIASES)


def read_nemotron_h(document: dict) -> Config:
    settings = canonical(document, ALIASES)
    refuse_unknown(settings, KNOWN)
    refuse_others(settings, FIXED)
    refuse_clamp(settings)
    blocks = items(settings, "block_configs", dict)
    letters = pattern(settings, "layers_block_type", "hybrid_override_pattern", blocks)
    own = own_sizes(blocks or per_layer_blocks(settings, len(letters)), letters)
    return Config(
        layers=tuple(read_layer(letter, settings | sizes) for letter, sizes in zip(letters, own, strict=True)),
        mtp=read_mtp(settings),
        norm_eps=real(settings, "layer_norm_epsilon", 1e-5),
        **read_frame(settings),
    )


def refuse_clamp(settings: dict) -> None:
    """Steps dt are not clamped here; a file may say so as Infinity or as a huge number."""
    limit = items(settings, "time_step_limit", (int, float))
    require(
        not limit or (len(limit) == 2 and limit[0] == 0 and limit[1] >= 1e30),
        f"config.json has time_step_limit={limit!r}; only [0, Infinity] can be computed here; use another package",
    )


def pattern(settings: dict, list_key: str, string_key: str, blocks: list[dict]) -> str:
    """The layer letters, from the blocks, the list of words, or the string, whichever is there first."""
    words = [block.get("block_type") for block in blocks] or items(settings, list_key, str)
    if not words:
        words = list(str(settings.get(string_key) or ""))
    spelling = LETTERS | {letter: letter for letter in WORDS}
    require(len(words) > 0, f"config.json has neither {list_key!r} nor {string_key!r}; one must list the layers")
    require(len(words) <= MOST_LAYERS, f"config.json has {len(words):,} layers; at most {MOST_LAYERS:,} can be read")
    for position, word in enumerate(words):
        require(
            isinstance(word, str) and word in spelling,
            f"config.json has {short(word)} as layer {position} of {list_key}; known are {', '.join(sorted(spelling))}",
        )
    return "".join(spelling[str(word)] for word in words)


def read_mtp(settings: dict) -> tuple[Layer, ...]:
    copies = whole(settings, "num_nextn_predict_layers", 0)
    require(
        copies in (0, 1),
        f"config.json has num_nextn_predict_layers={copies}; the released models hold one block that is applied "
        f"several times; 0 or 1 can be read",
    )
    if copies == 0:
        return ()
    blocks = items(settings, "mtp_block_configs", dict)
    keys = ("mtp_layers_block_type", "mtp_hybrid_override_pattern")
    told = any(settings.get(key) for key in keys)
    # "*E" is what transformers fills in.
    letters = pattern(settings if told else settings | {keys[1]: "*E"}, *keys, blocks)
    own = own_sizes(blocks or [{}] * len(letters), letters)
    return tuple(read_layer(letter, settings | sizes) for letter, sizes in zip(letters, own, strict=True))


def own_sizes(blocks: list[dict], letters: str) -> list[dict]:
    """The sizes that each layer has of its own, by the first spelling of their keys."""
    own = [canonical(block, ALIASES) for block in blocks]
    for layer, sizes in enumerate(own):
        foreign = sorted(set(sizes) - LAYER_KEYS - {"block_type"})
        require(
            not foreign,
            f"config.json gives layer {layer} ({WORDS[letters[layer]]}) its own {', '.join(foreign)}; a layer's own "
            f"may be: {', '.join(sorted(LAYER_KEYS))}",
        )
    return own


def per_layer_blocks(settings: dict, depth: int) -> list[dict]:
    """Transformers' own spelling of unequal layers, {"3": {"moe_intermediate_size": 96}}, as one block per layer."""
    table = group(settings, "per_layer_config")
    layers = {name: int(name) if name.isdecimal() else -1 for name in table}
    beyond = sorted(name for name, layer in layers.items() if not 0 <= layer < depth)
    require(
        not beyond, f"config.json has per_layer_config for layers {', '.join(beyond)}; it has layers 0..{depth - 1}"
    )
    own = {layers[name]: group(table, name) for name in table}
    return [own.get(layer, {}) for layer in range(depth)]


def read_layer(letter: str, settings: dict) -> Layer:
    match letter:
        case "M":
            return Mamba(
                heads=whole(settings, "mamba_num_heads"),
                head_width=whole(settings, "mamba_head_dim"),
                state=whole(settings, "ssm_state_size"),
                groups=whole(settings, "n_groups"),
                taps=whole(settings, "conv_kernel", 4),
                chunk=whole(settings, "chunk_size", 128),
            )
        case "*":
            heads = whole(settings, "num_attention_heads")
            groups = whole(settings, "num_key_value_heads", heads)
            return Attention(heads=heads, groups=groups, head_width=whole(settings, "head_dim", 128))
        case "-":
            return Mlp(hidden=whole(settings, "intermediate_size"))
    return read_experts(settings)


def read_experts(settings: dict) -> Experts:
    return Experts(
        experts=whole(settings, "n_routed_experts"),
        active=whole(settings, "num_experts_per_tok"),
        hidden=whole(settings, "moe_intermediate_size"),
        shared=whole(settings, "moe_shared_expert_intermediate_size"),
        latent=whole(settings, "moe_latent_size", 0),
        scale=real(settings, "routed_scaling_factor", 1.0),
        normalise=switch(settings, "norm_topk_prob", True),
        expert_groups=whole(settings, "n_group", 1),
        active_groups=whole(settings, "topk_group", 1),
    )


def write_layer(layer: Layer) -> dict:
    """The inverse of `read_layer`, as far as the family has words for the layer."""
    match layer:
        case Mamba():
            values = (layer.heads, layer.head_width, layer.state, layer.groups, layer.taps, layer.chunk)
            return dict(zip(MAMBA, values, strict=True))
        case Attention():
            return dict(zip(ATTENTION, (layer.heads, layer.groups, layer.head_width), strict=True))
        case Experts():
            sizes = (layer.experts, layer.active, layer.hidden, layer.shared, layer.latent or None)
            routing = (layer.scale, layer.expert_groups, layer.active_groups, layer.normalise)
            return dict(zip(EXPERTS, (*sizes, *routing), strict=True))
        case Mlp():
            return {"intermediate_size": layer.hidden}
    return {}


def write_nemotron_h(config: Config) -> dict | None:
    """One set of sizes for each kind; None when a layer has no word in the family."""
    letters, mtp = config.pattern, "".join(layer.letter for layer in config.mtp)
    shared = all(layer.shared for layer in (*config.layers, *config.mtp) if isinstance(layer, Experts))
    if set(letters) - set(WORDS) or not shared:  # readers of the family always build the shared expert
        return None
    document = {"architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h"} | write_frame(config)
    document |= {name: allowed[0] for name, allowed in FIXED.items() if allowed and name != "hidden_act"}
    for layer in reversed((*config.layers, *config.mtp)):
        document |= write_layer(layer)
    document |= {"mtp_hybrid_override_pattern": mtp} if mtp else {}
    return document | {
        "layer_norm_epsilon": config.norm_eps,
        "hybrid_override_pattern": letters,
        "num_hidden_layers": len(letters),
        "num_nextn_predict_layers": 1 if mtp else 0,
        "time_step_min": 1e-30,  # elsewhere an initialisation hint, but transformers 5.23 clamps dt to it
        "time_step_max": 0.1,
        "time_step_floor": 1e-4,
        "time_step_limit": [0.0, 1e308],  # a plain number, because Infinity is no valid JSON
    }


def write_puzzle(config: Config) -> dict | None:
    """Blocks with sizes of their own; what all layers of a kind share stays at the top."""
    document = write_nemotron_h(config)
    if document is None:
        return None
    common = common_sizes((*config.layers, *config.mtp))
    document = {name: value for name, value in document.items() if name not in LAYER_KEYS} | common
    document |= {"architectures": ["NemotronHPuzzleForCausalLM"], "model_type": "nemotron_h_puzzle"}
    document["layers_block_type"] = [WORDS[letter] for letter in document.pop("hybrid_override_pattern")]
    document["block_configs"] = [write_block(layer, common) for layer in config.layers]
    if document.pop("mtp_hybrid_override_pattern", ""):
        document["mtp_layers_block_type"] = [WORDS[layer.letter] for layer in config.mtp]
        document["mtp_block_configs"] = [write_block(layer, common) for layer in config.mtp]
    return document


def common_sizes(layers: tuple[Layer, ...]) -> dict:
    written = [write_layer(layer) for layer in layers]
    # Serving engines want these two in every block of experts.
    shared = sorted(LAYER_KEYS - {"moe_intermediate_size", "num_experts_per_tok"})
    values = {name: [sizes[name] for sizes in written if name in sizes] for name in shared}
    return {name: seen[0] for name, seen in values.items() if seen and all(value == seen[0] for value in seen)}


def write_block(layer: Layer, common: dict) -> dict:
    return {"block_type": WORDS[layer.letter]} | {
        name: value for name, value in write_layer(layer).items() if name not in common
    }
