"""Reads a checkpoint while a training may delete or replace it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from .._format import names
from .._format.manifest import Manifest
from ..errors import CheckpointError, CorruptCheckpoint
from . import manifests, places
from .filesystem import open_regular

_T = TypeVar("_T")
_TRIES = 3
# seconds to wait for a directory to come back that was moved away without an exchange
_MOMENT = 0.05


class Gone(CheckpointError):
    """A checkpoint was deleted or was replaced again and again while it was read.

    Retention or another program may have deleted it.
    """


def hold(directory: str) -> int | None:
    """Take a shared lock on a checkpoint's manifest, so that retention does not delete the checkpoint.

    Returns the descriptor of the locked file, or None if there is no manifest to lock. The lock ends when it is closed.
    """
    try:
        fd = open_regular(os.path.join(directory, names.MANIFEST))
    except OSError:
        return None  # the code that reads the manifest reports the error
    if os.name == "posix":
        import fcntl

        with contextlib.suppress(OSError):  # on file systems without locks, read without one
            fcntl.flock(fd, fcntl.LOCK_SH)
    return fd


@contextlib.contextmanager
def held(directory: str) -> Iterator[int | None]:
    """Context manager: `hold` the checkpoint inside."""
    fd = hold(directory)
    try:
        yield fd
    finally:
        if fd is not None:
            os.close(fd)


def has_changed(directory: str, lock: int | None) -> bool:
    """Return whether the directory's manifest is now another file than the one behind `lock`.

    `lock` is None if there was no manifest. Then this first waits a moment for one to appear.
    """
    if lock is None:
        time.sleep(_MOMENT)
    try:
        now = open_regular(os.path.join(directory, names.MANIFEST))
    except OSError:
        return lock is not None
    try:
        return lock is None or not os.path.sameopenfile(lock, now)
    finally:
        os.close(now)


def manifest_of(directory: str) -> Manifest:
    """Return the manifest of a checkpoint.

    Raises `CorruptCheckpoint` if it is damaged. If the path is not a checkpoint, raises `CheckpointError` that says
    what it is.
    """
    try:
        return manifests.read(directory)
    except CorruptCheckpoint:
        if why := places.no_checkpoint(directory):
            raise CheckpointError(why) from None
        raise


def reading(directory: str, look: Callable[[Manifest], _T]) -> _T:
    """Call `look` with the checkpoint's manifest and return its result.

    Retention does not delete the checkpoint meanwhile.

    If another save takes the name, `look` is called again. Raises what `manifest_of` and `look` raise. Raises `Gone`
    instead if the checkpoint was there at first and no longer is.
    """
    seen = False
    for _ in range(_TRIES):
        with held(directory) as lock:
            seen = seen or lock is not None
            try:
                return look(manifest_of(directory))
            except CheckpointError:
                if not has_changed(directory, lock):
                    if seen and not os.path.lexists(directory):
                        break
                    raise
    raise Gone(f"{directory}: is gone: it was deleted or replaced while it was read")
