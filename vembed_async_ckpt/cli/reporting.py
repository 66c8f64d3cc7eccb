"""`vembed-ckpt report`: one page about a run."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..report import history, page
from ..sinks import JsonLines


def report(
    events: Annotated[Path, typer.Argument(help="What sinks.JsonLines wrote.")],
    out: Annotated[
        Path | None, typer.Option(help="The page to write; EVENTS with the suffix .html unless given.")
    ] = None,
    disk_gbps: Annotated[
        float | None, typer.Option("--disk-gbps", help="What the disk writes, in GB/s, to compare with.", min=0.001)
    ] = None,
) -> None:
    """Make one HTML page from the events of a run: what saving cost, when, and why.

    The page opens offline and contains everything that it shows.
    """
    target = out or events.with_suffix(".html")
    try:
        found = history.read(JsonLines.read(events))
    except OSError as error:
        print(f"{events}: cannot be read ({error.strerror})", file=sys.stderr)
        raise typer.Exit(1) from None
    if not found.steps and not found.saves:
        print(f"{events}: holds no events of a training; write them with sinks=[JsonLines(...)]", file=sys.stderr)
        raise typer.Exit(1)
    text = page.render(found, os.path.basename(events), None if disk_gbps is None else disk_gbps * 1e9)
    target.write_text(text, encoding="utf-8")
    print(target)
