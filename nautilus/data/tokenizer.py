"""Byte-level BPE with the control tokens of the Nemotron 3 family at their fixed ids.

Text and control tokens are kept apart: `encode` reads text as text, whatever it spells, unless told `control=True`.
Training, saving and reading files is done by `tokenizers`; every file opens in `transformers`.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from nautilus.config.keys import short, token_ids
from nautilus.data.template import TEMPLATE, compiled
from nautilus.runtime import UserError, read_json, read_text, write_atomic

# id → word; the flag says special: left out by skip_special, as in the released tokenizers.
CONTROL = (
    ("<unk>", True),
    ("<s>", True),
    ("</s>", True),
    *((f"<SPECIAL_{i}>", True) for i in range(3, 10)),
    ("<|im_start|>", True),
    ("<|im_end|>", True),
    ("<think>", False),
    ("</think>", False),
    ("<tool_call>", False),
    ("</tool_call>", False),
    ("<tool_response>", False),
    ("</tool_response>", False),
)
PAD = "<unk>"  # id 0, as in the released files; never produced by byte-level text
MOST_WORDS = 1 << 24  # fifty times the largest vocabularies
SMALLEST = len(CONTROL) + 256  # control tokens and one token per byte
SHORT = 4096  # characters, which are encoded before a batch of them would be in other threads

# Words with one mark or blank before them; single digits, so that numbers have one spelling; runs of marks with the
# line ends after them; line ends with the blanks before them; blanks, all but the last, which belongs to the next word.
SPLIT = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def train_tokenizer(texts: Iterable[str], *, vocab: int, template: str | None = TEMPLATE) -> Tokenizer:
    """Learn merges from texts. The result depends on the texts alone, not on their order or the number of threads.

    With too little text for `vocab` tokens the tokenizer is smaller; its `vocab` says how large it became.
    """
    if vocab < SMALLEST:
        raise UserError(
            f"vocab={vocab} has no room for {len(CONTROL)} control tokens and 256 bytes; use at least {SMALLEST}"
        )
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[AddedToken(word, special=True, normalized=False) for word, _ in CONTROL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    # The trainer marks all of them special; thinking and tool tags must survive skip_special.
    plan = json.loads(core.to_str())
    for entry, (_, special) in zip(plan["added_tokens"], CONTROL, strict=True):
        entry["special"] = special
    core = tokenizers.Tokenizer.from_str(json.dumps(plan))
    return Tokenizer(core, bos="<s>", eos="<|im_end|>", template=template)


class Tokenizer:
    """Text ↔ token ids.

    `bos`, `eos` and `document_end` are ids; `stop` holds the ids that end a completion; `control` maps the words of all
    added tokens to ids; `vocab` is one more than the largest id; `words` are the special words that templates print.
    """

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        *,
        bos: str | None,
        eos: str,
        template: str | None = TEMPLATE,
        stop: Iterable[int] = (),
    ):
        words = core.get_vocab(with_added_tokens=True)
        if "ByteLevel" not in repr(core.decoder) or not words.keys() >= set(byte_alphabet()):
            raise UserError("this tokenizer is not byte-level BPE, the only kind read here; convert it or use another")
        self.core = core
        self.template = template
        self.control = {token.content: id for id, token in core.get_added_tokens_decoder().items()}
        self.control_ids = frozenset(self.control.values())
        self.special = {id for id, token in core.get_added_tokens_decoder().items() if token.special}
        self.words = {"bos_token": bos or "", "eos_token": eos}
        self.bos = id_of(bos, core) if bos is not None else None
        self.eos = id_of(eos, core)
        self.document_end = self.control.get("</s>", self.eos)
        self.stop = tuple(sorted({*stop, self.eos, self.document_end}))
        self.vocab = max(words.values()) + 1
        if self.vocab > MOST_WORDS:
            raise UserError(f"this tokenizer has a token {self.vocab - 1}; ids end at {MOST_WORDS}; copy it again")
        # The same merges without added tokens: what plain text is read by.
        self.plain = tokenizers.Tokenizer(core.model)
        self.plain.pre_tokenizer = core.pre_tokenizer
        if core.normalizer is not None:
            self.plain.normalizer = core.normalizer

    def encode(self, text: str, *, control: bool = False) -> list[int]:
        """Token ids, without any begin-of-text. With `control`, words such as <|im_end|> become their control tokens.

        Use `control` only for text that no user has touched.
        """
        checked = utf8(text)
        if control:
            return self.core.encode(checked, add_special_tokens=False).ids
        if len(checked) > SHORT:
            return self.encode_batch([checked])[0]
        return self.in_words([checked], lambda: [self.plain.encode(checked, add_special_tokens=False)])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Plain text only, on all cores. UserError for text that cannot be split into words."""
        return self.in_words(texts, lambda: self.plain.encode_batch_fast(list(texts), add_special_tokens=False))

    def in_words(self, texts: Sequence[str], encode: Callable[[], list[tokenizers.Encoding]]) -> list[list[int]]:
        try:
            rows = [found.ids for found in encode()]
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except (
            BaseException
        ) as bad:  # a panic of the library is no Exception: of one word, or gap, of ten million letters
            raise UserError(
                f"a text of {max(map(len, texts)):,} characters cannot be split into words ({bad}); break up its"
                " longest runs of one kind of character"
            ) from bad
        if not all(self.control_ids.isdisjoint(row) for row in rows):
            raise UserError(
                "this tokenizer spells some plain text with control tokens, which is unsafe; use another one"
            )
        return rows

    def decode(self, tokens: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of tokens; bytes that are no UTF-8 and ids outside the vocabulary become U+FFFD."""
        stream = self.stream(skip_special=skip_special)
        return stream.push(*tokens) + stream.close()

    def stream(self, *, skip_special: bool = False) -> TextStream:
        """A decoder for tokens that arrive one by one."""
        return TextStream(self, skip_special=skip_special)

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """What each id spells. Ids that the file leaves out spell U+FFFD."""
        byte_of = {char: byte for byte, char in enumerate(byte_alphabet())}
        spelled = ["\ufffd".encode()] * self.vocab
        for word, id in self.core.get_vocab(with_added_tokens=False).items():
            spelled[id] = bytes(byte_of[char] for char in word) if set(word) <= byte_of.keys() else word.encode()
        for word, id in self.control.items():
            spelled[id] = word.encode()
        return spelled

    @functools.cached_property
    def newline_ids(self) -> frozenset[int]:
        """The tokens that end a line."""
        return frozenset(id for id, spelled in enumerate(self.token_bytes) if spelled.endswith(b"\n"))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Short hash of everything that decides how text is encoded."""
        return hashlib.sha256(self.core.to_str().encode()).hexdigest()[:16]

    def save(self, folder: str | Path) -> None:
        """tokenizer.json and tokenizer_config.json, as `transformers` reads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{name: word for name, word in self.words.items() if word},
            **({"pad_token": PAD} if PAD in self.control else {}),
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            **({"chat_template": self.template} if self.template is not None else {}),
        }
        write_atomic(folder / "tokenizer.json", self.core.to_str())
        write_atomic(folder / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def id_of(word: str, core: tokenizers.Tokenizer) -> int:
    id = core.token_to_id(word)
    if id is None:
        raise UserError(f"the tokenizer has no token {word!r}; correct bos_token and eos_token in its config")
    return id


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


class TextStream:
    """Tokens in, text out, never half a character: bytes wait until their character is complete."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool):
        self.token_bytes = tokenizer.token_bytes
        self.skipped = tokenizer.special if skip_special else set()
        self.waiting = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, *tokens: int) -> str:
        known, skipped = self.token_bytes, self.skipped
        pieces = [known[t] if 0 <= t < len(known) else b"\xef\xbf\xbd" for t in tokens if t not in skipped]
        return self.waiting.decode(pieces[0] if len(pieces) == 1 else b"".join(pieces))

    def close(self) -> str:
        """What is left, an unfinished character as U+FFFD."""
        return self.waiting.decode(b"", final=True)


def utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as bad:
        raise UserError(
            f"character {bad.start} of the text is half a surrogate pair, which is no Unicode text; drop it"
        ) from bad
    return text


def core_of(folder: Path) -> tokenizers.Tokenizer:
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"no tokenizer.json in {folder}; copy it and its config from the release; info and bench speed need none"
        )
    text = read_text(folder / "tokenizer.json")
    try:
        return tokenizers.Tokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as bad:  # the tokenizers library raises nothing narrower, and its panics are no Exception
        raise UserError(f"{folder / 'tokenizer.json'} is no tokenizer ({bad}); copy it again") from bad


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """A checkpoint folder's tokenizer, with the folder's own template: chat_template.jinja, else the config's."""
    folder = Path(folder)
    core = core_of(folder)
    config, generation = (
        read_json(folder / name) if (folder / name).exists() else {}
        for name in ("tokenizer_config.json", "generation_config.json")
    )
    jinja = folder / "chat_template.jinja"
    template = read_text(jinja) if jinja.exists() else None
    try:
        bos, eos = word_of(config, "bos_token"), word_of(config, "eos_token")
        stops = token_ids(generation)
        template = template_of(config) if template is None else template
        if template is not None:
            compiled(template)  # now, not when somebody has begun to talk
    except (TypeError, LookupError, ValueError) as bad:
        what = str(bad) if isinstance(bad, ValueError) else f"{type(bad).__name__} {bad}"
        raise UserError(f"the tokenizer's settings in {folder} are not as transformers writes them: {what}") from bad
    if eos is None:
        raise UserError(f"{folder / 'tokenizer_config.json'} names no eos_token; add it so that a completion can end")
    return Tokenizer(core, bos=bos, eos=eos, template=template, stop=stops)


def word_of(config: dict, name: str) -> str | None:
    """Configs write a special word as text or as a record with its content."""
    entry = config.get(name)
    return text_or_none(name, entry["content"] if isinstance(entry, dict) else entry)


def template_of(config: dict) -> str | None:
    found = config.get("chat_template")
    if isinstance(found, list):  # several by name
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    return text_or_none("chat_template", found)


def text_or_none(name: str, value) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name} is {short(value)}, not text; correct the file")
    return value
