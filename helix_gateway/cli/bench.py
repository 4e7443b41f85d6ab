"""``helix bench``: load on any OpenAI-compatible server, and what its answers were like.

Turns flags into a plan for `load/`, shows how far it is, and writes what came out.  Knows nothing about how load is
made, and imports it only once it runs.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from helix_gateway.cli.interrupts import on_interrupt
from helix_gateway.cli.numbers import finite
from helix_gateway.core.errors import HelixError

if TYPE_CHECKING:
    from rich.console import Console

    from helix_gateway.cli.load.level import Level, Load, RequestRecord
    from helix_gateway.cli.load.session import OnEnd, Session

DEFAULT_URL = "http://127.0.0.1:8000/v1"
_INTERRUPTED = 130
_USUAL_CONCURRENCY = "1,4,16"
_MOST = 10_000

BaseUrl = Annotated[str, typer.Option(help="Where the server is; with or without /v1.")]
Model = Annotated[str | None, typer.Option(help="Name of the model.  [default: the one that the server serves]")]
ApiKey = Annotated[str | None, typer.Option(envvar="HELIX_API_KEY", help="Key that the server asks for.")]
ApiName = Annotated[Literal["chat", "completions"], typer.Option(help="Which route is asked.")]
_Concurrency = Annotated[
    str | None, typer.Option(help=f"Requests at once, a level for each number.  [default: {_USUAL_CONCURRENCY}]")
]
_Rate = Annotated[
    str | None,
    typer.Option(help="Requests a second at random (Poisson) moments, in place of --concurrency; like 0.5,2."),
]
_NumRequests = Annotated[
    int | None,
    typer.Option(min=1, help="Requests of each level.  [default: 4 a stream, or 20 s of a rate; 16 at least]"),
]
_Duration = Annotated[
    float | None, typer.Option(min=0.1, callback=finite, help="Seconds after which a level sends no more requests.")
]
_Prompts = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help='JSONL of {"messages": […]} or {"prompt": "…"}.  [default: made-up prompts, no two alike, of log-normal '
        "lengths like ShareGPT's]",
    ),
]
_PromptTokens = Annotated[int, typer.Option(min=1, max=_MOST, help="Mean length of made-up prompts, about.")]
_OutputTokens = Annotated[
    int, typer.Option(min=1, max=_MOST, help="Mean of what made-up prompts ask for as max_tokens.")
]
_MaxTokens = Annotated[
    int | None, typer.Option(min=1, help="Asked of every answer.  [default: what the prompt says, else 128]")
]
_Temperature = Annotated[float, typer.Option(min=0.0, max=2.0, callback=finite, help="Asked of every answer.")]
_IgnoreEos = Annotated[
    bool, typer.Option("--ignore-eos", help="Ask for answers that go on to max_tokens, of servers that know it.")
]
_WarmUp = Annotated[int, typer.Option(min=0, max=_MOST, help="Requests before the first level, which do not count.")]
_Seed = Annotated[int, typer.Option(help="Of made-up prompts and random moments.")]
_Timeout = Annotated[
    float, typer.Option(min=0.1, callback=finite, help="Seconds after which an answer counts as an error.")
]
_Output = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the figures here, as JSON.")]
_Plot = Annotated[Path | None, typer.Option(metavar="FILE", help="Draw them here, as PNG (needs the extra bench).")]


def bench(
    base_url: BaseUrl = DEFAULT_URL,
    model: Model = None,
    api_key: ApiKey = None,
    api: ApiName = "chat",
    concurrency: _Concurrency = None,
    rate: _Rate = None,
    num_requests: _NumRequests = None,
    duration: _Duration = None,
    prompts: _Prompts = None,
    prompt_tokens: _PromptTokens = 161,
    output_tokens: _OutputTokens = 338,
    max_tokens: _MaxTokens = None,
    temperature: _Temperature = 0.0,
    ignore_eos: _IgnoreEos = False,
    warm_up: _WarmUp = 2,
    seed: _Seed = 0,
    timeout: _Timeout = 600.0,
    output: _Output = None,
    plot: _Plot = None,
) -> None:
    """Put load on an OpenAI-compatible server and tell what its answers were like.  Ctrl-C ends it early."""
    loads = _loads(concurrency, rate, seed)
    _check_files(output, plot)
    from rich.console import Console

    from helix_gateway.cli.load.level import Limit
    from helix_gateway.cli.load.prompts import RequestOptions, read_prompts, repeated, synthetic
    from helix_gateway.cli.load.session import Plan, Session
    from helix_gateway.cli.openai_client import OpenAIClient

    if prompts is None:
        questions = synthetic(seed, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
    else:
        questions = repeated(read_prompts(prompts))
    console = Console(stderr=True)

    async def run() -> Session:
        async with OpenAIClient(base_url, api_key, timeout_s=timeout) as client:
            options = RequestOptions(await client.only_model(model), api, max_tokens, temperature, ignore_eos)
            plan = Plan(options, loads, Limit(num_requests, duration), warm_up)
            session = Session(client, plan, questions, lambda level: _watched(level, console))
            with on_interrupt(session.interrupt):
                await session.run()
            return session

    session = _run_on_the_fastest_loop(run)
    _tell(session, base_url, str(prompts or "made up"), output, plot)
    if session.interrupted:
        raise typer.Exit(_INTERRUPTED)


def _loads(concurrency: str | None, rate: str | None, seed: int) -> "list[Load]":
    from helix_gateway.cli.load.level import Concurrency, PoissonRate

    if rate is None:
        streams = _numbers(concurrency or _USUAL_CONCURRENCY, int, "--concurrency")
        return [Concurrency(int(number)) for number in streams]
    if concurrency is not None:
        raise typer.BadParameter("--concurrency and --rate exclude each other; give one of them.")
    return [PoissonRate(number, seed) for number in _numbers(rate, float, "--rate")]


def _numbers(text: str, read: Callable[[str], float], flag: str) -> list[float]:
    try:
        values = [read(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 < value <= _MOST for value in values):
        raise typer.BadParameter(f"{flag} takes numbers above 0 and up to {_MOST}, like 1,4,16; not {text!r}.")
    return values


def _check_files(output: Path | None, plot: Path | None) -> None:
    """Say now what would otherwise be found out after minutes of load."""
    for path in filter(None, (output, plot)):
        if not path.absolute().parent.is_dir():
            raise HelixError(f"Cannot write {path}: there is no folder {path.absolute().parent}.")
    if plot is not None:
        from helix_gateway.cli.load.report import check_can_draw

        check_can_draw()


def _run_on_the_fastest_loop(run: "Callable[[], Coroutine[Any, Any, Session]]") -> "Session":
    """On uvloop where it is installed: there the client takes less from the cores that it shares with the server."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(run())
    return uvloop.run(run())


@contextmanager
def _watched(level: "Level", console: "Console") -> "Iterator[OnEnd]":
    """A bar on the terminal while a level runs; slow to refresh, since it takes time from the server beside it."""
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("{task.fields[tokens_per_s]:.1f} tokens/s"),
    )
    tokens = 0
    with progress.Progress(*columns, console=console, refresh_per_second=2, transient=True) as bar:
        task = bar.add_task(str(level.load), total=level.limit.requests, tokens_per_s=0.0)

        def on_end(record: "RequestRecord") -> None:
            nonlocal tokens
            tokens += record.output_tokens
            bar.update(task, advance=1, tokens_per_s=tokens / level.running_s)

        yield on_end


def _tell(session: "Session", base_url: str, prompts: str, output: Path | None, plot: Path | None) -> None:
    """The table on stdout, remarks below it, and the files that were asked for."""
    from dataclasses import asdict

    from rich.console import Console

    from helix_gateway.cli.load import report

    title = f"{session.plan.options.model} at {base_url}" + (", interrupted" if session.interrupted else "")
    Console().print(report.table(title, session.summaries))
    for remark in report.remarks(session.summaries):
        typer.echo(remark)
    if output is not None:
        target = {"base_url": base_url, "prompts": prompts, "interrupted": session.interrupted}
        report.write_json(output, session.summaries, **target, options=asdict(session.plan.options))
    if plot is not None:
        report.write_picture(plot, title, session.summaries)
