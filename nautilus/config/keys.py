"""The keys of a released config.json: other spellings, types, keys that may have one value only, unknown keys.

A key is read, or fixed (it may have the one value that the model implements), or harmless (it changes nothing that is
computed here); any other key is refused, because it may change what the model computes.
"""

from __future__ import annotations

import difflib
import reprlib
from typing import Any

from nautilus.config.layer import MOST_LAYERS, require

# Bookkeeping of transformers' own config class, versions 4 and 5: how to run, label or export, never what to compute.
HARMLESS = frozenset(
    """
    model_type architectures auto_map transformers_version _name_or_path _attn_implementation
    _attn_implementation_autoset dtype torch_dtype use_cache output_attentions output_hidden_states return_dict
    torchscript use_bfloat16 tf_legacy_loss chunk_size_feed_forward is_encoder_decoder is_decoder
    add_cross_attention cross_attention_hidden_size tie_encoder_decoder finetuning_task id2label label2id problem_type
    task_specific_params tokenizer_class prefix pruned_heads sep_token_id decoder_start_token_id
    quantization_config quantization use_mamba_kernels num_logits_to_keep
    """.split()
)

FRAME = frozenset(
    """
    vocab_size hidden_size tie_word_embeddings initializer_range max_position_embeddings
    bos_token_id eos_token_id pad_token_id
    """.split()
)


WORDS = reprlib.Repr()
WORDS.maxstring = WORDS.maxother = 80
short = WORDS.repr  # a value in a message, which a file may have made a megabyte long

NAMES = {str: "words", dict: "objects", int: "whole numbers", (int, float): "numbers"}


def plain(value) -> Any:
    """The document with transformers' {"__float__": "Infinity"} turned back into floats."""
    if isinstance(value, dict):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


def canonical(document: dict, aliases: dict[str, str]) -> dict:
    """The document under the first spelling of every key. Two spellings with two values are a ValueError."""
    settings = {name: value for name, value in document.items() if name not in aliases}
    for name in sorted(set(document) & set(aliases)):
        first, value = aliases[name], document[name]
        clash = settings.get(first) is not None and value is not None and settings[first] != value
        both = f"{first}={short(settings.get(first))} and {name}={short(value)}"
        require(not clash, f"config.json has {both}; the two mean one setting")
        if settings.get(first) is None:
            settings[first] = value
    return settings


def refuse_unknown(settings: dict, known: frozenset[str]) -> None:
    for name in sorted(set(settings) - known):
        near = difflib.get_close_matches(name, sorted(known), n=1)
        hint = f"did you mean {near[0]!r}?" if near else "remove it if it changes nothing that the model computes"
        raise ValueError(
            f"config.json of type {settings.get('model_type')!r} has the unknown key {short(name)} (value "
            f"{short(settings[name])}), which may change what the model computes; {hint}"
        )


def refuse_others(settings: dict, fixed: dict[str, tuple]) -> None:
    """A ValueError for a key of `fixed` with another value than those listed; absent and null keys pass."""
    for name, allowed in fixed.items():
        value = settings.get(name)
        require(
            value is None or value in allowed,
            f"config.json of type {settings.get('model_type')!r} has {name}={short(value)}; only "
            f"{' or '.join(repr(item) for item in allowed) or 'null'} can be computed here; use another package for it",
        )


def whole(settings: dict, name: str, default: int | None = None) -> int:
    """A whole number; null counts as absent; without a default the key must be there."""
    value = present(settings, name, default)
    fits = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 62
    require(fits, f"config.json has {name}={short(value)}; a whole number (below 2**62) is needed")
    return value


def real(settings: dict, name: str, default: float | None = None) -> float:
    value = present(settings, name, default)
    # Comparing takes whole numbers of any size, which float() does not.
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e308
    require(fits, f"config.json has {name}={short(value)}; a finite number is needed")
    return float(value)


def switch(settings: dict, name: str, default: bool) -> bool:
    value = present(settings, name, default)
    require(isinstance(value, bool), f"config.json has {name}={short(value)}; true or false is needed")
    return value


def items(settings: dict, name: str, kind: type | tuple[type, ...]) -> list:
    """A list of values of that type; empty when absent."""
    value = settings.get(name) or []
    fits = isinstance(value, list) and all(isinstance(item, kind) for item in value)
    require(fits, f"config.json has {name}={short(value)}; a list of {NAMES[kind]} is needed")
    return value


def group(settings: dict, name: str) -> dict:
    """An object of settings; empty when absent."""
    value = settings.get(name) or {}
    require(isinstance(value, dict), f"config.json has {name}={short(value)}; an object of settings is needed")
    return value


def depth(settings: dict) -> int:
    """num_hidden_layers, small enough to make a list of."""
    value = whole(settings, "num_hidden_layers")
    require(value <= MOST_LAYERS, f"config.json has num_hidden_layers={value:,}; at most {MOST_LAYERS:,} can be read")
    return value


def token_ids(settings: dict) -> tuple[int, ...]:
    """The tokens that end a text: eos_token_id may be one id, a list of them, or null."""
    value = settings.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    fits = all(type(id) is int and 0 <= id < 1 << 62 for id in ids)  # true is no id
    require(fits, f"eos_token_id={short(value)} must be token ids: whole numbers from 0")
    return tuple(ids)


def present(settings: dict, name: str, default) -> Any:
    value = settings.get(name)
    value = default if value is None else value
    require(
        value is not None,
        f"config.json of type {settings.get('model_type')!r} has no {name!r}, which its layers need; add it",
    )
    return value


def read_frame(settings: dict) -> dict:
    """What every family has around its layers, as arguments for Config."""
    width, std = whole(settings, "hidden_size"), real(settings, "initializer_range", 0.0)
    return {
        "vocab": whole(settings, "vocab_size"),
        "width": width,
        "tied": switch(settings, "tie_word_embeddings", False),
        "init_std": 0.0 if std == automatic_std(max(width, 1)) else std,
        "positions": whole(settings, "max_position_embeddings", 262144),
        "bos": whole(settings, "bos_token_id", 1),
        "eos": token_ids(settings),
        "pad": whole(settings, "pad_token_id", 0),
    }


def write_frame(config) -> dict:
    """The inverse of `read_frame`."""
    stops = list(config.eos)
    return {
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "tie_word_embeddings": config.tied,
        "initializer_range": config.std,
        "max_position_embeddings": config.positions,
        "bos_token_id": config.bos,
        "eos_token_id": stops[0] if len(stops) == 1 else stops or None,
        "pad_token_id": config.pad,
        "use_cache": True,
    }


def automatic_std(width: int) -> float:
    """What Config.init_std = 0 stands for."""
    return 0.9 / width**0.5
