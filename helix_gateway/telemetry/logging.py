"""structlog, set up once a process: JSON lines where machines read them, short ones where people do.

Knows nothing about what is logged; whoever logs leaves prompt text out.  The standard library's loggers (aiohttp,
transformers) come out in the same form.
"""

import json
import logging
import os
from typing import Literal

import structlog

from helix_gateway.telemetry.console import at_a_glance
from helix_gateway.telemetry.log_stream import LogStream, to_file, to_stderr
from helix_gateway.telemetry.settings import LogSettings

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

Role = Literal["gateway", "engine"]


def configure_logging(settings: LogSettings, *, role: Role = "gateway") -> None:
    """Send this process's log to where the settings say.

    Raises:
        OSError: the log file cannot be written; in one line, why.
    """
    log_to(to_stderr() if settings.file is None else _opened(settings.file, role), settings, role=role)


def configure_engine_logging(settings: LogSettings) -> None:
    """The same for an engine's process, which may start when the disk is full: it goes to stderr then."""
    try:
        configure_logging(settings, role="engine")
    except OSError as error:
        log_to(to_stderr(), settings, role="engine")
        structlog.get_logger(__name__).error("log_file_unavailable", reason=str(error))


def _opened(path: str, role: Role) -> LogStream:
    line = {"event": "log_opened", "level": "info", "role": role, "pid": os.getpid(), "timestamp": _now()}
    return to_file(path, json.dumps(line) + "\n")


def _now() -> str:
    return str(structlog.processors.TimeStamper(fmt="iso", utc=True)(None, "", {})["timestamp"])


def log_to(target: LogStream, settings: LogSettings, *, role: Role = "gateway") -> None:
    """Send this process's log to ``target``."""
    for_people = settings.format == "console" or (settings.format == "auto" and target.is_terminal)
    shared, renderers = _console(role, target) if for_people else _json(role)
    shared.append(_tell_lost(target))
    structlog.configure(
        processors=[*shared, *renderers],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[settings.level]),
        logger_factory=structlog.WriteLoggerFactory(target),  # type: ignore[arg-type]  # it needs write and flush only
    )
    _adopt_standard_library(settings, target, shared, renderers)


_Processors = list[structlog.typing.Processor]


def _console(role: Role, target: LogStream) -> tuple[_Processors, _Processors]:
    shared: _Processors = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
    ]
    if role == "engine":
        shared.append(_constant(engine=os.getpid()))
    # The usual tracebacks show local variables: prompts among them.
    renderer = structlog.dev.ConsoleRenderer(
        colors=target.is_terminal,
        pad_level=False,
        pad_event_to=0,
        sort_keys=False,
        exception_formatter=structlog.dev.plain_traceback,
    )
    return shared, [_without_nones, at_a_glance, renderer]


def _json(role: Role) -> tuple[_Processors, _Processors]:
    shared: _Processors = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _constant(role=role, pid=os.getpid()),
    ]
    return shared, [structlog.processors.format_exc_info, _without_nones, structlog.processors.JSONRenderer()]


def _constant(**fields: object) -> structlog.typing.Processor:
    def add(_logger: object, _method: str, line: structlog.typing.EventDict) -> structlog.typing.EventDict:
        line.update(fields)
        return line

    return add


def _tell_lost(target: LogStream) -> structlog.typing.Processor:
    def add(_logger: object, _method: str, line: structlog.typing.EventDict) -> structlog.typing.EventDict:
        return {**line, "lost_lines_before": target.lost} if target.lost else line

    return add


def _without_nones(_logger: object, _method: str, line: structlog.typing.EventDict) -> structlog.typing.EventDict:
    return {key: value for key, value in line.items() if value is not None}


def _adopt_standard_library(
    settings: LogSettings, target: LogStream, shared: _Processors, renderers: _Processors
) -> None:
    handler = logging.StreamHandler(target)
    remove_meta = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=[remove_meta, *renderers])
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(LEVELS[settings.level], logging.WARNING))
