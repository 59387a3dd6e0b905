"""How evenly a model's routers use their experts on given text."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nautilus.model.language import Language
from nautilus.train.health import short


@torch.no_grad()
def expert_loads(model: Language, documents: Sequence[Sequence[int]], *, chunk: int = 2048) -> dict[str, list[float]]:
    """Per mixer, the tokens sent to each expert over the mean of the mixer: all 1 when balanced, 0 for a dead expert.

    Mixers are named by their layer, as in the training metrics; those of a multi-token-prediction block do not take
    part in reading text and are left out. The model is handed back as it was.
    """
    mixers, was_training = model.experts_mixers(), model.training
    kept = {name: mixer.load_E.clone() for name, mixer in mixers.items()}
    place = {"dtype": torch.int64, "device": model.head_weight.device}
    tokens_BT = torch.tensor([[token for document in documents for token in document]], **place)
    # Documents count from 1: number 0 is padding, which routers leave out of their counts.
    document_BT = torch.tensor([[i for i, document in enumerate(documents, 1) for _ in document]], **place)
    state = None
    try:
        model.train()  # routers count only in training
        for mixer in mixers.values():
            mixer.load_E.zero_()
        for low in range(0, tokens_BT.shape[1], chunk):
            here = slice(low, low + chunk)
            _, state = model.hidden(tokens_BT[:, here], state=state, document_BT=document_BT[:, here])
        used = {name: mixer.load_E for name, mixer in mixers.items() if mixer.load_E.sum() > 0}
        return {short(name): (load_E / load_E.mean()).tolist() for name, load_E in used.items()}
    finally:
        for name, mixer in mixers.items():
            mixer.load_E.copy_(kept[name])
        model.train(was_training)
