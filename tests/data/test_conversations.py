"""Finished conversations as samples: what counts, how much, and what is left out."""

import json

import pytest

from nautilus.data.conversations import Conversation, Teaching, conversations_in, fault, taught
from nautilus.data.template import template_text
from nautilus.data.tokenizer import SMALLEST, Tokenizer, train_tokenizer
from nautilus.runtime import UserError


@pytest.fixture(scope="module", params=["spaced", "glued"])
def tokenizer(request):
    plain = train_tokenizer([], vocab=SMALLEST)
    return Tokenizer(plain.core, bos="<s>", eos="<|im_end|>", template=template_text(request.param))


def said(content, thought="", **more):
    return {"role": "assistant", "content": content, **({"reasoning_content": thought} if thought else {}), **more}


def asked(content):
    return {"role": "user", "content": content}


def texts(tokenizer, found):
    """What counts of each sample, in words."""
    return [
        tokenizer.decode([token for token, weight in zip(tokens, weights, strict=True) if weight], skip_special=False)
        for tokens, weights in found.samples
    ]


def test_all_turns_count_where_nobody_thought(tokenizer):
    one = Conversation(messages=[asked("a"), said("b"), asked("c"), said("d")])
    found = taught(tokenizer, [one], Teaching())
    assert texts(tokenizer, found) == ["b<|im_end|>d<|im_end|>"]


def test_a_sample_for_each_question_where_somebody_did(tokenizer):
    one = Conversation(messages=[asked("a"), said("b", "hm b"), asked("c"), said("d", "hm d")])
    found = taught(tokenizer, [one], Teaching())
    first, second = texts(tokenizer, found)
    assert first.startswith("hm b") and first.endswith("b<|im_end|>") and "</think>" in first
    assert second.startswith("hm d") and second.endswith("d<|im_end|>")
    whole = tokenizer.decode(found.samples[1][0], skip_special=False)
    assert "hm b" not in whole and "hm d" in whole


def test_what_follows_a_question_counts_with_calls_and_without_what_tools_say(tokenizer):
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    messages = [
        asked("a"),
        said("", "call it", tool_calls=[call]),
        {"role": "tool", "content": "secret"},
        said("b", "so"),
    ]
    (text,) = texts(tokenizer, taught(tokenizer, [Conversation(messages=messages, tools=tools)], Teaching()))
    assert "<function=f>" in text and "so" in text and "b<|im_end|>" in text and "secret" not in text


def test_either_loss(tokenizer):
    both = [Conversation(messages=[asked("a"), said("b" * size)]) for size in (1, 30)]
    sums = {
        loss: [sum(weights) for _, weights in taught(tokenizer, both, Teaching(loss=loss)).samples]
        for loss in ("token", "sample")
    }
    assert sums["token"] == [2, 31] and sums["sample"] == pytest.approx([1, 1])


def test_cut_thinking_keeps_the_answer_and_does_not_teach_to_stop(tokenizer):
    many = [Conversation(messages=[asked(f"{number}"), said("42", "0123456789" * 4)]) for number in range(40)]
    found = taught(tokenizer, many, Teaching(cut=1.0))
    lengths = set()
    for text, (tokens, _) in zip(texts(tokenizer, found), found.samples, strict=True):
        assert text.endswith("42<|im_end|>") and "</think>" not in text
        assert "</think>" in tokenizer.decode(tokens, skip_special=False)
        thought = text.removesuffix("42<|im_end|>").strip()
        assert ("0123456789" * 4).startswith(thought)
        lengths.add(len(thought))
    assert len(lengths) > 10 and max(lengths) <= 40 and 0 not in lengths
    half = taught(tokenizer, many, Teaching(cut=0.5))
    assert 8 < sum("</think>" not in text for text in texts(tokenizer, half)) < 32


@pytest.mark.parametrize("thought", ["0123456789" * 4, ""])
def test_of_several_turns_only_the_end_of_what_was_cut_does_not_count(tokenizer, thought):
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    before = [asked("a"), said("", "call it", tool_calls=[call]), {"role": "tool", "content": "7"}]
    one = Conversation(messages=[*before, said("b", thought)], tools=tools)
    (cut,), (whole,) = (texts(tokenizer, taught(tokenizer, [one], Teaching(cut=share))) for share in (1.0, 0.0))
    assert whole.count("</think>") == 1 + bool(thought) and cut.count("</think>") == 1
    assert "</think>" in cut[: cut.index("<tool_call>")], "the first turn ended its thinking itself"
    assert thought or cut == whole, "nothing is cut where the last turn did not think"


def test_thinking_that_is_off_is_said_to_be(tokenizer):
    one = Conversation(messages=[asked("a"), said("b", "hm")])
    found = taught(tokenizer, [one], Teaching(off=1.0))
    whole = tokenizer.decode(found.samples[0][0], skip_special=False)
    assert texts(tokenizer, found) == ["b<|im_end|>"] and "hm" not in whole and "<think></think>b" in whole


def test_the_toggle_of_llama_nemotron(tokenizer):
    on = Conversation(messages=[asked("a"), said("b", "hm")])
    off = Conversation(messages=[{"role": "system", "content": "Be kind."}, asked("a"), said("b")])
    first, second = (
        tokenizer.decode(tokens, skip_special=False)
        for tokens, _ in taught(tokenizer, [on, off], Teaching(toggle=True)).samples
    )
    assert "detailed thinking on<|im_end|>" in first and "detailed thinking off\n\nBe kind.<|im_end|>" in second


def test_effort_stands_in_the_question(tokenizer):
    one = Conversation(messages=[asked("a"), said("b", "hm")], effort="low")
    assert "{reasoning effort: low}" in tokenizer.decode(
        taught(tokenizer, [one], Teaching()).samples[0][0], skip_special=False
    )


@pytest.mark.parametrize(
    "messages, why",
    [
        ([asked("a")], "no answer"), ([said("a")], "assistant after system"),
        ([asked("a"), asked("b"), said("c")], "user after user"),
        ([asked("a"), {"role": "tool", "content": ""}, said("c")], "tool after user"),
        ([asked("a"), said("b", tool_calls=[{"function": {"name": "f"}}])], "calls without tools"),
        (
            [asked("a"), said("b"), {"role": "robot", "content": ""}],
            "the role robot, for which there are system, user, assistant, tool",
        ),
        ([asked("a"), said("b")], ""),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_left_out_and_counted(tokenizer, messages, why):
    one = Conversation(messages=messages)
    assert fault(one) == why
    found = taught(tokenizer, [one], Teaching())
    assert dict(found.left_out) == ({why: 1} if why else {})


def test_long_ones_are_left_out_whole(tokenizer):
    found = taught(tokenizer, [Conversation(messages=[asked("a"), said("b" * 99)])], Teaching(length=64))
    assert not found.samples and found.left_out == {"too long": 1}


def test_files_say_which_line_is_wrong(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": [asked("a"), said("b")], "effort": "low"}) + "\n\n")
    (one,) = conversations_in(path)
    assert one.effort == "low" and len(one.messages) == 2
    for line, words in (("{", "is no JSON"), ("{}", "has no messages"), ('{"messages": [1]}', "has no messages")):
        path.write_text("\n" + line + "\n")
        with pytest.raises(UserError, match=f"line 2, {words}"):
            [*conversations_in(path)]


@pytest.mark.parametrize("wrong", [{"loss": "mean"}, {"off": 2}, {"off": 0.6, "cut": 0.6}])
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(UserError, match="asked for"):
        Teaching(**wrong)


def test_rows_of_which_no_chat_can_be_made_are_left_out_with_an_example(tokenizer, tmp_path):
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    bad = {"messages": [{"role": "user", "content": 4}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (good, bad, good, bad)))
    found = taught(tokenizer, conversations_in(tmp_path / "rows.jsonl"), Teaching())
    assert len(found.samples) == 2 and [*found.left_out.values()] == [2]
    assert "rows.jsonl, line 2" in next(iter(found.first.values()))
