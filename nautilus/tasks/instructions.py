"""Instructions whose following a program can check, under the names of IFEval (Zhou et al., arXiv 2311.07911).

`INSTRUCTIONS` maps a name to a function of the answer and of the instruction's own arguments. What needs more than the
answer (the language that it is in) is not among them, and a row that asks for it has no verdict.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nautilus.tasks.task import GraderBroken, Verdict

Check = Callable[..., bool]
BULLET = re.compile(r"^\s*(?:[-*]\s+|\*[^*\s])", re.MULTILINE)
HIGHLIGHT = re.compile(r"\*\*[^*\n]+\*\*|\*[^*\n]+\*")
TITLE = re.compile(r"<<[^<>\n]+>>")


def compared(count: float, relation: str | None, wanted: float) -> bool:
    """ "less than" or "at least", the two relations of IFEval."""
    if relation == "less than":
        return count < wanted
    if relation in ("at least", None):
        return count >= wanted
    raise GraderBroken(f"the relation {relation!r} was asked for; there are 'less than' and 'at least'")


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def sentences(text: str) -> list[str]:
    return [one for one in re.split(r"(?<=[.!?])\s+", text.strip()) if one]


def paragraphs(text: str, mark: str) -> list[str]:
    return [one for one in re.split(mark, text) if one.strip()]


def occurrences(word: str, text: str) -> int:
    return len(re.findall(rf"\b{re.escape(word)}\b", text, re.IGNORECASE))


def capitals(text: str) -> int:
    return sum(word.isupper() for word in words(text))


def is_json(text: str) -> bool:
    inner = re.sub(r"^```(?:json)?|```$", "", text.strip(), flags=re.IGNORECASE)
    try:
        json.loads(inner)
    except (ValueError, RecursionError):
        return False
    return True


def nth_paragraph(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    found = paragraphs(text, r"\n\n")
    if len(found) != num_paragraphs or not 0 < nth_paragraph <= len(found):
        return False
    first = words(found[nth_paragraph - 1])[:1]
    return bool(first) and first[0].lower() == first_word.lower()


def postscript(text: str, postscript_marker: str) -> bool:
    return bool(re.search(rf"^\s*{re.escape(postscript_marker)}", text, re.MULTILINE | re.IGNORECASE))


def two_answers(text: str) -> bool:
    found = [one.strip() for one in text.split("******")]
    return len(found) == 2 and all(found) and found[0] != found[1]


def repeated(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


INSTRUCTIONS: dict[str, Check] = {
    "keywords:existence": lambda text, keywords: all(occurrences(word, text) for word in keywords),
    "keywords:forbidden_words": lambda text, forbidden_words: (
        not any(occurrences(one, text) for one in forbidden_words)
    ),
    "keywords:frequency": lambda text, keyword, frequency, relation=None: compared(
        occurrences(keyword, text), relation, frequency
    ),
    "keywords:letter_frequency": lambda text, letter, let_frequency, let_relation=None: compared(
        text.lower().count(letter.lower()), let_relation, let_frequency
    ),
    "length_constraints:number_words": lambda text, num_words, relation=None: compared(
        len(words(text)), relation, num_words
    ),
    "length_constraints:number_sentences": lambda text, num_sentences, relation=None: compared(
        len(sentences(text)), relation, num_sentences
    ),
    "length_constraints:number_paragraphs": lambda text, num_paragraphs: (
        len(paragraphs(text, r"\s?\*\*\*\s?")) == num_paragraphs
    ),
    "length_constraints:nth_paragraph_first_word": nth_paragraph,
    "detectable_content:number_placeholders": lambda text, num_placeholders: (
        len(re.findall(r"\[[^\[\]]+\]", text)) >= num_placeholders
    ),
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": lambda text, num_bullets: len(BULLET.findall(text)) == num_bullets,
    "detectable_format:constrained_response": lambda text: any(
        f"My answer is {word}." in text for word in ("yes", "no", "maybe")
    ),
    "detectable_format:number_highlighted_sections": lambda text, num_highlights: (
        len(HIGHLIGHT.findall(text)) >= num_highlights
    ),
    "detectable_format:multiple_sections": lambda text, section_spliter, num_sections: (
        len(re.findall(rf"^\s*{re.escape(section_spliter)}\s+\d+", text, re.MULTILINE)) >= num_sections
    ),
    "detectable_format:json_format": is_json,
    "detectable_format:title": lambda text: bool(TITLE.search(text)),
    "combination:two_responses": two_answers,
    "combination:repeat_prompt": repeated,
    "startend:end_checker": lambda text, end_phrase: (
        text.strip().strip('"').lower().endswith(end_phrase.strip().lower())
    ),
    "startend:quotation": lambda text: len(text.strip()) > 1 and text.strip()[0] == text.strip()[-1] == '"',
    "change_case:english_capital": lambda text: text.isupper(),
    "change_case:english_lowercase": lambda text: text.islower(),
    "change_case:capital_word_frequency": lambda text, capital_frequency, capital_relation=None: compared(
        capitals(text), capital_relation, capital_frequency
    ),
    "punctuation:no_comma": lambda text: "," not in text,
}


def followed(answer: str, names: Sequence[str], arguments: Sequence[Mapping[str, Any]]) -> Verdict:
    """All of them, for the reward; each, beside it. GraderBroken for instructions that are none of ours."""
    if not names or len(names) != len(arguments):
        raise GraderBroken(f"the problem names {len(names)} instructions and arguments of {len(arguments)}")
    met = {}
    for name, given in zip(names, arguments, strict=True):
        if name not in INSTRUCTIONS:
            raise GraderBroken(f"the problem asks for {name!r}, which cannot be checked here")
        try:
            holds = INSTRUCTIONS[name](answer, **{key: value for key, value in given.items() if value is not None})
        except (TypeError, AttributeError) as bad:
            raise GraderBroken(f"the problem's arguments of {name!r} do not fit it: {dict(given)}") from bad
        met[name] = float(bool(answer.strip()) and holds)
    failed = [name for name, value in met.items() if not value]
    return Verdict(reward=float(not failed), why=f"not followed: {', '.join(failed)}" if failed else "all", parts=met)
