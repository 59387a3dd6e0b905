"""Settings: frozen records with no torch behind them."""

from nautilus.config.layer import (
    KINDS,
    Attention,
    Experts,
    Layer,
    Linear,
    Mamba,
    Mlp,
    Nothing,
    Rotary,
    describe,
    lay,
    pattern_of,
)
from nautilus.config.model import Config, from_dict, to_dict, weight_count
from nautilus.config.override import Based, apply_overrides, setting, settings_of
from nautilus.config.precision import PrecisionTable

__all__ = [
    "KINDS",
    "Attention",
    "Based",
    "Config",
    "Experts",
    "Layer",
    "Linear",
    "Mamba",
    "Mlp",
    "Nothing",
    "PrecisionTable",
    "Rotary",
    "apply_overrides",
    "describe",
    "from_dict",
    "lay",
    "pattern_of",
    "setting",
    "settings_of",
    "to_dict",
    "weight_count",
]
