"""Functions that only compiled code may call: Python that called one would end with its process."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("helix_gateway", "compat_tests", "benchmarks", "scripts")
COMPILED = {"njit", "cfunc"}
LINKING = {
    ("helix_gateway/runtime/cpu/attention_items.py", "link_items"),
    ("helix_gateway/runtime/cpu/quantised_step.py", "link_work"),
}
"""Functions that hand inner ones to `linking.link`, which has them compiled and calls none."""


def decorators(function):
    for decorator in function.decorator_list:
        called = decorator.func if isinstance(decorator, ast.Call) else decorator
        yield getattr(called, "attr", getattr(called, "id", "")), decorator


def is_inner(function):
    return any(
        isinstance(option.value, ast.Name) and option.value.id == "INNER"
        for _, decorator in decorators(function)
        if isinstance(decorator, ast.Call)
        for option in decorator.keywords
    )


def inner_names(tree):
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and is_inner(node)}


def module_of(path):
    return ".".join(path.with_suffix("").parts)


def imported(tree, module):
    """What each name of a module that it imports stands for, with dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                yield (alias.asname, alias.name) if alias.asname else (first, first)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: -node.level] if node.level else []
            source = ".".join([*parents, *filter(None, [node.module])])
            yield from ((alias.asname or alias.name, f"{source}.{alias.name}") for alias in node.names)


def python_nodes(node, skipped):
    """All that is not compiled, but for functions of some names."""
    if isinstance(node, ast.FunctionDef) and (
        COMPILED & {name for name, _ in decorators(node)} or node.name in skipped
    ):
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from python_nodes(child, skipped)


def named(node, names):
    """What an expression stands for, with dots; `getattr` of a name that is written out too."""
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr") and len(node.args) > 1:
        return f"{named(node.args[0], names)}.{getattr(node.args[1], 'value', '')}"
    if isinstance(node, ast.Attribute):
        return f"{named(node.value, names)}.{node.attr}"
    return names.get(node.id, "") if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) else ""


def references(trees):
    """``file:line`` of each inner function that Python looks at; trees by path relative to the root."""
    inner = {f"{module_of(path)}.{name}" for path, tree in trees.items() for name in inner_names(tree)}
    for path, tree in trees.items():
        module = module_of(path)
        names = {name: f"{module}.{name}" for name in inner_names(tree)} | dict(imported(tree, module))
        skipped = {function for file, function in LINKING if file == path.as_posix()}
        lines = {node.lineno for node in python_nodes(tree, skipped) if named(node, names) in inner}
        yield from (f"{path}:{line}" for line in sorted(lines))


def test_no_inner_function_is_looked_at_by_python():
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    trees = {path.relative_to(ROOT): ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    assert sum(len(inner_names(tree)) for tree in trees.values()) > 100
    assert list(references(trees)) == []


@pytest.mark.parametrize(
    "caller",
    [
        "from package.kernels import add\nadd(1)",
        "from package.kernels import add as plus\ndef use():\n    return plus(1)",
        "from package import kernels\nkernels.add(1)",
        "from .kernels import add\nadd(1)",
        "from . import kernels\nkernels.add(1)",
        "import package.kernels\npackage.kernels.add(1)",
        "import package.kernels as k\nk.add(1)",
        "from package.kernels import add\nmap(add, [1])",
        "from package.kernels import add\nf = add",
        "from package import kernels\ngetattr(kernels, 'add')(1)",
        "from package.kernels import add\n@intrinsic\ndef emit(context):\n    add(1)",
    ],
)
def test_what_python_looks_at_is_found_and_what_compiled_code_calls_is_not(caller):
    kernels = "@njit(cache=True, **INNER)\ndef add(x):\n    return x + 1\n@njit\ndef use(x):\n    return add(x)\n"
    trees = {Path("package/kernels.py"): ast.parse(kernels), Path("package/caller.py"): ast.parse(caller)}
    line = caller.count("\n") + 1
    assert list(references(trees)) == [f"package/caller.py:{line}"]
