"""Texts of which most of the answer is a copy: functions of Python's standard library, to be written again with a change.

What speculation is measured with, by itself and beside a peer.  Knows nothing about models or servers.
"""

import argparse
import ast
import inspect
import random
import re
import statistics
import textwrap
from dataclasses import dataclass
from pathlib import Path

MODULES = (argparse, statistics, textwrap, random)
SHORTEST, LONGEST = 400, 1500
"""Characters of a function."""
ANSWER_TOKENS = 256
"""Most out of each request: what is to be written again has 100 to 400 tokens."""
ASK = "Here is a Python file:\n\n```python\n{}\n```\n\nWrite the whole file again, with `self` renamed to `{}`."
LONGER_NAME = "this_one"
"""Of more tokens than what it replaces."""
FEWEST_CHANGES = 2


def functions_of(module):
    """The source of each function and method of a module."""
    source = Path(inspect.getsourcefile(module)).read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            yield textwrap.dedent(ast.get_source_segment(source, node, padded=True))


@dataclass(frozen=True)
class Edit:
    """One function to be written again with a name changed."""

    source: str
    new_name: str = "this"

    @property
    def messages(self):
        """The conversation that asks for it."""
        return [{"role": "user", "content": ASK.format(self.source, self.new_name)}]

    @property
    def file(self):
        """What a client can predict who knows the file."""
        return f"```python\n{self.source}\n```"

    @property
    def done(self):
        """The answer of a model that does what it is asked."""
        return "Here is the file with the name changed:\n\n" + re.sub(r"\bself\b", self.new_name, self.file)

    @property
    def num_changes(self):
        """How often the name is in the function."""
        return len(re.findall(r"\bself\b", self.source))


def some_edits(count, dice, modules=MODULES):
    """So many edits, none of them twice; some functions do not hold the name."""
    return dice.sample([Edit(source) for source in _sources(modules)], count)


def real_edits(count, dice, modules=MODULES):
    """So many edits of functions that hold the name a few times, none of them twice, to a name of more tokens."""
    edits = [Edit(source, LONGER_NAME) for source in _sources(modules)]
    return dice.sample([edit for edit in edits if edit.num_changes >= FEWEST_CHANGES], count)


def _sources(modules):
    functions = [source for module in modules for source in functions_of(module)]
    return [source for source in functions if SHORTEST < len(source) < LONGEST]
