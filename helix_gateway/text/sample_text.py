"""Some text that every Python brings along: what modules of its standard library say of themselves.

For whoever must know what a model makes of text and has none: English prose, with names and examples in code.  Nothing is
imported for it: docstrings are read from the modules' sources.  Knows nothing about what it is for.
"""

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from helix_gateway.text.tokenizer import Tokenizer

_MODULES = (
    "argparse",
    "asyncio/events",
    "calendar",
    "codecs",
    "collections/__init__",
    "concurrent/futures/_base",
    "contextlib",
    "copy",
    "csv",
    "dataclasses",
    "decimal",
    "difflib",
    "doctest",
    "email/message",
    "fractions",
    "functools",
    "http/client",
    "inspect",
    "ipaddress",
    "logging/__init__",
    "mailbox",
    "optparse",
    "pathlib",
    "pdb",
    "pickletools",
    "random",
    "smtplib",
    "statistics",
    "string",
    "subprocess",
    "tarfile",
    "textwrap",
    "threading",
    "turtle",
    "typing",
    "unittest/case",
    "urllib/request",
    "uuid",
    "weakref",
    "zipfile",
)
"""Of all kinds; where a Python has one elsewhere, its text is missing."""
_CHARACTERS = 2000
"""Of each module: short ones are not to vanish beside long ones."""
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def sample_text() -> str:
    """Up to 80,000 characters; empty where Python's sources are not there."""
    folder = Path(sysconfig.get_path("stdlib"))
    return "\n\n".join(filter(None, (_docstrings(folder / f"{name}.py") for name in _MODULES)))


def sample_ids(path: str) -> list[int]:
    """The same as a model's tokenizer has it; ``path``: as `Tokenizer.load` takes it."""
    return Tokenizer.load(path).encode(sample_text(), add_special_tokens=False)


def _docstrings(file: Path) -> str:
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return ""
    return "\n\n".join(_up_to(_CHARACTERS, tree))


def _up_to(characters: int, tree: ast.Module) -> Iterator[str]:
    """Docstrings as they come, until there are so many characters."""
    for node in ast.walk(tree):
        text = ast.get_docstring(node) if isinstance(node, _DOCUMENTED) else None
        if text and characters > 0:
            yield text[:characters]
            characters -= len(text)
