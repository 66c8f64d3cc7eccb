"""The commands that delete. They take the root's lock first, so a training that saves there cannot run meanwhile."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, cast, get_args

import typer

from .._disk import catalog, notes, places
from .._disk import deletion as removal
from .._disk.filesystem import LocalFilesystem
from .._disk.lock import RootLock
from .._format import names
from .._format.manifest import Manifest
from ..retention import AnyOf, KeepBest, KeepEvery, KeepLast, Mode, Policy, Unrated, unknown_metrics
from .reading import AsJson

Root = Annotated[Path, typer.Argument(help="Directory that holds the checkpoints.")]


def prune(
    root: Root,
    keep_last: Annotated[int | None, typer.Option(min=1, help="Keep the newest N.")] = None,
    keep_every: Annotated[int | None, typer.Option(min=1, help="Keep those whose step is a multiple of N.")] = None,
    keep_best: Annotated[
        str | None,
        typer.Option(help="Keep the one with the smallest value of a metric: min:NAME or NAME; or max:NAME."),
    ] = None,
    unrated: Annotated[
        str, typer.Option(help="What --keep-best does with those that have no value of the metric: keep or drop.")
    ] = "keep",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete the checkpoints that no --keep option keeps.

    The newest complete checkpoint always stays. So do checkpoints that are incomplete or being read.
    """
    policy = _policy(keep_last, keep_every, keep_best, unrated)
    path = os.path.realpath(root)
    places.refuse_no_root(path)
    if dry_run:
        _say("would delete", removal.expendable(policy, _committed(path, policy)), as_json)
        return
    lock = RootLock.acquire(path, create=False)
    try:
        gone = removal.prune(LocalFilesystem(), path, policy, _committed(path, policy), lock.refuse_if_lost)
        _say("deleted", gone, as_json)
    finally:
        lock.release()


def _committed(root: str, policy: Policy) -> list[tuple[str, Manifest]]:
    """Return the checkpoints that `policy` applies to.

    Exits with code 2 if `policy` needs a metric that none of them has.
    """
    committed = [(entry.path, entry.manifest) for entry in catalog.scan(root) if entry.manifest]
    for problem in unknown_metrics(policy, [manifest for _, manifest in committed]):
        raise typer.BadParameter(f"{root}: {problem}. Nothing was deleted", param_hint="--keep-best")
    return committed


def _say(what: str, checkpoints: list[str], as_json: bool) -> None:
    if as_json:
        print(json.dumps({what.replace(" ", "_"): checkpoints}))
    else:
        for name in checkpoints:
            print(f"{what} {name}")


def _policy(keep_last: int | None, keep_every: int | None, keep_best: str | None, unrated: str) -> Policy:
    policies: list[Policy] = []
    if keep_last is not None:
        policies.append(KeepLast(keep_last))
    if keep_every is not None:
        policies.append(KeepEvery(keep_every))
    if unrated not in get_args(Unrated):
        raise typer.BadParameter(f"{unrated!r}; use keep or drop", param_hint="--unrated")
    if keep_best is not None:
        mode, metric = _metric(keep_best)
        policies.append(KeepBest(metric, mode=mode, unrated=cast(Unrated, unrated)))
    if not policies:
        raise typer.BadParameter("say what to keep: --keep-last, --keep-every or --keep-best")
    return AnyOf(tuple(policies))


def _metric(text: str) -> tuple[Mode, str]:
    """Return (mode, metric) of the text of `--keep-best`.

    If the name of a metric has a colon, the mode must be given.
    """
    mode, colon, metric = text.partition(":")
    if not colon:
        mode, metric = "min", text
    if mode not in get_args(Mode) or not metric:
        raise typer.BadParameter(f"{text!r}; write NAME, min:NAME or max:NAME", param_hint="--keep-best")
    return cast(Mode, mode), metric


def sweep(
    root: Root,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without, only show what is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what crashes left behind. With --yes, remove what is ours. Other files are only shown."""
    path = os.path.realpath(root)
    places.refuse_no_root(path)
    work, kept = names.work_directory(path), names.replaced_directory(path)
    found = {
        "leftovers": [entry for entry in _entries(work) if names.parse_work_entry(entry) is not None],
        "kept": [os.path.join(kept, entry) for entry in _entries(kept)],
        "unshipped": [note.name for note in notes.readable(path)],
        "done": [],
    }
    if yes and os.path.isdir(work):
        lock = RootLock.acquire(path)
        try:
            found["done"] = removal.sweep(LocalFilesystem(), path)
        finally:
            lock.release()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for entry in found["leftovers"]:
        print(f"leftover: {entry}")
    for entry in found["kept"]:
        print(f"kept, not ours to delete: {entry}")
    for name in found["unshipped"]:
        print(f"still to be shipped: {name}; the next training that saves here does that")
    for line in found["done"]:
        print(line)


def _entries(directory: str) -> list[str]:
    return sorted(os.listdir(directory)) if os.path.isdir(directory) else []
