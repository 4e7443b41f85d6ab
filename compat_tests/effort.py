"""How hard tests search: the same tests, at a higher setting, where ``scripts/check.py --deep`` runs them."""

import os

import pytest

DEEP = bool(os.environ.get("HELIX_TEST_DEEP"))


def deeply(usual, deep):
    """The value for an ordinary run, or the one for a deep run."""
    return deep if DEEP else usual


def usually(parameter, chosen):
    """A parameter of a test that is run in any case where it is ``chosen``, and else in a deep run only."""
    return parameter if chosen else pytest.param(parameter, marks=pytest.mark.deep)
