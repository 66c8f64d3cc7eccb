"""A disk that is full, broken or read-only for a while."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from .._disk.filesystem import Filesystem, LocalFilesystem, RenameMode
from .power_cut import PowerCutFilesystem

_Result = TypeVar("_Result")


@dataclass
class _Fault:
    error: int
    call: str | None
    path: str
    nth: int
    times: int | None
    done: bool


class FailingFilesystem:
    """A disk whose calls fail on request. Otherwise it works like `inner`, by default the real file system.

    `calls` counts the calls by kind: make_directory, create, write, set_buffered, truncate, set_mode, sync, close,
    sync_directory, rename, link, symlink, unlink, remove_directory. `failed` lists the failed ones as (kind, path).
    Thread-safe if `inner` is.
    """

    def __init__(self, inner: Filesystem | None = None) -> None:
        self._inner = inner or LocalFilesystem()
        self.calls: Counter[str] = Counter()
        self.failed: list[tuple[str, str]] = []
        self._lock = threading.Lock()
        self._fault: _Fault | None = None
        self._paths: dict[int, str] = {}

    def fail(
        self,
        error: int,
        call: str | None = None,
        *,
        path: str = "",
        nth: int = 1,
        times: int | None = 1,
        done: bool = False,
    ) -> None:
        """Make calls fail with the errno `error`.

        The fault begins at the `nth` matching call from now. A call matches if its kind is `call` (None: any kind) and
        its path contains `path`. Then that call and the following matching calls fail, `times` in total (None: all
        until `heal`).

        A failing call is not done. With `done` it is done and then reported as failed, as a network file system may do.
        A descriptor is closed in any case. There is one fault at a time: a new one replaces the old one.
        """
        with self._lock:
            self._fault = _Fault(error, call, path, nth, times, done)

    def heal(self) -> None:
        """Let no further call fail."""
        with self._lock:
            self._fault = None

    def _due(self, call: str, path: str) -> _Fault | None:
        with self._lock:
            self.calls[call] += 1
            fault = self._fault
            if fault is None or fault.call not in (None, call) or fault.path not in path:
                return None
            if fault.nth > 1:
                fault.nth -= 1
                return None
            if fault.times is not None:
                fault.times -= 1
                if fault.times == 0:
                    self._fault = None
            self.failed.append((call, path))
            return fault

    def _do(self, call: str, path: str, action: Callable[[], _Result]) -> _Result:
        fault = self._due(call, path)
        if fault is None:
            return action()
        if fault.done:
            action()
        raise OSError(fault.error, os.strerror(fault.error), path)

    def make_directory(self, path: str) -> None:
        self._do("make_directory", path, lambda: self._inner.make_directory(path))

    def create(self, path: str, *, direct: bool) -> int:
        made: list[int] = []
        try:
            self._do("create", path, lambda: made.append(self._inner.create(path, direct=direct)))
        except OSError:
            for fd in made:
                self._inner.close(fd)
            raise
        self._paths[made[0]] = path
        return made[0]

    def write(self, fd: int, data: memoryview, offset: int) -> int:
        return self._do("write", self._paths[fd], lambda: self._inner.write(fd, data, offset))

    def set_buffered(self, fd: int) -> None:
        self._do("set_buffered", self._paths[fd], lambda: self._inner.set_buffered(fd))

    def truncate(self, fd: int, size: int) -> None:
        self._do("truncate", self._paths[fd], lambda: self._inner.truncate(fd, size))

    def set_mode(self, fd: int, mode: int) -> None:
        self._do("set_mode", self._paths[fd], lambda: self._inner.set_mode(fd, mode))

    def sync(self, fd: int) -> None:
        try:
            self._do("sync", self._paths[fd], lambda: self._inner.sync(fd))
        except OSError:
            if isinstance(self._inner, PowerCutFilesystem):
                self._inner.forget(fd)
            raise

    def close(self, fd: int) -> None:
        path = self._paths.pop(fd)
        self._inner.close(fd)
        self._do("close", path, lambda: None)

    def sync_directory(self, path: str) -> None:
        self._do("sync_directory", path, lambda: self._inner.sync_directory(path))

    def rename(self, source: str, target: str, mode: RenameMode) -> None:
        self._do("rename", source, lambda: self._inner.rename(source, target, mode))

    def link(self, source: str, target: str) -> None:
        self._do("link", target, lambda: self._inner.link(source, target))

    def symlink(self, text: str, path: str) -> None:
        self._do("symlink", path, lambda: self._inner.symlink(text, path))

    def unlink(self, path: str) -> None:
        self._do("unlink", path, lambda: self._inner.unlink(path))

    def remove_directory(self, path: str) -> None:
        self._do("remove_directory", path, lambda: self._inner.remove_directory(path))
