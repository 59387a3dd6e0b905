import json
import os

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from nautilus.data.tokenizer import CONTROL, SHORT, load_tokenizer, train_tokenizer
from nautilus.runtime import UserError

# Text that is likely to hold control words, code, digits and characters of several bytes.
fragments = st.sampled_from(
    ["<|im_start|>", "</think>", "</s>", "<", "|>", "im_end", "  ", "\n", "\r\n", "12", "e\u0301", "é", "\U0001f600"]
)
text = st.lists(fragments | st.text(max_size=6), max_size=8).map("".join)
quick = settings(max_examples=150, deadline=None)


@quick
@given(text=text)
def test_any_text_survives_the_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, control=True)) == text
    assert tokenizer.core.decode(tokenizer.encode(text), skip_special_tokens=False) == text


@quick
@given(text=text)
def test_plain_text_never_becomes_a_control_token(tokenizer, text):
    assert not set(tokenizer.encode(text)) & set(tokenizer.control.values())


@quick
@given(text=text, cuts=st.lists(st.integers(1, 4), max_size=30))
def test_a_stream_gives_whole_characters_and_in_the_end_the_same_text(tokenizer, text, cuts):
    tokens, stream, pieces = tokenizer.encode(text), tokenizer.stream(), []
    while tokens:
        size = cuts.pop() if cuts else 1
        pieces.append(stream.push(*tokens[:size]))
        tokens = tokens[size:]
        assert text.startswith("".join(pieces))
    assert stream.close() == ""
    assert "".join(pieces) == text


@quick
@given(tokens=st.lists(st.integers(0, 700), max_size=12), at=st.integers(0, 12))
def test_any_tokens_can_be_decoded_in_any_pieces(tokenizer, tokens, at):
    stream = tokenizer.stream(skip_special=True)
    pieces = stream.push(*tokens[:at]) + stream.push(*tokens[at:]) + stream.close()
    assert pieces == tokenizer.decode(tokens, skip_special=True)


def test_a_character_cut_short_is_shown_as_replaced(tokenizer):
    [first, *_] = [token for token in range(18, 274) if tokenizer.token_bytes[token] == b"\xc3"]
    stream = tokenizer.stream()
    assert stream.push(first) == "" and stream.close() == "\ufffd"
    assert tokenizer.decode([tokenizer.vocab + 5]) == "\ufffd"


def test_control_tokens_have_their_fixed_ids(tokenizer):
    ids = {word: id for id, (word, _) in enumerate(CONTROL)}
    assert tokenizer.control == ids and len(ids) == 18
    assert [ids[w] for w in ("<unk>", "<s>", "</s>", "<SPECIAL_3>", "<SPECIAL_9>", "<|im_start|>", "<|im_end|>")] == [
        0,
        1,
        2,
        3,
        9,
        10,
        11,
    ]
    assert [
        ids[w] for w in ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
    ] == [*range(12, 18)]
    assert (tokenizer.bos, tokenizer.eos, tokenizer.document_end, tokenizer.stop) == (1, 11, 2, (2, 11))
    newline = tokenizer.encode("\n")
    assert tokenizer.encode("<think>\n", control=True) == [12, *newline] and len(newline) == 1


def test_thinking_and_tool_tags_survive_skip_special(tokenizer):
    tokens = tokenizer.encode("<|im_start|><think>a</think><tool_call>b<|im_end|></s>", control=True)
    assert tokenizer.decode(tokens, skip_special=True) == "<think>a</think><tool_call>b"


def test_digits_stand_alone_even_where_training_saw_them_together():
    assert len(train_tokenizer(["2026 2026"] * 9, vocab=300).encode("2026")) == 4


def test_text_is_split_as_the_pattern_says(tokenizer):
    pieces = tokenizer.core.pre_tokenizer.pre_tokenize_str("  (self.f)  ==é12\r\n\n    x_y \n")
    spelled = [piece.replace("Ġ", " ").replace("Ċ", "\n").replace("č", "\r") for piece, _ in pieces]
    assert spelled == [" ", " (", "self", ".f", ")", " ", " ==", "Ã©", "1", "2", "\r\n\n", "   ", " x", "_y", " \n"]


def test_training_depends_on_the_texts_alone(tokenizer, texts):
    again = train_tokenizer(reversed(texts), vocab=600)
    assert again.core.to_str() == tokenizer.core.to_str() and again.fingerprint == tokenizer.fingerprint
    assert tokenizer.vocab == 600
    assert train_tokenizer(texts, vocab=500).fingerprint != tokenizer.fingerprint


def test_little_text_gives_a_smaller_vocabulary_and_a_vocabulary_below_the_bytes_is_refused():
    assert train_tokenizer(["ab ab"], vocab=600).vocab == 276
    with pytest.raises(ValueError, match="vocab=200 has no room .* use at least 274"):
        train_tokenizer(["ab"], vocab=200)


def test_a_text_on_which_the_library_gives_up_is_refused(tokenizer):
    with pytest.raises(UserError, match="cannot be split into words .*break up"):
        tokenizer.encode(" " * 10_100_000)
    assert tokenizer.decode(tokenizer.encode("and then ")) == "and then "


def test_half_a_surrogate_pair_is_refused_with_its_place(tokenizer):
    with pytest.raises(ValueError, match="character 1 of the text is half a surrogate"):
        tokenizer.encode("a\ud800")


def test_batches_encode_like_single_texts(tokenizer, texts):
    long = "".join(texts) * (1 + 2 * SHORT // len("".join(texts)))
    for some in (texts, [long, *texts]):
        assert tokenizer.encode_batch(some) == [tokenizer.encode(text) for text in some]


# ----- files -----


def test_saving_and_loading_changes_nothing(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "model")
    loaded = load_tokenizer(tmp_path / "model")
    kept = ("vocab", "bos", "eos", "stop", "document_end", "template", "words", "control", "special")
    for name in kept:
        assert vars(loaded)[name] == vars(tokenizer)[name], name
    assert loaded.fingerprint == tokenizer.fingerprint and loaded.token_bytes == tokenizer.token_bytes


def test_the_files_open_in_transformers(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "def f(x):\n    return <think> 12</s>é"
    assert theirs.encode(text) == tokenizer.encode(text, control=True)
    assert theirs.decode(tokenizer.encode(text)) == text
    assert (theirs.eos_token_id, theirs.bos_token_id, len(theirs)) == (11, 1, 600)
    kept = theirs.decode([10, 12, 13, 11], skip_special_tokens=True)
    assert kept.replace(" ", "") == "<think></think>"


def test_a_template_file_goes_before_the_config_and_generation_config_adds_stops(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("theirs")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 11, 5]}')
    loaded = load_tokenizer(tmp_path)
    assert loaded.template == "theirs" and loaded.stop == (2, 5, 11)
    (tmp_path / "chat_template.jinja").unlink()
    assert load_tokenizer(tmp_path).template == tokenizer.template


def test_special_words_and_templates_are_read_in_every_spelling(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    path.write_text(json.dumps(config | {"eos_token": {"content": "</s>"}, "bos_token": None, "chat_template": named}))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.eos, loaded.bos, loaded.template) == (2, None, "d")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", None, "no tokenizer.json"),
        ("tokenizer.json", "{oops", "tokenizer.json is no tokenizer"),
        ("tokenizer.json", "[" * 100_000, "tokenizer.json is no tokenizer"),
        ("tokenizer.json", "[]", "tokenizer.json is no tokenizer"),
        ("tokenizer.json", "{}", "tokenizer.json is no tokenizer"),
        ("tokenizer.json", '{"model": {"type": "BPE"}}', "is no tokenizer"),
        # What makes the library panic.
        ("tokenizer.json", '{"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}}', "is no tokenizer"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not valid JSON"),
        ("tokenizer_config.json", "7", "holds int, not an object"),
        ("tokenizer_config.json", '{"eos_token": "</s>", "chat_template": 7}', "chat_template is 7, not text"),
        ("tokenizer_config.json", '{"eos_token": "</s>", "chat_template": [7]}', "them: TypeError"),
        ("tokenizer_config.json", '{"eos_token": "</s>", "chat_template": [{"name": "a"}]}', "KeyError 'template'"),
        ("tokenizer_config.json", '{"eos_token": "</s>", "chat_template": "{% if %}"}', "not valid jinja"),
        ("tokenizer_config.json", '{"eos_token": "</s>", "bos_token": [1]}', r"bos_token is \[1\], not text"),
        ("tokenizer_config.json", '{"eos_token": {"content": 2}}', "eos_token is 2, not text"),
        ("tokenizer_config.json", '{"eos_token": {}}', "them: KeyError 'content'"),
        ("chat_template.jinja", "{% for message in %}", "not valid jinja"),
        ("chat_template.jinja", "{% for a in b %}" * 25 + "{% endfor %}" * 25, "not valid jinja"),
        ("chat_template.jinja", "{{" + "(" * 5000 + ")" * 5000 + "}}", "not valid jinja"),
        ("chat_template.jinja", "{{" + "9" * 5000 + "}}", "not valid jinja"),
        ("chat_template.jinja", "\udcff", "cannot read .*chat_template.jinja"),
        ("generation_config.json", '{"eos_token_id": [-4]}', "eos_token_id=.*-4.* must be token ids"),
        ("generation_config.json", '{"eos_token_id": "two"}', "eos_token_id='two' must be token ids"),
        ("generation_config.json", '{"eos_token_id": true}', "eos_token_id=True must be token ids"),
        ("tokenizer_config.json", "{}", "names no eos_token"),
        ("tokenizer_config.json", '{"eos_token": "<end>"}', "has no token '<end>'"),
    ],
)
def test_a_broken_folder_is_named(tokenizer, tmp_path, file, content, message):
    tokenizer.save(tmp_path)
    (tmp_path / file).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / file).write_text(content, errors="surrogateescape")
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(tokenizer, tmp_path, file):
    tokenizer.save(tmp_path)
    (tmp_path / file).unlink(missing_ok=True)
    os.mkfifo(tmp_path / file)
    with pytest.raises(UserError, match=file):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("vocabulary", "message"), [({"zz": 2**32 - 1}, "a token 4294967295; ids end at"), (None, "not byte-level BPE")]
)
def test_a_vocabulary_that_cannot_be_is_refused(tokenizer, tmp_path, vocabulary, message):
    tokenizer.save(tmp_path)
    plan = json.loads((tmp_path / "tokenizer.json").read_text())
    if vocabulary is None:  # the bytes are gone: text would vanish without a word
        plan["model"] |= {"vocab": {}, "merges": []}
    else:
        plan["model"]["vocab"] |= vocabulary
    (tmp_path / "tokenizer.json").write_text(json.dumps(plan))
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_is_not_byte_level_is_refused(tmp_path):
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    core.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(ValueError, match="not byte-level"):
        load_tokenizer(tmp_path)


def test_an_interrupt_while_a_tokenizer_is_read_stays_one(tmp_path, monkeypatch):
    def interrupted(text):
        raise KeyboardInterrupt

    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(tokenizers.Tokenizer, "from_str", staticmethod(interrupted))
    with pytest.raises(KeyboardInterrupt):
        load_tokenizer(tmp_path)
