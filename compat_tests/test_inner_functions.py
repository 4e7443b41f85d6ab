"""Functions that only compiled code may call: Python that called one would end with its process."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("helix_gateway", "compat_tests", "benchmarks", "scripts")
COMPILED = {"njit", "intrinsic", "cfunc"}


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


def calls_from_python(node, is_known):
    """Calls in what is not compiled, of what is known to be for compiled code alone."""
    if isinstance(node, ast.FunctionDef) and COMPILED & {name for name, _ in decorators(node)}:
        return
    if isinstance(node, ast.Call) and is_known(node.func):
        yield node
    for child in ast.iter_child_nodes(node):
        yield from calls_from_python(child, is_known)


def known_in(tree, inner, own):
    """Whether an expression is an inner function, as a module names it: its own, one that it imports, or a module's."""
    names, modules = set(own), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if alias.name in inner.get(node.module, ()):
                    names.add(alias.asname or alias.name)
                modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"

    def is_known(called):
        if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
            return called.attr in inner.get(modules.get(called.value.id), ())
        return isinstance(called, ast.Name) and called.id in names

    return is_known


def wrong_calls(trees):
    """``file:line`` of each; trees by path relative to the root."""
    inner = {".".join(path.with_suffix("").parts): inner_names(tree) for path, tree in trees.items()}
    for path, tree in trees.items():
        is_known = known_in(tree, inner, inner[".".join(path.with_suffix("").parts)])
        yield from (f"{path}:{call.lineno}" for call in calls_from_python(tree, is_known))


def test_no_inner_function_is_called_from_python():
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    trees = {path.relative_to(ROOT): ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    assert sum(len(inner_names(tree)) for tree in trees.values()) > 100
    assert list(wrong_calls(trees)) == []


@pytest.mark.parametrize(
    "caller",
    [
        "from package.kernels import add\nadd(1)",
        "from package.kernels import add as plus\ndef use():\n    return plus(1)",
        "from package import kernels\nkernels.add(1)",
    ],
)
def test_a_call_from_python_is_found_and_one_from_compiled_code_is_not(caller):
    kernels = "@njit(cache=True, **INNER)\ndef add(x):\n    return x + 1\n@njit\ndef use(x):\n    return add(x)\n"
    trees = {Path("package/kernels.py"): ast.parse(kernels), Path("caller.py"): ast.parse(caller)}
    line = caller.count("\n") + 1
    assert list(wrong_calls(trees)) == [f"caller.py:{line}"]
