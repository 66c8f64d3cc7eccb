"""The checkpoints under a root, for programs: list them, find the best one, delete one. Does not import torch."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ._disk import catalog, link_update
from ._disk import deletion as removal
from ._disk.filesystem import LocalFilesystem
from ._disk.lock import RootLock
from ._disk.reader import manifest_of
from ._format.manifest import Manifest
from .errors import CheckpointerBusy


@dataclass(frozen=True)
class CheckpointEntry:
    """One directory that is a checkpoint or claims to be one. A value that cannot be read is None, {} or 0.

    `path`: absolute path.
    `step`: as given to `save()`, or None.
    `sequence`: order of the saves under this root; the newest has the largest.
    `metrics`: as given to `save()`.
    `total_bytes`: bytes of its files without the manifest; a file with two names counts once.
    `time`: when it was saved, in seconds since 1970.
    `complete`: whether every file in the manifest exists and has its size.
    `problem`: what is wrong, "" if it is complete.
    """

    path: Path
    step: int | None
    sequence: int | None
    metrics: Mapping[str, float]
    total_bytes: int
    time: float | None
    complete: bool
    problem: str


def checkpoints(root: str | os.PathLike[str]) -> list[CheckpointEntry]:
    """List every checkpoint under `root`, newest first. Those with an unreadable manifest come last.

    Returns an empty list if the root does not exist. Raises `CheckpointError` if the root cannot be listed.
    """
    return [_entry(found) for found in reversed(catalog.survey(os.path.abspath(root)))]


def best(root: str | os.PathLike[str], metric: str, mode: Literal["min", "max"] = "min") -> Path | None:
    """Return the complete checkpoint under `root` with the best value of `metric`, or None.

    The best value is the smallest (`mode="min"`) or the largest (`"max"`). Among equal values the newest wins.
    Checkpoints without the metric, or with NaN for it, are ignored. Raises ValueError for any other `mode`, and
    `CheckpointError` if the root cannot be listed.
    """
    if mode not in ("min", "max"):
        raise ValueError(f"mode is {mode!r}; use 'min' or 'max'")
    rated = [entry for entry in checkpoints(root) if entry.complete and not math.isnan(_value(entry, metric))]
    if not rated:
        return None
    choose = min if mode == "min" else max
    return choose(rated, key=lambda entry: _value(entry, metric)).path


def delete(path: str | os.PathLike[str]) -> None:
    """Delete the checkpoint `path`: move it into the work directory, then delete the files that its manifest names.

    Files that this library did not write are kept in `_vembed_async_ckpt/replaced/` under the root.

    Raises `CorruptCheckpoint` if the manifest cannot be read; then nothing proves that the files are ours, and nothing
    is deleted. Raises `CheckpointerBusy` if a training saves in the same root, or if somebody is loading this
    checkpoint. Raises `CommitError` if the lock file of the root was removed meanwhile; nothing is deleted then.
    """
    directory = os.path.abspath(path)
    root, name = os.path.split(directory)
    save_id = manifest_of(directory).save_id
    root = os.path.realpath(root)
    lock = RootLock.acquire(root, create=False)
    try:
        if removal.in_use(os.path.join(root, name)):
            raise CheckpointerBusy(f"{directory}: somebody is loading this checkpoint; delete it later")
        lock.refuse_if_lost()
        removal.discard(LocalFilesystem(), root, name, save_id)
        left = [entry for entry in catalog.scan(root) if entry.manifest is not None]
        link_update.heal(LocalFilesystem(), root, os.path.basename(left[-1].path) if left else None, save_id)
    finally:
        lock.release()


def _entry(found: catalog.Entry) -> CheckpointEntry:
    manifest, problem = found.manifest, found.error
    if manifest is None:
        return CheckpointEntry(Path(found.path), None, None, {}, 0, None, False, str(problem))
    return CheckpointEntry(
        path=Path(found.path),
        step=manifest.step,
        sequence=manifest.sequence,
        metrics=dict(manifest.metrics),
        total_bytes=_total_bytes(found.path, manifest),
        time=manifest.time,
        complete=problem is None,
        problem="" if problem is None else str(problem),
    )


def _total_bytes(directory: str, manifest: Manifest) -> int:
    sizes: dict[object, int] = {}
    for name, record in manifest.files.items():
        try:
            status = os.lstat(os.path.join(directory, *name.split("/")))
            sizes[status.st_dev, status.st_ino] = record.size
        except OSError:
            sizes[name] = record.size
    return sum(sizes.values())


def _value(entry: CheckpointEntry, metric: str) -> float:
    return float(entry.metrics.get(metric, math.nan))
