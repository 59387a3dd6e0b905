"""A drafter beside the model that it drafts for. Letters: B rows, T time, D width, R positions, V words.

The model is not one of its parts: it is neither trained nor saved with it, may be in few bits, and stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from nautilus.config import Config
from nautilus.model.eagle import Eagle
from nautilus.model.language import Language
from nautilus.model.mtp import MtpBlock
from nautilus.ops.formats import Packed
from nautilus.ops.loss import ELEMENTS, rows_for
from nautilus.posttrain.divergence import weighted_kl
from nautilus.posttrain.unroll import Feed, latest, parts_of, unroll
from nautilus.runtime import UserError


class Drafter(nn.Module):
    """What `fit` trains in the place of a model, whose config, compute dtype and precision it shows."""

    lowered, chunk, checkpointing, ends = None, 0, False, True

    def __init__(self, model: Language, block: MtpBlock | Eagle):
        super().__init__()
        self.block = block
        self.beside = (model,)  # a tuple, so that it does not become a part

    @property
    def model(self) -> Language:
        return self.beside[0]

    @property
    def config(self) -> Config:
        return self.model.config

    @property
    def compute(self) -> torch.dtype:
        return self.model.compute

    def read(self, tokens_BT: Tensor, document_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Of the model: what the block's first step is fed with, and the hidden states that its head reads."""
        taps = self.block.taps if isinstance(self.block, Eagle) else ()
        residuals: dict[int, Tensor] = {}
        tap = lambda layer, residual_BTD: residuals.update({layer: residual_BTD} if layer in taps else {})
        with torch.no_grad():
            hidden_BTD, _ = self.model.hidden(tokens_BT, document_BT=document_BT, taps=[tap])
        if isinstance(self.block, Eagle):
            return self.block.features([residuals[layer] for layer in taps]), hidden_BTD
        return hidden_BTD, hidden_BTD

    def steps(
        self, feature_BTD: Tensor, tokens_BT: Tensor, count: int, document_BT: Tensor | None = None, feed: Feed = latest
    ) -> Iterator[Tensor]:
        """What its head reads at each step: see `unroll`."""
        with torch.no_grad():
            embeds_BTD = self.model.embed(tokens_BT)
        return unroll(parts_of(self.block), feature_BTD, embeds_BTD, count, document_BT=document_BT, feed=feed)

    def divergence(
        self, out_KRD: Tensor, last_RD: Tensor, weight_KR: Tensor, *, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Of its distributions from the model's, over the words that it can draft: see `weighted_kl`."""
        head: Tensor | Packed = self.model.head_weight
        if isinstance(self.block, Eagle):
            numbers = head.decode(last_RD.dtype) if isinstance(head, Packed) else head
            out_KRD, own, head = self.block.norm_f(out_KRD), self.block.lm_head.weight, numbers[self.block.token_ids_K]
            return weighted_kl(out_KRD, own, last_RD, head, weight_KR, temperature=temperature)
        return weighted_kl(out_KRD, head, last_RD, head, weight_KR, temperature=temperature)

    @torch.no_grad()
    def guess(self, out_RD: Tensor) -> Tensor:
        """The most probable token of each position."""
        chunks = out_RD[:, None].split(rows_for(ELEMENTS, self.config.vocab))
        if isinstance(self.block, Eagle):
            return torch.cat([self.block.token_ids_K[self.block.head(chunk).argmax(-1)] for chunk in chunks])[:, 0]
        return torch.cat([self.model.head(chunk).argmax(-1) for chunk in chunks])[:, 0]


class NoDrafts(UserError):
    """A model, or prompts and answers of it, with which drafts can be neither learnt nor measured."""


def mtp_drafter(model: Language) -> Drafter:
    if not model.config.mtp:
        raise NoDrafts(
            "the model has no multi-token-prediction block to draft with; train one with model.mtp=*E, or give it a "
            "head of its own with nautilus eagle"
        )
    return Drafter(model, model.mtp)


def drafter_of(model: Language, head: Eagle | None) -> Drafter | None:
    """With a head, or else with the model's own block, where it has one."""
    if head is not None:
        return Drafter(model, head)
    return mtp_drafter(model) if model.config.mtp else None
