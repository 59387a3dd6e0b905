"""The studies that come along: each claim of the pre-training recipe that a laptop can look at, sized for two cores.
Nothing is downloaded: text is the library's code that Python brings.

What they can show is bounded by their size: models of one to seven million weights after a few million bytes. That
NVFP4 trains to within so many percent here says nothing of speed, and nothing of a trillion tokens.
"""

from __future__ import annotations

from nautilus.studies.study import Study

MAMBA = ("M.heads=8", "M.head_width=32", "M.state=32", "M.groups=1")
ATTENTION = ("*.heads=4", "*.groups=1", "*.head_width=32")
EXPERTS = ("E.experts=8", "E.active=2", "E.hidden=64", "E.shared=128", "E.latent=0")
# A token is a byte: of 274 words 256 are bytes and the others control tokens.
TEXT = ("model.vocab=274", "data=python", "max_bytes=4_000_000", "compute=bf16", "prompts=def", "save_every=100")
RATE = ("optim.lr=3e-3", "optim.min_lr=3e-5", "optim.warmup=40", "optim.decay=0.25")
ALONE = ("model.mtp=", "mtp_depths=0")


def layers(pattern: str, *sizes: str, field: str = "layers") -> tuple[str, ...]:
    return (f"model.{field}={pattern}", *(f"model.{field}.{size}" for size in sizes))


HYBRID_LAYERS = layers("ME*EMEME", *MAMBA, *ATTENTION, *EXPERTS)
# Nine attention layers hold as many weights as three of Mamba and one of attention.
ATTENTION_LAYERS = layers("***E**E**E**E", *ATTENTION, "*.rotary.theta=1e4", *EXPERTS)
SMALL = ("model.width=128", *TEXT, *RATE)
SHORT = ("length=128", "rows=16")
FOUR = ("precision.format=nvfp4",)
EVERYWHERE = (*(f"precision.{role}=nvfp4" for role in ("mamba_out", "attention", "latent")), "precision.last_layers=0")
NAIVE = ("precision.rotate=false", "precision.stochastic=false", "precision.square=false")

NVFP4 = Study(
    name="nvfp4",
    about="Training in NVFP4 against bf16, and the recipe without each of its techniques. Simulated numerics: what is "
    "measured is loss, not speed.",
    base=(*SMALL, *HYBRID_LAYERS, *ALONE, *SHORT, "steps=600"),
    equal=("tokens", "parameters", "active"),
    variants={
        "bf16": (),
        "nvfp4": FOUR,
        "no_rotation": (*FOUR, "precision.rotate=false"),
        "no_stochastic": (*FOUR, "precision.stochastic=false"),
        "no_square": (*FOUR, "precision.square=false"),
        "all_layers": (*FOUR, *EVERYWHERE),
        "none": (*FOUR, *EVERYWHERE, *NAIVE),
        "bf16_at_the_end": (*FOUR, "precision.schedule=983040:bf16"),  # the last fifth
    },
    demonstrate=True,
)

DEMO_MODEL = (
    *("steps=560", "rows=8", "length=256", "max_bytes=6_000_000", "compute=bf16", "prompts=def"),
    *("optim.lr=5e-3", "optim.min_lr=5e-5", "optim.decay=0.3"),
)

DEMO = Study(
    name="demo",
    about="Training in NVFP4 against bf16 on the model and the text of `nautilus demo`, with its settings.",
    base=DEMO_MODEL,
    equal=("tokens", "parameters", "active"),
    variants={"bf16": (), "nvfp4": FOUR},
)

RECIPE = Study(
    name="recipe",
    about="The whole NVFP4 recipe against NVFP4 in every layer with none of its techniques: no rotation, rounding to "
    "nearest, weights scaled in rows. On the model and the text of `nautilus demo`.",
    base=DEMO_MODEL,
    equal=("tokens", "parameters", "active"),
    variants={"none": (*FOUR, *EVERYWHERE, *NAIVE), "recipe": FOUR},
)

LATENT = Study(
    name="latent",
    about="LatentMoE against standard experts at equal multiply-adds: width 96 in place of 384, 64 experts in place of "
    "16, 6 active in place of 2; the projections pay for the rest.",
    base=(
        *("model.width=384", *TEXT, *RATE, "optim.lr=2e-3", "optim.min_lr=2e-5", *ALONE),
        *layers("ME*EME", "M.heads=12", "M.state=64", "*.heads=6", "E.hidden=192", "E.shared=192"),
        *SHORT,
        "steps=1000",
    ),
    equal=("tokens", "active"),
    variants={
        "standard": ("model.layers.E.experts=16", "model.layers.E.active=2", "model.layers.E.latent=0"),
        "latent": ("model.layers.E.experts=64", "model.layers.E.active=6", "model.layers.E.latent=96"),
    },
)

MTP = Study(
    name="mtp",
    about="Multi-token prediction of two depths against none: the loss of the next token. The block is trained beside "
    "the main stack, which is the same.",
    base=(*SMALL, *HYBRID_LAYERS, *SHORT, "steps=1600", *layers("*E", *ATTENTION, *EXPERTS, field="mtp")),
    equal=("tokens", "active"),
    variants={"none": ("mtp_depths=0",), "two_depths": ("mtp_depths=2", "mtp_weight=0.3")},
)

HYBRID = Study(
    name="hybrid",
    about="The hybrid, whose attention has no positions, against attention alone with rotary positions.",
    base=(*SMALL, *ALONE, "length=256", "rows=8", "steps=1600"),
    equal=("tokens", "parameters"),
    variants={"hybrid": HYBRID_LAYERS, "attention": ATTENTION_LAYERS},
)

DECAY = Study(
    name="decay",
    about="A real decay of the learning rate against the plateau, and against an average of snapshots of the plateau "
    "over a window as long as the decay. All three are the same run up to where the decay begins.",
    base=(*SMALL, *HYBRID_LAYERS, *ALONE, *SHORT, "steps=1600"),
    equal=("tokens", "parameters", "active"),
    variants={
        "decay": (),
        "plateau": ("optim.decay=0",),
        "averaged": ("optim.decay=0", "average=16", "average_every=25"),
    },
)

NEEDLE = Study(
    name="needle",
    about="Values of keys found again in filler, at one, two, four and eight times the length of training: the hybrid, "
    "whose attention has no positions, against attention alone with rotary positions.",
    base=(*SMALL, *ALONE, *SHORT, "steps=2000", "max_bytes=0"),
    equal=("tokens", "parameters"),
    variants={"hybrid": HYBRID_LAYERS, "attention": ATTENTION_LAYERS},
    measure="needle",
)

NAMED = {study.name: study for study in (NVFP4, DEMO, RECIPE, LATENT, MTP, HYBRID, DECAY, NEEDLE)}
