"""structlog, set up once a process: JSON lines where stderr is read by machines, colours where by people.

Knows nothing about what is logged; whoever logs leaves prompt text out.  The standard library's loggers (aiohttp,
transformers) come out in the same form.
"""

import logging
import sys
from typing import TextIO

import structlog

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

_SHARED: tuple[structlog.typing.Processor, ...] = (
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
)


def configure_logging(level: str = "info", stream: TextIO | None = None) -> None:
    """Send this process's log to ``stream`` (stderr if None), from ``level`` up.

    Raises:
        KeyError: no such level; `LEVELS` names them.
    """
    target = sys.stderr if stream is None else stream
    renderers = _console() if target.isatty() else _json()
    structlog.configure(
        processors=[*_SHARED, *renderers],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.PrintLoggerFactory(target),
        cache_logger_on_first_use=True,
    )
    _adopt_standard_library(level, target, renderers)


def _console() -> list[structlog.typing.Processor]:
    # The usual tracebacks show local variables: prompts among them.
    return [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]


def _json() -> list[structlog.typing.Processor]:
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]


def _adopt_standard_library(level: str, target: TextIO, renderers: list[structlog.typing.Processor]) -> None:
    handler = logging.StreamHandler(target)
    remove_meta = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=_SHARED, processors=[remove_meta, *renderers])
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(LEVELS[level], logging.WARNING))
