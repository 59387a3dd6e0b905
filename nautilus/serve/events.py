"""Which prefixes are known, told as they come and go, for routers in front of several servers. Letter: T tokens.

The form is vLLM's: on a ZeroMQ PUB socket messages of three frames, the topic (empty), a number that counts up from 0
(8 bytes, big-endian), and a msgpack array (seconds since 1970, events, rank of the replica). An event is an array that
begins with its name:

    BlockStored, block_hashes, parent_block_hash, token_ids, block_size, lora_id, medium, lora_name
    BlockRemoved, block_hashes, medium
    AllBlocksCleared

A block is a page of tokens; its hash depends on all tokens before it and on whose they are. Only prefixes that an
engine can go on from are told: those that end at a saved state, in memory or in a file, in whole blocks. Whoever has
missed some asks a second socket (ROUTER) for all from a number on, and gets (number, batch) for each, then (-1, "").
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import numpy as np

from nautilus.ops.pages import PAGE
from nautilus.runtime import UserError, installing
from nautilus.serve.prefix import Tokens, as_tokens

KEPT_BYTES = 64 << 20  # of batches that can be asked for again
ENDPOINT = re.compile(r"tcp://([\w.-]+):(\d{1,5})")
LAST = (-1).to_bytes(8, "big", signed=True)


class KvEvents:
    """Events of one engine. Several prefixes share blocks: a block is told when the first comes and the last goes.

    send: takes the events of one batch. The first batch says that nothing is known.
    """

    def __init__(self, send: Callable[[list[list[Any]]], None]):
        self.send, self.known = send, Counter[int]()
        self.cleared()

    def stored(self, space: str, tokens: Tokens) -> None:
        """A state after these tokens can be gone on from."""
        tokens_T = as_tokens(tokens)
        hashes = block_hashes(space, tokens_T)
        old = sum(hash in self.known for hash in hashes)  # the first ones: what holds a block holds those before it
        self.known.update(hashes)
        if old < len(hashes):
            told_T = tokens_T[old * PAGE : len(hashes) * PAGE]
            parent = hashes[old - 1] if old else None
            self.send([["BlockStored", hashes[old:], parent, told_T.tolist(), PAGE, None, None, None]])

    def removed(self, space: str, tokens: Tokens) -> None:
        hashes = [hash for hash in block_hashes(space, as_tokens(tokens)) if hash in self.known]
        self.known.subtract(hashes)
        if gone := [hash for hash in hashes if not self.known[hash]]:
            for hash in gone:
                del self.known[hash]
            self.send([["BlockRemoved", gone, None]])

    def cleared(self) -> None:
        self.known.clear()
        self.send([["AllBlocksCleared"]])


def block_hashes(space: str, tokens_T: np.ndarray) -> list[int]:
    """Of each whole block, 64 bits: SHA-256 of what was hashed before it and its tokens."""
    found, before = [], hashlib.sha256(space.encode()).digest()
    for end in range(PAGE, len(tokens_T) + 1, PAGE):
        before = hashlib.sha256(before + tokens_T[end - PAGE : end].tobytes()).digest()
        found.append(int.from_bytes(before[:8], "big"))
    return found


class Publisher:
    """The sockets, in a thread of their own that sleeps until there is something to send or to answer.

    endpoint, replay: "tcp://HOST:PORT", each at a port of its own, to which the rank is added; without the second
    nothing can be asked for again. UserError for what is none, where nobody can listen, and without the libraries.
    """

    def __init__(self, endpoint: str, replay: str = "", rank: int = 0):
        self.zmq, self.pack = libraries()
        self.rank, self.next, self.bytes = rank, 0, 0
        self.sent: deque[tuple[int, bytes]] = deque()
        self.context = self.zmq.Context()
        self.context.linger = 0
        self.events = self.bound(self.zmq.PUB, "kv_events", endpoint)
        self.replay = self.bound(self.zmq.ROUTER, "kv_replay", replay) if replay else None
        self.arriving, self.orders = self.context.socket(self.zmq.PULL), self.context.socket(self.zmq.PUSH)
        self.arriving.bind("inproc://orders")
        self.orders.set_hwm(0)
        self.orders.connect("inproc://orders")
        self.thread = threading.Thread(target=self.run, name="kv-events", daemon=True)
        self.thread.start()

    def bound(self, kind: int, name: str, endpoint: str) -> Any:
        found = ENDPOINT.fullmatch(endpoint)
        if not found or not 0 < int(found[2]) + self.rank < 1 << 16:
            self.context.destroy()
            raise UserError(f"{name}={endpoint} was asked for; write tcp://HOST:PORT, such as tcp://127.0.0.1:5557")
        place = f"tcp://{found[1]}:{int(found[2]) + self.rank}"
        socket = self.context.socket(kind)
        try:
            socket.bind(place)
        except self.zmq.ZMQError as bad:
            self.context.destroy()
            raise UserError(f"{name}={endpoint}: cannot listen at {place}: {bad}; choose another port") from bad
        return socket

    def __call__(self, events: list[list[Any]]) -> None:
        """Send a batch. From one thread at a time, the engine's."""
        self.orders.send(self.pack([time.time(), events, self.rank]))

    def run(self) -> None:
        poller = self.zmq.Poller()
        for socket in filter(None, (self.arriving, self.replay)):
            poller.register(socket, self.zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self.arriving in ready:
                batch = self.arriving.recv()
                if not batch:
                    return
                self.publish(batch)
            if self.replay is not None and self.replay in ready:
                self.repeat(self.replay.recv_multipart())

    def publish(self, batch: bytes) -> None:
        self.events.send_multipart((b"", self.next.to_bytes(8, "big"), batch))
        self.sent.append((self.next, batch))
        self.next, self.bytes = self.next + 1, self.bytes + len(batch)
        while self.bytes > KEPT_BYTES:
            self.bytes -= len(self.sent.popleft()[1])

    def repeat(self, asked: list[bytes]) -> None:
        """Answer who asks for all from a number on. What is no such question gets no answer."""
        assert self.replay is not None
        if len(asked) != 3 or len(asked[2]) != 8:
            return
        who, begin = asked[0], int.from_bytes(asked[2], "big")
        for number, batch in self.sent:
            if number >= begin:
                self.replay.send_multipart((who, b"", number.to_bytes(8, "big"), batch))
        self.replay.send_multipart((who, b"", LAST, b""))

    def close(self) -> None:
        self.orders.send(b"")
        self.thread.join()
        self.context.destroy()


def libraries() -> tuple[Any, Callable[[Any], bytes]]:
    try:
        import msgspec
        import zmq
    except ImportError as bad:
        raise UserError(f"kv_events needs the library {bad.name!r}; {installing('scale')}") from bad
    return zmq, msgspec.msgpack.encode
