"""Imports point down the ladder of docs/tour.md, and nowhere do modules import each other in a ring."""

import ast
import pathlib

import nautilus

ROOT = pathlib.Path(nautilus.__file__).parent
LADDER = [
    "config", "presets", "runtime", "ops", "model", "data", "tasks", "train", "serve", "posttrain", "compress", "eval",
    "__init__", "studies", "recipes", "cli", "__main__",
]  # fmt: skip
# Siblings: may not see each other at all.
APART = [{"data", "tasks"}, {"train", "serve"}]
# No torch behind these: they are read anywhere, and the command line answers at once.
LIGHT = {"config", "presets", "runtime", "tasks"}


def imported_modules(path: pathlib.Path) -> set[str]:
    """Full names of the nautilus modules and names that a file imports, also inside functions: no hiding there."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            found.add(f"nautilus.<relative import on line {node.lineno}>")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "nautilus":
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "nautilus"}
    return found


def rung(module: str) -> str:
    """`nautilus.ops.ssd.wide` stands on `ops`; a name of the package itself on `__init__`."""
    second = (module + ".__init__").split(".")[1]
    if "<" in module:
        return module
    is_rung = (ROOT / second).is_dir() or (ROOT / f"{second}.py").exists()
    return second if is_rung else "__init__"


def violations(root: pathlib.Path) -> list[str]:
    bad = []
    for path in sorted(root.rglob("*.py")):
        here = path.relative_to(root).parts[0].removesuffix(".py")
        for there in sorted({rung(module) for module in imported_modules(path)} - {here}):
            if not {here, there} <= set(LADDER):
                bad.append(f"{path.relative_to(root)} imports {there}: one of the two is no rung of the ladder")
                continue
            up = LADDER.index(there) > LADDER.index(here)
            if up or any({here, there} <= pair for pair in APART):
                side = "above" if up else "kept apart from"
                bad.append(f"{path.relative_to(root)} imports nautilus.{there}, which is {side} it")
    return bad


def write(root: pathlib.Path, name: str, source: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(source)


def test_imports_point_down_the_ladder():
    assert violations(ROOT) == []


def test_every_module_stands_on_a_rung():
    names = {path.name.removesuffix(".py") for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert names - {"__pycache__"} <= set(LADDER)


def test_the_ladder_test_sees_an_import_that_points_up(tmp_path):
    write(tmp_path, "ops/norm.py", "def f():\n    from nautilus.train.loop import fit\n    return fit\n")
    write(tmp_path, "train/loop.py", "import nautilus.serve.engine\n")
    write(tmp_path, "data/mix.py", "from nautilus import load\n")
    write(tmp_path, "eval/loss.py", "from ..train import loop\n")
    write(tmp_path, "model/moe.py", "from nautilus.ops.experts import route\nfrom nautilus import config\n")
    found = violations(tmp_path)
    assert len(found) == 4
    assert "ops/norm.py imports nautilus.train, which is above it" in found
    assert "train/loop.py imports nautilus.serve, which is above it" in found
    assert "data/mix.py imports nautilus.__init__, which is above it" in found
    assert "relative import" in "".join(found)


def test_light_rungs_import_no_torch():
    heavy = {"torch", "transformers", "matplotlib"}
    for name in sorted(LIGHT):
        for path in [ROOT / f"{name}.py", *sorted((ROOT / name).rglob("*.py"))]:
            if not path.exists():
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                assert not {module.split(".")[0] for module in modules} & heavy, f"{path} imports {modules}"


# ----- rings ---------------------------------------------------------------------------------------------------------


def module_graph(root: pathlib.Path) -> dict[str, set[str]]:
    """Each module and the modules that it names in its imports."""
    names = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        names[".".join(["nautilus", *(part for part in parts if part != "__init__")])] = path
    graph = {}
    for name, path in names.items():
        wanted = imported_modules(path)
        graph[name] = {module if module in names else module.rpartition(".")[0] for module in wanted} & set(names)
        graph[name].discard(name)
    return graph


def ring(graph: dict[str, set[str]]) -> list[str]:
    """The modules of some ring in the order in which they import each other, or nothing."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for following in sorted(graph[name]):
            if found := walk(following, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := walk(name, []))), [])


def test_no_modules_import_each_other_in_a_ring():
    assert ring(module_graph(ROOT)) == []


def test_the_ring_test_sees_a_ring(tmp_path):
    write(tmp_path, "ops/a.py", "from nautilus.ops.b import x\n")
    write(tmp_path, "ops/b.py", "def f():\n    from nautilus.ops import c\n")
    write(tmp_path, "ops/c.py", "import nautilus.ops.a\n")
    found = ring(module_graph(tmp_path))
    assert found == ["nautilus.ops.a", "nautilus.ops.b", "nautilus.ops.c", "nautilus.ops.a"]
