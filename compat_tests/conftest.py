"""Fixtures that tests of several rooms share, and how long tests search.  Kept light: nothing here imports torch."""

import os

import pytest
from hypothesis import settings

from compat_tests.effort import DEEP
from helix_gateway.runtime.cpu.threads import _SPIN_COUNT
from helix_gateway.runtime.model_source import resolve

# What whoever runs the tests has configured for themselves does not reach them.
os.environ.setdefault("HELIX_CONFIG", "")
# As the engine's own process is started: OpenMP's threads look for work for 300,000 turns before they sleep, which takes
# three quarters of the processor's time where a model has a few thousand weights.  Read when the library is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", str(_SPIN_COUNT))

DEEP_TIMEOUT_S = 2 * 3600

# No deadlines: a first example may compile kernels, and machines that run tests are busy.
settings.register_profile("usual", deadline=None)
settings.register_profile("deep", deadline=None, max_examples=2000)
settings.load_profile("deep" if DEEP else "usual")


def pytest_collection_modifyitems(config, items):
    """Leave out what is marked ``deep``, unless asked for; then give everything time."""
    if DEEP:
        for item in items:
            if not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(DEEP_TIMEOUT_S))
        return
    left_out = [item for item in items if item.get_closest_marker("deep")]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session")
def smollm2_path() -> str:
    """Path of the default model's GGUF, fetched into the user's cache folder where it is not there yet."""
    return resolve(None)
