"""The line ratchet of pyproject.toml: small files, short functions, and a total that grows only on purpose."""

import ast
import io
import pathlib
import tokenize
import tomllib

import nautilus

ROOT = pathlib.Path(nautilus.__file__).parent
PYPROJECT = ROOT.parent / "pyproject.toml"
FILE_STOP, KERNEL_STOP, FUNCTION_STOP = 400, 600, 60
KERNELS = ("ops/cpu", "ops/triton")
NOT_CODE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING,
    tokenize.ENDMARKER,
}  # fmt: skip


def budget() -> dict:
    return tomllib.loads(PYPROJECT.read_text())["tool"]["nautilus"]["budget"]


def code_lines(source: str) -> int:
    """Lines that hold code: no blanks, comments or docstrings."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NOT_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                lines -= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return len(lines)


def function_lengths(source: str) -> dict[str, int]:
    """All lines of each function, from `def` to its end, blanks and docstring included."""
    return {
        f"{node.name} on line {node.lineno}": (node.end_lineno or node.lineno) - node.lineno + 1
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def sources() -> dict[str, str]:
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted(ROOT.rglob("*.py"))}


def test_no_file_is_over_its_budget():
    allowed = budget()
    over = []
    for name, source in sources().items():
        stop = KERNEL_STOP if name.startswith(KERNELS) else FILE_STOP
        limit = min(allowed["files"].get(name, allowed["file"]), stop)
        limit = allowed["recipe"] if name.startswith("recipes/") else limit
        if (lines := code_lines(source)) > limit:
            over.append(f"{name} has {lines} code lines, its budget is {limit}; split it")
    assert over == []


def test_budgets_of_single_files_name_files_that_need_them():
    allowed = budget()
    for name in allowed["files"]:
        lines = code_lines((ROOT / name).read_text())
        assert lines > allowed["file"], f"{name} has {lines} code lines: remove its entry from pyproject.toml"


def test_no_function_is_longer_than_sixty_lines():
    lengths = {f"{n}: {f}": size for n, source in sources().items() for f, size in function_lengths(source).items()}
    assert {name: size for name, size in lengths.items() if size > FUNCTION_STOP} == {}


def test_long_functions_do_not_become_more():
    limit, most = budget()["function"], budget()["longer_functions"]
    long = [
        f"{n}: {f} ({s} lines)" for n, src in sources().items() for f, s in function_lengths(src).items() if s > limit
    ]
    listing = "\n".join(long)
    assert len(long) <= most, f"{len(long)} functions are longer than {limit} lines, {most} may be:\n{listing}"


def test_the_total_grows_only_on_purpose():
    total, allowed = sum(code_lines(source) for source in sources().values()), budget()["total"]
    assert total <= allowed, f"{total} code lines, {allowed} allowed; make it smaller or raise total in pyproject.toml"
    assert total > 0.8 * allowed, f"{total} code lines, {allowed} allowed; lower total in pyproject.toml"


EXAMPLE = '''"""Doc
string."""

# comment
x = """a

b"""  # three lines


def f():
    """Doc."""
    return (
        1
    )
'''


def test_lines_are_counted_as_the_budget_says():
    assert code_lines(EXAMPLE) == 3 + 1 + 3
    assert function_lengths(EXAMPLE) == {"f on line 10": 5}
