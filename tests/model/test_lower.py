"""Which matrices train in few bits, when, and that nothing else about a model changes."""

import copy
import dataclasses

import pytest
import torch

from nautilus.config import PrecisionTable, apply_overrides
from nautilus.model import lower as lower_module
from nautilus.model.language import Language
from nautilus.model.layout import tensor_table
from nautilus.model.linear import Linear
from nautilus.model.lower import format_of, lower, probe
from nautilus.model.moe import ExpertWeights
from nautilus.ops import low_precision
from nautilus.ops.low_precision import USES
from nautilus.presets import PRECISION, preset, shrink

NVFP4 = PrecisionTable(format="nvfp4", last_layers=1)


def build(table=NVFP4, *, seed=0, compute=torch.bfloat16):
    model = Language(shrink(preset("super"), layers=6, width=32)).initialise(0)
    model.compute = compute
    return lower(model, table, seed=seed).train()


def formats(model):
    """The format of each matrix by its name."""
    named = ((n, m) for n, m in model.named_modules() if isinstance(m, Linear | ExpertWeights))
    return {name: "bf16" if module.site is None else module.site.format for name, module in named}


def gradients(model, tokens):
    model.zero_grad(set_to_none=True)
    hidden, _ = model.hidden(tokens)
    push = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    (hidden.float() * push).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


TOKENS = torch.arange(48).view(2, 24) % 97


@pytest.mark.parametrize("name,layers,tail", [("super", 88, 14), ("ultra", 108, 16)])
def test_the_published_tables_leave_exactly_their_last_layers_in_bf16(name, layers, tail):
    config, table = preset(name), PRECISION[name]
    assert len(config.layers) == layers
    model = lower(Language(config, device="meta"), table)
    found = formats(model)
    lowered = {int(n.split(".")[2]) for n, format in found.items() if format != "bf16"}
    has_some = {i for i, layer in enumerate(config.layers) if layer.letter in "ME"}
    assert lowered == {i for i in has_some if i < layers - tail}
    for matrix, format in found.items():
        part, inside = matrix.split(".")[-1], matrix.startswith("backbone.layers.")
        if not inside or int(matrix.split(".")[2]) >= layers - tail:
            want = "bf16"
        else:
            want = {
                "out_proj": "mxfp8",
                "in_proj": "nvfp4",
                "experts": "nvfp4",
                "up_proj": "nvfp4",
                "down_proj": "nvfp4",
            }
            want = want.get(part, "bf16")  # q, k, v, o and the latent projections
        assert format == want, matrix


def test_the_map_by_names_of_released_tensors():
    config, table = preset("super"), PRECISION["super"]
    names = [n.removesuffix(".weight") for n in tensor_table(config, "stacked")]
    named = {n.replace("model.", "backbone.", 1) for n in names}
    assert format_of("backbone.layers.1.mixer.gate", config, table) == "bf16"
    assert {format_of(n, config, table) for n in named if n.startswith(("mtp.", "lm_head"))} == {"bf16"}
    assert format_of("backbone.layers.1.mixer.shared_experts.up_proj", config, table) == "nvfp4"


def test_the_switches_of_the_table_reach_every_matrix():
    for switch in ("rotate", "stochastic", "square"):
        model = build(dataclasses.replace(NVFP4, **{switch: False}))
        hows = [
            m.site.how(True) for m in model.modules() if isinstance(m, Linear | ExpertWeights) and m.site is not None
        ]
        told = {(how.rotate, how.stochastic, how.square) for how in hows}
        assert told == {tuple(name != switch for name in ("rotate", "stochastic", "square"))}


def test_a_share_of_layers_is_rounded_up_where_no_number_is_given():
    assert [PrecisionTable(format="nvfp4").tail(n) for n in (1, 7, 20, 88)] == [1, 2, 3, 14]
    assert not any(PrecisionTable().lowered(i, 10) for i in range(10))
    table = PrecisionTable(format="nvfp4", first_layers=2, last_layers=3)
    assert [i for i in range(10) if table.lowered(i, 10)] == [2, 3, 4, 5, 6]


def test_the_schedule_says_what_holds_from_when_on():
    table = PrecisionTable(format="nvfp4", schedule=("1_000:table_backward", "2000:bf16"))
    assert [table.recipe_at(t) for t in (0, 999, 1000, 1999, 2000, 10**9)] == [
        "table", "table", "table_backward", "table_backward", "bf16", "bf16",
    ]  # fmt: skip
    for wrong, said in (
        ({"format": "fp4"}, "choose bf16, mxfp8, nvfp4"),
        ({"last_layers": -2}, "last_layers=-2"),
        ({"schedule": ("bf16",)}, "write TOKENS:RECIPE"),
        ({"schedule": ("5:fp8",)}, "choose table, table_backward, bf16, mxfp8"),
        ({"schedule": ("5:bf16", "5:table")}, "forward in tokens"),
    ):
        with pytest.raises(ValueError, match=said):
            PrecisionTable(**wrong)
    typed = apply_overrides(PrecisionTable(), ["format=nvfp4", "schedule=5:bf16,9:mxfp8"])
    assert typed.schedule == ("5:bf16", "9:mxfp8")


def test_a_table_that_is_off_changes_nothing():
    model = build(PrecisionTable())
    assert model.lowered is None and set(formats(model).values()) == {"bf16"}


def test_few_bits_are_for_training_only():
    low, plain = build(), build(PrecisionTable())
    with torch.no_grad():
        assert not torch.equal(low.hidden(TOKENS)[0], plain.hidden(TOKENS)[0])
        assert torch.equal(low.eval().hidden(TOKENS)[0], plain.eval().hidden(TOKENS)[0])


def test_gradients_are_near_those_of_bf16_and_in_float32():
    """With the forward in bf16, so that routers choose the same experts: that each module has what belongs to it."""
    model = build(PrecisionTable(format="nvfp4", last_layers=1, schedule=("0:table_backward",)))
    model.lowered.begin(0, 0)
    low, plain = gradients(model, TOKENS), gradients(build(PrecisionTable()), TOKENS)
    assert low.keys() == plain.keys() and all(g.dtype == torch.float32 for g in low.values())
    for name, gradient in low.items():
        if gradient.ndim > 1:
            along = torch.nn.functional.cosine_similarity(gradient.flatten(), plain[name].flatten(), dim=0)
            assert along > 0.88, f"{name}: {along}"


def test_steps_micro_batches_and_seeds_draw_their_own_bits_and_the_same_ones_again():
    model = build()

    def at(step, rows=0):
        model.lowered.begin(step, 0, row=rows)
        return gradients(model, TOKENS)["backbone.layers.0.mixer.in_proj.weight"]

    first = at(3)
    assert torch.equal(first, at(3))
    assert not torch.equal(first, at(4)) and not torch.equal(first, at(3, rows=16))
    assert torch.equal(at(3, rows=16), at(3, rows=16))
    other = build(seed=1)
    other.lowered.begin(3, 0)
    assert not torch.equal(first, gradients(other, TOKENS)["backbone.layers.0.mixer.in_proj.weight"])


def test_a_module_has_the_same_number_under_every_table():
    one, other = build(), build(PrecisionTable(format="nvfp4", first_layers=2, last_layers=0))
    numbers = [{n: m.site.number for n, m in model.named_modules() if isinstance(m, Linear | ExpertWeights) and m.site}
               for model in (one, other)]  # fmt: skip
    both = numbers[0].keys() & numbers[1].keys()
    assert both and all(numbers[0][name] == numbers[1][name] for name in both)
    assert len(set(numbers[0].values())) == len(numbers[0])
    streams = [m.site.how(True).stream for m in one.modules() if isinstance(m, Linear | ExpertWeights) and m.site]
    assert all(other - this >= USES for this, other in zip(streams, streams[1:], strict=False))


def test_recipes_switch_all_or_the_forward_back_to_bf16():
    table = PrecisionTable(format="nvfp4", last_layers=1, schedule=("10:table_backward", "20:bf16", "30:mxfp8"))
    model, plain = build(table), build(PrecisionTable())
    outs = {}
    for tokens in (0, 10, 20, 30):
        model.lowered.begin(0, tokens)
        with torch.no_grad():
            outs[tokens] = model.hidden(TOKENS)[0]
    with torch.no_grad():
        want = plain.hidden(TOKENS)[0]
    assert torch.equal(outs[20], want) and not torch.equal(outs[0], want) and not torch.equal(outs[30], want)
    # The forward's sums may be cut otherwise than those of the ordinary product, but they are sums of the same numbers.
    torch.testing.assert_close(outs[10].float(), want.float(), rtol=0.05, atol=0.05)
    model.lowered.begin(0, 10)
    few = gradients(model, TOKENS)["backbone.layers.0.mixer.in_proj.weight"]
    assert not torch.allclose(few, gradients(plain, TOKENS)["backbone.layers.0.mixer.in_proj.weight"], rtol=1e-3)


def test_flush_rates_are_counted_by_role_and_operand_only_while_watched():
    model = build()
    model.lowered.begin(0, 0)
    gradients(model, TOKENS)
    assert model.lowered.flush_rates() == {}
    model.lowered.begin(0, 0, watched=True)
    gradients(model, TOKENS)
    rates = model.lowered.flush_rates()
    operands = {"x", "weight", "dy", "dy_turned", "x_turned"}
    assert {f"flush.mamba.in_proj.{o}" for o in operands} <= rates.keys()
    assert {f"flush.experts.{m}.{o}" for o in operands for m in ("up", "down")} <= rates.keys()
    assert all(0 <= rate < 0.6 for rate in rates.values())
    # Of normal numbers a block's largest is about 2 sigma: those below a 24th of it, and half of those up to there.
    assert 0.03 < rates["flush.mamba.in_proj.weight"] < 0.15


def test_a_copy_of_a_model_stands_where_it_stands():
    model = build()
    other = copy.deepcopy(model)
    other.lowered.begin(5, 0)
    sites = [m.site for m in other.modules() if isinstance(m, Linear | ExpertWeights) and m.site]
    assert sites and all(site.model is other.lowered for site in sites) and model.lowered.step == 0


def test_the_probe_refuses_a_device_whose_rounding_gives_zeros(monkeypatch):
    probe()
    real = low_precision.engine_for

    def broken(*args):
        quantise, product = real(*args)
        zeros = lambda x, first, trip: (lambda v, top, n: (v * 0 if trip.address else v, top, n))(
            *quantise(x, first, trip)
        )  # noqa: E731
        return low_precision.Engine(zeros, product)

    monkeypatch.setattr(low_precision, "engine_for", broken)
    with pytest.raises(ValueError, match="train in bf16"):
        lower_module.lower(build(PrecisionTable()), NVFP4)
