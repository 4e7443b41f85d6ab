"""A running ``helix serve`` of the real model, for real clients."""

import pytest

from compat_tests.serving import start_server, stop_server


@pytest.fixture(scope="session")
def server(smollm2_path):
    running = start_server(smollm2_path, "--kv-cache-memory", "1GiB", "--served-model-name", "smollm2")
    yield running
    assert stop_server(running) == 0
