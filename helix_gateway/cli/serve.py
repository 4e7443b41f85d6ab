"""``helix serve``: get a model, start its engine in a process of its own, answer HTTP.

Turns settings into what the rooms below take and brings those together; knows nothing about how any of them works.
"""

import asyncio
import contextlib
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from helix_gateway.cli.options import with_flags
from helix_gateway.core.errors import InvalidRequestError, ModelLoadError
from helix_gateway.gateway.origins import is_loopback
from helix_gateway.gateway.settings import GatewaySettings
from helix_gateway.service.settings import EngineSettings

if TYPE_CHECKING:
    from collections.abc import Sequence
    from socket import socket

    from helix_gateway.cli.settings import ServeSettings
    from helix_gateway.cli.sources import Effective
    from helix_gateway.service.launch import CompilingAhead, EngineProcess
    from helix_gateway.telemetry.tracing import Tracer
    from helix_gateway.text.tokenizer import Tokenizer

WRONG_USE = 2
"""The exit code of a command that was called wrongly, as for any command line."""


@with_flags
def serve(
    *,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="TOML file of settings (also HELIX_CONFIG).  [default: helix.toml, see --show-config]"
        ),
    ] = None,
    show_config: Annotated[
        bool, typer.Option("--show-config", help="Print every setting with where it was set, and stop.")
    ] = False,
    reload: Annotated[
        bool, typer.Option("--reload", help="Start again whenever a file of Helix itself changes; to work on Helix.")
    ] = False,
    **flags: Any,
) -> None:
    """Serve a model through OpenAI's API until Ctrl-C.

    Each option can also be set by a variable (--port by HELIX_PORT) or in a TOML file (port = 8000); flags win over
    variables, and variables over the file.
    """
    found = _effective(flags, config)
    for doubt in found.doubts:
        typer.echo(f"helix: {doubt}", err=True)
    if show_config:
        from helix_gateway.cli.show_config import show

        typer.echo(show(found))
    elif reload:
        from helix_gateway.cli.reload import serve_again_on_change

        serve_again_on_change(sys.argv[1:])
    else:
        _serve(found.settings)


def _serve(settings: "ServeSettings") -> None:
    from helix_gateway.service.launch import EngineProcess

    # Before all else: it has more to import than this process, and does so meanwhile.  It ends with this process, too.
    launched = EngineProcess()
    try:
        raise typer.Exit(_serve_with(settings, launched))
    finally:
        launched.end()


def _serve_with(settings: "ServeSettings", launched: "EngineProcess") -> int:
    """Serve until told to stop; the exit code."""
    from helix_gateway.gateway.addresses import bind
    from helix_gateway.runtime.cpu import COMPILED_NOT_KEPT
    from helix_gateway.runtime.model_source import resolve, served_name

    if COMPILED_NOT_KEPT is not None:
        typer.echo(
            f"helix: compiled kernels cannot be kept in {COMPILED_NOT_KEPT}; each start compiles them anew, for up to a "
            "minute: set HELIX_CACHE or NUMBA_CACHE_DIR to a folder that can be written",
            err=True,
        )
    name = served_name(settings.model)
    gateway = settings.gateway(name)
    sockets = bind(gateway)
    if not (gateway.api_keys or gateway.api_key_file or is_loopback(gateway.host)):
        typer.echo(f"helix: whoever reaches {gateway.host} is served; set --api-key or --api-key-file", err=True)
    engine = settings.engine(resolve(settings.model), _draft_model_path(settings))
    return _run(engine, gateway, sockets, name, launched)


def _draft_model_path(settings: "ServeSettings") -> str | None:
    from helix_gateway.runtime.model_source import resolve

    name = settings.spoken().draft_model
    try:
        return None if name is None else resolve(name)
    except ModelLoadError as error:
        raise ModelLoadError(f"--draft-model: {error}") from error


def _effective(flags: dict[str, Any], config: str | None) -> "Effective":
    from helix_gateway.cli.sources import SettingsError, effective

    try:
        return effective(flags, config)
    except SettingsError as error:
        for line in str(error).splitlines():
            typer.echo(f"helix: {line}", err=True)
        raise typer.Exit(WRONG_USE) from None


def _run(
    engine: EngineSettings,
    gateway: GatewaySettings,
    sockets: "Sequence[socket]",
    model_name: str,
    launched: "EngineProcess",
) -> int:
    from helix_gateway.service.launch import CompilingAhead
    from helix_gateway.telemetry.logging import configure_logging

    configure_logging(engine.log)
    typer.echo(f"Loading {model_name}", err=True)
    with contextlib.closing(CompilingAhead()) as compiling:
        return _answer(engine, gateway, sockets, launched, compiling)


def _answer(
    engine: EngineSettings,
    gateway: GatewaySettings,
    sockets: "Sequence[socket]",
    launched: "EngineProcess",
    compiling: "CompilingAhead",
) -> int:
    """Answer HTTP until told to stop; what compiles ahead is ended as soon as the engine serves."""
    from helix_gateway.cli.first_start import telling_of_compilation
    from helix_gateway.gateway.app import create_app
    from helix_gateway.gateway.server import run
    from helix_gateway.service.observer import EngineObserver
    from helix_gateway.service.process import ProcessService
    from helix_gateway.telemetry.metrics import Metrics
    from helix_gateway.text.tokenizer import Tokenizer

    name = gateway.served_model_names[0]
    metrics, tracer = Metrics(), _tracer(gateway.otlp_endpoint)
    observer = EngineObserver(metrics, name)
    service = ProcessService(engine, Tokenizer.load(engine.model_path), observer, launched=launched)
    app = create_app(gateway, dict.fromkeys(gateway.served_model_names, service), metrics, tracer)

    async def stop(_app: object) -> None:
        await service.stop()

    async def start() -> None:
        with contextlib.closing(compiling):
            async with telling_of_compilation():
                await asyncio.gather(service.start(), asyncio.to_thread(_render_once, service.tokenizer))

    # Before connections are closed: whoever is being answered hears that the server stops.
    app.on_shutdown.append(stop)
    return run(app, gateway, sockets, start)


def _tracer(endpoint: str | None) -> "Tracer | None":
    from helix_gateway.telemetry.tracing import TracingUnavailableError, open_tracer

    try:
        return open_tracer(endpoint)
    except TracingUnavailableError as error:
        if endpoint is not None:
            typer.echo(f"helix: {error}", err=True)
            raise typer.Exit(1) from None
        import structlog

        # Such variables are often set for every program of a machine.
        structlog.get_logger(__name__).warning("no_traces", reason=str(error))
        return None


def _render_once(tokenizer: "Tokenizer") -> None:
    """Let happen now what the first request would wait for: imports, the template's compilation, the encoder's proof."""
    tokenizer.encode(".")
    # A model without a template, or whose template wants something else, is served all the same.
    with contextlib.suppress(InvalidRequestError):
        tokenizer.render_chat([{"role": "user", "content": "."}])
