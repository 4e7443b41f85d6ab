"""Logs are JSON lines for machines and readable for people."""

import io
import json
import logging

import pytest
import structlog

from helix_gateway.telemetry.logging import configure_logging


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def restored():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_a_pipe_gets_json_lines():
    stream = io.StringIO()
    configure_logging("info", stream)
    structlog.get_logger().info("served", tokens=5)
    structlog.get_logger().debug("too quiet to hear")
    logging.getLogger("aiohttp.server").error("from the %s library", "standard")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert (first["event"], first["tokens"], first["level"]) == ("served", 5, "info")
    assert (second["event"], second["level"]) == ("from the standard library", "error")
    assert "timestamp" in first
    assert "timestamp" in second


def test_an_exception_is_one_line_of_json():
    stream = io.StringIO()
    configure_logging("info", stream)
    try:
        raise ValueError("broken")
    except ValueError as error:
        structlog.get_logger().error("failed", exc_info=error)
    (line,) = stream.getvalue().splitlines()
    assert "ValueError: broken" in json.loads(line)["exception"]


def test_a_terminal_gets_text():
    stream = Terminal()
    configure_logging("debug", stream)
    structlog.get_logger().debug("served", tokens=5)
    assert "served" in stream.getvalue()
    with pytest.raises(json.JSONDecodeError):
        json.loads(stream.getvalue())


def test_levels_that_there_are_not_are_refused():
    with pytest.raises(KeyError):
        configure_logging("loud", io.StringIO())
