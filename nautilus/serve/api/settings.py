"""What a server is told of its clients: how much they may ask for, and how they are answered if they do not say."""

from __future__ import annotations

from dataclasses import dataclass

from nautilus.config import setting
from nautilus.runtime import UserError
from nautilus.serve import Sampling

MAY_BE_NONE = {
    "tools", "stop", "biases", "bad_words", "first", "responses", "response_bytes", "key_requests", "key_rate",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """How tokens are chosen where a request leaves it open."""

    temperature: float = setting(1.0, "0 takes the most probable token, 1 draws from the model")
    top_p: float = setting(0.95, "draw from the fewest tokens with this share (1: all)")
    top_k: int = setting(0, "draw from the k most probable tokens (0: all)")
    min_p: float = setting(0.0, "least probability, as a part of the highest (0: all)")
    repetition_penalty: float = setting(1.0, "above 1: tokens of the prompt and answer come less often again")

    def __post_init__(self):
        self.sampling()  # its errors are for these values too

    def sampling(self) -> Sampling:
        return Sampling(**vars(self))


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Nothing a client sends may cost more than this. 0 switches `first` and the limits of a key off."""

    body: int = setting(10 << 20, "bytes of a request")
    depth: int = setting(32, "lists and objects within each other in a request")
    nodes: int = setting(250_000, "values in a request")
    messages: int = setting(2048, "messages of a chat")
    tools: int = setting(256, "tools of a chat")
    choices: int = setting(8, "answers to one prompt (n)")
    prompts: int = setting(64, "prompts of one request")
    stop: int = setting(16, "stop strings")
    stop_chars: int = setting(256, "characters of a stop string")
    biases: int = setting(1024, "tokens in logit_bias")
    bad_words: int = setting(128, "strings in bad_words")
    rendering: float = setting(10.0, "seconds to read, render and encode a request")
    seconds: float = setting(1800.0, "seconds of a request")
    first: float = setting(0.0, "seconds to the first token of its answer (0: no limit of its own)")
    sending: float = setting(30.0, "seconds in which a client must have sent its request")
    idle: int = setting(5, "seconds of an idle connection")
    connections: int = setting(256, "connections")
    chunks: int = setting(1024, "events that wait for a slow reader before it is cut off")
    chunk_bytes: int = setting(1 << 20, "bytes of these")
    responses: int = setting(256, "answers of /v1/responses that are kept for each key")
    response_bytes: int = setting(32 << 20, "bytes of these with their conversations")
    stalled: float = setting(60.0, "seconds in which a reader takes nothing before it is cut off")
    ping: float = setting(15.0, "seconds of silence before a comment keeps a stream open")
    priority: int = setting(
        0, "least priority that may be asked for; a request with a lower one goes before all others"
    )
    key_requests: int = setting(0, "requests of one key that run together")
    key_rate: int = setting(0, "requests of one key in a minute")

    def __post_init__(self):
        for name, value in vars(self).items():
            if name == "priority" or (value >= 0 if name in MAY_BE_NONE else value > 0):
                continue
            least = "0 or more" if name in MAY_BE_NONE else "more than 0"
            raise UserError(f"limits.{name}={value} was asked for, with which nobody could be answered; give {least}")
