"""In which number format each matrix is multiplied while a model trains: a table from role to format.

    role                                       Nemotron 3 Super, Ultra
    routed and shared experts, Mamba's input,  nvfp4                      `format`
    MLPs, square matrices
    Mamba's output                             mxfp8                      `mamba_out`
    attention's projections                    bf16                       `attention`
    latent projections of experts              bf16                       `latent`
    everything in the last layers, prediction  bf16 or float32            always
    block, router, norms, embedding, head

(arXiv 2604.12374, table 3; 2606.15007, section 2.2.) Master weights, their gradients and the optimiser's moments are
float32 under every table. Nothing is in few bits unless `format` says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from nautilus.config.layer import require
from nautilus.config.override import setting

TRAINED_IN = ("bf16", "mxfp8", "nvfp4")
RECIPES = ("table", "table_backward", "bf16", "mxfp8")
TAIL = 0.15  # of the layers stay in bf16, rounded up, where the table does not say how many


class Recipe(NamedTuple):
    """What holds from a number of tokens on. table: as the table says; table_backward: so in the backward only, the
    forward in bf16; bf16: all of it; mxfp8: wherever the table has few bits."""

    token: int
    name: str


@dataclass(frozen=True, kw_only=True)
class PrecisionTable:
    """`last_layers` is an integer for each model, no share: 14 of Super's 88, 16 of Ultra's 108; -1: 15 %, rounded up.

    schedule: "TOKENS:RECIPE", what holds once the run has seen so many tokens, such as 8_000_000:bf16.
    """

    format: str = setting("bf16", "of experts, Mamba's input, MLPs: nvfp4, mxfp8; bf16: all is trained in `compute`")
    mamba_out: str = setting("mxfp8", "of Mamba's output where `format` is not bf16")
    attention: str = setting("bf16", "of attention's projections, likewise")
    latent: str = setting("bf16", "of the experts' latent projections, likewise")
    rotate: bool = setting(True, "nvfp4: both operands of the weight gradient turned by the Hadamard rotation")
    stochastic: bool = setting(True, "nvfp4: gradients rounded stochastically; false: to the nearest")
    square: bool = setting(True, "nvfp4: weights in blocks of 16x16, the same in both products; false: of 1x16 in each")
    first_layers: int = setting(0, "layers at the input that stay in bf16")
    last_layers: int = setting(-1, "layers at the output that stay in bf16, -1: 15 %, rounded up")
    schedule: tuple[str, ...] = setting((), "TOKENS:RECIPE, from when on: table, table_backward, bf16, mxfp8")

    def __post_init__(self):
        for name in ("format", "mamba_out", "attention", "latent"):
            value = getattr(self, name)
            require(value in TRAINED_IN, f"precision.{name}={value!r} is unknown; choose {', '.join(TRAINED_IN)}")
        require(self.first_layers >= 0, f"precision.first_layers={self.first_layers} must be 0 or positive")
        require(self.last_layers >= -1, f"precision.last_layers={self.last_layers} must be -1 (15 %), 0 or positive")
        tokens = [recipe.token for recipe in self.recipes]
        require(
            tokens == sorted(set(tokens)), f"precision.schedule={','.join(self.schedule)} must go forward in tokens"
        )

    @property
    def on(self) -> bool:
        """Whether anything at all is in few bits; a table of which `format` is bf16 is off as a whole."""
        return self.format != "bf16"

    @property
    def recipes(self) -> list[Recipe]:
        return [read_recipe(text) for text in self.schedule]

    def recipe_at(self, tokens: int) -> str:
        """What holds for a step before which the run has seen so many tokens."""
        past = [recipe.name for recipe in self.recipes if recipe.token <= tokens]
        return past[-1] if past else "table"

    def tail(self, layers: int) -> int:
        """How many of the last layers stay in bf16."""
        return math.ceil(TAIL * layers) if self.last_layers < 0 else self.last_layers

    def lowered(self, layer: int, layers: int) -> bool:
        """Whether anything in this layer of so many may be in few bits."""
        return self.on and self.first_layers <= layer < layers - self.tail(layers)

    def format_of(self, role: str) -> str:
        """Of a matrix in a lowered layer, by its role as `model/layout.py` has it: `mamba.in_proj`."""
        roles = {
            "experts.fc1_latent_proj": self.latent,
            "experts.fc2_latent_proj": self.latent,
            "experts.gate": "bf16",
            "experts": self.format,
            "mamba.in_proj": self.format,
            "mamba.out_proj": self.mamba_out,
            "attention": self.attention,
            "mlp": self.format,
            "linear": self.format,
        }
        for known, format in roles.items():
            if role == known or role.startswith(known + "."):
                return format
        return "bf16"


def read_recipe(text: str) -> Recipe:
    token, colon, name = text.partition(":")
    count = token.replace("_", "")
    require(bool(colon) and count.isdecimal(), f"precision.schedule has {text!r}; write TOKENS:RECIPE, 8_000_000:bf16")
    require(name in RECIPES, f"precision.schedule has the recipe {name!r}; choose {', '.join(RECIPES)}")
    return Recipe(int(count), name)
