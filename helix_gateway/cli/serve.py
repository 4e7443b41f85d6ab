"""``helix serve``: get a model, start its engine in a process of its own, answer HTTP.

Turns flags into `EngineSettings` and `GatewaySettings` and brings the rooms below together; knows nothing about
how any of them works.
"""

import asyncio
import contextlib
import math
from typing import TYPE_CHECKING, Annotated

import typer

from helix_gateway.cli.sizes import parse_size
from helix_gateway.core.errors import InvalidRequestError
from helix_gateway.gateway.settings import GatewaySettings
from helix_gateway.service.settings import DeviceName, DTypeName, EngineSettings

if TYPE_CHECKING:
    from helix_gateway.text.tokenizer import Tokenizer

_DEFAULT = EngineSettings(model_path="")
_GATEWAY = GatewaySettings()
_LARGEST_SEED = 2**64 - 1


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _window_ms(value: float) -> float:
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a number of milliseconds.")
    return value


def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A GGUF file, a folder in Hugging Face layout, or a hub id (org/name). "
            "Left out: SmolLM2-135M-Instruct, downloaded once.",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = _GATEWAY.host,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.")] = _GATEWAY.port,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="HELIX_API_KEY", help="Key that clients must send; left out, any will do."),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(help="Name that clients ask for; may be given several times, answers carry the first."),
    ] = None,
    dtype: Annotated[DTypeName, typer.Option(help="What weights are computed in.")] = _DEFAULT.dtype,
    device: Annotated[
        DeviceName, typer.Option(help="Where to compute; auto takes the best there is.")
    ] = _DEFAULT.device,
    max_model_len: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of prompt and answer together.  [default: what the model and memory hold]"),
    ] = None,
    max_num_seqs: Annotated[
        int, typer.Option(min=1, max=4096, help="Sequences computed in one step.")
    ] = _DEFAULT.max_num_seqs,
    max_num_batched_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens computed in one step.  [default: what suits the device]"),
    ] = None,
    block_size: Annotated[
        int, typer.Option(min=1, max=1024, help="Tokens in one block of the KV cache.")
    ] = _DEFAULT.block_size,
    kv_cache_memory: Annotated[
        int | None,
        typer.Option(
            parser=_size,
            metavar="SIZE",
            help="Memory of the KV cache, like 2GiB or 512MB.  [default: a share of what is free]",
        ),
    ] = None,
    enable_prefix_caching: Annotated[
        bool,
        typer.Option(
            "--enable-prefix-caching/--no-enable-prefix-caching",
            help="Find the KV of prompts that begin alike instead of computing it again.",
        ),
    ] = _DEFAULT.enable_prefix_caching,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=_LARGEST_SEED,
            help="Where the seeds of requests that bring none come from.  [default: the system]",
        ),
    ] = None,
    batch_window_ms: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=10_000.0,
            callback=_window_ms,
            help="How long an idle engine may wait for company before its first step.",
        ),
    ] = _DEFAULT.batch_window_ms,
    default_max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Bound on chat answers that name none.  [default: the end of the context]"),
    ] = None,
    allowed_origins: Annotated[
        list[str] | None,
        typer.Option(
            help="Origin of a web page that may call, or *; may be given several times.  "
            "[default: pages on this machine and desktop apps]"
        ),
    ] = None,
    allowed_hosts: Annotated[
        list[str] | None,
        typer.Option(
            help="Host name that clients may call this machine by while it listens on loopback; may be given several "
            "times.  [default: localhost and loopback addresses]"
        ),
    ] = None,
) -> None:
    """Serve a model through OpenAI's API until Ctrl-C."""
    from helix_gateway.runtime.model_source import resolve, served_name

    engine = EngineSettings(
        model_path=resolve(model),
        dtype=dtype,
        device=device,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=block_size,
        kv_cache_memory_bytes=kv_cache_memory,
        enable_prefix_caching=enable_prefix_caching,
        seed=seed,
        batch_window_ms=batch_window_ms,
    )
    gateway = GatewaySettings(
        host=host,
        port=port,
        api_key=api_key or None,
        served_model_names=tuple(served_model_name or [served_name(model)]),
        default_max_tokens=default_max_tokens,
        allowed_origins=tuple(allowed_origins or ()),
        allowed_hosts=tuple(allowed_hosts or ()),
    )
    raise typer.Exit(_run(engine, gateway))


def _run(engine: EngineSettings, gateway: GatewaySettings) -> int:
    from helix_gateway.gateway.app import create_app
    from helix_gateway.gateway.server import run
    from helix_gateway.service.process import ProcessService
    from helix_gateway.telemetry.logging import configure_logging
    from helix_gateway.text.tokenizer import Tokenizer

    configure_logging()
    name = gateway.served_model_names[0]
    typer.echo(f"Loading {name} (the first start takes longer: kernels are compiled for this processor)", err=True)
    service = ProcessService(engine, Tokenizer.load(engine.model_path))
    app = create_app(gateway, dict.fromkeys(gateway.served_model_names, service))

    async def stop(_app: object) -> None:
        await service.stop()

    async def start() -> None:
        await asyncio.gather(service.start(), asyncio.to_thread(_render_once, service.tokenizer))

    # Before connections are closed: whoever is being answered hears that the server stops.
    app.on_shutdown.append(stop)
    return run(app, gateway, start)


def _render_once(tokenizer: "Tokenizer") -> None:
    """Let happen now what the first conversation would have to wait for: imports, and the template's compilation."""
    # A model without a template, or whose template wants something else, is served all the same.
    with contextlib.suppress(InvalidRequestError):
        tokenizer.render_chat([{"role": "user", "content": "."}])
