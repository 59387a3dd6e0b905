"""A model from a checkpoint folder.

Reading is strict: a missing, unexpected or mis-shaped tensor, a NaN, a quantised matrix that is not what the folder
says are errors that name what they are about, and no code that came with a checkpoint is ever run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from nautilus.config import Config, Experts, pattern_of
from nautilus.config.keys import short, token_ids
from nautilus.config.released import read_config
from nautilus.model.held import REPEATED, Held, Place, put, put_scale
from nautilus.model.language import Language
from nautilus.model.layout import STACKED, Slot, layout_of, name_map, parameter_table
from nautilus.model.packed import Contents, clashes, faults, mixer_of, read_modules, record, sort_tensors
from nautilus.model.quantised import INSTEAD, declarations
from nautilus.model.shards import Stored, inventory, read_tensors
from nautilus.ops.formats import Packed, dense
from nautilus.presets import PRESETS
from nautilus.runtime import UserError, hub_folder, read_json, repair

READABLE = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16}
SHOWN = 20
MANY = 100_000  # experts that are still listed one by one
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]


def load_model(source: str | Path, *, dtype: torch.dtype | None = None, device="cpu") -> Language:
    """The model in a folder or of a hub id, in any layout of `layout.py`.

    dtype: of parameters and activations; None keeps every tensor as it is stored and computes in the embedding's dtype.
    Matrices in few bits stay in them either way. On the CPU, tensors that keep their type and are not stacked are the
    files' own memory, copied where they are written to: such a file may be replaced, but not changed in place, while
    the model is in use.
    """
    refuse_place(source, dtype, device)
    folder = local_folder(source)
    found = check_folder(folder)
    held, schemes, wrong = read_modules(found, device)
    refuse_faults(folder, "has quantised matrices that cannot be read", wrong)
    model = Language(found.config, device="meta", dtype=dtype or main_type(found))
    if dtype is None:
        keep_stored_types(model, found.plain_slots, found.plain)
    fill(model, found, held, device)
    model.quantised = record(found, schemes)
    return model


def refuse_place(source: str | Path, dtype: torch.dtype | None, device) -> None:
    """UserError, before anything is read, for a type that models do not have or a device that is not here."""
    if dtype not in (None, *READABLE.values(), torch.float64):
        raise UserError(
            f"{source} was asked for with dtype={dtype!r}; give None (as stored), torch.bfloat16, torch.float16,"
            f" torch.float32 or torch.float64"
        )
    try:
        place = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as bad:  # what torch raises differs from device to device
        raise UserError(f"{source} was asked for with device={device!r}, which cannot be used here ({bad})") from bad
    if place.type == "meta":
        raise UserError(f"{source} was asked for with device={device!r}, which holds no weights; give cpu or cuda")


def check_folder(folder: Path) -> Contents:
    """What the folder holds, once that is what its config says, by name and shape; no weight is read."""
    cure = "give a run or a checkpoint folder, or copy or download it again"
    found = contents(folder, read_json(folder / "config.json", cure))
    refuse_faults(folder, "has quantised matrices that cannot be read", faults(found))
    refuse_differences(folder, found.config, found.plain_slots, found.plain)
    refuse_faults(folder, "does not hold what it says", clashes(found))
    return found


def stored_weights(folder: Path, config: Config) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a folder that is to be trained, as it is stored, by the model's name for it: one at a time, those
    of a layer's experts as one. UserError as in `load_model`, for few bits, and for a folder of another config."""
    found = check_trainable(folder)
    there, here = parameter_table(found.config), parameter_table(config)
    if differing := [name for name in here.keys() | there.keys() if here.get(name) != there.get(name)]:
        raise UserError(
            f"{folder} holds another model: it differs in {len(differing)} tensors, such as {min(differing)}; leave "
            f"model settings as they are there"
        )
    names: dict[str, list[str]] = {}
    for name in found.plain:
        names.setdefault(found.slots[name].parameter, []).append(name)
    for parameter, own in names.items():
        tensors = dict(read_tensors({name: found.plain[name] for name in own}))
        where = (f"{name} in {found.plain[name].file.name}" for name, t in tensors.items() if not finite(t))
        refuse_broken(folder, list(where))
        ordered = sorted(own, key=lambda name: (found.slots[name].expert or 0, name == "lm_head.weight"))
        first = tensors[ordered[0]]
        if found.slots[ordered[0]].expert is None:
            refuse_another_head(folder, first, tensors[ordered[-1]])
            yield parameter, first
        else:
            yield parameter, torch.stack([tensors[name] for name in ordered])


def check_trainable(folder: Path) -> Contents:
    """`check_folder`, for weights that are to be trained."""
    found = check_folder(folder)
    if found.modules:
        kinds = sorted({format for _, format, _ in found.formats()} - READABLE.keys())
        code = (
            f"import nautilus; model, tokenizer = nautilus.load('{folder}'); "
            f"model.save('{folder}-bf16', precision='bf16', tokenizer=tokenizer)"
        )
        raise UserError(
            f"{folder} has {len(found.modules):,} matrices in {' and '.join(kinds)}, which cannot be trained; take the "
            f'BF16 release of the model, or the numbers that its codes stand for: python -c "{code}"'
        )
    return found


def contents(folder: Path, document: dict) -> Contents:
    """What the folder's files hold, from their headers, and what its configs say. document: its config.json."""
    declared = declarations(folder, document)
    config = with_stops(described(document, folder), folder)
    stored = {name: where for name, where in inventory(folder).items() if not derived(name)}
    layout = layout_of(document["model_type"], stored)
    refuse_many_experts(folder, config, layout, len(stored))
    return sort_tensors(folder, config, name_map(config, layout), declared, stored)


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


def refuse_faults(folder: Path, what: str, lines: Iterable[str]) -> None:
    if found := list(lines):
        raise UserError(f"{folder} {what}: {len(found)} of them\n{listed(found)}\n{INSTEAD}, or copy it again")


def main_type(found: Contents) -> torch.dtype:
    """What to compute in: the embedding's type, or where that is in few bits the final norm's."""
    names = {found.slots[name].parameter: name for name in found.plain}
    name = names.get("backbone.embeddings.weight", names["backbone.norm_f.weight"])
    return READABLE[found.plain[name].dtype]


def keep_stored_types(model: Language, slots: dict[str, Slot], stored: dict[str, Stored]) -> None:
    """Give each parameter the type that its tensors are stored in: some releases keep the router in float32."""
    widest: dict[str, torch.dtype] = {}
    for name in slots.keys() & stored.keys():
        dtype, parameter = READABLE[stored[name].dtype], slots[name].parameter
        widest[parameter] = torch.promote_types(dtype, widest.get(parameter, dtype))
    for name, parameter in model.named_parameters():
        if parameter.dtype != widest.get(name, parameter.dtype):
            parameter.data = torch.empty(parameter.shape, dtype=widest[name], device=parameter.device)


def fill(model: Language, found: Contents, held: dict[Place, Held], device) -> None:
    """Give every place its tensor. NaN or infinite numbers are an error that names the tensors."""
    places, mixed = model.state_dict(), {parameter for parameter, expert in held if expert is not None}
    ready: dict[str, Tensor] = {}
    broken, head = [], held.pop(REPEATED).matrix if found.config.tied and REPEATED in held else None
    for name, tensor in read_tensors(found.plain):
        slot, like = found.slots[name], places[found.slots[name].parameter]
        if not finite(tensor):
            broken.append(f"{name} in {found.plain[name].file.name}")
        if name == "lm_head.weight" and model.config.tied:
            head = tensor
        elif slot.expert is None:
            ready[slot.parameter] = tensor.to(device, like.dtype)
        elif slot.parameter in mixed:
            held[slot.parameter, slot.expert] = Held(tensor.to(device, like.dtype))
        else:
            if slot.parameter not in ready:
                ready[slot.parameter] = torch.empty(like.shape, dtype=like.dtype, device=device)
            ready[slot.parameter][slot.expert].copy_(tensor)
    refuse_broken(found.folder, broken)
    put(model, held)
    model.load_state_dict(ready, assign=True)
    for mixer in model.experts_mixers().values():
        mixer.load_E = torch.zeros(mixer.load_E.shape, device=device)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    refuse_another_head(found.folder, model.head_weight, head)
    put_cache_scales(model, found)


def put_cache_scales(model: Language, found: Contents) -> None:
    for name, tensor in read_tensors(found.kv_scales):
        try:
            put_scale(model, mixer_of(name, found.slots) or "", name.rpartition(".")[2], tensor.float().item())
        except ValueError as bad:
            raise UserError(f"{name} in {found.kv_scales[name].file}: {bad}") from bad


def finite(tensor: Tensor) -> bool:
    """In one pass at the speed of memory: the smallest and the largest number tell of NaN too."""
    return tensor.numel() == 0 or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def refuse_broken(folder: Path, broken: list[str]) -> None:
    if broken:
        raise UserError(
            f"{folder} has NaN or infinite numbers in {len(broken)} tensors\n{listed(broken)}\n"
            f"the training run that wrote them diverged, or the copy is damaged; use an earlier or a fresh copy"
        )


def refuse_another_head(folder: Path, own: Tensor | Packed, head: Tensor | Packed | None) -> None:
    if head is None or head is own:
        return
    dtype = torch.float32 if isinstance(own, Packed) or isinstance(head, Packed) else own.dtype
    if not torch.equal(dense(head, dtype).to(own.device), dense(own, dtype).detach()):
        raise UserError(
            f"{folder} says tie_word_embeddings=true, but its lm_head.weight differs from its embedding; "
            f"set tie_word_embeddings to false in its config.json"
        )
