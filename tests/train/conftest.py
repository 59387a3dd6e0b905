import importlib.util
import json
import pathlib

import pytest
import torch

from nautilus.data.batch import Batch
from nautilus.data.mix import Stream
from nautilus.model.language import Language
from nautilus.presets import preset, shrink

torch.set_num_threads(1)

spec = importlib.util.spec_from_file_location("ranks", pathlib.Path(__file__).with_name("ranks.py"))
assert spec and spec.loader
helper = importlib.util.module_from_spec(spec)
spec.loader.exec_module(helper)


@pytest.fixture(scope="session")
def written_alone(tmp_path_factory):
    """A function that gives the folder of what a single process, this one, wrote while it trained."""
    known = {}

    def folder_of(**settings) -> pathlib.Path:
        key = json.dumps(settings, sort_keys=True)
        if key not in known:
            known[key] = tmp_path_factory.mktemp("alone")
            helper.work(known[key], layout={}, **settings)
        return known[key]

    return folder_of


@pytest.fixture(scope="session")
def alone(written_alone):
    """A function that gives the curve of a single process."""
    return lambda **settings: helper.curve_of(written_alone(**settings))


@pytest.fixture(scope="session")
def small_model():
    """A function that builds one: a Mamba, an experts and an attention layer, and a prediction block."""

    def build(*, seed=0, pattern_layers=4, dtype=torch.float32, **changes) -> Language:
        config = shrink(preset("toy"), layers=pattern_layers, width=32)
        return Language(config, dtype=dtype, **changes).initialise(seed)

    return build


@pytest.fixture(scope="session")
def random_rows():
    """A function that makes a Batch of random rows; with `documents`, of several documents and with padding."""

    def build(rows=4, time=24, *, seed=0, vocab=97, documents=False, dtype=torch.float32) -> Batch:
        g = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, vocab, (rows, time), generator=g)
        weights = torch.rand(rows, time, generator=g, dtype=dtype).mul(4).round() / 4
        document = None
        if documents:
            begins = (torch.rand(rows, time, generator=g) < 0.2).long()
            begins[:, 0] = 1
            document = begins.cumsum(1)
            lengths = torch.randint(time // 3, time + 1, (rows,), generator=g)
            document[torch.arange(time) >= lengths[:, None]] = 0
            first = torch.ones_like(document, dtype=torch.bool)
            first[:, 1:] = document[:, 1:] != document[:, :-1]
            weights[first | (document == 0)] = 0
        weights[:, 0] = 0
        return Batch(tokens, {"next_token": weights}, document=document)

    return build


@pytest.fixture(scope="session")
def small_stream(random_rows):
    """A function that makes a resumable stream over a few random rows."""

    def build(*, seed=1, rows=4, micro=2, time=24, held=32) -> Stream:
        return Stream({"text": random_rows(held, time, seed=7)}, rows=rows, micro=micro, seed=seed)

    return build
