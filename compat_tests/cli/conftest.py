"""What the commands' tests share: a server for commands that are clients."""

import sys
from pathlib import Path

import pytest
import structlog

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "api"))

from fake_service import FakeService
from server_thread import ServerThread


@pytest.fixture(autouse=True)
def plain_logs():
    """Log lines in their simplest form, so that a failing test shows them and a passing one loses no time."""
    structlog.configure(processors=[structlog.processors.add_log_level, structlog.processors.KeyValueRenderer()])
    yield
    structlog.reset_defaults()


@pytest.fixture
def server():
    with ServerThread(FakeService(max_model_len=100_000)) as running:
        yield running
