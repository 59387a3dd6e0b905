import hypothesis.strategies as st
import pytest
from hypothesis import given

from nautilus.serve.request import Piece
from nautilus.serve.sources import Origins, passes, runs_of
from nautilus.serve.toolcalls import AnswerStream, Content, Reasoning

MARKUP = ["</think>", "\n", "\n\n", "<think>", "<tool_call>", "<function=f>", "<parameter=x>", "</parameter>", "<", " "]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"type": "string"}}}}}]
pieces = st.lists(
    st.builds(
        Piece, text=st.sampled_from([*MARKUP, "a", "ab", "thin", "é", ""]), token=st.just(1), logprob=st.just(0.0),
        source=st.sampled_from(["plain", "cache", "mtp"]),
    ),
    max_size=25,
)  # fmt: skip


def told(pieces, parser):
    """(source, character) of all that is shown, and the runs."""
    origins, shown, runs = Origins(), [], []

    def take(deltas):
        for delta in deltas:
            text = delta.text if isinstance(delta, Reasoning | Content) else ""
            runs.append(origins.take(len(text)))
            assert sum(run[2] for run in runs[-1]) == len(text)
            for source, _, size in runs[-1]:
                shown.extend((source, char) for char in text[:size])
                text = text[size:]

    for piece in pieces:
        deltas = parser.add(piece.text)
        origins.read(piece, deltas, parser.held)
        take(deltas)
    rest = parser.finish()
    origins.finish(rest)
    take(rest)
    runs.append(origins.take())
    return shown, [run for part in runs for run in part]


@given(pieces=pieces, inside=st.sampled_from([True, False, None]), more=st.booleans(), tools=st.booleans())
def test_every_token_is_told_once_and_every_character_has_a_source(pieces, inside, more, tools):
    parser = AnswerStream(inside=inside, tools=TOOLS if tools else None, force_nonempty_content=more)
    shown, runs = told(pieces, parser)
    for source in ("plain", "cache", "mtp"):
        assert sum(run[1] for run in runs if run[0] == source) == sum(piece.source == source for piece in pieces)
    made = {(piece.source, char) for piece in pieces for char in piece.text}
    # White space around markers may be that of the marker, and thoughts that become content may come out of order.
    assert more or all(one in made for one in shown if one[1].strip())


def piece(text, source):
    return Piece(text=text, token=1, logprob=0.0, source=source)


@pytest.mark.parametrize("force", [False, True])
def test_characters_that_were_held_back_or_stand_around_markup_keep_their_source(force):
    spelled = [
        ("Hm", "plain"), (".\n", "cache"), ("\n", "plain"), ("</thi", "plain"), ("nk>\n", "cache"), ("\n", "mtp"),
        ("think <", "cache"), ("b", "plain"), ("> on", "mtp"), (" ", "plain"), ("", "cache"), ("x", "cache"),
    ]  # fmt: skip
    parser = AnswerStream(inside=True, force_nonempty_content=force)
    shown, runs = told([piece(*one) for one in spelled], parser)
    kept = [("Hm", "plain"), (".", "cache"), ("think <", "cache"), ("b", "plain"), ("> on", "mtp"), (" ", "plain")]
    assert shown == [(source, char) for text, source in [*kept, ("x", "cache")] for char in text]
    assert sum(run[1] for run in runs) == len(spelled)


def test_text_that_is_told_together_with_a_marker_dropped_within_keeps_its_sources():
    spelled = [("x</think>", "plain"), ("a", "plain"), (" ", "cache"), ("</think>", "mtp"), ("bt", "eagle")]
    shown, _ = told([piece(*one) for one in spelled], AnswerStream(inside=True, tools=TOOLS))
    assert [one for one in shown if one[1] != " "] == [("plain", "x"), ("plain", "a"), ("eagle", "b"), ("eagle", "t")]


def test_neighbours_of_one_source_are_one_run():
    made = [piece("ab", "plain"), piece("", "plain"), piece("é", "cache"), piece("c", "plain")]
    end = Piece(text="d", token=-1, logprob=0.0, finish_reason="cancelled")
    assert runs_of([*made, end]) == [["plain", 2, 2], ["cache", 1, 1], ["plain", 1, 2]]


@pytest.mark.parametrize(
    "sources, count",
    [("", 0), ("p", 1), ("ppp", 3), ("pccp", 2), ("pcc", 2), ("pccpmpp", 4)],
)
def test_a_pass_ends_with_a_token_that_was_not_foretold_or_with_the_answer(sources, count):
    names = {"p": "plain", "c": "cache", "m": "mtp"}
    assert passes([names[one] for one in sources]) == count
