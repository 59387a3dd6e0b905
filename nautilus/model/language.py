"""The language model: embedding, a stack of pre-norm residual layers, final norm, head. Letters: B batch, T time,
D width, V vocabulary.

    x = Emb[tokens];   x = x + mixer_i(norm_i(x)) for each layer;   hidden = norm_f(x);   logits = hidden head^T
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import overload

import torch
from torch import Tensor, nn

from nautilus.config import Attention, Config, Experts, Layer, Linear, Mamba, Mlp, Nothing
from nautilus.model.attention import AttentionMixer
from nautilus.model.initialise import initialise
from nautilus.model.lanes import Lanes, MambaSlots, RestingSlots
from nautilus.model.linear import Linear as LinearMap
from nautilus.model.linear import Matrix
from nautilus.model.mamba import MambaMixer
from nautilus.model.mlp import LinearMixer, MlpMixer
from nautilus.model.moe import ExpertsMixer
from nautilus.model.mtp import MtpBlock
from nautilus.model.norm import RmsNorm
from nautilus.model.precision import Lowered
from nautilus.model.quantised import Quantisation
from nautilus.model.save import save_model
from nautilus.model.state import Cache, MambaState, Span, State, StoredMamba, advance, place
from nautilus.model.thrift import thrifty
from nautilus.ops.formats import Packed
from nautilus.ops.linear import linear
from nautilus.ops.loss import weighted_nll
from nautilus.ops.pages import Pool
from nautilus.ops.residual import add, embed
from nautilus.ops.ssd import wide
from nautilus.ops.state_format import EXACT, StateFormat

Tap = Callable[[int, Tensor], None]


def build_mixer(layer: Layer, config: Config, *, device=None, dtype=None) -> nn.Module | None:
    where = {"device": device, "dtype": dtype}
    match layer:
        case Mamba():
            return MambaMixer(layer, config.width, config.norm_eps, **where)
        case Attention():
            return AttentionMixer(layer, config.width, config.norm_eps, **where)
        case Experts():
            return ExpertsMixer(layer, config.width, **where)
        case Mlp():
            return MlpMixer(layer, config.width, **where)
        case Linear():
            return LinearMixer(config.width, **where)
        case Nothing():
            return None


class Block(nn.Module):
    """x + mixer(norm(x)); the identity, without parameters, where the mixer is nothing."""

    def __init__(self, layer: Layer, config: Config, *, device=None, dtype=None):
        super().__init__()
        self.mixer = build_mixer(layer, config, device=device, dtype=dtype)
        self.norm = None if self.mixer is None else RmsNorm(config.width, config.norm_eps, device=device, dtype=dtype)

    def forward(self, hidden_BTD: Tensor, span: Span, state: Cache | MambaState | MambaSlots | Pool | None):
        if self.mixer is None or self.norm is None:
            return hidden_BTD, None
        mixed, state = self.mixer(self.norm(hidden_BTD), span, state)
        return add(hidden_BTD, mixed), state

    def remembering(self, hidden_BTD: Tensor, span: Span, past):
        """The block's call where the past may be stored in a format that it is not computed in."""
        if isinstance(past, StoredMamba):
            return self(hidden_BTD, span, past.opened(wide(hidden_BTD.dtype)))
        if not isinstance(past, RestingSlots) or span.lanes is None:
            return self(hidden_BTD, span, past)
        slot_B = span.lanes.slot_B.long()
        lanes = replace(span.lanes, slot_B=torch.arange(len(slot_B), dtype=torch.int32, device=slot_B.device))
        awake = past.wake(slot_B)
        hidden_BTD, _ = self(hidden_BTD, replace(span, lanes=lanes), awake)
        past.rest(slot_B, awake, lanes.rows.length - 1)
        return hidden_BTD, past


class Embedding(Matrix):
    """One row per word. Left unset, unlike PyTorch's, which would draw a billion normals for a large model."""

    def forward(self, tokens_BT: Tensor, dtype: torch.dtype) -> Tensor:
        return embed(tokens_BT, self.weight, dtype)


class Backbone(nn.Module):
    def __init__(self, config: Config, *, device=None, dtype=None):
        super().__init__()
        where = {"device": device, "dtype": dtype}
        self.embeddings = Embedding(config.vocab, config.width, **where)
        self.layers = nn.ModuleList(Block(layer, config, **where) for layer in config.layers)
        self.norm_f = RmsNorm(config.width, config.norm_eps, **where)


class Language(nn.Module):
    """A model of any Config. Parameters carry the names of the released checkpoints, experts stacked.

    `compute` is the dtype of activations. Parameters may be wider: float32 masters with bf16 compute train as the
    published models did. In training, `checkpointing` keeps of each layer only what enters it, and `chunk` (0: off)
    also computes it in pieces of so many tokens of a row; see thrift.py. The prediction block is always kept whole.
    `ends` is false in an early stage of a pipeline: it has no head, and what `hidden` gives is for its backward only.
    """

    checkpointing, chunk, ends = False, 0, True

    def __init__(self, config: Config, *, device=None, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.compute = config, dtype
        self.quantised: Quantisation | None = None  # what `load_model` read of it
        self.lowered: Lowered | None = None  # trains in few bits; see `lower.py`
        where = {"device": device, "dtype": dtype}
        self.backbone = Backbone(config, **where)
        if not config.tied:
            self.lm_head = LinearMap(config.width, config.vocab, **where)
        if config.mtp:
            self.mtp = MtpBlock(config, build_mixer, **where)

    @property
    def head_weight(self) -> Tensor | Packed:
        """The (V, D) matrix of the head: its own, or the embedding's when tied."""
        return self.backbone.embeddings.weight if self.config.tied else self.lm_head.weight

    def head(self, hidden_BTD: Tensor) -> Tensor:
        """Logits, float32 whatever the compute dtype."""
        return linear(hidden_BTD, self.head_weight, wide=True)

    def nll(self, hidden_RD: Tensor, target_R: Tensor, weight_R: Tensor) -> Tensor:
        """-sum_r weight_r log p(target_r) under the head, a scalar; never all logits at once."""
        return weighted_nll(hidden_RD, self.head_weight, target_R, weight_R)

    def embed(self, tokens_BT: Tensor) -> Tensor:
        return self.backbone.embeddings(tokens_BT, self.compute)

    def entering(self, tokens_BT: Tensor | None, embeds_BTD: Tensor | None) -> Tensor:
        """What enters the first layer."""
        if (tokens_BT is None) == (embeds_BTD is None):
            raise ValueError("hidden() takes either tokens_BT or embeds_BTD, and exactly one of the two")
        x = embeds_BTD.to(self.compute) if tokens_BT is None else self.embed(tokens_BT)  # type: ignore[union-attr]
        if x.shape[1] == 0:
            raise ValueError(f"hidden() was given {x.shape[0]} rows of 0 tokens; it needs at least one")
        return x

    @overload
    def hidden(
        self, tokens_BT: Tensor | None = None, *, embeds_BTD: Tensor | None = None, state: Lanes,
        taps: Sequence[Tap] = (),
    ) -> tuple[Tensor, Lanes]: ...  # fmt: skip

    @overload
    def hidden(
        self, tokens_BT: Tensor | None = None, *, embeds_BTD: Tensor | None = None, state: State | None = None,
        document_BT: Tensor | None = None, taps: Sequence[Tap] = (), state_format: StateFormat = EXACT,
    ) -> tuple[Tensor, State]: ...  # fmt: skip

    def hidden(
        self,
        tokens_BT: Tensor | None = None,
        *,
        embeds_BTD: Tensor | None = None,
        state: State | Lanes | None = None,
        document_BT: Tensor | None = None,
        taps: Sequence[Tap] = (),
        state_format: StateFormat = EXACT,
    ) -> tuple[Tensor, State | Lanes]:
        """Hidden states after the final norm, and the state to continue from.

        Give tokens or embeddings. Neighbouring tokens with equal `document_BT` numbers see each other, across calls
        too; a change of number starts afresh. Left padding is a document of its own before the text's. Each tap is
        called as tap(layer index, residual_BTD) after each layer. A State passed in stays valid, whatever format it
        was stored in; `state_format` is how the recurrent part of the one handed back is stored, once, after the last
        token. Lanes change in place, in the format that their memory has; they take all rows' tokens as one row.
        """
        x = self.entering(tokens_BT, embeds_BTD)
        span, remembered = place(state, document_BT, x.shape[0], x.shape[1], x.device), []
        for index, block in enumerate(self.backbone.layers):
            assert isinstance(block, Block)
            x, kept = self.through(block, x, span, None if state is None else state.layers[index])
            if isinstance(kept, MambaState) and not state_format.lossless:
                kept = kept.stored(state_format, layer=index, span=span)
            remembered.append(kept)
            for tap in taps:
                tap(index, x)
        return self.backbone.norm_f(x), advance(state, span, document_BT, remembered)

    def through(self, block: Block, hidden_BTD: Tensor, span: Span, past):
        """The block's output and memory. Computed again in the backward, it has no memory: training needs none."""
        thrift = (self.checkpointing or self.chunk) and self.training and torch.is_grad_enabled()
        if thrift and past is None and block.mixer is not None:
            return thrifty(block, hidden_BTD, span, self.chunk, self.lowered), None
        return block.remembering(hidden_BTD, span, past)

    def forward(self, tokens_BT: Tensor, state: State | None = None, document_BT: Tensor | None = None):
        hidden_BTD, state = self.hidden(tokens_BT, state=state, document_BT=document_BT)
        return self.head(hidden_BTD), state

    def mtp_hidden(
        self, hidden_BTD: Tensor, tokens_BT: Tensor, depths: int, document_BT: Tensor | None = None, *,
        apart: bool = False,
    ) -> list[Tensor]:  # fmt: skip
        """Hidden states of each depth; entry k-1 at position t predicts token t+1+k.

        The last k + 1 positions of a row, and of a document, have no such target: mask them. apart: no gradient reaches
        what the block stands on.
        """
        if not self.config.mtp:
            raise ValueError("this model has no multi-token-prediction block; set mtp=*E and train it, or use depths=0")
        batch, time = tokens_BT.shape
        span = place(None, document_BT, batch, time, tokens_BT.device)
        out, embeds_BTD = [], self.embed(tokens_BT)
        if apart:
            hidden_BTD, embeds_BTD = hidden_BTD.detach(), embeds_BTD.detach()
        for depth in range(1, depths + 1):
            ahead_BTD = nn.functional.pad(embeds_BTD[:, depth:], (0, 0, 0, min(depth, time)))
            hidden_BTD = self.mtp(hidden_BTD, ahead_BTD, span)
            out.append(hidden_BTD)
        return out

    @property
    def cache_scales(self) -> dict[int, tuple[float, float]]:
        """By layer, the scales of keys and of values that are kept in FP8."""
        mixers = ((index, block.mixer) for index, block in enumerate(self.backbone.layers))
        return {i: (mixer.k_scale, mixer.v_scale) for i, mixer in mixers if isinstance(mixer, AttentionMixer)}

    def experts_mixers(self) -> dict[str, ExpertsMixer]:
        """Every mixture-of-experts mixer by its name, the multi-token-prediction block's included."""
        return {name: module for name, module in self.named_modules() if isinstance(module, ExpertsMixer)}

    def collect_balance(self, on: bool) -> None:
        """From here on training forwards leave (or do not leave) the routers' balance losses; earlier ones go."""
        for mixer in self.experts_mixers().values():
            mixer.balances = [] if on else None

    @property
    def auxiliary(self) -> list[tuple[Tensor, Tensor]]:
        """(sum, count) of the sequence balance loss of each pass through a router since `collect_balance(True)`."""
        return [pair for mixer in self.experts_mixers().values() for pair in mixer.balances or ()]

    def save(self, folder: str | Path, *, precision: str | None = None, tokenizer=None, facts=None) -> None:
        """Writes a Hugging Face checkpoint folder; see `save_model`."""
        save_model(self, folder, precision=precision, tokenizer=tokenizer, facts=facts)

    def initialise(self, seed: int) -> Language:
        """Random initial weights; see initialise.py."""
        initialise(self, self.config, seed)
        return self
