"""Compiles a stranger's grammar in a process of its own before the server does.

The compiler recurses and may run long or fill the memory: a chain of a few thousand rules overflows its stack, which
ends the process without an error that could be caught, and a thread that hangs cannot be stopped. A process can be
killed, and its death tells what the grammar would have done. So each new grammar is compiled in a fresh process first,
with a small stack, little memory and a time limit; one that comes through is compiled again by the server.

The file is its own program and imports nothing of this package, so that it starts in less than a tenth of a second.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

SECONDS = 2  # of computing for one grammar, the start of the process included
WAIT = 6.0  # seconds by the clock, on a machine that has other things to do
MEMORY = 1 << 30  # of address space, Python's own included
GROWTH = 128 << 20  # bytes that one compiled grammar may take
STACK = 1 << 20  # of the trial; threads of the server have as much or more
STEPS = 8  # tokens of a trial
# What one grammar may cost later, in units of the library: 200,000 of fuel are about 14 ms for one mask, and a lexer
# state takes 1 to 2 kB. Messages without the parser's state: they may go to clients.
LIMITS = {
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
one_at_a_time = threading.Lock()


def build(tokenizer: Any, grammar: str) -> tuple[Any, str]:
    """The matcher at the start of the grammar, its first mask known, and what is wrong with it ("": nothing)."""
    import llguidance

    limits = llguidance.LLParserLimits(**LIMITS)
    try:
        matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as bad:  # a panic of the library is no Exception
        return None, f"the compiler failed on it: {bad}"
    if not matcher.is_error():
        matcher.compute_bitmask()
    return matcher, matcher.get_error()


def tried(grammar: str, words: dict[int, str], ends: list[int]) -> tuple[str, int]:
    """What is wrong with a grammar ("": nothing), and the bytes that it takes compiled. One process at a time.

    words: the control tokens that the grammar may name; ends: those that end an answer.
    """
    import llguidance

    library = str(Path(llguidance.__path__[0]).parent)
    task = json.dumps({"grammar": grammar, "words": list(words.items()), "ends": ends}).encode()
    with one_at_a_time:
        try:
            # Alone and without site packages: only the one library is found.
            child = subprocess.run(
                [sys.executable, "-I", "-S", __file__, library], input=task, capture_output=True, timeout=WAIT
            )
        except subprocess.TimeoutExpired:
            return f"it takes more than {WAIT:g} s to compile", 0
    if 0 < child.returncode < 128:  # an error of the program itself; what kills it gives other numbers
        raise RuntimeError(f"a grammar's trial failed: {child.stderr.decode(errors='replace')[-500:]}")
    if child.returncode:
        return "it takes more time, memory or recursion than a grammar may", 0
    error, growth = json.loads(child.stdout)
    return (error, growth) if error or growth <= GROWTH else (f"it takes {growth >> 20} MB of memory", growth)


class Bytes:
    """A vocabulary of single bytes and control tokens, in the form that the library reads."""

    is_tokenizer_wrapper, bos_token_id = True, None

    def __init__(self, words: list[tuple[int, str]], ends: list[int]):
        self.special_token_ids = [id for id, _ in words]
        self.eos_token_id = ends[0]
        self.tokens = [b""] * (max(self.special_token_ids) + 257)
        for id, word in words:
            self.tokens[id] = word.encode()
        free = (id for id in range(len(self.tokens)) if id not in set(self.special_token_ids))
        self.id_of = dict(zip(range(256), free, strict=False))
        for byte, id in self.id_of.items():
            self.tokens[id] = bytes([byte])

    def __call__(self, text: str) -> list[int]:
        return [self.id_of[byte] for byte in text.encode()]


def limit_resources() -> None:
    try:
        import resource
    except ImportError:  # not on this system; elapsed time and stack are limited all the same
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def memory_used() -> int:
    """The most that this process has held so far, where the system tells. (getrusage would count the server's too.)"""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def rehearse(task: dict) -> tuple[str, int]:
    """A few tokens too: the first that is allowed, each time."""
    import llguidance

    words: Any = Bytes(task["words"], task["ends"])
    tokenizer = llguidance.LLTokenizer(words, eos_token=task["ends"])
    before = memory_used()
    matcher, error = build(tokenizer, task["grammar"])
    for _ in range(STEPS):
        allowed = 0 if error or matcher.is_stopped() else int.from_bytes(matcher.compute_bitmask(), "little")
        if not allowed:
            break
        matcher.consume_token((allowed & -allowed).bit_length() - 1)
        error = matcher.get_error()
    return error, memory_used() - before


def main() -> None:
    limit_resources()
    sys.path.append(sys.argv[1])
    importlib.import_module("llguidance")  # an error here is none of the grammar
    task = json.load(sys.stdin)
    threading.stack_size(STACK)
    results: list[tuple[str, int]] = []
    thread = threading.Thread(target=lambda: results.append(rehearse(task)))
    thread.start()
    thread.join()
    print(json.dumps(results[0]))


if __name__ == "__main__":
    main()
