"""One small tokenizer for the tests of this folder."""

import pytest
import torch

from nautilus.data import embedded
from nautilus.data.tokenizer import Tokenizer, train_tokenizer

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return [text for _, text in embedded.code()[:6]]


@pytest.fixture(scope="session")
def tokenizer(texts) -> Tokenizer:
    return train_tokenizer(texts, vocab=600)
