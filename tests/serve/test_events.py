"""What a router hears of known prefixes, as a subscriber with vLLM's own types reads it."""

import random
import socket

import pytest

from nautilus.ops.pages import PAGE
from nautilus.runtime import UserError
from nautilus.serve.events import KvEvents, Publisher, block_hashes
from nautilus.serve.prefix import as_tokens
from tests.serve.test_prefixes import SHORT, engine_of, run, words

msgspec, zmq = pytest.importorskip("msgspec"), pytest.importorskip("zmq")


class Event(msgspec.Struct, array_like=True, omit_defaults=True, gc=False, tag=True):
    pass


class BlockStored(Event):
    block_hashes: list[bytes | int]
    parent_block_hash: bytes | int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list | None = None


class BlockRemoved(Event):
    block_hashes: list[bytes | int]
    medium: str | None


class AllBlocksCleared(Event):
    pass


class Batch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


class Router:
    """It believes what it is told: which blocks are known, by hash, with the tokens up to their end."""

    def __init__(self):
        self.blocks, self.next = {}, 0

    def take(self, number, batch):
        assert number == self.next, "one was missed"
        self.next += 1
        for event in batch.events:
            match event:
                case AllBlocksCleared():
                    self.blocks.clear()
                case BlockStored():
                    before = self.blocks[event.parent_block_hash] if event.parent_block_hash is not None else []
                    assert event.block_size == PAGE and len(event.token_ids) == PAGE * len(event.block_hashes)
                    for at, hash in enumerate(event.block_hashes):
                        before = [*before, *event.token_ids[at * PAGE : (at + 1) * PAGE]]
                        assert hash not in self.blocks, "told twice"
                        self.blocks[hash] = before
                case BlockRemoved():
                    for hash in event.block_hashes:
                        del self.blocks[hash]

    def prefixes(self):
        return sorted(self.blocks.values())


def blocks_of(engine):
    """All whole blocks of all prefixes that the engine knows."""
    known = [place.tokens().tolist() for place in engine.prefixes.saved.tree]
    return sorted({tuple(tokens[:end]) for tokens in known for end in range(PAGE, len(tokens) + 1, PAGE)})


@pytest.fixture
def ports():
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        found = [one.getsockname()[1], two.getsockname()[1]]
    return [f"tcp://127.0.0.1:{port}" for port in found]


@pytest.fixture
def published(ports):
    publisher = Publisher(*ports)
    with zmq.Context() as context, context.socket(zmq.SUB) as heard, context.socket(zmq.DEALER) as asking:
        heard.connect(ports[0])
        heard.subscribe(b"")
        heard.rcvtimeo = asking.rcvtimeo = 5000
        asking.connect(ports[1])
        asking.send_multipart([b"", bytes(8)])
        assert asking.recv_multipart()[1] == b"\xff" * 8, "nothing was sent yet"
        yield publisher, heard, asking
        asking.linger = 0
    publisher.close()


def asked(asking, begin):
    """What comes when all from a number on is asked for."""
    asking.send_multipart([b"", begin.to_bytes(8, "big")])
    found = []
    while (message := asking.recv_multipart())[1] != b"\xff" * 8:
        found.append((int.from_bytes(message[1], "big"), msgspec.msgpack.decode(message[2], type=Batch)))
    return found


@pytest.mark.parametrize("saved_gb", [1e-2, 2e-5])
def test_a_router_that_hears_all_events_knows_what_the_engine_knows(saved_gb):
    draw, router, engine = random.Random(1), Router(), engine_of(saved_gb=saved_gb)
    encode = msgspec.msgpack.encode
    send = lambda events: router.take(router.next, msgspec.msgpack.decode(encode([0.0, events, 3]), type=Batch))
    engine.prefixes.tell(KvEvents(send))
    begun = words(draw, 150)
    for length in (20, 40, 100, 150, 70):
        prompt = [*begun[:length], *words(draw, 40)]
        run(engine, engine.request(prompt, SHORT, marks=(length,), tenant=draw.choice("ab")))
        assert [*map(tuple, router.prefixes())] == sorted(blocks_of(engine) + shared_blocks(engine))
    assert engine.prefixes.saved.counts.evictions > 0 or saved_gb > 1e-3, engine.prefixes.saved.counts
    engine.forget()
    assert router.blocks == {}


def shared_blocks(engine):
    """Of these two tenants have each their own."""
    mine = {}
    for place in engine.prefixes.saved.tree:
        tokens = place.tokens().tolist()
        mine.setdefault(place.space, set()).update(tuple(tokens[:e]) for e in range(PAGE, len(tokens) + 1, PAGE))
    every = [block for blocks in mine.values() for block in blocks]
    return [block for block in {*every} for _ in range(every.count(block) - 1)]


def test_only_prefixes_that_end_at_a_state_are_told():
    draw, told = random.Random(2), []
    engine = engine_of()
    engine.prefixes.tell(KvEvents(told.extend))
    request = engine.request(words(draw, 100), SHORT)
    engine.submit(request)
    while not request.pieces:
        engine.step()
    assert told == [["AllBlocksCleared"]], "100 tokens were read, but nothing can go on from there"
    while not request.finished:
        engine.step()
    (_, stored) = told
    assert stored[0] == "BlockStored" and len(stored[1]) == 107 // PAGE and stored[3] == request.tokens[:96]


def test_what_was_known_before_anybody_listened_is_told_at_once():
    draw, told, engine = random.Random(3), [], engine_of()
    engine.generate([words(draw, 64)], SHORT)
    engine.prefixes.tell(KvEvents(told.extend))
    assert [event[0] for event in told] == ["AllBlocksCleared", "BlockStored"] and len(told[1][1]) == 4


def test_hashes_tell_prefixes_and_their_owners_apart():
    one, other = as_tokens(range(64)), as_tokens([*range(48), *range(16)])
    assert block_hashes("a", one)[:3] == block_hashes("a", other)[:3] == block_hashes("a", one[:60])
    assert block_hashes("a", one)[3] != block_hashes("a", other)[3]
    assert not {*block_hashes("a", one)} & {*block_hashes("b", one)}
    assert block_hashes("a", one[:15]) == [] and all(0 <= hash < 1 << 64 for hash in block_hashes("a", one))


def test_a_subscriber_hears_and_what_it_missed_comes_again(published):
    publisher, heard, asking = published
    events, router = KvEvents(publisher), Router()
    for length in (32, 48, 160):
        events.stored("a", range(length))
    events.removed("a", range(160))
    for _ in range(5):
        topic, number, batch = heard.recv_multipart()
        batch = msgspec.msgpack.decode(batch, type=Batch)
        assert topic == b"" and batch.data_parallel_rank == 0 and batch.ts > 1e9
        router.take(int.from_bytes(number, "big"), batch)
    assert router.prefixes() == [[*range(16)], [*range(32)], [*range(48)]]
    late = Router()
    for number, batch in asked(asking, 0):
        late.take(number, batch)
    assert late.blocks == router.blocks and late.next == 5
    assert [number for number, _ in asked(asking, 3)] == [3, 4] and asked(asking, 5) == []


def test_strange_questions_get_no_answer_and_do_no_harm(published):
    _, _, asking = published
    for strange in ([b""], [b"", b"x"], [b"", b"", b""], [b"a", b"b", b"c", b"d"]):
        asking.send_multipart(strange)
    assert asked(asking, 0) == []


def test_batches_that_are_kept_have_a_bound(published, monkeypatch):
    publisher, heard, asking = published
    monkeypatch.setattr("nautilus.serve.events.KEPT_BYTES", 100)
    for _ in range(50):
        publisher([["AllBlocksCleared"]])
        heard.recv_multipart()
    numbers = [number for number, _ in asked(asking, 0)]
    assert numbers[-1] == 49 and 0 < len(numbers) < 5


def test_replicas_publish_at_ports_of_their_own(ports):
    port = int(ports[0].rpartition(":")[2])
    publisher = Publisher(f"tcp://127.0.0.1:{port - 1}", rank=1)
    with socket.create_connection(("127.0.0.1", port), timeout=5):
        pass
    publisher.close()


@pytest.mark.parametrize("endpoint", ["", "5557", "tcp://*:5557", "ipc://x", "tcp://127.0.0.1:0", "tcp://a:70000"])
def test_what_is_no_endpoint_is_refused(endpoint):
    with pytest.raises(UserError, match=f"kv_events={endpoint.replace('*', '.')} was asked for; write tcp://HOST:PORT"):
        Publisher(endpoint)


def test_a_port_in_use_is_told():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="choose another port"):
        Publisher(f"tcp://127.0.0.1:{taken.getsockname()[1]}")


def test_without_kept_prefixes_there_is_nothing_to_tell():
    with pytest.raises(UserError, match="saved_gb=0"):
        engine_of(saved_gb=0).prefixes.tell(KvEvents(print))


def test_without_the_libraries_it_says_how_to_get_them(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "zmq", None)
    with pytest.raises(UserError, match="kv_events needs the library 'zmq'; .*scale"):
        Publisher("tcp://127.0.0.1:5557")
