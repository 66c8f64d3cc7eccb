"""Disks that fail on purpose, to test how your training reacts when its disk fails.

    disk = PowerCutFilesystem(root)
    with use_filesystem(disk):
        checkpointer = AsyncCheckpointer(root, writer="thread", retention=KeepLast(2))
    checkpointer.save(1, model=model).result()
    disk.after(9)                                               # the power fails at the ninth call from now
    assert checkpointer.save(2, model=model).exception() is not None
    checkpointer.close()
    latest(disk.image(tmp_path / "reboot"))                     # checkpoint-1 or checkpoint-2, complete

`FailingFilesystem` is a disk that is full, broken or read-only for a while. It shows what your callbacks and your
retention do then. Both work with `writer="thread"` only: a writer process uses the real file system.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from .._disk.filesystem import FILESYSTEM_OVERRIDE, Filesystem, LocalFilesystem
from .failing import FailingFilesystem
from .power_cut import Change, Choose, Fate, PowerCutFilesystem, at_random, kept, lost, names_only

__all__ = [
    "use_filesystem",
    "PowerCutFilesystem",
    "FailingFilesystem",
    "Change",
    "Choose",
    "Fate",
    "lost",
    "kept",
    "names_only",
    "at_random",
    "Filesystem",
    "LocalFilesystem",
]


@contextlib.contextmanager
def use_filesystem(filesystem: Filesystem) -> Iterator[None]:
    """Let checkpointers made inside the block write through `filesystem`, for their whole life.

    They must have `writer="thread"`; otherwise their constructor raises ValueError.
    """
    token = FILESYSTEM_OVERRIDE.set(filesystem)
    try:
        yield
    finally:
        FILESYSTEM_OVERRIDE.reset(token)
