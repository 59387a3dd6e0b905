"""Mixed load on `nautilus serve` for a long time: no answer lost or mixed up, and no memory that grows.

    python -m tests.serve.reliability.soak minutes=20 clients=6 seed=0

A tiny model answers; every answer is compared with what it must be, token by token. The exit status is 0 where all were
right and resident memory, after a warm-up of a quarter of the time, grew by at most 1 MiB per 10,000 requests. Of runs
shorter than five minutes the slope is told, and not judged: allocators are still filling up.
"""

import collections
import http.client
import json
import pathlib
import random
import sys
import tempfile
import threading
import time

import numpy as np

import nautilus
from nautilus.serve import Engine, Sampling
from tests.serve.reliability.parts import words
from tests.serve.reliability.web import PATH, body_of, command, events, get, model_folder

LIMIT = 1.0  # MiB per 10,000 requests
LONG_ENOUGH = 300.0  # seconds
CHAT = "/v1/chat/completions"
SERVER = ("rows=4", "saved_gb=0.001", "saved_folder_gb=0.002", "step_seconds=0.02")
KINDS = {"plain": 4, "stream": 4, "chat": 3, "salted": 2, "leaves": 2, "wrong": 1}


class Wrong(Exception):
    """An answer that is not what it must be."""


class Questions:
    """What is asked, and what must be answered: computed before, by an engine that has one request at a time."""

    def __init__(self, folder, draw, count=60):
        engine = Engine(*nautilus.load(folder), rows=1)
        begun = [words(draw, 60) for _ in range(6)]
        self.texts, self.chats = [], []
        for number in range(count):
            sampling = Sampling(seed=draw.randrange(9), max_tokens=draw.choice([1, 8, 30]))
            prompt = [*draw.choice(begun)[: draw.randint(1, 60)], *words(draw, draw.randint(1, 30))]
            self.texts.append((body_of(prompt, sampling), engine.generate([prompt], sampling)[0].tokens))
            messages = [{"role": "user", "content": f"{draw.choice(['Tell', 'Ask'])} me {number}"}]
            chat = {**body_of([], sampling), "messages": messages, "top_k": 0, "min_p": 0}
            del chat["prompt"]
            self.chats.append((chat, engine.generate([messages], sampling)[0].tokens))


class Client(threading.Thread):
    """Asks one question after another until the time is over."""

    def __init__(self, port, questions, seed, until):
        super().__init__()
        self.port, self.questions, self.draw, self.until = port, questions, random.Random(seed), until
        self.done, self.failures = collections.Counter(), []

    def run(self):
        while time.monotonic() < self.until:
            (kind,) = self.draw.choices([*KINDS], [*KINDS.values()])
            try:
                getattr(self, kind)()
            except Exception as bad:
                self.failures.append(f"{kind}: {type(bad).__name__}: {bad}")
            self.done[kind] += 1

    def post(self, path, body):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        return connection, connection.getresponse()

    def whole(self, path, body, status=200):
        connection, answer = self.post(path, body)
        content = answer.read().decode()
        connection.close()
        if answer.status != status:
            raise Wrong(f"status {answer.status} where {status} was due: {content[:300]}")
        return content

    def plain(self, **more):
        body, tokens = self.draw.choice(self.questions.texts)
        same(json.loads(self.whole(PATH, {**body, **more}))["choices"][0]["token_ids"], tokens)

    def salted(self):
        self.plain(cache_salt=str(self.draw.random()))

    def chat(self):
        body, tokens = self.draw.choice(self.questions.chats)
        same(json.loads(self.whole(CHAT, body))["choices"][0]["token_ids"], tokens)

    def stream(self):
        body, tokens = self.draw.choice(self.questions.texts)
        content = self.whole(PATH, {**body, "stream": True})
        if not content.endswith("data: [DONE]\n\n"):
            raise Wrong(f"a stream ended with {content[-200:]!r}")
        same([token for event in events(content) for token in event["choices"][0].get("token_ids", ())], tokens)

    def leaves(self):
        connection, answer = self.post(PATH, {**self.draw.choice(self.questions.texts)[0], "stream": True})
        answer.read(self.draw.randint(1, 600))
        connection.close()

    def wrong(self):
        self.whole(PATH, {"prompt": [1, 2], "max_tokens": -5}, status=400)


def same(got, want):
    if tuple(got) != tuple(want):
        raise Wrong(f"{got} came where {list(want)} was due")


def resident(process):
    pages = int(pathlib.Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * 4096 / (1 << 20)


def watched(process, clients, seconds):
    """(requests so far, MiB), every half second, after the warm-up."""
    begin, found = time.monotonic(), []
    while any(client.is_alive() for client in clients):
        time.sleep(0.5)
        if time.monotonic() - begin >= seconds / 4 and process.poll() is None:
            found.append((sum(client.done.total() for client in clients), resident(process)))
    return found


def slope(found):
    """MiB per 10,000 requests, by least squares."""
    counts, sizes = np.array(found, dtype=float).T
    return float(np.polyfit(counts, sizes, 1)[0]) * 10_000 if len({*counts}) > 1 else float("nan")


def soak(place, *, minutes=20.0, clients=6, seed=0):
    """The exit status."""
    folder, seconds = model_folder(place / "model"), 60 * float(minutes)
    questions = Questions(folder, random.Random(seed))
    with command(folder, *SERVER, f"saved_folder={place / 'states'}") as (process, port):
        until = time.monotonic() + seconds
        asking = [Client(port, questions, seed * 1000 + number, until) for number in range(int(clients))]
        for client in asking:
            client.start()
        found = watched(process, asking, seconds)
        if process.poll() is not None:
            print(f"the server ended with status {process.poll()}: {process.stderr.read()[-2000:]}")
            return 1
        for _ in range(100):  # who left last is noticed at the next step, and prompts may be read ahead
            load = [line for line in get(port, "/metrics")[2].decode().splitlines() if "num_requests_running{" in line]
            if not any(float(line.rpartition(" ")[2]) for line in load):
                break
            time.sleep(0.1)
    return verdict(asking, found, seconds, load)


def verdict(asking, found, seconds, load):
    done = sum((client.done for client in asking), collections.Counter())
    failures, grew = [failure for client in asking for failure in client.failures], slope(found)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(done.items()))
    print(f"{done.total()} requests in {seconds:.0f} s ({kinds}); {len(failures)} lost or mixed up")
    for failure in failures[:10]:
        print(f"  {failure}")
    judged, later = seconds >= LONG_ENOUGH, found[-1][0] - found[0][0]
    print(
        f"resident memory {found[0][1]:.1f} MiB after warm-up, {found[-1][1]:.1f} at the end, {later} requests later: "
        f"{grew:+.2f} MiB per 10,000 requests (limit {LIMIT:g}{'' if judged else ', not judged'})"
    )
    left = [line for line in load if float(line.rpartition(" ")[2])]
    print("\n".join(["requests still run:", *left]) if left else "nothing runs any more")
    return int(bool(failures or left or (judged and not grew <= LIMIT)))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(soak(pathlib.Path(temporary), **dict(word.split("=", 1) for word in sys.argv[1:])))
