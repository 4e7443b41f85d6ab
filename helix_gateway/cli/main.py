"""The `helix` command and how it ends: exit codes, and one line on stderr where something is wrong.

Knows nothing about what the subcommands do.  Nothing heavy is imported here, so that ``helix --help`` answers at
once: each subcommand imports what it runs when it runs.
"""

import sys
from typing import Annotated

import typer

from helix_gateway.cli.bench import bench
from helix_gateway.cli.chat.command import chat
from helix_gateway.cli.doctor.command import doctor
from helix_gateway.cli.models import app as models
from helix_gateway.cli.serve import WRONG_USE, serve
from helix_gateway.cli.usage import WrongUsage, told
from helix_gateway.cli.version import print_version, version
from helix_gateway.core.errors import HelixError

app = typer.Typer(
    name="helix",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def helix(
    *,
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=print_version)
    ] = False,
) -> None:
    """Serve language models through OpenAI's API."""


app.command(name="serve")(serve)
app.command(name="chat")(chat)
app.command(name="bench")(bench)
app.command(name="doctor")(doctor)
app.add_typer(models)
app.command(name="version")(version)


def main() -> None:
    """Run the command line of this process; the console script ``helix``.

    What Helix raises on purpose, and what the system refuses (a port in use, a full disk), is one line on stderr
    and exit code 1; a command line that makes no sense is one line and exit code 2; a traceback is our own fault.
    """
    try:
        sys.exit(app(prog_name="helix", standalone_mode=False))
    except WrongUsage as error:
        typer.echo(told(error), err=True)
        sys.exit(WRONG_USE)
    except typer.Abort:
        sys.exit("Aborted.")
    except (HelixError, OSError) as error:
        sys.exit(f"helix: {error}")
