"""The command `watch`: follows the checkpoints under a root while somebody trains. No torch."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.filesize import decimal

from .. import listing
from .._disk import places
from .reading import finite, shown


def watch(
    root: Annotated[str, typer.Argument(help="Directory that holds the checkpoints.")],
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: one line of JSON for each change.")] = False,
) -> None:
    """Print a line for each checkpoint under ROOT, and another whenever one appears, breaks or goes. Ctrl-C ends it."""
    places.refuse_no_root(root)
    try:
        for change in _changes(root, interval):
            print(json.dumps(finite(change)) if as_json else _line(change), flush=True)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


def _changes(root: str, interval: float) -> Iterator[dict[str, Any]]:
    known: dict[Path | str, listing.CheckpointEntry] = {}
    while True:
        now = {entry.path: entry for entry in reversed(listing.checkpoints(root))}
        for path, entry in now.items():
            if path not in known or repr(known[path]) != repr(entry):  # NaN, as a metric, is not equal to itself
                yield _change("complete" if entry.complete else "broken", entry)
        for path, entry in known.items():
            if path not in now:
                yield _change("gone", entry)
        known = now
        time.sleep(interval)


def _change(what: str, entry: listing.CheckpointEntry) -> dict[str, Any]:
    return {
        "time": time.time(),
        "change": what,
        "path": os.fspath(entry.path),
        "step": entry.step,
        "bytes": entry.total_bytes,
        "saved": entry.time,
        "metrics": dict(entry.metrics),
        "problem": entry.problem,
    }


def _line(change: dict[str, Any]) -> str:
    parts = [time.strftime("%H:%M:%S"), shown(os.path.basename(change["path"])), change["change"]]
    if change["change"] == "complete":
        parts += [
            decimal(change["bytes"]),
            *(f"{shown(name)}={value:.4g}" for name, value in change["metrics"].items()),
        ]
        if change["saved"] is not None:
            parts.append(f"(saved {_ago(change['time'] - change['saved'])} ago)")
    elif change["change"] == "broken":
        parts[-1] = f"broken: {shown(change['problem'])}"
    return " ".join(parts)


def _ago(seconds: float) -> str:
    minutes, rest = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
