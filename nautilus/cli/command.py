"""`nautilus <name> [MODEL] a.b=v`: finds the command, resolves its settings, runs it, and makes errors one message.

A command is a module with a frozen `Settings` record, every field of which has a default and may carry
`metadata={"help": ...}`, and a function `main(settings)` that returns an exit status or None. Modules are imported
when they are asked for.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import nautilus
from nautilus.cli.settings import listing, pasteable, resolve
from nautilus.runtime import DISK_FULL, UserError, disk_full, quiet


class Command(NamedTuple):
    module: str
    help: str
    typed: bool = False  # reads what is typed: not to be shown before it is read


COMMANDS = {
    "demo": Command("nautilus.recipes.demo", "train a small model here, write its report, let it talk"),
    "curate": Command("nautilus.recipes.curate", "make text worth training on out of raw text"),
    "pretrain": Command("nautilus.recipes.pretrain", "train a model of any preset from plain text"),
    "compare": Command(
        "nautilus.recipes.compare", "train variants over several seeds; paired differences and intervals"
    ),
    "eval": Command("nautilus.recipes.eval", "examine a model: retrieval in long texts, tasks of lm-eval"),
    "synthesize": Command("nautilus.recipes.synthesize", "make conversations and questions to learn from out of texts"),
    "sft": Command("nautilus.recipes.sft", "train a model on finished conversations and worked answers"),
    "rlvr": Command("nautilus.recipes.rlvr", "train a model by reinforcement on tasks that can be verified"),
    "dpo": Command("nautilus.recipes.dpo", "train a model to prefer its better answers"),
    "mopd": Command("nautilus.recipes.mopd", "distil several teachers into one student, on its own answers"),
    "posttrain": Command(
        "nautilus.recipes.posttrain", "the whole pipeline: sft, specialists, one student of them, boost"
    ),
    "boost": Command("nautilus.recipes.boost", "train a model's prediction block so that more drafts are accepted"),
    "eagle": Command("nautilus.recipes.eagle", "train a draft head for a model, in the manner of EAGLE-3"),
    "chat": Command("nautilus.recipes.chat", "talk to a model in the terminal", typed=True),
    "serve": Command("nautilus.recipes.serve", "answer over HTTP as OpenAI's API does"),
    "environments": Command("nautilus.recipes.environments", "put tasks behind HTTP as environments of NeMo Gym"),
    "hvd train": Command("nautilus.recipes.hvd", "learn here which copied drafts are worth trying for a model"),
    "speculate": Command("nautilus.recipes.speculate", "what every way to draft brings a model, side by side"),
    "info": Command("nautilus.cli.info", "layers, parameters and memory of a preset or checkpoint"),
    "doctor": Command("nautilus.cli.doctor", "what this machine has, how fast it is, what is missing"),
    "publish": Command("nautilus.cli.publish", "send a model folder to the hub"),
    "plan": Command("nautilus.cli.plan", "memory and time of a training on any number of devices"),
    "bench speed": Command("nautilus.cli.bench", "how fast a model decodes here, beside what memory allows"),
}

USAGE = """\
nautilus <command> [MODEL] setting=value …

{commands}

Settings are written a.b=v or --a.b v; a hyphen equals an underscore. Every command takes
  --help       its settings with their defaults
  --show       the settings it would run with, and stop
  --traceback  where an error came from
"""


LONGEST = 5000  # characters of a message; what it quotes from a file may be of any length
MISTAKES = (ValueError, OSError, ImportError)
# Nothing that a person gives should lead here; where it does, one line is still better than a page.
FAILURES = (RuntimeError, MemoryError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError)
PANIC = "PanicException"  # of libraries in Rust: no Exception, and of a class that cannot be imported


def main(words: Sequence[str] | None = None) -> int:
    """The exit status: 0 done, 1 failed, 2 a mistake to mend, 130 interrupted."""
    given = list(sys.argv[1:] if words is None else words)
    if odd := next((word for word in given if any("\ud800" <= sign <= "\udfff" for sign in word)), None):
        return complain(f"{odd!r} is no UTF-8, in which everything is kept; take another name", 2)
    if "--traceback" in given:
        return run([word for word in given if word != "--traceback"])
    try:
        return run(given)
    except KeyboardInterrupt as stop:
        return complain(f"interrupted. {stop}".rstrip(), 130)
    except SystemExit as stop:
        if not isinstance(stop.code, str):
            raise
        return complain(stop.code, 130)
    except BrokenPipeError:
        # The reader (`| head`) has gone; without this Python would complain again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except MISTAKES as bad:
        return complain(explain(bad), 2)
    except BaseException as bad:
        if not isinstance(bad, FAILURES) and type(bad).__name__ != PANIC:
            raise
        return complain(f"failed: {type(bad).__name__}: {bad} (add --traceback to see where)", 1)


def complain(message: str, status: int) -> int:
    cut = f"{message[:LONGEST]} …" if len(message) > LONGEST else message
    cut = "".join(sign if sign.isprintable() or sign in "\n\t" else repr(sign)[1:-1] for sign in cut)
    print(f"nautilus: {cut}", file=sys.stderr)
    return status


def explain(bad: Exception) -> str:
    if isinstance(bad, UserError):
        return str(bad)
    if isinstance(bad, OSError) and bad.errno in DISK_FULL:
        return str(disk_full(Path(bad.filename))) if bad.filename else "cannot write the output: the disk is full"
    return f"{str(bad) or type(bad).__name__} (add --traceback to see where)"


def run(words: list[str]) -> int:
    if not words or words[0] in ("--help", "-h", "help"):
        width = max(map(len, COMMANDS))
        print(USAGE.format(commands="\n".join(f"  {name:<{width}}  {c.help}" for name, c in COMMANDS.items())), end="")
        return 0
    if words[0] == "--version":
        print(f"nautilus {nautilus.__version__}")
        return 0
    name, rest = named(words)
    with quiet() if COMMANDS[name].typed else contextlib.nullcontext():
        module = importlib.import_module(COMMANDS[name].module)  # seconds where it needs torch
    if "--help" in rest or "-h" in rest:
        print(command_help(name, module), end="")
        return 0
    settings = resolve(module.Settings, [word for word in rest if word != "--show"])
    if "--show" in rest:
        print("\n".join(pasteable(settings)))
        return 0
    return module.main(settings) or 0


def named(words: list[str]) -> tuple[str, list[str]]:
    """The command that the first words name, and the words after it."""
    for count in (2, 1):
        name = " ".join(words[:count]).replace("-", "_")
        if name in COMMANDS:
            return name, words[count:]
    if members := [name for name in COMMANDS if name.startswith(f"{words[0]} ")]:
        raise UserError(
            f"{words[0]} is a group of commands: {', '.join(members)}; nautilus {members[0]} --help says more"
        )
    near = difflib.get_close_matches(words[0].replace("-", "_"), COMMANDS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"have {', '.join(COMMANDS)}"
    raise UserError(f"no command {words[0]!r}; {hint}")


def command_help(name: str, module: ModuleType) -> str:
    settings = module.Settings()
    model = " [MODEL]" if "model" in module.Settings.__dataclass_fields__ else ""
    about = (module.__doc__ or COMMANDS[name].help).strip()
    return f"nautilus {name}{model} setting=value …\n\n{about}\n\n{listing(settings)}"
