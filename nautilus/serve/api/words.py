"""What a server says in the terminal where it is started. settings: those of `nautilus serve`."""

from __future__ import annotations

import socket
from typing import Any

from nautilus.serve.api.keys import others_may_read
from nautilus.serve.api.server import address, loopback


def warnings(settings: Any) -> list[str]:
    """Who could use or read what they should not."""
    found = []
    if not settings.keys and not loopback(settings.host):
        found.append(f"everybody who reaches host={settings.host} may use this model; give keys=FILE to say who may")
    if settings.keys and others_may_read(settings.keys):
        found.append(f"other users of this machine can read keys={settings.keys}; chmod 600 it")
    place = settings.kv_events.removeprefix("tcp://").rpartition(":")[0]
    if place and not loopback(place):
        found.append(f"everybody who reaches kv_events={settings.kv_events} can read the tokens of all prompts")
    return found


def greeting(engine: Any, settings: Any, name: str, listening: socket.socket) -> str:
    place = address(settings.host, listening)
    many = f" in {settings.replicas} replicas" if settings.replicas > 1 else ""
    most = f"{engine.max_tokens:,} tokens of a request, {settings.rows * settings.replicas} requests together{many}"
    who = f"keys of {settings.keys}" if settings.keys else "no keys"
    bare = " It has no chat template: it answers completions, not chats; template=nemotron gives it the family's."
    return f"{name} answers at {place}: {most}, {who}.{'' if engine.tokenizer.template else bare} Ctrl-C ends it."
