"""Answers that hold to a grammar: a JSON schema, any JSON object, a regular expression, one of some strings, a grammar
in lark's notation, or calls of tools. By the library `llguidance`. Letters: V vocabulary, K tokens concerned.

At each position the grammar knows which tokens may come; the others get -inf. Where the text that must follow is
certain, only its own tokenisation may come. A grammar from a client is first compiled in a process of its own (see
`trial`). Departures from JSON Schema: properties come in the order of the schema, names of properties that it does not
list may come twice, white space between two parts is at most one line break and forty blanks.
"""

from __future__ import annotations

import collections
import copy
import hashlib
import json
import math
import threading
import weakref
from collections.abc import Sequence
from typing import Any, Self, TypedDict

import numpy as np
import torch
from torch import Tensor

from nautilus.data.tokenizer import Tokenizer, utf8
from nautilus.runtime import UserError, installing
from nautilus.serve import trial
from nautilus.serve.schema import read_json_text, screened
from nautilus.serve.toolgrammar import OPEN, tools_lark

THOUGHT = "</think>"
MOST_REGEX, MOST_LARK = 4096, 64 << 10  # characters
MOST_CACHED, MOST_CACHED_BYTES = 256, 256 << 20  # compiled grammars, of each tokenizer
NEWLINES = 2  # that may stand between the thinking block and the answer, as chat templates write them
FEW = 1024  # tokens; so many or fewer are picked out, which is faster than to go through all
SPACE = r"[ \t]{1,40}|\r?\n[ \t]{0,40}"


def compile_grammar(
    kind: str, text: str, tokenizer: Tokenizer, *, thinking: bool = False, parallel: bool = True
) -> Grammar:
    """The rule for one answer. Takes up to `trial.WAIT` seconds for a grammar that is new: not for an event loop.

    kind, text:  json_schema  a JSON schema, as JSON
                 json_object  nothing
                 regex        a regular expression that the whole answer matches, in the notation of Rust's `regex`;
                              as in JSON Schema, \\d and \\w are of ASCII
                 choice       a JSON list of strings
                 lark         a grammar in llguidance's kind of lark
                 tools        the JSON list of tools of which one must be called; with `parallel`, one or more times
    thinking: the answer begins inside a thinking block. What is in it is free, but it cannot end the answer. Without,
    the grammar holds from the first token on.

    UserError for text that is wrong, too large or too costly, and for what the grammar cannot hold.
    """
    words, text = vocabulary(tokenizer), utf8(text)
    if thinking and THOUGHT not in words.control:
        raise UserError(
            f"this tokenizer has no token {THOUGHT}, so a grammar cannot tell where thinking ends; turn it off"
        )
    matcher = words.matcher(
        source(kind, text, words.control, parallel), text if kind in ("json_schema", "tools") else ""
    )
    asked = Source(kind=kind, text=text, thinking=thinking, parallel=parallel)
    return Grammar(words, matcher, asked)


def source(kind: str, text: str, control: dict[str, int], parallel: bool) -> str:
    """A grammar in the library's own notation."""
    library = required().LLMatcher
    if kind in ("json_schema", "json_object"):
        schema = screened(read_json_text(text, "schema")) if kind == "json_schema" else {"type": "object"}
        if schema is False:
            raise UserError("the schema is false, so that no answer fits; ask for another")
        schema = {} if schema is True else schema
        try:
            return library.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_pattern": SPACE})
        except ValueError as bad:  # what Python reads as JSON and the library does not, such as half a surrogate pair
            raise UserError(f"the schema cannot be used: {plain(str(bad))}; correct it") from bad
    if kind == "tools":
        return tools_lark(read_json_text(text, "list of tools"), control, parallel=parallel)
    if kind == "choice":
        choices = read_json_text(text, "list of choices")
        if not (isinstance(choices, list) and choices and all(isinstance(choice, str) for choice in choices)):
            raise UserError(f"the choices are {text[:80]!r}; give a JSON list of strings, not empty")
        return f"%llguidance {{}}\nstart: CHOICE\nCHOICE: {' | '.join(map(json.dumps, choices))}"
    limits = {"regex": MOST_REGEX, "lark": MOST_LARK}
    if kind not in limits:
        raise UserError(f"grammar {kind!r} was asked for; use json_schema, json_object, regex, choice, lark or tools")
    if not 0 < len(text) <= limits[kind]:
        raise UserError(f"the {kind} has {len(text):,} characters; write 1 to {limits[kind]:,}")
    if kind == "regex":
        return library.grammar_from_regex(required().regex_to_lark(text, use_ascii="dw"))
    return library.grammar_from_lark(text)


def required() -> Any:
    try:
        import llguidance
    except ImportError as bad:
        raise UserError(f"grammars need the library llguidance; {installing('serve')}") from bad
    return llguidance


class Source(TypedDict):
    """What `compile_grammar` was asked for, to ask for it again in another process."""

    kind: str
    text: str
    thinking: bool
    parallel: bool


class Grammar:
    """A `Rule` that keeps an answer within a grammar.

    Before the grammar begins there is what is free: the thinking block, up to its closing token or, where calls are
    asked for, the token that opens one; then at most two newlines.
    """

    def __init__(self, words: Words, matcher: Any, source: Source):
        thinking, calls = source["thinking"], source["kind"] == "tools"
        self.words, self.matcher, self.source = words, matcher, source
        self.free = thinking
        self.newlines = NEWLINES if thinking or calls else 0
        self.opening = words.control.get(OPEN) if calls else None
        self.known: np.ndarray | None = None  # which tokens may come; None: not yet computed

    def forced(self) -> int | None:
        """The token that must come next, if only one may. Once nothing but an end may come, the tokenizer's own end."""
        if self.free:
            return None
        allowed_V = self.allowed()
        count = np.count_nonzero(allowed_V)
        if count == np.count_nonzero(allowed_V[self.words.ends]):
            return self.words.eos
        return int(allowed_V.argmax()) if count == 1 else None

    def coming(self) -> Sequence[int]:
        """What the grammar leaves no choice of, in the tokens that the tokenizer would write it in."""
        return () if self.free or self.newlines else self.matcher.compute_ff_tokens()

    def change(self, logits_V: Tensor) -> Tensor:
        """-inf for what may not come. UserError if other rules have left nothing that may."""
        if self.free:
            barred = [id for id in self.words.barred if id != self.opening and id < len(logits_V)]
            return logits_V.index_fill(0, torch.tensor(barred, device=logits_V.device), -math.inf)
        allowed_V = self.allowed()[: len(logits_V)]
        if np.count_nonzero(allowed_V) > FEW:
            kept_V = torch.where(torch.from_numpy(allowed_V).to(logits_V.device), logits_V[: len(allowed_V)], -math.inf)
            return torch.cat([kept_V, logits_V.new_full((len(logits_V) - len(kept_V),), -math.inf)])
        id_K = torch.from_numpy(np.flatnonzero(allowed_V)).to(logits_V.device)
        logits_K = logits_V[id_K]
        if bool((logits_K == -math.inf).all()):
            raise UserError(
                f"the grammar leaves {len(id_K)} tokens that may come next, and none of them may by the request's other"
                " rules or by the model's vocabulary; take back bans, biases and min_tokens, or change the grammar"
            )
        return torch.full_like(logits_V, -math.inf).index_copy_(0, id_K, logits_K)

    def add(self, token: int) -> None:
        """ValueError for a token that may not come."""
        if self.free:
            self.free = token not in (self.words.control[THOUGHT], self.opening)
            if self.free or token != self.opening:
                return
        newlines = self.words.newlines.get(token, math.inf)
        self.known = None
        if newlines <= self.newlines:
            self.newlines -= newlines
            return
        self.newlines = 0
        if not (self.matcher.is_stopped() and token in self.words.ends) and not self.matcher.consume_token(token):
            raise ValueError(f"token {token} came, which the grammar does not allow here")

    def fork(self) -> Self:
        other = copy.copy(self)
        other.matcher = self.matcher.deep_copy()
        return other

    @property
    def ended(self) -> bool:
        """Nothing may follow but an end of the answer."""
        return not self.free and self.matcher.is_stopped() and not self.matcher.is_error()

    def allowed(self) -> np.ndarray:
        """bool, over the tokenizer's vocabulary."""
        if self.known is None:
            bits = self.matcher.compute_bitmask()
            if self.matcher.is_error():
                raise UserError(
                    f"the grammar became too costly at this point of the answer ({plain(self.matcher.get_error())});"
                    " ask for a simpler one"
                )
            packed = np.frombuffer(bits, np.uint8)
            self.known = np.unpackbits(packed, count=self.words.count, bitorder="little").view(bool)
            self.known[[id for id, newlines in self.words.newlines.items() if newlines <= self.newlines]] = True
        return self.known


class Words:
    """What grammars know of a tokenizer, and those that were compiled for it last."""

    def __init__(self, tokenizer: Tokenizer):
        self.count, self.eos, self.control = tokenizer.vocab, tokenizer.eos, dict(tokenizer.control)
        self.ends = [id for id in tokenizer.stop if id < tokenizer.vocab]
        # Inside thinking: what would end the answer, or the thinking, with nothing in the form that was asked for.
        self.barred = [*self.ends, *(id for word, id in self.control.items() if word == OPEN)]
        self.newlines = {id: len(spelt) for id, spelt in enumerate(tokenizer.token_bytes) if spelt in (b"\n", b"\n\n")}
        self.library = required().LLTokenizer(Spelling(tokenizer), eos_token=self.ends)
        self.compiled: collections.OrderedDict[bytes, tuple[Any, int]] = collections.OrderedDict()
        self.lock = threading.Lock()

    def matcher(self, source: str, schema: str) -> Any:
        """A copy of the grammar's matcher at its start. `schema`: the client's JSON, for the words of an error."""
        key = hashlib.sha256(source.encode()).digest()
        with self.lock:
            if key in self.compiled:
                self.compiled.move_to_end(key)
                return self.compiled[key][0].deep_copy()
        error, size = trial.tried(source, {id: word for word, id in self.control.items()}, self.ends)
        if error:
            raise UserError(refusal(error, schema))
        matcher, error = trial.build(self.library, source)
        if error:
            raise UserError(refusal(error, schema))
        with self.lock:
            self.compiled[key] = matcher, size
            held = sum(size for _, size in self.compiled.values())
            while len(self.compiled) > MOST_CACHED or held > MOST_CACHED_BYTES:
                held -= self.compiled.popitem(last=False)[1][1]
        return matcher.deep_copy()


def refusal(error: str, schema: str) -> str:
    if error.startswith("NoExtension"):
        return "no answer fits the grammar that was asked for, or only the empty one; change it"
    if "oneOf" in error and schema:
        places = ", ".join(places_of("oneOf", json.loads(schema), "#"))[:500]
        return (
            f"'oneOf' is held only where its alternatives exclude each other at first sight, by type or by constants;"
            f" use anyOf. It stands at {places}"
        )
    return f"the grammar that was asked for cannot be used: {plain(error)}; simplify or correct it"


def places_of(key: str, value: Any, where: str) -> list[str]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    within = [place for name, part in pairs for place in places_of(key, part, f"{where}/{name}")]
    return ([f"{where}/{key}"] if isinstance(value, dict) and key in value else []) + within


def plain(error: str) -> str:
    """The library's message, without the excerpts from the grammar that come after its first line."""
    return error.strip().splitlines()[0][:200] if error.strip() else "no reason was told"


class Spelling:
    """A tokenizer in the form that the library reads: how each token is spelt, and how text is tokenised."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer):
        absent = set(range(tokenizer.vocab)) - set(tokenizer.core.get_vocab(with_added_tokens=True).values())
        self.plain = tokenizer.plain  # not the tokenizer itself: that one is a key by weak reference
        self.tokens = [b"" if id in absent else spelt for id, spelt in enumerate(tokenizer.token_bytes)]
        self.special_token_ids = sorted(tokenizer.control_ids)
        self.eos_token_id, self.bos_token_id = tokenizer.eos, tokenizer.bos
        self.byte_ids = {spelt: id for id, spelt in enumerate(self.tokens) if len(spelt) == 1}

    def __call__(self, text: str) -> list[int]:
        ids, spelt = self.plain.encode(text, add_special_tokens=False).ids, text.encode()
        if b"".join(self.tokens[id] for id in ids) == spelt:
            return ids
        return [self.byte_ids[bytes([byte])] for byte in spelt]  # a normaliser would write something else


known_words: weakref.WeakKeyDictionary[Tokenizer, Words] = weakref.WeakKeyDictionary()
making_words = threading.Lock()


def vocabulary(tokenizer: Tokenizer) -> Words:
    """What grammars need of a tokenizer. The first time takes about a second for 131,072 tokens."""
    with making_words:
        if tokenizer not in known_words:
            known_words[tokenizer] = Words(tokenizer)
        return known_words[tokenizer]
