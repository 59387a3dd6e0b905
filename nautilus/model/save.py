"""A checkpoint folder from a model. The folder is replaced as a whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from nautilus.config import Config
from nautilus.config.released import write_config
from nautilus.model.card import model_card
from nautilus.model.held import Held, Model, Place, formats_of, held_by, quantisation_of, scales_of_cache
from nautilus.model.layout import ALWAYS_FLOAT32, WRITTEN, Slot, place_of, written_slots
from nautilus.model.quantised import OWN_FILE, describe
from nautilus.model.shards import write_shards
from nautilus.ops.formats import Packed, dense, to_modelopt
from nautilus.runtime import UserError, atomic_folder

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def save_model(
    model: Model,
    folder: str | Path,
    *,
    precision: str | None = None,
    tokenizer=None,
    facts: dict[str, str] | None = None,
    shard_bytes: float = 5e9,
) -> None:
    """Write a Hugging Face folder in the layout of the model's family; replace `folder` as a whole, or leave it.

    precision: bf16, fp32 or fp16; None writes the parameters as they are, and matrices in few bits as ModelOpt does,
    with hf_quant_config.json beside them. The load-balancing bias stays float32.
    tokenizer: anything with save(folder). facts: rows of the model card about the training. Besides the model, memory
    holds at most the converted copies of one file of `shard_bytes`.
    """
    document = write_config(model.config)
    family = str(document["model_type"])
    slots = written_slots(model.config, WRITTEN.get(family, family))
    held, places = held_by(model), model.state_dict()
    main = chosen_type(precision, places.get("backbone.embeddings.weight", places["backbone.norm_f.weight"]).dtype)
    formats = [] if precision else formats_of(held)
    stored = stored_as_they_are(model, slots, held) if formats else {}
    tensor, sizes = exporter(model, slots, held, stored, main if precision else None)
    told = {"precision": ", ".join([*formats, short_name(main)]), "bytes": f"{sum(sizes.values()):,}"}
    card = model_card(model.config, family=family, facts=told | (facts or {}), quantised=bool(formats))
    documents = {
        "config.json": document | {"dtype": str(main).removeprefix("torch.")},
        "generation_config.json": generation_settings(model.config),
    } | ({OWN_FILE: describe(quantisation_of(model, slots, held))} if formats else {})
    with atomic_folder(folder) as fresh:
        for name, content in documents.items():
            write_json(fresh / name, content)
        write_shards(fresh, sizes, tensor, shard_bytes=shard_bytes)
        (fresh / "README.md").write_text(card)
        if tokenizer is not None:
            tokenizer.save(fresh)


def stored_as_they_are(model: Model, slots: dict[str, Slot], held: dict[Place, Held]) -> dict[str, Tensor]:
    """The tensors of matrices in few bits, and the scales of the cache, under ModelOpt's names."""
    stored = {}
    for name, slot in slots.items():
        one = held.get((slot.parameter, slot.expert))
        if one is not None and isinstance(one.matrix, Packed):
            module = name.removesuffix(".weight")
            try:
                parts = to_modelopt(one.matrix)
            except ValueError as bad:
                raise UserError(f"{module} cannot be written: {bad}; or give a precision, which decodes it") from bad
            parts |= {} if one.input_scale is None else {"input_scale": one.input_scale}
            stored |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
    return stored | scales_of_cache(model, slots)


def exporter(
    model: Model, slots: dict[str, Slot], held: dict[Place, Held], stored: dict[str, Tensor], dtype: torch.dtype | None
) -> tuple[Callable[[str], Tensor], dict[str, int]]:
    """A function that makes the tensor of a name, ready to be written, and the bytes of each; dtype None: as held."""
    numbers, types = numbers_of(model, slots, held, stored, dtype)

    def tensor(name: str) -> Tensor:
        ready = stored[name].cpu() if name in stored else dense(numbers[name], types[name]).cpu()
        if name in numbers and not ready.isfinite().all():
            raise UserError(
                f"{name} holds NaN or infinite numbers as {types[name]}; the model was not saved and what the folder"
                f" holds is untouched; save an earlier state, or in a wider precision"
            )
        # The file format has no two names for one memory.
        return ready.clone() if name.startswith("lm_head.") and model.config.tied else ready.contiguous()

    sizes = {name: torch.Size(t.shape).numel() * types[name].itemsize for name, t in numbers.items()}
    return tensor, sizes | {name: t.nbytes for name, t in stored.items()}


def numbers_of(
    model: Model, slots: dict[str, Slot], held: dict[Place, Held], stored: dict[str, Tensor], dtype: torch.dtype | None
) -> tuple[dict[str, Tensor | Packed], dict[str, torch.dtype]]:
    """What is written as numbers, and in which type: all but what is stored as it is."""
    places, numbers, types = model.state_dict(), {}, {}
    for name, slot in slots.items():
        if name in stored:
            continue
        one = held.get((slot.parameter, slot.expert))
        numbers[name] = place_of(slot, places) if one is None else one.matrix
        own = dtype if dtype is not None else numbers[name].dtype
        types[name] = torch.float32 if name.endswith(ALWAYS_FLOAT32) else own
    return numbers, types


def chosen_type(precision: str | None, held: torch.dtype) -> torch.dtype:
    if precision is not None and precision not in PRECISIONS:
        raise UserError(f"precision={precision!r} cannot be written; {', '.join(PRECISIONS)} can")
    main = held if precision is None else PRECISIONS[precision]
    if main not in PRECISIONS.values():
        raise UserError(f"the model is in {held}, which no checkpoint holds; give precision={' or '.join(PRECISIONS)}")
    return main


def short_name(dtype: torch.dtype) -> str:
    return next(name for name, kind in PRECISIONS.items() if kind == dtype)


def generation_settings(config: Config) -> dict:
    return {"bos_token_id": config.bos, "eos_token_id": list(config.eos) or None, "pad_token_id": config.pad}


def write_json(path: Path, document: dict) -> None:
    path.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n")
