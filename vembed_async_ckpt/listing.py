"""The checkpoints under a root, for programs: find the newest or the best one, check, list or delete them.

Where a root or a checkpoint is only read, it may be a URL of what `shipping.upload` wrote. Does not import torch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, overload

from ._disk import catalog, link_update, notes
from ._disk import deletion as removal
from ._disk.filesystem import LocalFilesystem
from ._disk.lock import RootLock
from ._disk.manifests import Verify
from ._disk.reader import manifest_of
from ._format.manifest import Manifest
from ._format.urls import is_url
from .errors import CheckpointerBusy, CheckpointError

if TYPE_CHECKING:
    from ._ship.remote import Uploaded


@dataclass(frozen=True)
class CheckpointEntry:
    """One directory that is a checkpoint or claims to be one. A value that cannot be read is None, {} or 0.

    `path`: absolute path, or the URL of an uploaded checkpoint.
    `step`: as given to `save()`, or None.
    `sequence`: order of the saves under this root; the newest has the largest.
    `metrics`: as given to `save()`.
    `total_bytes`: bytes of its files without the manifest; a file with two names counts once.
    `time`: when it was saved, in seconds since 1970.
    `complete`: whether every file in the manifest exists and has its size.
    `problem`: what is wrong, "" if it is complete.
    """

    path: Path | str
    step: int | None
    sequence: int | None
    metrics: Mapping[str, float]
    total_bytes: int
    time: float | None
    complete: bool
    problem: str


@overload
def latest(root: os.PathLike[str], *, verify: Verify = ...) -> Path | None: ...
@overload
def latest(root: str, *, verify: Verify = ...) -> Path | str | None: ...
def latest(root: str | os.PathLike[str], *, verify: Verify = "size") -> Path | str | None:
    """Return the newest complete checkpoint under `root`: its path, or its URL if `root` is a URL.

    None means that nothing there is a checkpoint or claims to be one.

    The newest is the one with the largest (sequence, step) in its manifest; names and file times do not count. Of
    uploaded checkpoints it is the one that arrived last. Broken checkpoints are skipped with a warning that gives the
    reason. If the writer of a dead trainer is still finishing a staged save, this waits for it (up to 60 s) and logs
    that. Raises `CorruptCheckpoint` if every checkpoint is broken, `CheckpointerBusy` if that writer does not finish,
    and `CheckpointError` if the root cannot be listed, is a checkpoint itself, or holds only what other programs wrote.
    """
    if not is_url(root):
        return catalog.latest(root, verify=verify)
    from ._ship import remote

    return remote.latest(os.fspath(root), verify)


def verify(path: str | os.PathLike[str]) -> Manifest:
    """Check a checkpoint against its manifest: the manifest itself, the size of every file, and the hash of every file.

    `path` may be the URL of an uploaded checkpoint; then all of it is read. Returns the manifest. Retention does not
    delete the checkpoint meanwhile. Raises `CorruptCheckpoint` that names the file and the reason, and
    `CheckpointError` if the path is not a checkpoint or is deleted meanwhile.
    """
    if not is_url(path):
        return catalog.verify(path)
    from ._ship.remote import RemoteFiles

    files = RemoteFiles(os.fspath(path))
    manifest = files.manifest()
    files.check(manifest, "full")
    return manifest


def checkpoints(root: str | os.PathLike[str]) -> list[CheckpointEntry]:
    """List every checkpoint under `root`, newest first. Those with an unreadable manifest come last.

    Returns an empty list if the root does not exist. Raises `CheckpointError` if the root cannot be listed.
    """
    if is_url(root):
        from ._ship import remote

        return [_uploaded_entry(found) for found in remote.uploaded(os.fspath(root))]
    return [_entry(found) for found in reversed(catalog.survey(os.path.abspath(root)))]


@overload
def best(root: os.PathLike[str], metric: str, mode: Literal["min", "max"] = ...) -> Path | None: ...
@overload
def best(root: str, metric: str, mode: Literal["min", "max"] = ...) -> Path | str | None: ...
def best(root: str | os.PathLike[str], metric: str, mode: Literal["min", "max"] = "min") -> Path | str | None:
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

    If it is still to be shipped (`after_commit`), it is not shipped any more. Files that this library did not write are
    kept in `_vembed_async_ckpt/replaced/` under the root.

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
        notes.remove(LocalFilesystem(), root, save_id)
        removal.discard(LocalFilesystem(), root, name, save_id)
        left = [entry for entry in catalog.scan(root) if entry.manifest is not None]
        link_update.heal(LocalFilesystem(), root, os.path.basename(left[-1].path) if left else None, save_id)
    finally:
        lock.release()


def _entry(found: catalog.Entry) -> CheckpointEntry:
    if found.manifest is None:
        return CheckpointEntry(Path(found.path), None, None, {}, 0, None, False, str(found.error))
    return _described(Path(found.path), found.manifest, _total_bytes(found.path, found.manifest), found.error)


def _uploaded_entry(found: Uploaded) -> CheckpointEntry:
    if found.manifest is None:
        return CheckpointEntry(found.url, None, None, {}, 0, None, False, str(found.error))
    total = sum(record.size for record in set(found.manifest.files.values()))
    return _described(found.url, found.manifest, total, found.error)


def _described(
    path: Path | str, manifest: Manifest, total_bytes: int, problem: CheckpointError | None
) -> CheckpointEntry:
    return CheckpointEntry(
        path=path,
        step=manifest.step,
        sequence=manifest.sequence,
        metrics=dict(manifest.metrics),
        total_bytes=total_bytes,
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
