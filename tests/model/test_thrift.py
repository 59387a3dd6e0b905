"""Rows in pieces and layers computed again: the same losses, counts and gradients with less memory."""

import dataclasses
import subprocess
import sys

import pytest
import torch

from nautilus.config import Attention, Experts, Mamba, Mlp, Rotary, lay
from nautilus.data.batch import Batch
from nautilus.model.language import Language
from nautilus.presets import preset, shrink
from nautilus.train.objective import pretrain

torch.set_num_threads(1)
KINDS = (
    Mamba(heads=6, head_width=8, state=16, groups=2, chunk=8),
    Attention(heads=4, groups=2, head_width=16, rotary=Rotary(), head_norm=True),
    Experts(experts=8, active=3, hidden=24, shared=40, latent=20, scale=2.5),
    Mlp(hidden=64),
)
CONFIG = dataclasses.replace(
    shrink(preset("toy"), width=32), layers=lay("ME*-ME_L", *KINDS), mtp=lay("*E", *KINDS), vocab=97
)


def batch_of(rows, time, documents, seed=3):
    g = torch.Generator().manual_seed(seed)
    weights = torch.rand(rows, time, generator=g)
    weights[:, 0] = 0
    document = None
    if documents:
        begins = (torch.rand(rows, time, generator=g) < 0.1).long()
        begins[:, 0] = 1
        document = begins.cumsum(1)
        document[0, -7:] = 0
        weights[document == 0] = 0
    return Batch(torch.randint(0, 97, (rows, time), generator=g), {"next_token": weights}, document=document)


def learnt(config, batch, *, dtype=torch.float32, depths=2, **thrift):
    """Losses, gradients, and tokens per expert."""
    model = Language(config, dtype=dtype).initialise(1).train()
    for name, value in thrift.items():
        setattr(model, name, value)
    objective = pretrain(mtp_depths=depths, aux_weight=1.0)
    terms, _ = objective(model, batch)
    sum(total for total, _ in terms.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    loads = {name: mixer.load_E.clone() for name, mixer in model.experts_mixers().items()}
    return {name: total.detach() for name, (total, _) in terms.items()}, gradients, loads


def far(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-12)).item()


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("thrift", [{"checkpointing": True}, {"chunk": 16}, {"chunk": 13}, {"chunk": 1000}])
def test_pieces_and_second_computations_change_no_number(thrift, documents):
    batch = batch_of(2, 48, documents)
    losses, gradients, loads = learnt(CONFIG, batch)
    exact = learnt(CONFIG, batch, dtype=torch.float64)[1]
    got_losses, got_gradients, got_loads = learnt(CONFIG, batch, **thrift)
    assert got_losses.keys() == losses.keys() and got_gradients.keys() == gradients.keys()
    for name, loss in losses.items():
        assert far(got_losses[name], loss) < 1e-6, name
    for name, gradient in gradients.items():
        # Sums that nearly cancel, those of A_log, have a rounding of their own that is larger in any order.
        assert far(got_gradients[name], gradient) < max(1e-5, 3 * far(gradient, exact[name])), name
    flat = lambda found: torch.cat([found[name].flatten() for name in gradients])
    assert far(flat(got_gradients), flat(gradients)) < 1e-5
    assert all(torch.equal(got_loads[name], load) for name, load in loads.items())


@pytest.mark.parametrize("window", [0, 9])
def test_in_double_precision_only_rounding_differs(window):
    layers = lay("ME*E", KINDS[0], dataclasses.replace(KINDS[1], window=window), KINDS[2])
    config = dataclasses.replace(CONFIG, layers=layers)
    batch = batch_of(2, 40, True)
    want, got = (learnt(config, batch, dtype=torch.float64, **thrift) for thrift in ({}, {"chunk": 11}))
    assert max(far(got[1][name], gradient) for name, gradient in want[1].items()) < 1e-12


def test_a_wrong_hand_over_would_show():
    """Guards the tests above: a row whose pieces do not know of each other has other gradients."""
    batch = batch_of(1, 48, False)
    apart = dataclasses.replace(batch, document=torch.arange(48)[None] // 16 + 1)
    want, got = learnt(CONFIG, batch, depths=0)[1], learnt(CONFIG, apart, depths=0)[1]
    assert max(far(got[name], gradient) for name, gradient in want.items()) > 1e-2


def test_states_and_evaluation_are_as_ever():
    model = Language(CONFIG).initialise(0)
    tokens = batch_of(1, 30, False).tokens
    with torch.no_grad():
        want, state = model.eval().hidden(tokens)
        model.chunk = 7
        got, same = model.train().hidden(tokens)
    assert torch.equal(got, want) and [type(x) for x in same.layers] == [type(x) for x in state.layers]


def test_what_is_kept_is_what_enters_each_layer():
    """The plan's figure for checkpointing: of each layer one row of the width, and a little state."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model = Language(preset("toy_1m")).initialise(0).train()
    model.chunk = 256
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden, _ = model.hidden(torch.zeros(1, 4096, dtype=torch.int64))
    nbytes = sum(size for pointer, size in kept.items() if pointer not in own)
    assert hidden.requires_grad and nbytes < 4096 * (64 * 4 * 8 + 400)


MEASURE = """
import pathlib, re, sys, torch
from nautilus.model.language import Language
from nautilus.presets import preset
from nautilus.train.objective import pretrain
from nautilus.data.batch import Batch
# Not ru_maxrss, in which a new process begins with what its parent had.
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
torch.set_num_threads(1)
length = int(sys.argv[1])
model = Language(preset("toy_1m")).initialise(0).train()
model.chunk = 4096
weights = torch.ones(1, length)
weights[:, 0] = 0
before = peak()
objective = pretrain(aux_weight=1e-4)
batch = objective.weigh(Batch(torch.arange(length)[None] % 512, {"next_token": weights}))
sum(total for total, _ in objective.terms(model, batch)[0].values()).backward()
assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
print((peak() - before) / length)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory in /proc")
def test_bytes_per_token_stay_flat_up_to_64k():
    run = lambda length: float(subprocess.check_output([sys.executable, "-c", MEASURE, str(length)], text=True))
    short, long = run(1 << 14), run(1 << 16)
    assert long < short and long < 12_000
