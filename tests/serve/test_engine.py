import dataclasses
import inspect

import hypothesis.strategies as st
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from tokenizers.processors import TemplateProcessing

from nautilus.config import Config, Experts, Mamba, lay
from nautilus.data.chat import chat_tokens
from nautilus.data.tokenizer import SMALLEST, Tokenizer, train_tokenizer
from nautilus.model.language import Language
from nautilus.ops.cpu.library import native
from nautilus.presets import preset, shrink
from nautilus.runtime import UserError
from nautilus.serve import Engine, Sampling

torch.set_num_threads(1)
GREEDY = Sampling(temperature=0, max_tokens=9)
COOL = Sampling(temperature=0.8, top_p=0.95, seed=5, max_tokens=9)


def tokenizer_of():
    return train_tokenizer([], vocab=SMALLEST)  # one token per byte, and the control tokens


TOKENIZER, UNENDING = tokenizer_of(), tokenizer_of()
UNENDING.stop = ()
EOS, VOCAB = TOKENIZER.eos, TOKENIZER.vocab


def model_of(name="lightning", **changes):
    config = dataclasses.replace(shrink(preset(name)), vocab=VOCAB, **changes)
    model = Language(config, dtype=torch.float64).initialise(3)
    model.head_weight.data *= 12  # sharp enough that greedy answers differ from each other
    return model.eval()


MODEL, ENDLESS = model_of(), model_of(eos=())
prompts = st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=25), min_size=1, max_size=4)
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_p=st.sampled_from([0.9, 1.0]),
    seed=st.integers(0, 9),
    max_tokens=st.integers(1, 9),
    stop=st.lists(st.text(alphabet="abc\n", min_size=1, max_size=2), max_size=2).map(tuple),
)


def by_definition(model, tokens, steps):
    """Greedy decoding without a state: the whole text through the model for every token."""
    answer = []
    for _ in range(steps):
        logits, _ = model(torch.tensor([tokens + answer]))
        answer.append(int(logits[0, -1].argmax()))
        if answer[-1] in (*model.config.eos, *TOKENIZER.stop):
            break
    return answer


@pytest.mark.parametrize("name", ["toy", "nano", "super", "nano_9b_v2", "llama_3_1_8b", "gpt_oss_20b"])
def test_greedy_equals_the_argmax_of_full_forwards(name):
    model = model_of(name)
    prompt = torch.randint(0, VOCAB, (21,), generator=torch.Generator().manual_seed(1)).tolist()
    completion = Engine(model, TOKENIZER, chunk=8).generate([prompt], GREEDY)[0]
    assert list(completion.tokens) == by_definition(model, prompt, 9)


@settings(max_examples=15, deadline=None)
@given(prompts=prompts, sampling=samplings, chunk=st.integers(1, 30), rows=st.integers(1, 4))
def test_each_prompt_of_a_batch_gets_what_it_gets_alone(prompts, sampling, chunk, rows):
    together = Engine(MODEL, TOKENIZER, chunk=chunk, rows=rows).generate(prompts, sampling)
    for prompt, completion in zip(prompts, together, strict=True):
        alone = Engine(MODEL, TOKENIZER).generate([prompt], sampling)[0]
        assert completion.prompt == tuple(prompt)
        assert dataclasses.replace(completion, logprobs=()) == dataclasses.replace(alone, logprobs=())
        assert completion.logprobs == pytest.approx(alone.logprobs, abs=1e-9)


@settings(max_examples=15, deadline=None)
@given(prompts=prompts, sampling=samplings)
def test_a_stream_adds_up_to_the_completion(prompts, sampling):
    engine = Engine(MODEL, TOKENIZER)
    pieces = list(engine.stream(prompts[0], sampling))
    completion = engine.generate(prompts[:1], sampling)[0]
    assert "".join(piece.text for piece in pieces) == completion.text
    assert tuple(piece.token for piece in pieces) == completion.tokens
    assert tuple(piece.logprob for piece in pieces) == completion.logprobs
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + [completion.finish_reason]
    assert not any(stop in completion.text for stop in sampling.stop)
    written = TOKENIZER.decode(completion.tokens, skip_special=True)
    assert written.startswith(completion.text) and (completion.text == written or sampling.stop)


@settings(max_examples=15, deadline=None)
@given(
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9), cut=st.integers(1, 11), seed=st.integers(0, 9)
)
def test_an_answer_cut_anywhere_and_resumed_goes_on_as_if_it_had_not_been_cut(prompt, cut, seed):
    sampling = Sampling(seed=seed, max_tokens=12)
    engine = Engine(ENDLESS, UNENDING)
    whole = engine.generate([prompt], sampling)[0].tokens
    rest = engine.generate([[*prompt, *whole[:cut]]], dataclasses.replace(sampling, max_tokens=12 - cut))[0].tokens
    assert whole == whole[:cut] + rest


def test_a_seed_repeats_an_answer_and_another_seed_gives_another():
    engine = Engine(ENDLESS, UNENDING)
    answers = [engine.generate([[1, 5]], Sampling(seed=seed, max_tokens=9))[0] for seed in (1, 1, 2)]
    assert answers[0] == answers[1] and answers[0].tokens != answers[2].tokens


def test_each_prompt_may_have_its_own_sampling():
    engine = Engine(ENDLESS, UNENDING)
    several = [dataclasses.replace(COOL, seed=seed, max_tokens=3 + seed) for seed in range(3)]
    together = engine.generate([[1, 5]] * 3, several)
    alone = [engine.generate([[1, 5]], sampling)[0] for sampling in several]
    assert [completion.tokens for completion in together] == [completion.tokens for completion in alone]
    assert [len(completion.tokens) for completion in together] == [3, 4, 5]


def test_the_log_probs_are_those_of_the_trainer_forward():
    completion = Engine(MODEL, TOKENIZER, chunk=3).generate([[1, 5, 7, 9]], COOL)[0]
    tokens = torch.tensor([completion.prompt + completion.tokens])
    logprob = MODEL(tokens)[0].log_softmax(-1)[0, 3:-1].gather(1, tokens[0, 4:, None])[:, 0]
    assert completion.logprobs == pytest.approx(logprob.tolist(), abs=1e-9)


class Scripted(torch.nn.Module):
    """A model that writes a given list of tokens whatever it reads; it counts the tokens read."""

    def __init__(self, script):
        super().__init__()
        self.config = MODEL.config
        self.head_weight = torch.nn.Parameter(torch.eye(VOCAB))
        self.script, self.compute, self.cache_scales = script, torch.float32, {}

    def hidden(self, tokens_BT, state):
        read = int(state.rows.length[0])
        token = self.script[read - 1] if read <= len(self.script) else EOS
        return self.head_weight[token].expand(len(tokens_BT), tokens_BT.shape[1], VOCAB) * 99, state

    def head(self, hidden_BTD):
        return hidden_BTD


def answer(text, *, script_end=(EOS,), **how):
    script = TOKENIZER.encode(text) + list(script_end)
    return list(Engine(Scripted(script), TOKENIZER).stream([1], Sampling(temperature=0, **how)))


def test_a_stop_token_ends_the_answer_and_is_not_text():
    pieces = answer("cab")
    assert [piece.text for piece in pieces] == ["c", "a", "b", ""]
    assert pieces[-1].token == EOS and pieces[-1].finish_reason == "stop"
    own = answer("cab", stop_tokens=tuple(TOKENIZER.encode("a")))
    assert [piece.text for piece in own] == ["c", ""] and own[-1].finish_reason == "stop"


def test_a_stop_string_may_lie_across_tokens_and_no_part_of_it_is_written():
    pieces = answer("ca\nb", stop=("a\nb",))
    assert [piece.text for piece in pieces] == ["c", "", "", ""] and pieces[-1].finish_reason == "stop"


def test_no_end_comes_before_min_tokens_and_none_of_the_models_where_it_is_ignored():
    script = TOKENIZER.encode("ca")
    early = answer("ca", min_tokens=4)  # the script ends after two tokens
    assert [piece.token for piece in early][:2] == script and early[-1].finish_reason == "stop"
    assert [piece.token == EOS for piece in early] == [False] * 4 + [True]
    texts = [piece.text for piece in answer("abab", stop=("b",), min_tokens=3)]
    assert texts == ["a", "b", "a", ""], "nor does a string end it before"
    on = answer("ca", ignore_eos=True, max_tokens=5)
    assert [piece.token for piece in on] == [*script, EOS, EOS, EOS] and on[-1].finish_reason == "length"


def test_what_a_sampling_asks_of_the_next_token_is_done():
    cab = TOKENIZER.encode("cab")
    assert [piece.token for piece in answer("cab", bad_tokens=(tuple(cab),))][:3] != cab
    assert [piece.token for piece in answer("cab", bad_tokens=((*cab, 7),))][:3] == cab
    assert [piece.token for piece in answer("cab", logit_bias={cab[0]: 100.0}, max_tokens=4)] == cab[:1] * 4


@pytest.mark.parametrize("grace, reasoning", [(0, "abc"), (2, "abcab\n"), (9, "abcab\n")])
def test_reasoning_is_closed_when_its_budget_is_out(grace, reasoning):
    prompt, text = TOKENIZER.encode("<think>\n", control=True), "-abcab\ncab"  # what is read stands for its place
    engine = Engine(Scripted(TOKENIZER.encode(text) + [EOS]), TOKENIZER)
    how = Sampling(temperature=0, thinking_budget=3, thinking_grace=grace)
    want = reasoning[: 3 + grace] + "</think>"
    assert "".join(piece.text for piece in engine.stream(prompt, how)).startswith(want)
    plain = "".join(piece.text for piece in engine.stream(TOKENIZER.encode("x"), how))
    assert plain == text, "no block, nothing to close"


def test_what_only_looked_like_a_stop_string_is_written_in_the_end():
    assert [piece.text for piece in answer("ca\n", stop=("a\nb",))] == ["c", "", "", "a\n"]
    short = answer("ca\n", stop=("a\nb",), max_tokens=3)
    assert [piece.text for piece in short] == ["c", "", "a\n"] and short[-1].finish_reason == "length"


def test_a_character_of_several_tokens_is_written_when_it_is_whole():
    pieces = answer("a\U0001f419")
    assert [piece.text for piece in pieces] == ["a", "", "", "", "\U0001f419", ""]
    half = answer("a", script_end=TOKENIZER.encode("\u00e9")[:1], max_tokens=2)
    assert [piece.text for piece in half] == ["a", "\ufffd"]


def test_the_answer_ends_where_the_context_ends():
    engine = Engine(ENDLESS, UNENDING, max_tokens=8)
    completion = engine.generate([[1] * 5], Sampling(max_tokens=100))[0]
    assert len(completion.tokens) == 3 and completion.finish_reason == "length"


def test_text_is_continued_from_where_its_tokenizer_begins_a_text():
    assert Engine(MODEL, TOKENIZER).generate(["cab"], GREEDY)[0].prompt == tuple(TOKENIZER.encode("cab"))
    core = tokenizers.Tokenizer.from_str(TOKENIZER.core.to_str())
    core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", TOKENIZER.bos)])
    begun = Tokenizer(core, bos="<s>", eos="<|im_end|>")
    assert Engine(MODEL, begun).generate(["cab"], GREEDY)[0].prompt == (TOKENIZER.bos, *TOKENIZER.encode("cab"))


def test_a_model_in_training_is_used_in_evaluation_mode_and_handed_back_as_it_was():
    model = model_of(eos=())
    want = Engine(model, TOKENIZER).generate([[1, 5]], GREEDY)
    model.train()
    stream = Engine(model, TOKENIZER).stream([1, 5], GREEDY)
    next(stream)
    assert model.training and torch.is_grad_enabled() and not torch.is_inference_mode_enabled(), "between two pieces"
    assert Engine(model, TOKENIZER).generate([[1, 5]], GREEDY) == want
    assert all(mixer.load_E.sum() == 0 for mixer in model.experts_mixers().values()), "no expert load was counted"


def test_only_the_last_position_of_a_chunk_is_given_to_the_head(monkeypatch):
    model, sizes = model_of(eos=()), []
    plain = model.head
    monkeypatch.setattr(model, "head", lambda hidden: (sizes.append(tuple(hidden.shape[:2])), plain(hidden))[1])
    Engine(model, TOKENIZER, chunk=4).generate([[1] * 10, [1] * 3], Sampling(max_tokens=2))
    assert sizes == [(1, 1), (1, 1), (1, 2)], "once after each prompt, then once per token"


@pytest.mark.parametrize(
    "prompt, limits, message",
    [
        ([], {}, r"0 tokens .* at least one"),
        ([3, VOCAB], {}, rf"token {VOCAB}, the model knows 0 to {VOCAB - 1}; use the tokenizer"),
        ([-1], {}, r"token -1"),
        ([1] * 8, {"max_tokens": 8}, r"8 tokens .* max_tokens=8 .* shorten the prompt"),
        ([1.7, 2], {}, r"\[1.7, 2\] was asked for, .*float.*; give text"),
        (["a"], {}, r"\['a'\] was asked for, .*str.*; give text"),
        (None, {}, r"None was asked for, .*; give text"),
        (b"abc", {}, r"it is one bytes; give text"),
        ({"role": "user", "content": "hi"}, {}, r"it is one dict; give text"),
        ([{"role": "user", "content": "hi"}, 5], {}, r"5 stands among its messages; give text"),
    ],
)
def test_a_bad_prompt_is_refused_before_the_first_piece_is_asked_for(prompt, limits, message):
    with pytest.raises(ValueError, match=message):
        Engine(MODEL, TOKENIZER, **limits).stream(prompt)


@pytest.mark.parametrize(
    "limits",
    [{"max_tokens": 1}, {"max_tokens": 1 << 40}, {"rows": 0}, {"chunk": 0}, {"rows": 1.5}, {"chunk": 2.5}],
)
def test_a_bad_limit_is_refused_with_its_name_and_its_value(limits):
    name, value = next(iter(limits.items()))
    with pytest.raises(UserError, match=f"{name}={value}"):
        Engine(MODEL, TOKENIZER, **limits)


@pytest.mark.parametrize("rows", [10**13, 10**30])
def test_requests_for_which_there_is_no_memory_are_refused(rows):
    with pytest.raises(UserError, match=rf"{rows} requests of 9 tokens .* no memory .* fewer rows"):
        Engine(MODEL, TOKENIZER, max_tokens=9, rows=rows)


@pytest.mark.timeout(60)
def test_a_stream_that_nobody_reads_on_holds_nobody_up_and_is_there_later():
    engine = Engine(ENDLESS, UNENDING, max_tokens=64, rows=1)
    stream = engine.stream([1, 2], GREEDY)
    first = next(stream)
    other = engine.generate([[3]], GREEDY)[0]
    assert len(other.tokens) == GREEDY.max_tokens
    alone = Engine(ENDLESS, UNENDING, max_tokens=64).generate([[1, 2]], GREEDY)[0]
    assert [piece.token for piece in (first, *stream)] == list(alone.tokens)
    assert engine.scheduler.idle and len(engine.berths.slots) == 1


@pytest.mark.parametrize("prompts", ["abc", None])
def test_one_prompt_is_no_list_of_prompts(prompts):
    with pytest.raises(UserError, match=f"answers to {prompts!r} .* a list of prompts, or use stream"):
        Engine(MODEL, TOKENIZER).generate(prompts)


def test_a_list_of_samplings_must_fit_the_prompts():
    with pytest.raises(ValueError, match="2 prompts .* 1 samplings"):
        Engine(MODEL, TOKENIZER).generate([[1], [2]], [GREEDY])


# ----- the state between tokens ---------------------------------------------------------------------------------------


def sharp_mamba():
    """Layers whose rows have the same bits alone and in any batch, in float32."""
    layers = lay("MEM", Mamba(heads=4, head_width=12, state=6, groups=2), Experts(experts=6, active=2, hidden=10))
    model = Language(Config(vocab=VOCAB, width=20, layers=layers, eos=())).initialise(3)
    model.head_weight.data *= 12
    return model.eval()


NATIVE = sharp_mamba()


@pytest.mark.skipif(native().functions is None, reason="torch adds in another order in another batch")
@settings(max_examples=15, deadline=None)
@given(
    prompts=prompts, chunk=st.integers(1, 30), state=st.sampled_from(["fp16_sr", "int8_sr", "int8_ef", "fp8"]),
    sampling=samplings,
)  # fmt: skip
def test_a_stored_state_gives_the_same_log_probs_in_any_batch_and_in_any_chunks(prompts, chunk, state, sampling):
    """Bit for bit: rounding does not feel the other rows, nor where the prompt was cut."""
    together = Engine(NATIVE, UNENDING, chunk=chunk, state=state, state_seed=3).generate(prompts, sampling)
    for prompt, completion in zip(prompts, together, strict=True):
        assert Engine(NATIVE, UNENDING, state=state, state_seed=3).generate([prompt], sampling) == [completion]


def test_the_format_and_the_seed_of_the_state_are_felt_and_fp32_is_what_there_was():
    ways = {"plain": {}, "fp32": {"state": "fp32", "state_seed": 9}, "half": {"state": "fp16_sr"}}
    ways |= {"other seed": {"state": "fp16_sr", "state_seed": 1}, "int8": {"state": "int8"}}
    ways["int8, other seed"] = {"state": "int8", "state_seed": 1}
    found = {}
    for name, how in ways.items():
        found[name] = Engine(NATIVE, UNENDING, **how).generate([[1, 5, 7]], Sampling(max_tokens=30))[0].logprobs
    assert found["plain"] == found["fp32"] and found["int8"] == found["int8, other seed"]
    assert len({*found.values()}) == 4
    assert found["half"][0] == found["plain"][0], "the first token comes from the prompt, which is read unrounded"


def test_an_unknown_state_format_is_refused_with_a_suggestion():
    with pytest.raises(ValueError, match=r"called 'fp16-sr'; did you mean fp16_sr"):
        Engine(MODEL, TOKENIZER, state="fp16-sr")
    with pytest.raises(ValueError, match=r"seed is -1; choose"):
        Engine(MODEL, TOKENIZER, state="fp16_sr", state_seed=-1)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"no.such": torch.zeros(1)}, r"no\.such of shape \(1,\).*names none so"),
        ({"backbone.embeddings.weight": torch.zeros(2, 3)}, r"embeddings.weight of shape \(2, 3\).*has them of \("),
    ],
)
def test_weights_that_the_model_has_not_change_nothing(weights, message):
    model = model_of()
    engine = Engine(model, TOKENIZER)
    before = engine.generate([[1, 2, 3]], GREEDY)[0]
    good = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=message):
        engine.update({**good, **weights})
    assert engine.generate([[1, 2, 3]], GREEDY)[0] == before


MESSAGES = [{"role": "user", "content": "a b"}]


def test_messages_are_rendered_by_the_chat_template():
    completion = Engine(MODEL, TOKENIZER).generate([MESSAGES], GREEDY)[0]
    assert list(completion.prompt) == chat_tokens(TOKENIZER, MESSAGES)


def test_messages_need_a_chat_template():
    base = tokenizer_of()
    base.template = None
    with pytest.raises(ValueError, match="no chat template"):
        Engine(MODEL, base).stream(MESSAGES)


def test_the_help_of_an_engine_explains_every_argument():
    names = [*inspect.signature(Engine).parameters]
    for name in names:
        assert f"    {name}: " in Engine.__doc__ or f"{names[0]}, {names[1]}: " in Engine.__doc__ and name in names[:2]
