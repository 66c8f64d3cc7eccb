"""`vembed-ckpt`: list, inspect and check checkpoints, and try the library.

Exit codes: 0 success, 1 nothing or something broken was found, 2 the command line is wrong. Commands that only read do
not load torch.
"""

from __future__ import annotations

import io
import sys
import warnings
from importlib.metadata import version
from typing import Annotated

import typer

from ..errors import CheckpointError
from . import bench, cleaning, exporting, inspecting, reading, reporting, training, watching

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for command in (
    *(training.demo, reading.ls, reading.latest, watching.watch, reading.verify),
    *(inspecting.inspect, inspecting.diff, exporting.export, reporting.report),
    *(cleaning.prune, cleaning.sweep),
):
    app.command()(command)
app.add_typer(bench.app, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"vembed-ckpt {version('vembed-async-ckpt')}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line. An error of the library prints one line and gives exit code 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file name may not be valid text
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        app()
    except CheckpointError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
