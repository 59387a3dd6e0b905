"""Features say what they are called, and nothing that is not known before a draft is verified."""

import math

import pytest

from nautilus.data.tokenizer import SMALLEST, train_tokenizer
from nautilus.serve.draft.copies import Copied
from nautilus.serve.draft.features import KINDS, NAMES, Situation, Spelling, features_of, kind_of
from nautilus.serve.draft.history import FADE, LATELY, PRIOR, TRUST, Depths, History
from nautilus.serve.draft.suffix import Draft

TOKENIZER = train_tokenizer(["```python\nx = ```"] * 9, vocab=SMALLEST + 4)
SPELLING = Spelling(TOKENIZER)
TOKEN = {text: token for token, text in enumerate(TOKENIZER.token_bytes)}


def tokens_of(text, control=True):
    return TOKENIZER.encode(text, control=control)


def draft_of(tokens, probs=None, **more):
    probs = probs or [1.0] * len(tokens)
    known = {"match": 7, "places": 3, "kinds": 2, "entropy": 0.5, "age": 11} | more
    return Draft(tokens=tuple(tokens), probs=tuple(probs), **known)


def named(copied, situation, history):
    found = features_of(copied, situation, history)
    assert found.dtype == "float32" and found.shape == (len(NAMES),)
    return dict(zip(NAMES, found.tolist(), strict=True))


def test_every_feature_is_what_its_name_says():
    probs = [1.0, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 0.25, 0.2]
    copied = Copied(draft=draft_of(tokens_of("ab 1\n({'`+"), [*probs, 0.2]), origin="tenant")
    situation = Situation(SPELLING, tokens_of("<think>x"), 22)
    situation.read(tokens_of("</think><tool_call>abc"))
    history = History()
    for _ in range(20):
        history.add("cache", 4, 4)
    history.add("mtp", 3, 0)
    history.add("cache", 4, 1, trimmed=True)
    history.add("plain", 0, 0)
    history.add("cache", 4, 4, trimmed=True)
    found = named(copied, situation, history)
    want = {
        "score": sum(probs) + 0.2, "match": math.log(8), "length": math.log(11), "first_prob": 1.0,
        "least_prob": 0.25, "mean_prob": sum(probs[:8]) / 8, "kinds": math.log(3), "entropy": 0.5,
        "places": math.log(4), "shared": 1.0, "corpus": 0.0, "age": math.log(12),
        "prompt": math.log(3), "answered": math.log(6), "answered_share": 5 / 20, "reasoning": 0.0, "code": 1.0,
        "chosen_16": 14 / 16, "chosen_64": 22 / 64, "accepted_1": math.log(5), "accepted_4": math.log(1 + 5 / 4),
        "accepted_share": (7 + 0.25) / 8, "since_wrong": math.log(1 + 1 + 5), "model_first": PRIOR * (1 - LATELY),
        "trimmed": 1.0,
        "letters": 0.2, "digits": 0.1, "blanks": 0.1, "lines": 0.1, "brackets": 0.2, "quotes": 0.2, "marks": 0.1,
        "control": 0.0,
    }  # fmt: skip
    assert found == pytest.approx(want, abs=1e-6)


def test_a_request_that_begins_has_no_history():
    found = named(Copied(draft=draft_of([5]), origin="own"), Situation(SPELLING, [1, 2], 9), History())
    assert all(found[name] == 0 for name in NAMES[16:22]) and found["model_first"] == pytest.approx(PRIOR)
    assert found["answered"] == found["shared"] == found["reasoning"] == found["code"] == 0


@pytest.mark.parametrize(
    ("text", "kind"),
    [("a", "letters"), ("é", "letters"), (" 7", "digits"), ("  ", "blanks"), (" }\n", "lines"), (" ]", "brackets"),
     (' "', "quotes"), (";", "marks"), ("_", "marks"), ("<|im_end|>", "control")],
)  # fmt: skip
def test_kinds_of_tokens(text, kind):
    if kind == "control":
        assert KINDS[SPELLING.kinds[TOKENIZER.control[text]]] == kind
    else:
        assert KINDS[kind_of(text.encode())] == kind


def test_tokens_that_only_the_model_knows_are_no_error():
    assert SPELLING.shares([TOKEN[b"a"], TOKENIZER.vocab + 3])[KINDS.index("control")] == 0.5


def test_blocks_of_code_open_and_close_however_their_ticks_are_cut():
    whole, single = tokens_of("```python\nx = ```"), [TOKEN[b"`"]] * 3
    assert TOKENIZER.token_bytes[whole[0]] == b"```"
    situation = Situation(SPELLING, [], 99)
    for tokens, inside in [
        (whole[:1], True),
        (whole[1:], False),
        ([TOKEN[b"a"], *single[:2]], False),
        (single[:1], True),
    ]:
        situation.read(tokens)
        assert situation.fenced == inside
    situation.read([*single[:2], TOKEN[b"a"], *single[:1]])
    assert situation.fenced, "these are no three in a row"
    situation.read(single)
    assert not situation.fenced, "four in a row are one mark, as three are"
    situation.read([TOKEN[b"a"], *single])
    assert situation.fenced
    situation.read([TOKENIZER.eos])
    assert not situation.fenced


def test_reasoning_and_calls_end_with_their_turn():
    situation = Situation(SPELLING, tokens_of("<think>a"), 99)
    assert situation.reasoning and not situation.call
    situation.read(tokens_of("</think><tool_call>"))
    assert not situation.reasoning and situation.call
    situation.read(tokens_of("<think><|im_end|>"))
    assert not situation.reasoning and not situation.call


def test_text_read_in_pieces_is_text_read_at_once():
    tokens = tokens_of("<think>a ``` b</think> ```x``` <tool_call>``")
    whole, pieces = Situation(SPELLING, tokens, 99), Situation(SPELLING, tokens[:3], 99)
    for token in tokens[3:]:
        pieces.read([token])
    same = "length", "run", "reasoning", "call", "fenced"
    assert [getattr(whole, name) for name in same] == [getattr(pieces, name) for name in same]


def test_depths_of_a_request_lean_on_those_of_all():
    everyone = Depths(3)
    assert everyone.survival() == pytest.approx([PRIOR, PRIOR**2, PRIOR**3])
    for _ in range(2000):
        everyone.add(3, 1)
    counts = (1 - FADE**2000) / (1 - FADE)
    first, second = (counts + TRUST * PRIOR) / (counts + TRUST), TRUST * PRIOR / (counts + TRUST)
    assert everyone.survival()[:2] == pytest.approx([first, first * second])
    assert everyone.shares()[2] == PRIOR, "it was never reached"
    mine = Depths(3, everyone)
    assert mine.survival() == pytest.approx(everyone.survival())
    mine.add(2, 2)
    assert mine.shares()[0] > first and mine.shares()[2] == pytest.approx(PRIOR) and everyone.true[1] == 1.0
