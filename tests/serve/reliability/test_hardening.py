"""What the package never does, read off its source; and that nothing of one request is left to the next."""

import ast
import pathlib

import pytest
import torch

import nautilus
from nautilus.model.lanes import MambaSlots
from tests.serve.reliability.parts import Oracle, audit, engine_of, hybrid, run, some_requests

SOURCES = sorted(pathlib.Path(nautilus.__file__).parent.rglob("*.py"))
# What runs code out of data; and a hash that differs between processes and can be made to collide.
MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml"}
CALLS = {"eval", "exec", "compile", "hash", "__import__", "torch.load", "os.system", "os.popen"}
CALLS |= {"runpy.run_path", "runpy.run_module"}
# A program of the user that was asked for by its file's name is no data.
MEANT = {"tasks/asked.py": ["runpy.run_path(file, run_name=module)"]}


def faults(source):
    """Each as (line, what)."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            named = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called in CALLS or named.get("shell") == "True" or named.get("allow_pickle") == "True":
                found.append((node.lineno, ast.unparse(node)))
        found += [(node.lineno, name) for name in names if name.partition(".")[0] in MODULES]
    return found


def test_no_code_is_run_out_of_data():
    root = pathlib.Path(nautilus.__file__).parent
    found = {path.relative_to(root).as_posix(): [what for _, what in faults(path.read_text())] for path in SOURCES}
    assert {path: what for path, what in found.items() if what} == MEANT


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from yaml import load", "import os, marshal", "eval(x)", "torch.load(f, weights_only=True)",
        "hash(key)", "np.load(f, allow_pickle=True)", "subprocess.run(x, shell=True)",
        "runpy.run_path(x)",
    ],
)  # fmt: skip
def test_the_reader_of_the_source_sees_it(line):
    assert len(faults(f"def f():\n    {line}\n")) == 1


def test_what_others_left_in_slots_and_pages_is_not_felt():
    model = hybrid()
    engine, oracle = engine_of(model, saved_gb=0), Oracle(model)
    for layer in engine.berths.layers:
        if isinstance(layer, MambaSlots):
            for part in (layer.tail_SRC, layer.ssm_SHNP):
                part.fill_(float("nan"))
    for part in engine.berths.pool.parts:
        part.fill_(float("nan") if part.is_floating_point() else torch.iinfo(part.dtype).max)
    requests = some_requests(engine, 9)
    run(engine, *requests)
    assert all(request.error is None and oracle.agrees(request) for request in requests)
    assert audit(engine) == []
