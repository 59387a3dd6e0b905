"""A checkpoint folder from a model. The folder is replaced as a whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from nautilus.config import Config
from nautilus.config.released import write_config
from nautilus.model.card import model_card
from nautilus.model.layout import ALWAYS_FLOAT32, WRITTEN, Slot, place_of, written_slots
from nautilus.model.shards import write_shards
from nautilus.runtime import UserError, atomic_folder

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


class Model(Protocol):
    """What a folder is made from: a Language, which this file does not import because that one imports it."""

    config: Config

    def state_dict(self) -> dict[str, Any]: ...


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

    precision: bf16, fp32 or fp16; None writes the parameters as they are. The load-balancing bias stays float32.
    tokenizer: anything with save(folder). facts: rows of the model card about the training. Besides the model, memory
    holds at most the converted copies of one file of `shard_bytes`.
    """
    document = write_config(model.config)
    family = str(document["model_type"])
    slots = written_slots(model.config, WRITTEN.get(family, family))
    main = chosen_type(precision, model.state_dict()["backbone.embeddings.weight"].dtype)
    tensor, sizes = exporter(model, slots, main if precision else None)
    facts = {"precision": short_name(main), "bytes": f"{sum(sizes.values()):,}"} | (facts or {})
    with atomic_folder(folder) as fresh:
        write_json(fresh / "config.json", document | {"dtype": str(main).removeprefix("torch.")})
        write_json(fresh / "generation_config.json", generation_settings(model.config))
        write_shards(fresh, sizes, tensor, shard_bytes=shard_bytes)
        (fresh / "README.md").write_text(model_card(model.config, family=family, facts=facts))
        if tokenizer is not None:
            tokenizer.save(fresh)


def exporter(
    model: Model, slots: dict[str, Slot], dtype: torch.dtype | None
) -> tuple[Callable[[str], Tensor], dict[str, int]]:
    """A function that makes the tensor of a name, ready to be written, and the bytes of each; dtype None: as held."""
    places = model.state_dict()
    held = {name: place_of(slot, places) for name, slot in slots.items()}
    types = {name: torch.float32 if name.endswith(ALWAYS_FLOAT32) else dtype or t.dtype for name, t in held.items()}

    def tensor(name: str) -> Tensor:
        ready = held[name].to("cpu", types[name]).contiguous()
        if not ready.isfinite().all():
            raise UserError(
                f"{name} holds NaN or infinite numbers as {types[name]}; the model was not saved and what the folder"
                f" holds is untouched; save an earlier state, or in a wider precision"
            )
        # The file format has no two names for one memory.
        return ready.clone() if name == "lm_head.weight" and model.config.tied else ready

    return tensor, {name: t.numel() * types[name].itemsize for name, t in held.items()}


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
