import dataclasses

import pytest
import torch

from nautilus.data.tokenizer import SMALLEST, train_tokenizer
from nautilus.model.language import Language
from nautilus.ops.cpu.library import native
from nautilus.presets import preset, shrink
from nautilus.serve import Engine, Sampling
from nautilus.serve.forward import Step
from nautilus.serve.memory import Berths, pages_for

torch.set_num_threads(1)
TOKENIZER = train_tokenizer([], vocab=SMALLEST)
TOKENIZER.stop = ()
GREEDY = Sampling(temperature=0, max_tokens=9)
NATIVE = pytest.mark.skipif(native().functions is None, reason="only native steps are recorded")


def model_of(name, dtype=torch.bfloat16):
    config = dataclasses.replace(shrink(preset(name)), vocab=TOKENIZER.vocab, eos=())
    return Language(config, dtype=dtype).initialise(3).requires_grad_(False).eval()


def facts(completions):
    return [(one.tokens, one.logprobs) for one in completions]


def replays_what_it_computes(model):
    """Whether an engine whose steps are recorded gives the bits of one that computes each."""
    prompts = [[1, 2, 3], [4] * 20, [5, 6]]
    engine, computing = (Engine(model, TOKENIZER, max_tokens=40, rows=3) for _ in range(2))
    for rows in (1, 2, 3):
        computing.forward.steps[rows] = Step(computing.forward, rows, rows)
        computing.forward.steps[rows].recorded.may_record = False
    for some in (prompts, prompts[1:2]):
        assert facts(engine.generate(some, GREEDY)) == facts(computing.generate(some, GREEDY))
    assert all(step.recorded.tape is None for step in computing.forward.steps.values())
    return engine.forward.steps[1].recorded.tape is not None and engine.forward.steps[3].recorded.tape is not None


@NATIVE
@pytest.mark.parametrize("name", ["toy", "nano", "super", "llama_3_1_8b", "qwen3_30b_a3b", "gpt_oss_20b"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_replayed_step_has_the_bits_of_a_computed_one(name, dtype):
    assert replays_what_it_computes(model_of(name, dtype))


@NATIVE
@pytest.mark.parametrize("name", ["super", "llama_3_1_8b", "qwen3_30b_a3b"])
@pytest.mark.parametrize("format", ["nvfp4", "fp8_e4m3"])
def test_a_step_on_matrices_in_few_bits_is_replayed_with_the_same_bits(name, format, in_few_bits):
    assert replays_what_it_computes(in_few_bits(model_of(name), format))


@pytest.mark.parametrize("name", ["toy", "super", "llama_3_1_8b", "qwen3_30b_a3b"])
def test_a_request_has_the_same_answer_in_any_company_and_any_place(name):
    """Bit for bit, log-probs included: alone, after others that left their memory behind, in a full house."""
    model, prompts = model_of(name), [[1, 2, 3], [4] * 20, [5, 6], [7] * 9]
    one_by_one = Engine(model, TOKENIZER, max_tokens=40, rows=1)
    together = Engine(model, TOKENIZER, max_tokens=40, rows=3, chunk=7)
    want = facts(one_by_one.generate(prompts, GREEDY))
    got = facts(together.generate(prompts, GREEDY))
    assert [tokens for tokens, _ in got] == [tokens for tokens, _ in want]
    if native().functions is not None:
        assert got == want
    assert facts(together.generate(prompts[::-1], GREEDY))[::-1] == got


def test_requests_wait_for_room_and_leave_it_behind():
    model = model_of("toy")
    berths = Berths(model, rows=3, max_tokens=64)
    first = berths.take(64)
    assert first is not None and len(first.pages) == 4
    others = [berths.take(20), berths.take(1)]
    assert [len(one.pages) for one in others] == [2, 1] and berths.take(1) is None
    assert len({*first.pages, *others[0].pages, *others[1].pages}) == 7
    berths.give_back(first)
    again = berths.take(64)
    assert again is not None and again.slot == first.slot and again.length == 0
    assert [pages_for(tokens) for tokens in (1, 16, 17)] == [1, 1, 2]


def test_requests_of_a_model_without_keys_and_values_wait_for_slots_only():
    config = dataclasses.replace(shrink(preset("toy")), vocab=TOKENIZER.vocab)
    config = dataclasses.replace(config, layers=tuple(layer for layer in config.layers if layer.letter != "*"))
    berths = Berths(Language(config).initialise(3), rows=3, max_tokens=64)
    assert all(berths.take(64) for _ in range(3)) and berths.take(1) is None


def test_a_stream_that_is_dropped_frees_its_room():
    engine = Engine(model_of("toy"), TOKENIZER, max_tokens=40, rows=1)
    for _ in range(3):
        stream = engine.stream([1, 2, 3], GREEDY)
        next(stream)
        stream.close()
    assert len(engine.generate([[1, 2, 3]], GREEDY)[0].tokens) == 9


@NATIVE
@pytest.mark.parametrize("cache", ["fp8", "int8"])
def test_a_narrow_cache_changes_log_probs_a_little(cache):
    model, prompt = model_of("toy"), [[1, 2, 3, 4, 5, 6, 7, 8] * 4]
    short = Sampling(temperature=0, max_tokens=1)
    wide, narrow = (Engine(model, TOKENIZER, max_tokens=64, cache=c).generate(prompt, short)[0] for c in ("", cache))
    assert wide.logprobs != narrow.logprobs
    assert narrow.logprobs == pytest.approx(wide.logprobs, abs=0.05)


def test_training_between_two_runs_is_seen():
    model = model_of("toy", torch.float32).requires_grad_(True)
    engine = Engine(model, TOKENIZER, max_tokens=40)
    before = facts(engine.generate([[1, 2, 3]], GREEDY))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    after = facts(engine.generate([[1, 2, 3]], GREEDY))
    assert after != before and after == facts(Engine(model, TOKENIZER, max_tokens=40).generate([[1, 2, 3]], GREEDY))
