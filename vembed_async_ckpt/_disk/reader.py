"""Reading a checkpoint beside a training that may delete or replace it meanwhile."""

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
_MOMENT = 0.05  # seconds that a directory which made way without an exchange is given to come back


class Gone(CheckpointError):
    """A checkpoint was deleted, by retention or by somebody, or replaced again and again while it was read."""


@contextlib.contextmanager
def held(directory: str) -> Iterator[int | None]:
    """Retention leaves a checkpoint alone while somebody holds a shared lock on its manifest: the file that was locked. None
    if there is no manifest to lock."""
    try:
        fd = open_regular(os.path.join(directory, names.MANIFEST))
    except OSError:
        yield None  # the manifest's own reader says what is wrong
        return
    try:
        if os.name == "posix":
            import fcntl

            with contextlib.suppress(OSError):  # where there are no locks, readers do without
                fcntl.flock(fd, fcntl.LOCK_SH)
        yield fd
    finally:
        os.close(fd)


def has_changed(directory: str, lock: int | None) -> bool:
    """Whether the directory's manifest is another file than the one behind `lock`; where there was none (None), it is given a
    moment to come."""
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
    """The manifest of a checkpoint. Raises `CorruptCheckpoint` if it is damaged, and `CheckpointError` saying what the path is
    if that is no checkpoint."""
    try:
        return manifests.read(directory)
    except CorruptCheckpoint:
        if why := places.no_checkpoint(directory):
            raise CheckpointError(why) from None
        raise


def reading(directory: str, look: Callable[[Manifest], _T]) -> _T:
    """What `look` returns for the checkpoint, which retention leaves alone meanwhile. If another save takes its name, `look` is
    called again.

    Raises what `manifest_of` and `look` raise, and `Gone` instead if the checkpoint was there and is not any more.
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
