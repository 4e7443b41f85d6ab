"""Texts of which most of the answer is a copy: functions of Python's standard library, to be written again with a change.

What speculation is measured with, by itself and beside a peer.  Knows nothing about models or servers.
"""

import argparse
import ast
import inspect
import random
import statistics
import textwrap
from pathlib import Path

MODULES = (argparse, statistics, textwrap, random)
SHORTEST, LONGEST = 400, 1500
"""Characters of a function."""
ANSWER_TOKENS = 256
"""Most out of each request: what is to be written again has 100 to 400 tokens."""
ASK = "Here is a Python file:\n\n```python\n{}\n```\n\nWrite the whole file again, with `self` renamed to `this`."


def functions_of(module):
    """The source of each function and method of a module."""
    source = Path(inspect.getsourcefile(module)).read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            yield textwrap.dedent(ast.get_source_segment(source, node, padded=True))


def edit_prompts(count, dice, modules=MODULES):
    """So many conversations, none of them twice: functions, each to be written again with one name changed."""
    functions = [source for module in modules for source in functions_of(module)]
    chosen = dice.sample([source for source in functions if SHORTEST < len(source) < LONGEST], count)
    return [[{"role": "user", "content": ASK.format(source)}] for source in chosen]
