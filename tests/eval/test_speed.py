import dataclasses
import time

import pytest
import torch

from nautilus.config import Attention, Config, Experts, Mamba, Mlp, lay, weight_count
from nautilus.eval import random_model as made
from nautilus.eval.random_model import bytes_of, random_model, require_memory
from nautilus.eval.speed import SETTLE, Meter, Work, memory_of, stored_bytes
from nautilus.eval.where import HEAD, OUTSIDE, Timed, caller, part_of, where
from nautilus.model.linear import Matrix
from nautilus.model.moe import ExpertWeights
from nautilus.ops.cpu.library import native
from nautilus.ops.formats import Packed
from nautilus.presets import preset, shrink
from nautilus.runtime import UserError

torch.set_num_threads(1)
MAMBA = Mamba(heads=4, head_width=16, state=32, groups=2)
ATTENTION = Attention(heads=4, groups=2, head_width=16)
EXPERTS = Experts(experts=8, active=3, hidden=64, shared=32, latent=32)
CONFIG = Config(vocab=320, width=64, layers=lay("ME*-", MAMBA, ATTENTION, EXPERTS, Mlp(hidden=96)), eos=())
STATE = 2 * (4 * 16 * 32 * 4 + 3 * (64 + 2 * 2 * 32) * 2)  # read and written, float32 and a tail of bf16
KEYS = 2 * 2 * 16 * 2  # and values, of a token
ONE = Work(prompt=20, steps=4)


def meter_of(*works, config=CONFIG, format="bf16", **named):
    return Meter(random_model(config, format), works or (ONE,), **named)


needs_native = pytest.mark.skipif(native().functions is None, reason=native().reason)


# ----- what a step must read -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
def test_a_step_reads_weights_once_and_states_keys_and_values_of_every_row(rows):
    everyone = dataclasses.replace(EXPERTS, active=8)
    config = dataclasses.replace(CONFIG, layers=(MAMBA, everyone, *CONFIG.layers[2:]))
    work = dataclasses.replace(ONE, sequences=rows)
    with meter_of(work, config=config).ready(work) as ready:
        buffers = 8  # of the router's bias, which is none of the weights that are counted here
        weights = weight_count(config)["main"] - config.vocab * config.width - buffers
        assert ready.bytes == 2 * (weights + rows * config.width) + rows * (STATE + KEYS * 22)


def test_of_the_experts_those_that_were_chosen_are_read():
    many = Work(prompt=20, sequences=8, steps=4)
    meter = meter_of(ONE, many)
    one = 2 * 64 * 32 * 2  # both matrices of an expert
    with meter.ready(ONE) as ready:
        assert ready.reads["backbone.layers.1.mixer.experts"] == 3 * one
    with meter.ready(many) as ready:
        assert 3 * one < ready.reads["backbone.layers.1.mixer.experts"] <= 8 * one


@pytest.mark.parametrize("cache", ["bf16", "int8"])
def test_caches_that_are_filled_are_as_long_as_those_that_were_read(cache):
    long = dataclasses.replace(ONE, prompt=40, sequences=2)
    everyone = dataclasses.replace(EXPERTS, active=8)
    meter = meter_of(long, cache=cache, config=dataclasses.replace(CONFIG, layers=(MAMBA, everyone, ATTENTION)))
    with meter.ready(long) as ready:
        read = dict(ready.reads), [berth.length for berth in ready.berths]
    with meter.ready(long, filled=True) as ready:
        assert (dict(ready.reads), [berth.length for berth in ready.berths]) == read
        hidden = ready.engine.forward.step(ready.berths, [1, 1])
        assert hidden.isfinite().all() and not torch.equal(*hidden), "each has a history of its own"
        assert ready.turn().tokens_per_s > 0


def test_a_window_and_a_tied_head_are_accounted_for():
    near = dataclasses.replace(ATTENTION, window=5)
    config = dataclasses.replace(CONFIG, layers=(near, ATTENTION), tied=True)
    with meter_of(config=config).ready(ONE) as ready:
        projections = 2 * 2 * 64 * (64 + 32)
        assert sum(v for k, v in ready.reads.items() if ".0.mixer" in k) == projections + 5 * KEYS
        assert sum(v for k, v in ready.reads.items() if ".1.mixer" in k) == projections + 22 * KEYS
        assert ready.reads["lm_head"] == 320 * 64 * 2 and ready.reads["backbone.embeddings"] == 64 * 2


@pytest.mark.skipif(native().functions is None, reason="only native kernels read keys and values in fp8")
def test_matrices_in_few_bits_and_stored_states_count_as_they_are_stored():
    with meter_of(format="nvfp4", state="int8", cache="fp8").ready(ONE) as ready:
        number = 1 / 2 + 1 / 16
        assert ready.reads["lm_head"] == 320 * 64 * number + 4
        assert ready.reads["backbone.layers.1.mixer.experts"] == 3 * 2 * (64 * 32 * number + 4)
        assert ready.reads["backbone.layers.2.mixer"] == 22 * KEYS // 2
        tail, scale = 3 * 192 * 2, 4 * 4 * 16
        assert ready.reads["backbone.layers.0.mixer"] - own(ready, 0) == 2 * (tail + 4 * 16 * 32 + scale)


def own(ready, layer):
    """Bytes of the parameters of a mixer itself, which `reads` holds together with its states."""
    mixer = ready.engine.model.backbone.layers[layer].mixer
    return sum(parameter.nbytes for parameter in mixer.parameters(recurse=False))


# ----- turns ---------------------------------------------------------------------------------------------------------


def test_a_turn_is_tokens_by_seconds_and_the_share_of_the_time_that_memory_needs(monkeypatch):
    meter = meter_of(work := Work(prompt=20, sequences=2, steps=6))
    monkeypatch.setattr(meter, "bandwidth", lambda: 1e6)
    with meter.ready(work) as ready:
        clock = iter([10.0, 12.0])
        monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
        turn = ready.turn()
    assert turn.tokens_per_s == 2 * 6 / 2 and turn.bandwidth == 1e6
    assert turn.share == pytest.approx(6 * ready.bytes / 1e6 / 2)


def test_a_prompt_is_timed_alone():
    meter = meter_of(work := Work(prompt=30))
    with meter.ready(work) as ready:
        turn = ready.turn()
        assert ready.bytes == 0 and turn.tokens_per_s > 0 and (turn.bandwidth, turn.share) == (None, None)
        assert ready.berths[0].length == 30


def test_every_turn_begins_after_the_same_prompt_and_memory_is_given_back():
    meter = meter_of(ONE, cache="bf16")
    free = sorted(meter.engine.berths.pool.unused)
    for _ in range(2):
        with meter.ready(ONE) as ready:
            for _ in range(2):
                ready.turn()
                assert ready.berths[0].length == ONE.prompt
            assert len(meter.engine.berths.pool.unused) < len(free)
        assert sorted(meter.engine.berths.pool.unused) == free and len(meter.engine.berths.slots) == 1
    with pytest.raises(KeyError), meter.ready(ONE):
        raise KeyError
    assert sorted(meter.engine.berths.pool.unused) == free


def test_tokens_differ_from_step_to_step_and_a_seed_repeats_them():
    drawn = [[meter_of(seed=seed).tokens(30)] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0][0])) > 15


@needs_native
def test_steps_are_replayed_while_the_clock_runs(monkeypatch):
    meter = meter_of()
    with meter.ready(ONE) as ready:
        assert ready.step.recorded.tape is not None
        monkeypatch.setattr(ready.step, "compute", lambda: pytest.fail("a step was computed"))
        assert ready.turn().share > 0


def test_without_native_kernels_speed_is_measured_and_nothing_is_said_of_memory(monkeypatch):
    monkeypatch.setenv("NAUTILUS_OPS", "torch")
    off = dataclasses.replace(native(), functions=None)
    monkeypatch.setattr("nautilus.eval.speed.native", lambda: off)
    with meter_of().ready(ONE) as ready:
        turn = ready.turn()
        assert turn.tokens_per_s > 0 and (turn.bandwidth, turn.share) == (None, None)
        assert ready.bytes > 0 and where(ready) == []


def test_work_that_the_model_has_no_room_for_is_refused():
    small = dataclasses.replace(CONFIG, positions=100)
    with pytest.raises(UserError, match="prefill 98 was asked for, which takes 101 positions; the model has 100"):
        meter_of(Work(prompt=98), config=small)
    with pytest.raises(UserError, match="no work"):
        Meter(random_model(CONFIG, "bf16"), [])
    meter = meter_of(work := Work(prompt=20, sequences=3, steps=4))
    del meter.engine.berths.pool.unused[4:]
    with pytest.raises(UserError, match="of 2 such sequences fill"), meter.ready(work):
        pass
    assert len(meter.engine.berths.pool.unused) == 4


def test_work_has_a_name():
    assert Work(prompt=4096).name == "prefill 4,096" and Work(prompt=4096, steps=1).name == "decode after 4,096"
    assert Work(prompt=16, sequences=8, steps=1).name == "8 sequences after 16"
    assert Work(prompt=16, steps=1).positions == 16 + SETTLE and Work(prompt=16, steps=50).positions == 66


# ----- where the time goes -------------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("format", ["bf16", "nvfp4"])
def test_every_native_call_of_a_step_belongs_to_a_part_and_every_byte_too(format):
    with meter_of(format=format).ready(ONE) as ready:
        before, parts = ready.step.recorded.tape, {part.part: part for part in where(ready)}
        tape, turn = ready.step.recorded.tape, ready.turn()
        assert tape is not None and tape is not before and not isinstance(tape, Timed) and turn.share > 0
        assert sum(part.calls for part in parts.values()) == len(tape.names)
        assert sum(part.bytes for part in parts.values()) == ready.bytes
    product = "quant_linear" if format == "nvfp4" else "linear"
    for name in ("Mamba in_proj", "Attention o_proj", "Mlp up_proj", "Experts shared.down_proj"):
        assert [*parts[name].kernels] == [product] and parts[name].calls == 1 and parts[name].seconds > 0
    assert [*parts["head"].kernels] == [product, "peak"], "what a draw needs of the logits is found in the same step"
    assert parts["head"].bytes == ready.reads["lm_head"]
    assert parts["Experts"].bytes == ready.reads["backbone.layers.1.mixer.experts"]
    assert parts["Mamba"].bytes > STATE and parts["Attention"].bytes == 22 * KEYS
    assert [*parts["Attention"].kernels] == ["kv_write", "attention"] and [*parts["Mamba"].kernels] == ["mamba"]
    assert parts["residual"].calls == parts["norms"].calls == len(CONFIG.layers)


@needs_native
def test_the_times_of_the_parts_and_of_what_is_outside_are_those_of_the_step(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    class Slow(Timed):
        """Call i takes i seconds, and what is around them 7."""

        def __init__(self, tape):
            super().__init__(tape)
            self.functions = [self.slowed(number, function) for number, function in enumerate(self.functions, 1)]

        def slowed(self, seconds, function):
            def run(*arguments):
                now[0] += seconds
                return function(*arguments)

            return run

        def replay(self):
            now[0] += 7
            return super().replay()

    monkeypatch.setattr("nautilus.eval.where.Timed", Slow)
    with meter_of().ready(ONE) as ready:
        parts = where(ready)
    seconds, count = {part.part: part.seconds for part in parts}, sum(part.calls for part in parts)
    assert parts[-1].part == OUTSIDE and parts[-1].seconds == 7
    assert sum(seconds.values()) == count * (count + 1) / 2 + 7
    assert [*seconds.values()][:-1] == sorted([*seconds.values()][:-1], reverse=True)
    assert seconds["embeddings"] == 1 and seconds["head"] == count - 1 + count
    assert all(sum(part.kernels.values()) == part.seconds for part in parts[:-1])


def test_parts_are_named_by_the_kind_of_layer():
    names = ["backbone.embeddings", "backbone.layers.0.norm", "backbone.layers.0", "backbone.norm_f", HEAD]
    assert [part_of(name, CONFIG) for name in names] == ["embeddings", "norms", "residual", "norm_f", "head"]
    assert part_of("backbone.layers.0.mixer", CONFIG) == "Mamba"
    assert part_of("backbone.layers.1.mixer.gate", CONFIG) == "Experts gate"
    assert caller("backbone.layers.1.mixer.experts", {"backbone.layers.1.mixer"}) == "backbone.layers.1.mixer"
    assert caller("lm_head", {"backbone.layers.1.mixer"}) == HEAD


# ----- random models -------------------------------------------------------------------------------------------------


def matrices_of(model):
    """Of linear layers and experts, one by one."""
    for module in model.modules():
        if isinstance(module, ExpertWeights):
            yield from (*module.up_proj, *module.down_proj)
        elif isinstance(module, Matrix):
            yield module.weight


@pytest.mark.parametrize("format", ["f32", "bf16", "nvfp4", "mxfp4", "int4", "int8", "fp8_e4m3"])
def test_random_models_of_every_format_compute_and_take_the_memory_that_was_said(format):
    model, packed = random_model(CONFIG, format), []
    for matrix in matrices_of(model):
        numbers = matrix.float() if isinstance(matrix, torch.Tensor) else matrix.decode()
        assert 0.8 < numbers.std() / CONFIG.std < 1.2 and abs(numbers.mean()) < CONFIG.std / 5
        packed += [matrix] if isinstance(matrix, Packed) else []
    assert len(packed) == (0 if format in ("f32", "bf16") else 13 + 2 * 8)
    assert {matrix.format for matrix in packed} <= {format}
    logits, _ = model(torch.arange(40)[None])
    assert logits.isfinite().all() and logits.std() > 0.01
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    assert bytes_of(CONFIG, format)[0] == pytest.approx(parameters + stored_bytes(tuple(packed)), rel=0.03)


@needs_native
@pytest.mark.parametrize("format", ["f32", "bf16", "nvfp4", "int8"])
def test_what_an_engine_packs_takes_the_memory_that_was_said(format):
    layers = dataclasses.replace(MAMBA, heads=16), dataclasses.replace(EXPERTS, hidden=512, shared=512, latent=256)
    config = dataclasses.replace(CONFIG, width=512, vocab=1024, layers=layers)
    meter = meter_of(config=config, format=format)
    with meter.ready(ONE):
        pass
    kept = [form for _, form in meter.engine.forward.packs.values() if form is not None]
    parts = [part for form in kept for part in ([form] if isinstance(form, torch.Tensor) else [form.codes, form.scale])]
    size = sum(part.nbytes for part in parts)
    assert bytes_of(config, format)[1] == pytest.approx(size, rel=0.1)


def test_the_experts_are_matrices_of_their_own_and_a_seed_repeats_a_model():
    first, again, other = (random_model(CONFIG, "nvfp4", seed) for seed in (1, 1, 2))
    tokens = torch.arange(20)[None]
    assert torch.equal(first(tokens)[0], again(tokens)[0]) and not torch.equal(first(tokens)[0], other(tokens)[0])
    up = first.backbone.layers[1].mixer.experts.up_proj
    assert len({matrix.codes.data_ptr() for matrix in up}) == len({str(matrix.codes.tolist()) for matrix in up}) == 8
    router = first.backbone.layers[1].mixer.gate.weight
    assert len(router.unique(dim=0)) == len(router)


def test_a_model_that_does_not_fit_is_refused_with_numbers_before_it_is_made(monkeypatch):
    monkeypatch.setattr(made, "free_bytes", lambda: int(24e9))
    monkeypatch.setattr(torch.nn.Module, "to_empty", lambda *_, **__: pytest.fail("memory was taken"))
    works = [Work(prompt=16, sequences=8, steps=32)]
    with pytest.raises(UserError) as refused:
        require_memory("nano", preset("nano"), "nvfp4", memory_of(preset("nano"), works, 2))
    message = str(refused.value)
    assert "nano (52 layers, vocabulary 131,072) with random weights in nvfp4" in message
    assert "it takes 36.8 GB (weights 18.3, laid out for kernels once more 17.6" in message
    assert "24.0 GB are free" in message and "layers=MEME" in message
    require_memory("nano", dataclasses.replace(preset("nano"), layers=preset("nano").layers[:4]), "nvfp4", 0)


def test_a_format_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match="weights in 'nvfp5' were asked for; choose one of bf16, f32, fp8_e4m3"):
        random_model(shrink(preset("toy")), "nvfp5")


def test_free_memory_is_what_the_system_says():
    assert 1 << 26 < made.free_bytes() < 1 << 50
