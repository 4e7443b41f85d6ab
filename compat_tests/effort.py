"""How hard tests search: the same tests, at a higher setting, where ``scripts/check.py --deep`` runs them."""

import os

DEEP = bool(os.environ.get("HELIX_TEST_DEEP"))


def deeply(usual, deep):
    """The value for an ordinary run, or the one for a deep run."""
    return deep if DEEP else usual
