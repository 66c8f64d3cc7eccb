"""The committed checkpoints under a root.

A directory is one if its manifest verifies. They are ordered by (sequence, step).
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from .._format import names
from .._format.manifest import Manifest
from ..errors import CheckpointError, CorruptCheckpoint
from . import latest_link, manifests, places
from .manifests import Verify
from .reader import reading

_MOMENT = 0.05  # seconds to wait for a directory to come back under its name


@dataclass(frozen=True)
class Entry:
    """One directory under a root: its manifest, or the reason why it has no usable one."""

    path: str
    manifest: Manifest | None
    error: CheckpointError | None = None
    order: tuple[int, int] = (-1, -1)  # the newest is largest; unknown counts as oldest


def scan(root: str) -> list[Entry]:
    """Return every directory under `root` that is a checkpoint or claims to be one.

    Broken ones come first, then the others from oldest to newest. A directory claims to be a checkpoint by its name
    (`names.parse_checkpoint`) or by holding a manifest. On file systems without exchange, the replacement of a
    checkpoint may have been interrupted. Such a checkpoint is listed as broken until the next start brings it back. A
    root that does not exist is empty. Raises `CheckpointError` if the root cannot be listed: then its content is
    unknown.
    """
    try:
        with os.scandir(root) as found:
            candidates = [item.path for item in found if _claims(item)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{root}: cannot be listed ({error.strerror}): what is there is unknown") from error
    return sorted([*map(_read, candidates), *interrupted(root)], key=lambda entry: (entry.order, entry.path))


def interrupted(root: str) -> Iterator[Entry]:
    """Yield checkpoints that were moved away for a replacement that was never published.

    Each entry has the path that the checkpoint had.
    """
    replaced = names.replaced_directory(root)
    for name in list_replaced(root):
        parsed = names.parse_swap(name)
        if parsed is None or os.path.lexists(target := os.path.join(root, parsed[1])):
            continue
        found = _read(os.path.join(replaced, name))
        reason = (
            "its replacement was interrupted; `vembed-ckpt sweep`, or the next AsyncCheckpointer there, brings it back"
        )
        yield Entry(target, None, CorruptCheckpoint(f"{target}: {reason}"), found.order)


def list_replaced(root: str) -> list[str]:
    """Return the names in `replaced/`. Empty if that is a symbolic link: it is not ours and leads out of the root.

    Raises `CheckpointError` if the directory cannot be listed.
    """
    replaced = names.replaced_directory(root)
    try:
        return [] if os.path.islink(replaced) else sorted(os.listdir(replaced))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{replaced}: cannot be listed ({error.strerror}): what is there is unknown") from error


def _claims(item: os.DirEntry[str]) -> bool:
    if item.name == names.WORK or not (item.is_dir(follow_symlinks=False) or item.is_symlink()):
        return False
    if names.parse_checkpoint(item.name) is not None:
        return True
    return not item.is_symlink() and os.path.lexists(os.path.join(item.path, names.MANIFEST))


def _read(path: str) -> Entry:
    try:
        found = manifests.read(path)
        return Entry(path, found, order=found.order)
    except CorruptCheckpoint as error:
        writer = places.other_program(path)
        if writer and not os.path.lexists(os.path.join(path, names.MANIFEST)):
            return Entry(path, None, CheckpointError(f"{path}: was written by {writer}, not by vembed_async_ckpt"))
        return Entry(path, None, error)


def latest(root: str | os.PathLike[str], *, verify: Verify = "size") -> Path | None:
    """Return the newest complete checkpoint under `root`.

    None means that nothing there is a checkpoint or claims to be one.

    The newest is the one with the largest (sequence, step) in its manifest; names and file times do not count. Broken
    checkpoints are skipped with a warning that gives the reason. If the writer of a dead trainer is still finishing a
    staged save, this waits for it (up to 60 s) and logs that. Raises `CorruptCheckpoint` if every checkpoint is broken,
    `CheckpointerBusy` if that writer does not finish, and `CheckpointError` if the root cannot be listed, is a
    checkpoint itself, or holds only what other programs wrote.
    """
    root = os.fspath(root)
    places.refuse_checkpoint(root)
    if os.name == "posix":
        from .lock import wait_for_orphan

        wait_for_orphan(root)
    return _newest(root, verify)


def _newest(root: str, verify: Verify, retries: int = 2) -> Path | None:
    broken: list[CheckpointError] = []
    entries = scan(root)
    # If a manifest cannot be read, the age of its checkpoint is unknown: it may be the newest.
    unread = [entry for entry in entries if entry.error and entry.order < (0, 0)]
    if retries and any(map(_has_changed, unread)):
        return _look_again(root, verify, retries)
    for entry in reversed(entries):
        error = entry.error
        if entry.manifest is not None:
            try:
                manifests.check(entry.path, entry.manifest, verify)
                break
            except CorruptCheckpoint as found:
                error = found
        assert error is not None
        if retries and _has_changed(entry):
            return _look_again(root, verify, retries)
        broken.append(error)
    else:
        if not entries:
            return None
        if not any(isinstance(error, CorruptCheckpoint) for error in broken):
            raise CheckpointError(
                f"{root}: nothing there is a checkpoint of ours, so there is nothing to go on from; load it with the program "
                "that wrote it: " + "; ".join(str(error) for error in broken)
            )
        raise CorruptCheckpoint(
            f"{root}: none of the {len(entries)} checkpoints is complete; newest first: "
            + "; ".join(str(error) for error in broken)
        )
    broken += [entry.error for entry in unread if entry.error and not _has_changed(entry)]
    for error in broken:
        what = "skipped a broken checkpoint" if isinstance(error, CorruptCheckpoint) else "skipped"
        warnings.warn(f"{what}: {error}", stacklevel=3)
    return Path(entry.path)


def _look_again(root: str, verify: Verify, retries: int) -> Path | None:
    """Scan again: a live run has just moved or replaced one of the directories."""
    time.sleep(_MOMENT)
    return _newest(root, verify, retries - 1)


def _has_changed(entry: Entry) -> bool:
    """Return whether the entry's path now holds another checkpoint or none.

    Also True if it changed during this call.
    """
    before = _identity(entry.path)
    found = _read(entry.path).manifest
    return before is None or found != entry.manifest or _identity(entry.path) != before


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def survey(root: str) -> list[Entry]:
    """Return the entries of `scan`, after comparing the sizes of their files with the manifests.

    A checkpoint that is deleted meanwhile is left out. One that is replaced meanwhile is read again.
    """
    return [entry for found in scan(root) if (entry := _surveyed(found)) is not None]


def _surveyed(entry: Entry, retries: int = 2) -> Entry | None:
    error = entry.error
    if entry.manifest is not None:
        try:
            manifests.check(entry.path, entry.manifest, "size")
            return entry
        except CorruptCheckpoint as found:
            error = found
    if retries and entry.order >= (-1, -1) and _has_changed(entry):
        if not os.path.lexists(entry.path):
            time.sleep(_MOMENT)
        return _surveyed(_read(entry.path), retries - 1) if os.path.lexists(entry.path) else None
    return replace(entry, error=error)


def verify(path: str | os.PathLike[str]) -> Manifest:
    """Check a checkpoint against its manifest: the manifest itself, the size of every file, and the hash of every file.

    Returns the manifest. Retention does not delete the checkpoint meanwhile. Raises `CorruptCheckpoint` that names the
    file and the reason, and `CheckpointError` if the path is not a checkpoint or is deleted meanwhile.
    """
    directory = latest_link.resolve(path)

    def look(found: Manifest) -> Manifest:
        manifests.check(directory, found, "full")
        return found

    return reading(directory, look)


class Committed:
    """The manifests under a root, each read once. Their tensor tables are dropped because they may be large."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._known: dict[str, tuple[tuple[int, ...], Manifest]] = {}

    def refresh(self) -> list[tuple[str, Manifest]]:
        """Return (path, manifest) of every checkpoint that has a usable manifest now."""
        found: dict[str, tuple[tuple[int, ...], Manifest]] = {}
        with os.scandir(self._root) as entries:
            paths = [e.path for e in entries if e.name != names.WORK and e.is_dir(follow_symlinks=False)]
        for path in paths:
            try:
                status = os.lstat(os.path.join(path, names.MANIFEST))
                key = (status.st_ino, status.st_size, status.st_mtime_ns)
                known = self._known.get(path)
                found[path] = known if known and known[0] == key else (key, _slim(manifests.read(path)))
            except (OSError, CorruptCheckpoint):
                continue  # not a checkpoint, or a broken one: neither counted nor deleted
        self._known = found
        return [(path, manifest) for path, (_, manifest) in found.items()]


def _slim(manifest: Manifest) -> Manifest:
    return replace(manifest, names={}, tensors={})
