"""config.json of released models to Config and back, and our own form for models that no released family can hold."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from typing import NamedTuple

from nautilus.config.keys import plain, short
from nautilus.config.layer import require
from nautilus.config.llama import read_llama, read_qwen3_moe, write_llama, write_qwen3_moe
from nautilus.config.model import Config, from_dict, to_dict
from nautilus.config.nemotron_h import read_nemotron_h, write_nemotron_h, write_puzzle

OWN = "nautilus"


class Family(NamedTuple):
    read: Callable[[dict], Config]
    write: Callable[[Config], dict | None]  # None, or a document that may say something else than the config


def read_own(document: dict) -> Config:
    require(isinstance(document.get(OWN), dict), f"config.json has model_type={OWN!r} but no settings under {OWN!r}")
    return from_dict(document[OWN])


def write_own(config: Config) -> dict:
    return {"architectures": ["NautilusLanguage"], "model_type": OWN, OWN: to_dict(config)}


# In the order in which `write_config` asks them.
FAMILIES: dict[str, Family] = {
    "nemotron_h": Family(read_nemotron_h, write_nemotron_h),
    "nemotron_h_puzzle": Family(read_nemotron_h, write_puzzle),
    "llama": Family(read_llama, write_llama),
    "qwen3_moe": Family(read_qwen3_moe, write_qwen3_moe),
    OWN: Family(read_own, write_own),
}


def read_config(document: dict) -> Config:
    """The Config of a config.json. ValueError for an unknown family, a key that is unknown, missing or of the wrong
    type, and for a value that asks for a computation that does not exist here."""
    require(isinstance(document, dict), f"config.json holds {type(document).__name__}, not an object of settings")
    kind = str(document.get("model_type"))
    near = difflib.get_close_matches(kind, FAMILIES, n=1)
    hint = f"; did you mean {near[0]!r}?" if near and kind not in FAMILIES else ""
    require(kind in FAMILIES, f"config.json has model_type={short(kind)}; {', '.join(FAMILIES)} can be read{hint}")
    try:
        return FAMILIES[kind].read(plain(document))
    except (TypeError, LookupError, AttributeError, ArithmeticError, MemoryError, RecursionError) as bad:
        raise ValueError(f"config.json does not describe a model ({type(bad).__name__}: {bad}); copy it again") from bad


def write_config(config: Config) -> dict:
    """The config.json of the first released family that can hold the model, otherwise our own form.

    A family can hold a model when reading back what it wrote gives the same model: the one test that cannot forget a
    setting. A model with Linear layers, for instance, has no word in any of them.
    """
    for family in FAMILIES.values():
        document = family.write(config)
        if document is not None and same(family.read(plain(document)), config):
            return document
    raise AssertionError("our own form holds every config")


def same(one: Config, other: Config) -> bool:
    """Equal, with init_std = 0 counted as the value that it stands for."""
    return dataclasses.replace(one, init_std=one.std) == dataclasses.replace(other, init_std=other.std)
