"""Text that every Python brings along: the standard library's code, its docstrings, the language reference; and lines
made of their words, from which a model learns to copy."""

from __future__ import annotations

import ast
import functools
import inspect
import os
import random
import sysconfig
from pathlib import Path

# Tests and idlelib dwarf the rest and repeat themselves, encodings are tables, pydoc_data is the reference below, and
# what is installed differs from machine to machine.
LEFT_OUT = {"test", "tests", "idlelib", "encodings", "pydoc_data", "site-packages", "dist-packages", "__pycache__"}

WORDS, LONG, MOST = (4, 16), 14, 40  # words of a line that comes twice; letters of a word too long; lines of a module


@functools.cache
def code() -> tuple[tuple[str, str], ...]:
    """(relative path, text) of the library's modules, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if name not in LEFT_OUT and not name.startswith("config-")]
        # _sysconfigdata holds the paths and flags of one build.
        paths = [Path(folder, name) for name in files if name.endswith(".py") and not name.startswith("_sysconfigdata")]
        found += [(path.relative_to(root).as_posix(), path) for path in paths]
    return tuple((name, path.read_text(encoding="utf-8", errors="replace")) for name, path in sorted(found))


@functools.cache
def docstrings() -> tuple[tuple[str, str], ...]:
    """(relative path, prose): per module all its docstrings, each under the name of what it describes.

    A module's prose carries the module's name, so it is held out exactly when the code is.
    """
    return tuple((name, prose) for name, text in code() if (prose := module_prose(name, text)))


def module_prose(name: str, text: str) -> str:
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    try:
        tree = ast.parse(text)
    except SyntaxError:  # a distribution may add a file for another version of Python; it still serves as code
        return ""
    return "\n".join(f"{title}\n\n{doc}\n" for title, doc in described(tree, module))


@functools.cache
def twice() -> tuple[tuple[str, str], ...]:
    """(relative path, lines): words of a module's prose in no order, and every line comes twice. What comes next is
    then plain from what came before and from nothing else: within minutes a small model learns to look it up, which
    takes it hours from the prose alone."""
    return tuple((name, lines) for name, prose in docstrings() if (lines := lines_twice(name, prose)))


def lines_twice(name: str, prose: str) -> str:
    words, draw = sorted({word for word in prose.split() if len(word) < LONG}), random.Random(name)
    count = min(MOST, len(words) // WORDS[0])
    return "".join(2 * (" ".join(draw.choices(words, k=draw.randint(*WORDS))) + "\n") for _ in range(count))


def described(node: ast.AST, title: str) -> list[tuple[str, str]]:
    """(qualified name, docstring) of a module, class or function and of all that is defined inside it, in order."""
    if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        return [
            pair
            for child in ast.iter_child_nodes(node)
            if isinstance(child, ast.stmt)
            for pair in described(child, title)
        ]
    if not isinstance(node, ast.Module):
        title = f"{title}.{node.name}"
    doc = ast.get_docstring(node, clean=False)
    own = [(title, inspect.cleandoc(doc))] if doc and doc.strip() else []
    return own + [pair for child in node.body for pair in described(child, title)]


@functools.cache
def reference() -> tuple[tuple[str, str], ...]:
    """(topic, prose) of the language reference that `help()` shows; none where a distribution leaves it out."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return ()
    return tuple(sorted(topics.items()))
