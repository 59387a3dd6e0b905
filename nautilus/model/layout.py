"""Which tensors a checkpoint holds, by layout, from the Config alone. Letters as in the modules.

    layout      prefix     experts     written by
    legacy      backbone.  one by one  every Nemotron 3 release, transformers 5 on save, this package
    puzzle      model.     one by one  releases whose layers differ in size
    stacked     model.     stacked     transformers 5 in memory
    llama       model.     -           a block holds self_attn and mlp: two layers here
    qwen3_moe   model.     one by one  likewise, with experts and normed heads

The model keeps the legacy names with experts stacked, so that a layout is a renaming and, at most, a slicing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import Tensor

from nautilus.config import Attention, Config, Experts, Layer, Linear, Mamba, Mlp

Shape = tuple[int, ...]

PREFIX = {"legacy": "backbone", "puzzle": "model", "stacked": "model", "backbone stacked": "backbone"}
STACKED = ("stacked", "backbone stacked")
PAIRED = ("llama", "qwen3_moe")
WRITTEN = {"nemotron_h": "legacy", "nautilus": "legacy", "nemotron_h_puzzle": "puzzle"}  # the others: their own name

STACK = re.compile(r"(.*\.experts)\.((?:up|down|gate)_proj)")
LAYER = re.compile(r"backbone\.layers\.(\d+)\.(norm|mixer)\.(.*)")
OUTSIDE = {"backbone.embeddings.weight": "model.embed_tokens.weight", "backbone.norm_f.weight": "model.norm.weight"}

ALWAYS_FLOAT32 = "e_score_correction_bias"


class Slot(NamedTuple):
    """Where a tensor of a file goes: a parameter of the model, or one expert's place in a stacked one."""

    parameter: str
    shape: Shape
    expert: int | None = None


def parameter_table(config: Config) -> dict[str, Shape]:
    """Every stored parameter and buffer of the model, as it names them."""
    width = config.width
    table: dict[str, Shape] = {"backbone.embeddings.weight": (config.vocab, width)}
    for i, layer in enumerate(config.layers):
        table |= layer_shapes(f"backbone.layers.{i}", layer, width)
    table["backbone.norm_f.weight"] = (width,)
    if not config.tied:
        table["lm_head.weight"] = (config.vocab, width)
    if config.mtp:
        table |= {"mtp.layers.0.enorm.weight": (width,), "mtp.layers.0.hnorm.weight": (width,)}
        table["mtp.layers.0.eh_proj.weight"] = (width, 2 * width)
        for i, layer in enumerate(config.mtp):
            table |= layer_shapes(f"mtp.layers.{i}", layer, width)
        table[f"mtp.layers.{len(config.mtp) - 1}.final_layernorm.weight"] = (width,)
    return table


def layer_shapes(name: str, layer: Layer, width: int) -> dict[str, Shape]:
    mixer = mixer_shapes(layer, width)
    norm: dict[str, Shape] = {f"{name}.norm.weight": (width,)} if mixer else {}
    return norm | {f"{name}.mixer.{part}": shape for part, shape in mixer.items()}


def mixer_shapes(layer: Layer, width: int) -> dict[str, Shape]:
    match layer:
        case Mamba():
            return mamba_shapes(layer, width)
        case Attention():
            q, kv, p = layer.heads * layer.head_width, layer.groups * layer.head_width, layer.head_width
            norms: dict[str, Shape] = {"q_norm.weight": (p,), "k_norm.weight": (p,)} if layer.head_norm else {}
            projections = {"q_proj": (q, width), "k_proj": (kv, width), "v_proj": (kv, width), "o_proj": (width, q)}
            return {f"{part}.weight": shape for part, shape in projections.items()} | norms
        case Experts():
            return experts_shapes(layer, width)
        case Mlp():
            return mlp_shapes("", layer.hidden, width, layer.gated)
        case Linear():
            return {"linear.weight": (width, width)}
    return {}


def mamba_shapes(layer: Mamba, width: int) -> dict[str, Shape]:
    return {
        "in_proj.weight": (layer.inner + layer.conv_width + layer.heads, width),
        "conv1d.weight": (layer.conv_width, 1, layer.taps),
        "conv1d.bias": (layer.conv_width,),
        "A_log": (layer.heads,),
        "D": (layer.heads,),
        "dt_bias": (layer.heads,),
        "norm.weight": (layer.inner,),
        "out_proj.weight": (width, layer.inner),
    }


def experts_shapes(layer: Experts, width: int) -> dict[str, Shape]:
    inner = layer.latent or width
    shapes: dict[str, Shape] = {"gate.weight": (layer.experts, width)}
    if layer.score == "sigmoid":
        shapes["gate.e_score_correction_bias"] = (layer.experts,)
    shapes["experts.up_proj"] = (layer.experts, layer.hidden, inner)
    shapes["experts.down_proj"] = (layer.experts, inner, layer.hidden)
    if layer.gated:
        shapes["experts.gate_proj"] = (layer.experts, layer.hidden, inner)
    if layer.shared:
        shapes |= mlp_shapes("shared_experts.", layer.shared, width, layer.gated)
    if layer.latent:
        shapes |= {"fc1_latent_proj.weight": (layer.latent, width), "fc2_latent_proj.weight": (width, layer.latent)}
    return shapes


def mlp_shapes(prefix: str, hidden: int, width: int, gated: bool) -> dict[str, Shape]:
    shapes = {"up_proj": (hidden, width), "down_proj": (width, hidden)} | (
        {"gate_proj": (hidden, width)} if gated else {}
    )
    return {f"{prefix}{part}.weight": shape for part, shape in shapes.items()}


def name_map(config: Config, layout: str) -> dict[str, Slot]:
    """Every tensor that a checkpoint of that layout may hold, by its name there.

    A tied head is among them: some files repeat the embedding under the head's name.
    """
    slots = {}
    for parameter, shape in parameter_table(config).items():
        for name, slot in stored_as(parameter, shape, layout):
            slots[name] = slot
    if config.tied:
        slots["lm_head.weight"] = Slot("backbone.embeddings.weight", (config.vocab, config.width))
    return slots


def stored_as(parameter: str, shape: Shape, layout: str) -> Iterator[tuple[str, Slot]]:
    name = paired_name(parameter) if layout in PAIRED else parameter.replace("backbone", PREFIX[layout], 1)
    stack = STACK.fullmatch(name)
    if stack is None or layout in STACKED:
        yield name, Slot(parameter, shape)
        return
    for expert in range(shape[0]):
        yield f"{stack[1]}.{expert}.{stack[2]}.weight", Slot(parameter, shape[1:], expert)


def paired_name(parameter: str) -> str:
    """Layer 2i is the attention half of block i, layer 2i + 1 its feed-forward half."""
    found = LAYER.fullmatch(parameter)
    if found is None:
        return OUTSIDE.get(parameter, parameter)
    block, half = divmod(int(found[1]), 2)
    if found[2] == "norm":
        return f"model.layers.{block}.{('input_layernorm', 'post_attention_layernorm')[half]}.{found[3]}"
    return f"model.layers.{block}.{('self_attn', 'mlp')[half]}.{found[3]}"


def layout_of(family: str, names: Iterable[str]) -> str:
    """The layout of a checkpoint of that model_type that holds tensors of these names."""
    if family in PAIRED:
        return family
    names = list(names)
    stacked = any(name.endswith(".experts.up_proj") for name in names)
    if any(name.startswith("model.") for name in names):
        return "stacked" if stacked else "puzzle"
    return "backbone stacked" if stacked else "legacy"


def written_slots(config: Config, layout: str) -> dict[str, Slot]:
    """The tensors that a checkpoint of that layout is written with.

    Readers of llama and qwen3_moe tie the head by themselves; those of nemotron_h do not, so it is written out.
    """
    slots = name_map(config, layout)
    if config.tied and layout in PAIRED:
        del slots["lm_head.weight"]
    return slots


def tensor_table(config: Config, layout: str = "legacy") -> dict[str, Shape]:
    """Name and shape of every tensor of a checkpoint in that layout."""
    return {name: slot.shape for name, slot in written_slots(config, layout).items()}


def place_of(slot: Slot, places: dict[str, Tensor]) -> Tensor:
    whole = places[slot.parameter]
    return whole if slot.expert is None else whole[slot.expert]


def role(name: str, config: Config) -> str:
    """What a parameter is for: `backbone.layers.3.mixer.in_proj.weight` of a Mamba layer is `mamba.in_proj`."""
    parts = name.removesuffix(".weight").split(".")
    if "layers" not in parts:
        return parts[-1]
    at = parts.index("layers")
    place, number, inner = parts[0], int(parts[at + 1]), parts[at + 2 :]
    if inner[0] != "mixer":
        return "mtp.join" if place == "mtp" and inner[0] != "norm" else "norm"
    layer = (config.mtp if place == "mtp" else config.layers)[number]
    kind = type(layer).__name__.lower()
    return ".".join((["mtp"] if place == "mtp" else []) + [kind, *(part for part in inner[1:] if part != kind)])
