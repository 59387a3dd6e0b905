"""The plan against trainings on this machine, and layouts that cannot be."""

import dataclasses
import json
import math

import pytest
import torch

from nautilus.cli import main
from nautilus.config import Attention, Config, Experts, Mamba, Mlp, Nothing, Rotary, lay, weight_count
from nautilus.model.language import Language
from nautilus.ops.cpu.library import native
from nautilus.presets import preset, shrink
from nautilus.runtime import UserError
from nautilus.train.layout import KERNELS, MACHINES, Layout, Machine, Work, refuse
from nautilus.train.objective import pretrain
from nautilus.train.optim import OptimConfig, adamw
from nautilus.train.plan import Plan, refuse_too_large
from nautilus.train.stages import even_stages, stages_of

ONE = Layout()


def plan(config, layout=ONE, **work):
    return Plan(config=config, layout=layout, work=Work(**({"rows": 4, "length": 64} | work)))


def parts(config, layout=ONE, **work):
    return plan(config, layout, **work).memory


@pytest.mark.parametrize("name", ["toy", "nano", "super", "ultra", "nano_4b", "qwen3_30b_a3b", "nemotron_h_4b"])
def test_weights_gradients_and_moments_are_counted_exactly(name, random_rows):
    config = shrink(preset(name))
    model, depths = Language(config).initialise(0).train(), 1 if config.mtp else 0
    objective, optimizer = pretrain(mtp_depths=depths), adamw(model, OptimConfig())
    batch = objective.weigh(random_rows(2, 16))
    sum(total for total, _ in objective.terms(model, batch)[0].values()).backward()
    optimizer.step()
    memory = parts(config, compute=4, checkpointing=False)
    assert memory["weights"] == sum(p.nbytes for p in model.parameters())
    assert memory["gradients"] == sum(p.grad.nbytes for p in model.parameters())
    assert memory["optimizer"] == sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    assert memory["gathered"] == 0


KINDS = (
    Mamba(heads=6, head_width=8, state=16, groups=2, chunk=8),
    Attention(heads=4, groups=2, head_width=20),
    Experts(experts=8, active=3, hidden=24, shared=40, latent=20, scale=2.5),
    Mlp(hidden=72),
)
RELATIVES = (
    Attention(heads=4, groups=2, head_width=20, head_norm=True, rotary=Rotary()),
    Experts(experts=8, active=3, hidden=24, shared=40, gated=True, score="softmax"),
    Mlp(hidden=72, gated=True),
)


@pytest.fixture(params=KERNELS)
def kernels(request, monkeypatch):
    """Which kernels run in the test: those that a GPU would have, as far as PyTorch chooses, or those of CPUs."""
    if request.param == "native" and native().functions is None:
        pytest.skip("there are no native kernels here")
    monkeypatch.delenv("NAUTILUS_OPS", raising=False)
    if request.param == "torch":
        monkeypatch.setenv("NAUTILUS_OPS", "torch")
    if request.param == "torch_cpu":
        monkeypatch.setenv("NAUTILUS_NATIVE", "off")
        native.cache_clear()
    yield request.param
    monkeypatch.undo()
    native.cache_clear()


def kept_by_training(model, depths, batch):
    """Bytes of every tensor that autograd or a layer's own backward saves, each storage once, weights aside."""
    objective = pretrain(mtp_depths=depths, aux_weight=1e-4)
    batch = objective.weigh(batch)
    batch.weights["next_token"][:, 1:] = 1
    own = [*model.parameters(), *model.buffers(), batch.tokens, batch.document, *batch.weights.values()]
    addresses = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in addresses:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        terms = objective.terms(model, batch)
    assert terms
    return sum(kept.values())


PATTERNS = [("M", 0), ("*", 0), ("E", 0), ("-", 0), ("ME*-EM", 0), ("M*", 2)]
STACKS = [*((KINDS, *each) for each in PATTERNS), *((RELATIVES, pattern, 0) for pattern in "*E-")]


@pytest.mark.parametrize("kinds, pattern, depths", STACKS)
@pytest.mark.parametrize("compute", [4, 2])
def test_activations_are_what_the_graph_keeps_to_two_percent(kernels, kinds, pattern, depths, compute, random_rows):
    config = Config(vocab=97, width=48, layers=lay(pattern, *kinds), mtp=lay("*E", *kinds) if depths else ())
    model = Language(config).initialise(0).train()
    model.compute = torch.bfloat16 if compute == 2 else torch.float32
    rows, length = 4, 512
    batch = dataclasses.replace(
        random_rows(rows, length), document=torch.arange(length).div(200, rounding_mode="floor").expand(rows, -1) + 1
    )
    found = kept_by_training(model, depths, batch)
    work = Work(rows=rows, micro=rows, length=length, compute=compute, mtp_depths=depths, checkpointing=False)
    heads = 4 * config.vocab * config.width * (1 + depths)  # the head's gradients, which the plan counts as `loss`
    planned = Plan(config=config, work=work, machine=Machine(kernels=kernels)).memory["activations"]
    assert found - heads == pytest.approx(planned, rel=0.02)


def test_a_gpu_keeps_more_than_the_kernels_of_a_cpu_and_the_prediction_block_is_never_computed_again():
    config = preset("nano")
    kept = [
        dataclasses.replace(plan(config, length=8192, checkpointing=False), machine=Machine(kernels=kernels))
        for kernels in ("native", "torch_cpu", "torch")
    ]
    native_, torch_cpu, gpu = (one.memory["activations"] / 8192 for one in kept)
    assert 1.4 * native_ < torch_cpu < gpu < 2.5 * native_ + 2 * weight_count(config)["main"] / 8192
    assert gpu - torch_cpu == pytest.approx(6 * (2 * 8192 + 4 * 32), rel=1e-3)  # masks and sums of six layers
    super_ = preset("super")
    short, deep = (parts(super_, length=64, rows=1, mtp_depths=depths)["activations"] for depths in (0, 2))
    block = sum(p.numel() for p in Language(super_, device="meta").mtp.layers.parameters())
    assert deep - short > 2 * 2 * block  # its matrices, rounded to bf16, of both depths


def test_spreading_divides_what_each_device_holds():
    config = preset("super")
    whole = parts(config)
    count = weight_count(config)
    biases = sum(layer.experts for layer in (*config.layers, *config.mtp) if isinstance(layer, Experts))
    assert whole["weights"] == 4 * (count["main"] + count["mtp"] - biases)
    spread = parts(config, Layout(dp=256, ep=64, tp=2), rows=512)
    assert spread["weights"] == pytest.approx(whole["weights"] / 512, rel=0.01)
    held = parts(config, Layout(dp=256, ep=64, tp=2, replicas=8), rows=512)
    experts = sum(2 * e.experts * e.hidden * e.latent for e in (*config.layers, *config.mtp) if isinstance(e, Experts))
    assert held["weights"] == pytest.approx(8 * spread["weights"], rel=0.01)
    assert held["weights"] > 4 * experts / 64 and held["weights"] < 4 * (experts / 64 + 8e9)
    stages = parts(config, Layout(pp=8), rows=64)
    assert stages["weights"] < whole["weights"] / 6


def test_checkpointing_keeps_one_layer_and_what_enters_the_others():
    config = preset("nano")
    kept, again = (parts(config, length=8192, checkpointing=flag)["activations"] for flag in (False, True))
    assert again < kept / 8
    assert again > 52 * 8192 * 2 * config.width


def test_time_follows_machine_and_devices():
    config = preset("nano")
    few, many = (plan(config, Layout(dp=g, ep=8), rows=3072, length=8192) for g in (64, 128))
    assert few.seconds["computing"] == pytest.approx(2 * many.seconds["computing"])
    active = 6 * weight_count(config)["active"] * 3072 * 8192
    assert active < few.flops < 1.6 * active
    assert few.seconds["computing"] == pytest.approx(few.flops * 4 / 3 / 64 / (989e12 * 0.4))
    faster = dataclasses.replace(few, machine=MACHINES["gb200"])
    assert faster.seconds["step"] < few.seconds["step"] and 0 < few.mfu < few.machine.efficiency
    assert few.traffic["tp"] == few.traffic["cp"] == few.traffic["pp"] == 0 < few.traffic["ep"] < few.traffic["dp"] * 9


def test_traffic_of_experts_is_tokens_times_active_times_width():
    config = dataclasses.replace(preset("super"), layers=lay("E", *preset("super").layers), mtp=())
    found = plan(config, Layout(dp=8, ep=8), rows=8, length=1024, checkpointing=False).traffic["ep"]
    assert found == 4 * 1024 * 22 * 1024 * 2 * 7 / 8  # there and back, forward and backward, bf16


def test_traffic_of_words_is_of_the_embedding_and_of_each_head():
    config = dataclasses.replace(preset("super"), layers=(Nothing(),))
    sent = lambda **given: plan(config, Layout(tp=2), length=1024, **given).traffic["tp"]
    layers = len(config.layers) * 2 * 1024 * 3 * 2 * config.width / 2
    vectors, numbers = 2 * 1024 * 2 * config.width / 2, 2 * 1024 * 12 / 2
    assert sent(rows=1) - layers == 2 * vectors + numbers
    assert sent(rows=1, mtp_depths=2) - sent(rows=1) > 3 * vectors + 2 * numbers  # another embedding, two heads


def test_stages_have_even_costs():
    assert even_stages([1, 1, 1, 1], 2) == [0, 0, 1, 1]
    assert even_stages([1, 1, 1, 3], 2) == [0, 0, 0, 1]
    assert even_stages([5.0], 1) == [0]
    assert even_stages([9, 1, 1, 9], 4) == [0, 1, 2, 3]


def test_the_head_and_the_prediction_block_count_for_the_last_stage():
    config = preset("super")
    found = {depths: stages_of(config, 4, length=8192, depths=depths) for depths in (0, 2)}
    assert all(own == sorted(own) and set(own) == {0, 1, 2, 3} for own in found.values())
    assert found[2].count(3) < found[0].count(3) < found[0].count(0)
    idle = dataclasses.replace(
        config, layers=(Nothing(), *config.layers[:3], Nothing(), Nothing(), *config.layers[3:5])
    )
    assert set(stages_of(idle, 5, length=8, depths=0)) == set(range(5))
    with pytest.raises(UserError, match="6 stages cannot share 5"):
        refuse(idle, Layout(pp=6), Work())


def test_what_is_planned_and_not_built_is_refused_only_when_it_is_to_run():
    refuse(preset("nano"), Layout(tp=8), Work())
    with pytest.raises(UserError, match="tp=8 does not divide attention's groups=2"):
        refuse(preset("nano"), Layout(tp=8), Work(), now=True)
    refuse(preset("super"), Layout(tp=2, cp=8), Work())
    with pytest.raises(UserError, match="cp=8 does not divide Mamba's groups/tp=4"):
        refuse(preset("super"), Layout(tp=2, cp=8), Work(), now=True)


@pytest.mark.parametrize(
    "name, layout, work, message",
    [
        ("ultra", {"dp": 4, "tp": 8, "pp": 2, "ep": 128}, {}, "ep=128 does not divide dp x cp x tp / replicas = 32"),
        ("super", {"dp": 24, "tp": 2, "cp": 1, "ep": 32}, {}, "ep=32 does not divide dp x cp x tp / replicas = 48"),
        ("super", {"tp": 2, "cp": 128}, {}, "cp=128 does not divide Mamba's heads/tp=64"),
        ("nano", {"dp": 3, "ep": 3}, {}, "ep=3 does not divide experts=128"),
        ("nano", {"tp": 16}, {}, "tp=16 does not divide Mamba's heads=64 and groups=8"),
        ("nano", {"pp": 64}, {}, "64 stages cannot share 52"),
        ("nano_4b", {"dp": 2, "ep": 2}, {}, "no layer has experts"),
        ("nano", {"dp": 5}, {}, "rows=3072 is no multiple of dp=5"),
        ("nano", {"cp": 2}, {"length": 1023}, "length=1023 cannot be dealt among cp=2"),
        ("nano", {"cp": 2}, {"length": 14}, "at least 8"),
        ("nano", {"pp": 0}, {}, "pp=0 must be at least 1"),
        ("nano", {"dp": 3, "replicas": 2}, {}, "replicas=2 does not divide dp=3"),
        ("nano", {}, {"compute": 3}, "compute"),
    ],
)
def test_impossible_layouts_are_refused_with_the_reason(name, layout, work, message):
    with pytest.raises(UserError, match=message):
        refuse(preset(name), Layout(**layout), Work(**work))


@pytest.mark.parametrize(
    "name, layout, rows, length",
    [
        ("nano", {"tp": 8, "pp": 4, "ep": 8, "cp": 8}, 48, 1 << 19),
        ("super", {"dp": 8, "tp": 2, "ep": 64, "cp": 64}, 16, 1 << 20),
        ("ultra", {"tp": 8, "pp": 2, "ep": 128, "cp": 32}, 24, 1 << 20),
    ],
)
def test_the_published_long_context_layouts_are_possible(name, layout, rows, length):
    refuse(preset(name), Layout(**layout), Work(rows=rows, length=length))
    with pytest.raises(UserError, match="bounds it"):
        refuse(preset(name), Layout(**(layout | {"cp": 2 * layout["cp"]})), Work(rows=rows, length=length))


def test_the_command_says_it_in_numbers_or_refuses(capsys):
    assert main("plan ultra gpus=2048 tp=8 pp=2 ep=128 device=gb200 --json".split()) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["fits"] and facts["memory"]["total"] == sum(v for k, v in facts["memory"].items() if k != "total")
    assert facts["seconds"]["step"] == pytest.approx(sum(v for k, v in facts["seconds"].items() if k != "step"))
    assert facts["days"] == pytest.approx(20e12 / facts["tokens_per_s"] / 86400) and math.isfinite(facts["days"])
    assert main("plan nano".split()) == 0
    assert "does not fit into 80 GB" in capsys.readouterr().out
    assert main("plan nano gpus=8 ep=3".split()) == 2
    assert "this layout cannot be" in capsys.readouterr().err
    assert main("plan super gpus=64 tp=2 --json".split()) == 0
    assert json.loads(capsys.readouterr().out)["layout"]["dp"] == 32
    assert main("plan nano gpus=9 tp=2".split()) == 2
    assert "gpus=9 is not pp=1 x dp=4 x cp=1 x tp=2 = 8" in capsys.readouterr().err
    assert main("plan nano device=abacus".split()) == 2
    assert "have h100" in capsys.readouterr().err


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "words, message",
    [
        ("toy gpus=many", "gpus='many' is not a whole number"),
        ("toy gpus=8 tp=1.5", "tp='1.5' is not a whole number"),
        ("nano gpus=1e9", "rows=3072 is no multiple of dp=1000000000"),
        ("toy gpus=-4", "gpus=-4 is not pp=1"),
        ("toy tokens=-1", "tokens=-1.0 of the whole training must be a finite number"),
        ("toy tokens=nan", "tokens='nan'"),
        ("toy machine.flops=0 machine.domain=0", "machine has flops=0.0, domain=0; its numbers must be finite"),
        ("toy machine.link=nan", "machine.link='nan'"),
        ("toy work.mtp_depths=1e9", "mtp_depths=1000000000 tokens ahead do not lie in rows of length=8192"),
        ("toy work.rows=1e300", "tokens a step"),
        ("toy work.micro=1e300", "are more than the rows=3072 of a step"),
    ],
)
def test_a_plan_of_what_cannot_be_is_one_message(capsys, words, message):
    assert main(["plan", *words.split()]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1


def test_a_training_that_no_memory_holds_is_refused():
    small, large = plan(shrink(preset("nano"))), plan(shrink(preset("nano")), rows=10**9, micro=10**9)
    refuse_too_large(small, 10**9)
    with pytest.raises(UserError, match=r"rows=1000000000 of length=64 .* need .* GB of memory .*smaller micro="):
        refuse_too_large(large, 10**12)
    with pytest.raises(UserError, match=r"rows 1,024.0"):
        refuse_too_large(plan(shrink(preset("nano")), rows=10**9), 10**12)
