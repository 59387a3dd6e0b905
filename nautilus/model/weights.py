"""A model from a checkpoint folder.

Reading is strict: a missing, unexpected or mis-shaped tensor, a NaN, a quantised file are errors that name what they
are about, and no code that came with a checkpoint is ever run.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from nautilus.config import Config, Experts, pattern_of
from nautilus.config.keys import short, token_ids
from nautilus.config.released import read_config
from nautilus.model.language import Language
from nautilus.model.layout import STACKED, Slot, layout_of, name_map, place_of
from nautilus.model.shards import Stored, inventory, read_tensors
from nautilus.presets import PRESETS
from nautilus.runtime import UserError, hub_folder, read_json, repair

READABLE = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16}
SHOWN = 20
MANY = 100_000  # experts that are still listed one by one
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]


def load_model(source: str | Path, *, dtype: torch.dtype | None = None, device="cpu") -> Language:
    """The model in a folder or of a hub id, in any layout of `layout.py`.

    dtype: of parameters and activations; None keeps every tensor as it is stored and computes in the embedding's dtype.
    Besides the weights, memory holds one tensor at a time.
    """
    folder = local_folder(source)
    document = read_json(folder / "config.json")
    refuse_quantised(folder, document)
    config = with_stops(described(document, folder), folder)
    stored = {name: where for name, where in inventory(folder).items() if not derived(name)}
    layout = layout_of(document["model_type"], stored)
    refuse_many_experts(folder, config, layout, len(stored))
    slots = name_map(config, layout)
    refuse_differences(folder, config, slots, stored)
    embedding = next(name for name, slot in slots.items() if slot.parameter == "backbone.embeddings.weight")
    model = Language(config, device=device, dtype=dtype or READABLE[stored[embedding].dtype])
    if dtype is None:
        keep_stored_types(model, slots, stored)
    fill(model, folder, slots, stored)
    return model


def local_folder(source: str | Path) -> Path:
    """The folder itself, or the local copy of a hub repository: configs, tokenizer and safetensors only."""
    if Path(source).parent.is_dir():
        repair(source)  # a save that was killed between its two renames
    if Path(source).is_dir():
        return Path(source)
    if str(source) in PRESETS:
        raise UserError(
            f"{str(source)!r} is a preset: sizes without weights. Train one with nautilus pretrain {source}"
        )
    return hub_folder(str(source), HUB_FILES)


def refuse_quantised(folder: Path, document: dict) -> None:
    declared = document.get("quantization_config") or document.get("quantization")
    if declared or (folder / "hf_quant_config.json").exists():
        where = "config.json" if declared else "hf_quant_config.json"
        raise UserError(
            f"{folder} is quantised, says its {where}; this release reads BF16, FP16 and FP32 weights only; "
            f"load the BF16 checkpoint of the model"
        )


def described(document: dict, folder: Path) -> Config:
    try:
        return read_config(document)
    except ValueError as bad:
        raise UserError(f"{folder / 'config.json'}: {bad}") from bad


def with_stops(config: Config, folder: Path) -> Config:
    """With the stop ids of generation_config.json: chat models list more of them there than in config.json."""
    path = folder / "generation_config.json"
    generation = read_json(path) if path.exists() else {}
    try:
        stops = token_ids(generation) or config.eos
    except ValueError as bad:
        raise UserError(f"{path}: {bad}; correct the file") from bad
    if beyond := [stop for stop in stops if stop >= config.vocab]:
        raise UserError(
            f"{folder}: eos_token_id={short(beyond)} must be token ids in 0..{config.vocab - 1}; correct its"
            f" config.json and generation_config.json"
        )
    # Padding is never seen, so any token will do; old Llama files say -1.
    return dataclasses.replace(config, eos=stops, pad=config.pad if 0 <= config.pad < config.vocab else 0)


def derived(name: str) -> bool:
    """Tables that old Llama files store although they follow from the config."""
    return name.endswith("rotary_emb.inv_freq")


def refuse_many_experts(folder: Path, config: Config, layout: str, tensors: int) -> None:
    """Before the name of every one is listed: far more experts than the files have tensors."""
    experts = sum(layer.experts for layer in (*config.layers, *config.mtp) if isinstance(layer, Experts))
    if layout not in STACKED and experts > max(tensors, MANY):
        raise UserError(
            f"{folder} does not hold the model of its config.json, which has {experts:,} experts: there are"
            f" {tensors:,} tensors in all; use the config.json that belongs to these weights"
        )


def refuse_differences(folder: Path, config: Config, slots: dict[str, Slot], stored: dict[str, Stored]) -> None:
    optional = {"lm_head.weight"} if config.tied else set()
    missing = [name for name in slots if name not in stored and name not in optional]
    unexpected = [name for name in stored if name not in slots]
    shared = [name for name in slots if name in stored]
    shaped = [name for name in shared if stored[name].shape != slots[name].shape]
    typed = [name for name in shared if stored[name].dtype not in READABLE]
    lines = [f"missing: {name} {list(slots[name].shape)}" for name in missing]
    lines += [f"unexpected: {name} {list(stored[name].shape)} in {stored[name].file.name}" for name in unexpected]
    lines += [
        f"shape: {name} is {list(stored[name].shape)}, config.json asks for {list(slots[name].shape)}"
        for name in shaped
    ]
    lines += [f"type: {name} is {stored[name].dtype}; only {', '.join(READABLE)} can be read" for name in typed]
    if lines:
        raise UserError(
            f"{folder} does not hold the model of its config.json (layers {pattern_of(config.layers)}): "
            f"{len(missing)} tensors missing, {len(unexpected)} unexpected, {len(shaped)} of another shape, "
            f"{len(typed)} of another type\n{listed(lines)}\nuse the config.json that belongs to these weights"
        )


def listed(lines: list[str]) -> str:
    rest = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n".join(f"  {line}" for line in lines[:SHOWN] + rest)


def keep_stored_types(model: Language, slots: dict[str, Slot], stored: dict[str, Stored]) -> None:
    """Give each parameter the type that its tensors are stored in: some releases keep the router in float32."""
    widest: dict[str, torch.dtype] = {}
    for name in slots.keys() & stored.keys():
        dtype, parameter = READABLE[stored[name].dtype], slots[name].parameter
        widest[parameter] = torch.promote_types(dtype, widest.get(parameter, dtype))
    for name, parameter in model.named_parameters():
        if parameter.dtype != widest[name]:
            parameter.data = torch.empty_like(parameter, dtype=widest[name])


def fill(model: Language, folder: Path, slots: dict[str, Slot], stored: dict[str, Stored]) -> None:
    """Copy every tensor to its place. NaN or infinite numbers are an error that names the tensors."""
    places = model.state_dict()
    broken, head = [], None
    for name, tensor in read_tensors(stored):
        if not torch.isfinite(tensor).all():
            broken.append(f"{name} in {stored[name].file.name}")
        if name == "lm_head.weight" and model.config.tied:
            head = tensor
        else:
            place_of(slots[name], places).copy_(tensor)
    if broken:
        raise UserError(
            f"{folder} has NaN or infinite numbers in {len(broken)} tensors\n{listed(broken)}\n"
            f"the training run that wrote them diverged, or the copy is damaged; use an earlier or a fresh copy"
        )
    if head is not None and not torch.equal(head.to(model.head_weight), model.head_weight.detach()):
        raise UserError(
            f"{folder} says tie_word_embeddings=true, but its lm_head.weight differs from its embedding; "
            f"set tie_word_embeddings to false in its config.json"
        )
