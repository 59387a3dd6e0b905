"""What is kept of a chat is how the next one begins."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from nautilus.data.chat import ChatSettings, chat_tokens
from nautilus.data.template import template_text
from nautilus.data.tokenizer import SMALLEST, train_tokenizer
from nautilus.serve.api.marks import following_turn, stable_lengths

TEXT = ["the <|im_start|>user\nhas text", "user\nuser", "assistant\n<think>\nhm", "\n\n  \n", "system\nYou are"] * 20
TOKENIZERS = [
    train_tokenizer(TEXT, vocab=SMALLEST + 60, template=template_text(style)) for style in ("spaced", "glued")
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "string"}}}}}]
words = st.text(alphabet="ab \nuser<>|", max_size=6)
user = st.builds(lambda text: {"role": "user", "content": text}, words)
said = st.builds(
    lambda text, thought: {"role": "assistant", "content": text, **({"reasoning_content": thought} if thought else {})},
    words, words,
)  # fmt: skip
turns = st.lists(st.tuples(user, said), max_size=3).map(lambda pairs: [message for pair in pairs for message in pair])
systems = st.one_of(st.just([]), words.map(lambda text: [{"role": "system", "content": text}]))
how = st.builds(ChatSettings, enable_thinking=st.booleans(), truncate_history_thinking=st.booleans())
tools = st.sampled_from([None, TOOLS])


def starts(tokens, prefix):
    return tokens[: len(prefix)] == prefix


@settings(max_examples=60, deadline=None)
@given(
    tokenizer=st.sampled_from(TOKENIZERS), system=systems, history=turns, last=user, other=words, answer=said,
    tools=tools, how=how,
)  # fmt: skip
def test_each_length_is_where_later_chats_agree(tokenizer, system, history, last, other, answer, tools, how):
    render = lambda messages: chat_tokens(tokenizer, messages, tools=tools, settings=how)
    messages = [*system, *history, last]
    tokens = render(messages)
    lengths = stable_lengths(tokenizer, messages, tools, how, tokens)
    assert lengths == tuple(sorted(set(lengths))) and all(0 < length < len(tokens) for length in lengths)
    # Another chat of the same system message shares the first, one that asks something else the one before the last
    # user message, the next turn of this one its text.
    assert starts(render([*system, {"role": "user", "content": "!" + other}]), tokens[: lengths[0]])
    following = render([*messages, answer, {"role": "user", "content": "!" + other}])
    shared = [length for length in lengths if starts(following, tokens[:length])]
    text_end = len(chat_tokens(tokenizer, messages, tools=tools, settings=how, generate=False))
    assert max(shared) >= text_end - 3 - len(tokenizer.encode("\n")), "all but the end of the turn and what may merge"


def test_the_lengths_of_a_chat_by_hand():
    tokenizer = train_tokenizer([], vocab=SMALLEST)  # one token per byte
    messages = [
        {"role": "system", "content": "Be kind."}, {"role": "user", "content": "One"},
        {"role": "assistant", "content": "1", "reasoning_content": "hm"}, {"role": "user", "content": "Two"},
    ]  # fmt: skip
    tokens = chat_tokens(tokenizer, messages)
    ends = [
        tokenizer.decode(tokens[:length])
        for length in stable_lengths(tokenizer, messages, None, ChatSettings(), tokens)
    ]
    turn = "<|im_end|>\n<|im_start|>user"
    assert ends[0] == "<|im_start|>system\nBe kind." + turn, "the newline is given back"
    assert ends[1] == ends[0] + "\nOne<|im_end|>\n<|im_start|>assistant\n<think></think>\n1" + turn
    assert ends[2] == ends[1] + "\nTw"
    assert ends[3] == ends[1] + "\nTwo<|im_end|>" and len(ends) == 4


def test_a_template_that_adds_to_the_last_message_shares_its_text_only():
    tokenizer = train_tokenizer([], vocab=SMALLEST)
    tokenizer.template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if loop.last %} /think hard{% endif %}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    messages = [{"role": "user", "content": "Question"}]
    tokens = chat_tokens(tokenizer, messages)
    lengths = stable_lengths(tokenizer, messages, None, ChatSettings(), tokens)
    assert tokenizer.decode(tokens[: lengths[1]]) == "[user]Questio"


@pytest.mark.parametrize("messages", [[{"role": "assistant", "content": "a"}], [{"role": "system", "content": "a"}]])
def test_chats_without_a_user_have_lengths_too(messages):
    tokens = chat_tokens(TOKENIZERS[0], messages)
    assert stable_lengths(TOKENIZERS[0], messages, None, ChatSettings(), tokens)[-1] > 0


@settings(max_examples=40, deadline=None)
@given(tokenizer=st.sampled_from(TOKENIZERS), history=turns, ask=user, answer=said, more=words, tools=tools, how=how)
def test_what_is_read_ahead_is_how_the_next_turn_begins(tokenizer, history, ask, answer, more, tools, how):
    messages = [*history, ask, answer]
    known = following_turn(tokenizer, messages, tools, how)
    following = chat_tokens(tokenizer, [*messages, {"role": "user", "content": more}], tools=tools, settings=how)
    assert starts(following, known)
    whole = chat_tokens(tokenizer, messages, tools=tools, settings=how, generate=False)
    assert len(known) >= len(whole) or not starts(following, whole)
