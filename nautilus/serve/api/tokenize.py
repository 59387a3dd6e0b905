"""POST /tokenize, /detokenize and /apply-template: what the model reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nautilus.data.chat import render as render_text
from nautilus.serve.api.chat import render
from nautilus.serve.api.context import Context
from nautilus.serve.api.errors import ApiError
from nautilus.serve.api.fields import Record, known_tokens, read
from nautilus.serve.api.messages import ChatInput, chat_settings, plain_messages, plain_tools


class TokenizeRequest(Record):
    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool | None = None


class TokenizeChatRequest(ChatInput):
    model: str | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Record):
    model: str | None = None
    tokens: list[int]


def tokenize(context: Context, body: Mapping[str, Any]) -> dict[str, Any]:
    """The tokens of a text, or of a chat as the model would be given it."""
    if "messages" in body:
        asked = read(TokenizeChatRequest, body)
        tokens = render(context, asked).tokens
    else:
        asked = read(TokenizeRequest, body)
        start = context.engine.tokens if asked.add_special_tokens else context.tokenizer.encode
        tokens = start(asked.prompt)
    context.check_model(asked.model)
    spelled = context.tokenizer.token_bytes
    words = [spelled[token].decode(errors="replace") for token in tokens] if asked.return_token_strs else None
    return {"count": len(tokens), "max_model_len": context.engine.max_tokens, "tokens": tokens, "token_strs": words}


def detokenize(context: Context, body: Mapping[str, Any]) -> dict[str, Any]:
    asked = read(DetokenizeRequest, body)
    context.check_model(asked.model)
    return {"prompt": context.tokenizer.decode(known_tokens(asked.tokens, context.tokenizer, "tokens"))}


def apply_template(context: Context, body: Mapping[str, Any]) -> dict[str, Any]:
    """The text of a chat, for people: control tokens and words that look like them cannot be told apart in it."""
    asked = read(ChatInput, body)
    if asked.continue_final_message:
        raise ApiError(400, "continue_final_message is for /tokenize; leave it out", param="continue_final_message")
    messages, tools = plain_messages(asked, context.limits), plain_tools(asked.tools, context.limits)
    settings, generate = chat_settings(asked, context.tokenizer), asked.add_generation_prompt is not False
    return {"prompt": render_text(context.tokenizer, messages, tools=tools, settings=settings, generate=generate)}
