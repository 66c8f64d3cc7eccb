"""The commands that read checkpoints: no torch, tables for people, `--json` for programs."""

from __future__ import annotations

import datetime
import json
import math
import os
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import DownloadColumn, Progress
from rich.table import Table

from .. import listing
from .._disk import catalog, latest_link, manifests, places
from .._disk.manifests import Verify
from .._disk.reader import reading
from .._format import names
from .._format.manifest import Manifest
from .._format.urls import is_url
from ..errors import CheckpointError, CorruptCheckpoint
from ..retention import Mode

if TYPE_CHECKING:
    from .._ship.remote import RemoteFiles

Root = Annotated[str, typer.Argument(help="Directory that holds the checkpoints, or the URL of an uploaded run.")]
AsJson = Annotated[bool, typer.Option("--json", help="For programs: JSON on standard output.")]


def print_json(value: Any) -> None:
    """Print JSON that every program can read: NaN and infinities become null."""
    json.dump(finite(value), sys.stdout, indent=2)
    print()


def finite(value: Any) -> Any:
    """Return JSON data with null in place of NaN and infinities."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def shown(name: str) -> str:
    """Return the name without characters that control a terminal."""
    return name if name.isprintable() else ascii(name)[1:-1]


def ls(root: Root, as_json: AsJson = False) -> None:
    """List the checkpoints under ROOT, oldest first: step, age, size, metrics, and whether each is complete."""
    rows = [_row(entry) for entry in _entries(root)]
    if as_json:
        print_json(rows)
    elif not rows:
        print(f"no checkpoints under {root}", file=sys.stderr)
    else:
        Console().print(_table(rows))
    raise typer.Exit(0 if rows and all(row["complete"] for row in rows) else 1)


def _entries(root: str) -> list[catalog.Entry]:
    """Return the checkpoints in a directory or below a URL, oldest first."""
    if not is_url(root):
        places.refuse_no_root(root)
        return catalog.survey(root)
    from .._ship import remote

    return [catalog.Entry(found.url, found.manifest, found.error) for found in remote.uploaded(root)][::-1]


def _row(entry: catalog.Entry) -> dict[str, Any]:
    error, found = entry.error, entry.manifest
    return {
        "name": os.path.basename(entry.path),
        "path": entry.path,
        "complete": error is None,
        "ours": error is None or isinstance(error, CorruptCheckpoint),
        "reason": None if error is None else str(error),
        "step": found.step if found else None,
        "sequence": found.sequence if found else None,
        "time": found.time if found else None,
        "bytes": sum(record.size for record in found.files.values()) if found else None,
        "files": len(found.files) if found else None,
        "metrics": dict(found.metrics) if found else {},
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table()
    for title in ("checkpoint", "step", "age", "size", "metrics", "state"):
        table.add_column(title, justify="right" if title in ("step", "age", "size") else "left")
    for row in rows:
        metrics = " ".join(f"{name}={value:.4g}" for name, value in row["metrics"].items())
        table.add_row(
            escape(row["name"]),
            "" if row["step"] is None else str(row["step"]),
            "" if row["time"] is None else _age(row["time"]),
            "" if row["bytes"] is None else decimal(row["bytes"]),
            escape(metrics),
            _state(row),
        )
    return table


def _state(row: dict[str, Any]) -> str:
    if row["complete"]:
        return "[green]complete[/]"
    return f"[red]{'broken' if row['ours'] else 'not ours'}:[/] {escape(row['reason'])}"


def _age(then: float) -> str:
    try:
        return str(datetime.timedelta(seconds=max(round(time.time() - then), 0)))
    except (ValueError, OverflowError):
        return "?"


def latest(
    root: Root,
    verify: Annotated[str, typer.Option(help="How closely to look: size, full or none.")] = "size",
    best: Annotated[str | None, typer.Option(help="Instead of the newest, the best by this metric.")] = None,
    mode: Annotated[str, typer.Option(help="Which value of the metric is best: min or max.")] = "min",
    as_json: AsJson = False,
) -> None:
    """Print only the path of the newest complete checkpoint under ROOT. Exit code 1 if there is none.

    With --best METRIC, print the one with the best value of that metric. Checkpoints without the metric are ignored.
    """
    if verify not in ("size", "full", "none"):
        raise typer.BadParameter(f"{verify!r}; use size, full or none", param_hint="--verify")
    if mode not in ("min", "max"):
        raise typer.BadParameter(f"{mode!r}; use min or max", param_hint="--mode")
    missing = f"no checkpoints under {root}"
    if best is None:
        found = listing.latest(root, verify=cast(Verify, verify))
    else:
        found = listing.best(root, best, cast(Mode, mode))
        missing = f"no complete checkpoint under {root} has a metric {best!r}"
    if as_json:
        print(json.dumps(None if found is None else os.fspath(found)))
    elif found is None:
        print(missing, file=sys.stderr)
    else:
        print(found)
    raise typer.Exit(0 if found is not None else 1)


def verify(
    path: Annotated[str, typer.Argument(help="A checkpoint, or a directory that holds some, or the URL of either.")],
    as_json: AsJson = False,
) -> None:
    """Check PATH, or every checkpoint under it: manifests, sizes, and the hash of every file."""
    entries, others, listed = _to_verify(path)
    with Progress(
        *Progress.get_default_columns(), DownloadColumn(), console=Console(stderr=True), transient=True
    ) as bar:
        results = [_verified(entry, bar, listed=listed) for entry in entries]
    if as_json:
        print_json(results)
    else:
        for result in results:
            print(f"{result['path']}: {_verdict(result)}")
        for line in others:
            print(line)
    raise typer.Exit(1 if not results or any(result["ok"] is False for result in results) else 0)


def _to_verify(path: str) -> tuple[list[str], list[str], bool]:
    """Return the checkpoints to check, what is said of others, and whether the checkpoints were found in a list."""
    if is_url(path):
        from .._ship import remote

        found_there = [f"{path.rstrip('/')}/{key}" for _, key in remote.markers(path)]
        return found_there or [path], [], False
    directory = latest_link.resolve(path)
    is_root = not os.path.lexists(os.path.join(directory, names.MANIFEST)) and os.path.isdir(directory)
    found = catalog.scan(directory) if is_root else []
    entries = [entry.path for entry in found if entry.manifest or isinstance(entry.error, CorruptCheckpoint)]
    others = [str(entry.error) for entry in found if entry.path not in entries]
    return entries if found else [directory], others, bool(entries)


def _verdict(result: dict[str, Any]) -> str:
    if result["ok"] is None:
        return "gone: it was deleted or replaced meanwhile"
    return "ok" if result["ok"] else f"BROKEN: {result['reason']}"


def _verified(path: str, bar: Progress, *, listed: bool) -> dict[str, Any]:
    """Return the result of checking one checkpoint.

    `listed`: the checkpoint was in a list just read. Then `ok` is None if the checkpoint is gone now.
    """

    def look(found: Manifest) -> dict[str, Any]:
        size = sum(record.size for record in found.files.values())
        task = bar.add_task(escape(os.path.basename(path)), total=size)

        def hashed(count: int) -> None:
            bar.advance(task, count)

        if remote is None:
            manifests.check(path, found, "full", hashed)
        else:
            remote.check(found, "full", hashed=hashed)
        return {"path": path, "ok": True, "reason": None, "files": len(found.files), "bytes": size}

    remote = _remote(path) if is_url(path) else None
    try:
        return reading(path, look) if remote is None else look(remote.manifest())
    except CorruptCheckpoint as error:
        return {"path": path, "ok": False, "reason": str(error)}
    except CheckpointError as error:
        if not listed:
            raise
        return {"path": path, "ok": None, "reason": str(error)}


def _remote(url: str) -> RemoteFiles:
    from .._ship.remote import RemoteFiles

    return RemoteFiles(url)
