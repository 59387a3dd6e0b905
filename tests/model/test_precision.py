"""Every cast of the model is written down, and what bf16 costs is bounded."""

import collections
import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nautilus.ops.loss import token_logprob, weighted_nll
from nautilus.presets import preset, shrink

ROWS, TIME = 2, 19


def tokens(seed=0, rows=ROWS, time=TIME):
    return torch.randint(0, 97, (rows, time), generator=torch.Generator().manual_seed(seed))


class Promotions(TorchDispatchMode):
    """Operations fed two float widths at once, by (file that called them, operation). Scalars do not count."""

    def __init__(self):
        super().__init__()
        self.seen = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = tree_leaves((args, kwargs or {}))
        widths = {t.dtype for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point() and t.ndim > 0}
        if len(widths) > 1:
            self.seen[nearest_file(sys._getframe(1)), func.name().removeprefix("aten::").split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def nearest_file(frame):
    """The nautilus module that asked for the operation; 'autograd' for the derivative of one of PyTorch's own."""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("nautilus."):
            return module.removeprefix("nautilus.")
        frame = frame.f_back
    return "autograd"


# The custom functions compute in float32 from bf16 inputs on purpose, without a widened copy of them; PyTorch's fused
# attention keeps its log-sum-exp in float32. Nothing else may mix, and nothing in model/ at all.
ON_PURPOSE = {
    ("ops.ssd", "mul"),
    ("ops.ssd", "copy_"),
    ("ops.norm", "mul"),
    ("ops.norm", "mul_"),
    ("ops.norm", "copy_"),
    ("ops.conv", "copy_"),
    ("ops.attention", "add_"),
    ("ops.attention", "copy_"),
    ("ops.loss", "mul"),
    ("ops.loss", "copy_"),
    ("ops.loss", "add_"),
    ("autograd", "_scaled_dot_product_flash_attention_for_cpu_backward"),
}


def test_every_cast_is_written_down(name, stir):
    """float32 masters, bf16 compute, forward, backward and decode: no operation promotes one side in silence."""
    model = stir(shrink(preset(name)), dtype=torch.float32).train()
    model.compute = torch.bfloat16
    model.collect_balance(True)
    tokens_BT, document_BT = tokens(), torch.tensor([[0] * 5 + [1] * 14] * 2)
    with Promotions() as promotions:
        hidden_BTD, state = model.hidden(tokens_BT, document_BT=document_BT)
        depths = model.mtp_hidden(hidden_BTD, tokens_BT, 2, document_BT) if model.config.mtp else []
        loss = sum(total for total, _ in model.auxiliary) + model.head(hidden_BTD).log_softmax(-1)[..., 3].sum()
        for rows_RD in (h.flatten(0, 1) for h in (hidden_BTD, *depths)):
            loss = loss + weighted_nll(rows_RD, model.head_weight, tokens_BT.flatten(), torch.ones(ROWS * TIME))
            loss = loss + token_logprob(rows_RD, model.head_weight, tokens_BT.flatten()).sum()
        loss.backward()
        with torch.no_grad():
            model.hidden(tokens_BT[:, :1], state=state)
    assert hidden_BTD.dtype == torch.bfloat16
    assert not set(promotions.seen) - ON_PURPOSE
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_the_watch_for_promotions_sees_one():
    with Promotions() as promotions:
        torch.ones(2, requires_grad=True) * torch.ones(2, dtype=torch.bfloat16)
    assert promotions.seen == {("autograd", "mul"): 1}


@torch.no_grad()
def test_bf16_stays_close_to_float64(name, stir):
    """Each of the L layers may add an error of one bf16 rounding, 2^-8 of the residual; they add up to at most L 2^-8.

    A token whose experts differ (two scores nearer than that error) may be off by any amount: so the median over
    tokens for all models, and the worst token only where nothing is routed.
    """
    config = shrink(preset(name))
    exact, model = stir(config), stir(config, dtype=torch.float32)
    model.compute = torch.bfloat16
    want, got = (m.hidden(tokens(13, time=40))[0].double() for m in (exact, model))
    error_BT = (got - want).norm(dim=-1) / want.norm(dim=-1)
    bound = len(config.layers) * 2.0**-8
    assert error_BT.median() < bound
    if not model.experts_mixers():
        assert error_BT.max() < 2 * bound
    model.compute = torch.float32
    assert (model.hidden(tokens(13, time=40))[0] - want).norm() / want.norm() < len(config.layers) * 2.0**-20


@torch.no_grad()
def test_states_in_bf16_keep_the_scan_in_float32_and_the_logits_too(stir):
    model = stir(shrink(preset("toy")), dtype=torch.bfloat16)
    logits, state = model(tokens())
    assert logits.dtype == torch.float32
    assert state.layers[0].ssm_BHPN.dtype == torch.float32 and state.layers[0].tail_BRC.dtype == torch.bfloat16
    assert state.layers[3].keys_values[0].dtype == torch.bfloat16
