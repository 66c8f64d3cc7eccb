"""A temporary directory in which files are rendered.

`save_pretrained`, `torch.save` and save hooks can write only to paths.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TypeVar

from .._format import names
from ..errors import WriteError, warn
from ..events import logger

T = TypeVar("T")

_SAID_OF_DISKS = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS))
_TRIAL = 1 << 20  # bytes


class Scratch:
    """The place where one process renders the files of its saves to `root`.

    It is the temporary directory of the system (TMPDIR). If that is missing, full or not writable, the work directory
    of `root` is used from then on, and one warning says so.
    """

    def __init__(self, root: str | None = None) -> None:
        """Without a `root`, only the temporary directory is used."""
        self._root = root
        self._moved = False

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Context manager: let `in_scratch` use this place in this thread."""
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(token)

    def run(self, render: Callable[[str], T]) -> T:
        """See `in_scratch`."""
        if self._root is None:
            return _in_temporary(render)
        if self._moved:
            return _in_work_directory(self._root, render)
        try:
            return _in_temporary(render)
        except _Unusable as unusable:
            why = str(unusable)
        self._moved = True
        work = names.work_directory(self._root)
        warn(f"{why}; files are prepared in {work} instead. Free it, or set TMPDIR to a directory that has room")
        try:
            return _in_work_directory(self._root, render)
        except WriteError as error:
            raise WriteError(f"{why}; {error}") from error


_CURRENT: ContextVar[Scratch] = ContextVar("scratch", default=Scratch())  # noqa: B039  # without a root it never changes


def in_scratch(render: Callable[[str], T]) -> T:
    """Call `render` with an empty directory and return its result. The directory is removed afterwards.

    If the disk of the directory is full or fails otherwise, `render` is called again with another directory. Raises
    what `render` raises, and `WriteError` naming the directories if none can be written.
    """
    return _CURRENT.get().run(render)


class _Unusable(WriteError):
    """The directory could not be made, or its disk failed. What is rendered is not at fault."""


def _in_temporary(render: Callable[[str], T]) -> T:
    where = "the temporary directory"
    try:
        where = tempfile.gettempdir()
        directory = tempfile.mkdtemp(prefix="vembed-ckpt-")
    except OSError as error:
        raise _Unusable(f"{where} cannot be used ({error.strerror or error})") from error
    return _in(directory, where, render)


def _in_work_directory(root: str, render: Callable[[str], T]) -> T:
    """Call `render` with a directory inside the work directory of `root`.

    The directory is locked while this process lives. If the process crashes, the next sweep removes the directory.
    """
    directory = names.scratch_directory(root, os.urandom(16).hex())
    where = os.path.dirname(directory)
    try:
        os.mkdir(directory, 0o700)
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise _Unusable(f"{where} cannot be used ({error.strerror or error})") from error
    try:
        with contextlib.suppress(OSError):  # a file system that cannot lock directories: a sweep may interfere
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return _in(directory, where, render)
    finally:
        os.close(lock)


def _in(directory: str, where: str, render: Callable[[str], T]) -> T:
    try:
        return render(directory)
    except Exception as error:
        why = _fault_of_disk(directory, error)
        if why:
            raise _Unusable(f"{where} cannot be used ({why})") from error
        raise
    finally:
        try:
            shutil.rmtree(directory)
        except FileNotFoundError:
            pass  # another program removed it
        except OSError as error:
            logger.warning("%s could not be removed: %s", directory, error)


def _fault_of_disk(directory: str, error: BaseException) -> str:
    """Return why `directory` cannot be written, if `error` comes from that; else "".

    A writer that is not in Python reports the cause only in the text of its error, or not at all. In the latter case a
    trial write decides.
    """
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        for said in _SAID_OF_DISKS:
            if said in str(link):
                return said
        link = link.__cause__ or link.__context__
    try:
        with open(os.path.join(directory, ".trial"), "wb", buffering=0) as file:
            written = file.write(bytes(_TRIAL))
    except OSError as refused:
        return refused.strerror or str(refused)
    return "" if written == _TRIAL else os.strerror(errno.ENOSPC)
