"""A draft head in the manner of EAGLE-3 (arXiv 2503.01840). Letters: B rows, T time, D width of the model, K words that
it can draft.

The feature of a token joins what the model knew of it at three depths, x_i being the residual after layer i of N:

    h = fc [x_2 ; x_{N/2} ; x_{N-3}],      f = eh_proj [enorm(Emb[next token]) ; hnorm(h)]
    f += attention(norm(f));   f += mlp(norm(f));      logits = lm_head(norm_f(f))

f is the feature of the next drafted token. No positions; a vocabulary of its own, the words used most.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from nautilus.config import Attention, Config, Mlp, to_dict
from nautilus.config.keys import short
from nautilus.config.model import build
from nautilus.model.attention import AttentionMixer
from nautilus.model.initialise import initial_value, seeded
from nautilus.model.language import Language
from nautilus.model.linear import Linear
from nautilus.model.mlp import MlpMixer
from nautilus.model.norm import RmsNorm
from nautilus.model.shards import entries, read_tensors, write_file
from nautilus.model.state import Span
from nautilus.ops.formats import dense
from nautilus.ops.linear import linear
from nautilus.ops.norm import joined_norms
from nautilus.ops.pages import Pool
from nautilus.ops.residual import add
from nautilus.runtime import UserError, atomic_folder, read_json

FILE, SIZES = "eagle.safetensors", "eagle.json"
SAMPLE = 256  # numbers of a tensor that tell one model from another
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class EagleSizes:
    """words: that it can draft; hidden: of its MLP; heads, groups, head_width: of its attention."""

    words: int
    hidden: int
    heads: int
    groups: int
    head_width: int
    gated: bool = True

    def __post_init__(self):
        Attention(heads=self.heads, groups=self.groups, head_width=self.head_width)
        if self.words < 1 or self.hidden < 1:
            raise ValueError(f"words={self.words} and hidden={self.hidden} must be at least 1")


def sizes_for(config: Config, words: int, *, hidden: int = 0, gated: bool = True) -> EagleSizes:
    """Attention as the model's own; hidden 0: the published 8/3 of the width, in whole dozens of 16."""
    own = next((layer for layer in config.layers if isinstance(layer, Attention)), None)
    width = own.head_width if own else min(64, config.width)
    heads = own.heads if own else max(1, config.width // width)
    groups = own.groups if own else heads
    hidden = hidden or -(-8 * config.width // 48) * 16
    return EagleSizes(words=words, hidden=hidden, heads=heads, groups=groups, head_width=width, gated=gated)


def taps_of(layers: int) -> tuple[int, int, int]:
    """Indices of the layers after which features are taken: 2, N/2 and N-3, kept inside a small model."""
    inside = lambda index: min(max(index, 0), layers - 1)
    return inside(2), inside(layers // 2), inside(layers - 3)


class EagleLayer(nn.Module):
    """A mixer after its norm, as a layer of the drafter."""

    def __init__(self, mixer: nn.Module, config: Config, **where):
        super().__init__()
        self.norm, self.mixer = RmsNorm(config.width, config.norm_eps, **where), mixer

    def forward(self, f_BTD: Tensor, span: Span, past: Pool | None) -> Tensor:
        return add(f_BTD, self.mixer(self.norm(f_BTD), span, past)[0])


class Eagle(nn.Module):
    """`hidden` of one token feeds the next; `head` reads it. token_ids_K: the model's number of each word, rising."""

    token_ids_K: Tensor

    def __init__(self, config: Config, sizes: EagleSizes, token_ids_K: Tensor, *, device=None, dtype=None):
        super().__init__()
        refuse_words(config, sizes, token_ids_K)
        width, eps, where = config.width, config.norm_eps, {"device": device, "dtype": dtype}
        self.attention = Attention(heads=sizes.heads, groups=sizes.groups, head_width=sizes.head_width)
        self.sizes, self.taps = sizes, taps_of(len(config.layers))
        self.fc = Linear(3 * width, width, **where)
        self.enorm, self.hnorm = RmsNorm(width, eps, **where), RmsNorm(width, eps, **where)
        self.eh_proj = Linear(2 * width, width, **where)
        mixers = AttentionMixer(self.attention, width, eps, **where), MlpMixer(mlp_of(sizes), width, **where)
        self.layers = nn.ModuleList(EagleLayer(mixer, config, **where) for mixer in mixers)
        self.norm_f = RmsNorm(width, eps, **where)
        self.lm_head = Linear(width, sizes.words, **where)
        self.register_buffer("token_ids_K", token_ids_K.to(device=device, dtype=torch.int64))

    def features(self, residuals: Sequence[Tensor]) -> Tensor:
        """hidden_BTD of tokens that the model has read; `residuals` are those after the layers of `taps`, in order."""
        return self.fc(torch.cat([*residuals], dim=-1))

    def forward(self, hidden_BTD: Tensor, ahead_BTD: Tensor, span: Span, memory: Sequence[Pool | None] = ()) -> Tensor:
        """The next hidden_BTD, from those of each token before and the embedding of the token. memory: of the attention
        layer, where the span has lanes."""
        f = self.join(hidden_BTD, ahead_BTD)
        for layer, past in zip(self.layers, (memory[0] if memory else None, None), strict=True):
            f = layer(f, span, past)
        return f

    def join(self, hidden_BTD: Tensor, ahead_BTD: Tensor) -> Tensor:
        enorm, hnorm = self.enorm, self.hnorm
        return self.eh_proj(joined_norms(ahead_BTD, enorm.weight, hidden_BTD, hnorm.weight, hnorm.eps))

    def head(self, hidden_BTD: Tensor) -> Tensor:
        """Logits of its words, float32 whatever the compute dtype; word i is the model's token token_ids_K[i]."""
        return linear(self.norm_f(hidden_BTD), self.lm_head.weight, wide=True)

    @torch.no_grad()
    def initialise(self, model: Language, seed: int) -> Eagle:
        """As new models begin, but the head with the rows of the model's own and its norm."""
        for name, value in self.named_parameters():
            value.copy_(initial_value(name, tuple(value.shape), model.config.std, 2, seeded(seed, f"eagle/{name}")))
        self.norm_f.weight.copy_(model.backbone.norm_f.weight)
        own_KD = cast(Tensor, self.lm_head.weight)
        own_KD.copy_(dense(model.head_weight, own_KD.dtype)[self.token_ids_K])
        return self

    def save(self, folder: str | Path, model: Language) -> None:
        """Its weights and what they are made for; replaces the folder as a whole, or leaves it."""
        dtype = str(self.norm_f.weight.dtype).removeprefix("torch.")
        told = {"fingerprint": trunk_fingerprint(model), "dtype": dtype}
        document = {"nautilus_eagle": 1, "sizes": dataclasses.asdict(self.sizes)} | told
        with atomic_folder(folder) as fresh:
            (fresh / SIZES).write_text(json.dumps(document, indent=2) + "\n")
            write_file(fresh / FILE, {name: tensor.contiguous() for name, tensor in self.state_dict().items()})


def mlp_of(sizes: EagleSizes) -> Mlp:
    return Mlp(hidden=sizes.hidden, gated=sizes.gated)


def refuse_words(config: Config, sizes: EagleSizes, token_ids_K: Tensor) -> None:
    known = token_ids_K.device.type == "meta" or (
        bool((token_ids_K.diff() > 0).all()) and 0 <= int(token_ids_K[0]) and int(token_ids_K[-1]) < config.vocab
    )
    if token_ids_K.shape != (sizes.words,) or not known:
        raise UserError(
            f"a draft head of words={sizes.words} was given {tuple(token_ids_K.shape)} token ids; give as many, rising,"
            f" in 0..{config.vocab - 1}"
        )


def trunk_fingerprint(model: Language) -> str:
    """Of the form of the layers and some numbers of every tensor that is not in few bits; not of a prediction block,
    which may learn on."""
    form = to_dict(dataclasses.replace(model.config, mtp=(), eos=(), pad=0, bos=0))
    found = hashlib.sha256(json.dumps(form, sort_keys=True).encode())
    for name, tensor in sorted(model.backbone.state_dict().items()):
        flat = tensor.detach().flatten()
        some = flat[:: max(1, len(flat) // SAMPLE)].to("cpu", torch.float32).contiguous()
        found.update(name.encode() + some.numpy().tobytes())
    return found.hexdigest()


def load_eagle(folder: str | Path, model: Language) -> Eagle:
    """The head in a folder or a run, for the model that it was made for. UserError for another, and damaged files."""
    inner = Path(folder) / "model"
    folder = inner if (inner / SIZES).is_file() else Path(folder)
    sizes, dtype = described(folder, model)
    if not (folder / FILE).is_file():
        raise UserError(f"{folder} has no {FILE}; copy the folder again, or train the head anew")
    found = dict(read_tensors(dict(entries(folder / FILE))))
    with torch.device("meta"):
        like = Eagle(model.config, sizes, torch.empty(sizes.words, dtype=torch.int64)).state_dict()
    if wrong := sorted(name for name in like.keys() | found.keys() if not fits(name, found, like)):
        raise UserError(
            f"{folder / FILE} does not hold the head of its {SIZES}: {len(wrong)} tensors are missing, unknown, of "
            f"another shape or no numbers, such as {wrong[0]}; copy the folder again, or train the head anew"
        )
    where = {"device": model.backbone.norm_f.weight.device, "dtype": dtype}
    head = Eagle(model.config, sizes, found["token_ids_K"], **where)
    head.load_state_dict(found)
    return head.requires_grad_(False).eval()


def fits(name: str, found: dict[str, Tensor], like: dict[str, Tensor]) -> bool:
    if name not in found or name not in like or found[name].shape != like[name].shape:
        return False
    return found[name].is_floating_point() == like[name].is_floating_point() and bool(found[name].isfinite().all())


def described(folder: Path, model: Language) -> tuple[EagleSizes, torch.dtype]:
    """What the folder's JSON says, once that is for this model."""
    document = read_json(folder / SIZES, "give the folder of a draft head, as nautilus eagle writes it")
    sizes, dtype = document.get("sizes"), DTYPES.get(str(document.get("dtype")))
    try:
        if document.get("nautilus_eagle") != 1 or dtype is None:
            raise ValueError(f"it has dtype={short(document.get('dtype'))}")
        read = build(EagleSizes, sizes if isinstance(sizes, dict) else {})
    except ValueError as bad:
        raise UserError(f"{folder / SIZES} describes no draft head: {bad}; copy the folder again") from bad
    if document.get("fingerprint") != trunk_fingerprint(model):
        raise UserError(
            f"the draft head in {folder} was made for another model, or this one in another number format; give the "
            "model that it was trained beside, or train one with nautilus eagle"
        )
    return read, dtype
