"""The real server in a thread of the test's process, on any `Filesystem`: milliseconds a save, so thousands of faults can be tried.

What a save answers is what the trainer would be told; who the trainer is, the server cannot tell.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from vembed_async_ckpt._disk import deletion as removal
from vembed_async_ckpt._disk.filesystem import Filesystem, LocalFilesystem, RenameMode
from vembed_async_ckpt._disk.lock import RootLock
from vembed_async_ckpt._memory.arena import Arena
from vembed_async_ckpt._shared.protocol import Command, Kind, ReplyReader, send_command
from vembed_async_ckpt._writer import server

from . import checks
from .victims import place

PATIENCE = 20.0  # seconds for a save of some kilobytes
_ARENA = 128 << 10


class Hasty(LocalFilesystem):
    """A disk that is trusted, where nothing is looked at but what a recovery does: syncing would only take time."""

    def create(self, path: str, *, direct: bool) -> int:
        return super().create(path, direct=False)

    def sync(self, fd: int) -> None: ...

    def sync_directory(self, path: str) -> None: ...


def without_exchange(base: type[LocalFilesystem]) -> type[LocalFilesystem]:
    """NFS and FUSE: a rename is a rename, and a file somebody else made gets no second name."""

    class Primitive(base):  # type: ignore[misc, valid-type]
        def rename(self, source: str, target: str, mode: RenameMode) -> None:
            if mode != "plain":
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), source)
            super().rename(source, target, mode)

        def link(self, source: str, target: str) -> None:
            if not os.path.basename(os.path.dirname(source)).startswith("work-"):
                raise OSError(errno.EPERM, os.strerror(errno.EPERM), source)
            super().link(source, target)

    return Primitive


@dataclass
class Outcome:
    """How a save ended: `acknowledged`, or with `errors`; and what else was said."""

    acknowledged: bool = False
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class _KeptLock(RootLock):
    """Leaves lock file and work directory, as a process that is killed does."""

    def clear(self) -> None: ...


class Writer:
    """A writer on `root`; `ready` is the first it said, what it swept. Use as a context manager."""

    def __init__(self, root: str, fs: Filesystem) -> None:
        lock = _KeptLock.acquire(root)
        self._arena = Arena(1, _ARENA)
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(PATIENCE)
        self._thread = threading.Thread(target=server.serve, args=(theirs, lock, fs, None), daemon=True)
        self._thread.start()
        self._replies = ReplyReader()
        self._received: list[dict[str, Any]] = []
        send_command(self._sock, Command(Kind.ARENA, 1, self._arena.size), (self._arena.fd,))
        self.ready = self._wait_for("ready")

    def save(self, n: int, step: int, keep: int, ship: Sequence[dict[str, Any]] = ()) -> Outcome:
        """Make save `n`; returns when it has ended and all that follows it too. `ship`: where it is to be shipped."""
        offset, length = place(self._arena, n, step, keep, ship)
        send_command(self._sock, Command(Kind.JOB, 1, n, offset, length))
        outcome = Outcome()
        while True:
            reply = self._next()
            if reply["event"] == "committed":
                outcome.acknowledged = True
            elif reply["event"] == "failed":
                outcome.errors.append(reply["message"])
                return outcome
            elif reply["event"] == "warning":
                outcome.warnings.append(reply["message"])
                if outcome.acknowledged:
                    return outcome
            elif reply["event"] == "tidy":
                return outcome

    def _wait_for(self, event: str) -> dict[str, Any]:
        while (reply := self._next())["event"] != event:
            pass
        return reply

    def _next(self) -> dict[str, Any]:
        while not self._received:
            data = self._sock.recv(1 << 16)
            assert data, "the server ended"
            self._received += self._replies.feed(data)
        return self._received.pop(0)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.shutdown(socket.SHUT_WR)
        self._thread.join(PATIENCE)
        self._sock.close()
        self._arena.close()
        assert not self._thread.is_alive(), "the server did not end"


def next_start(root: str, keep: int) -> Iterator[str]:
    """Violations of I5, as `checks.next_start` finds them."""
    with Writer(root, Hasty()) as writer:
        yield from recovered(writer, keep)
    yield from checks.after_next_save(root, keep)
    yield from (f"I5: the start after that had to do: {line}" for line in removal.sweep(Hasty(), root))


def recovered(writer: Writer, keep: int) -> Iterator[str]:
    if "error" in writer.ready:
        yield f"I5: {writer.ready['error']}"
    yield from (f"I5: {line}" for line in writer.ready["swept"] if not checks.EXPECTED.search(line))
    outcome = writer.save(checks.NEXT, checks.NEXT, keep)
    if not outcome.acknowledged or outcome.errors or outcome.warnings:
        yield f"I5, I6: the next save: {outcome}"


@contextmanager
def no_other_threads() -> Iterator[None]:
    """Every thread that was started inside has ended."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(PATIENCE)
        assert not thread.is_alive(), thread
