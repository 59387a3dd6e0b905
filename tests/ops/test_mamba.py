"""The whole mixer, composed of ops: fast forms against references, and any cut of the tokens."""

from functools import partial

import pytest
import torch

from nautilus.ops.mamba import mamba, mamba_composed

SIZE = {"groups": 2, "eps": 1e-5}


def inputs(time, seed=0):
    rows, heads, width, groups, state, taps = 2, 4, 3, 2, 5, 4
    inner, channels = heads * width, heads * width + 2 * groups * state
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)
    return {
        "input_BTE": normal(rows, time, inner + channels + heads),
        "weight_CW": normal(channels, taps),
        "bias_C": normal(channels),
        "dt_bias_H": normal(heads) - 1,
        "a_H": -torch.exp(normal(heads)),
        "skip_H": normal(heads),
        "norm_I": normal(inner),
        "tail_BRC": normal(rows, taps - 1, channels),
        "state_BHPN": normal(rows, heads, width, state),
    }


@pytest.mark.parametrize("time", [1, 9, 70])
def test_the_composed_mixer_equals_the_one_composed_of_references(time, monkeypatch, pushed, close):
    position = torch.arange(time)
    reach_BT = torch.where(position < 4, position + 2, position - 4).expand(2, -1)
    t, function = inputs(time), partial(mamba, **SIZE, reach_BT=reach_BT)
    got, got_grads = pushed(function, t)
    monkeypatch.setenv("NAUTILUS_OPS", "reference")
    want, want_grads = pushed(function, t)
    assert len(got) == 3
    for index, (g, w) in enumerate(zip(got, want, strict=True)):
        close(f"output {index}", g, w, 1e-12)
    for name in t:
        close(f"d{name}", got_grads[name], want_grads[name], 1e-10)


def test_the_skip_the_gate_and_the_norm_stand_where_the_paper_has_them():
    """One token without memory, by hand: the scan gives dt (b . c) x."""
    t = inputs(1) | {"tail_BRC": None, "state_BHPN": None}
    out, tail, state = mamba(**t, **SIZE)
    z, x, b, c, dt = t["input_BTE"][:, 0].split([12, 12, 10, 10, 4], dim=-1)
    assert torch.equal(tail[:, -1], torch.cat([x, b, c], -1)) and not tail[:, :-1].any()
    mixed = torch.cat([x, b, c], -1) * t["weight_CW"][:, -1] + t["bias_C"]
    x, b, c = (mixed * mixed.sigmoid()).split([12, 10, 10], dim=-1)
    dt = (dt + t["dt_bias_H"]).exp().log1p()
    inner = (b * c).view(2, 2, 5).sum(-1).repeat_interleave(2, -1)
    y = x.view(2, 4, 3) * (dt * inner + t["skip_H"])[..., None]
    v = (y.flatten(1) * z * z.sigmoid()).view(2, 2, 6)
    want = (v / (v.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(1) * t["norm_I"]
    torch.testing.assert_close(out[:, 0], want)
    want_state = torch.einsum("bh,bhp,bhn->bhpn", dt, x.view(2, 4, 3), b.view(2, 2, 5).repeat_interleave(2, 1))
    torch.testing.assert_close(state, want_state)


def test_native_takes_float32_and_float64_goes_to_torch():
    t = {n: v.float() for n, v in inputs(5).items()}
    assert torch.equal(mamba(**inputs(5), **SIZE)[0], mamba_composed(**inputs(5), **SIZE)[0])
    torch.testing.assert_close(mamba(**t, **SIZE)[0], mamba_composed(**t, **SIZE)[0], rtol=1e-5, atol=1e-5)
