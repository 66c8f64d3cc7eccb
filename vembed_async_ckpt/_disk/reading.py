"""Reads parts of files into existing memory: one copy, several reads at once, no mmap."""

from __future__ import annotations

import errno
import io
import os
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from ..errors import CheckpointError, CorruptCheckpoint
from .filesystem import open_regular

READ_BYTES = 2 << 20  # per call, so that the threads end at about the same time
THREADS = 4
# bytes between two parts: up to this gap they are read in one call, with the bytes between them
MAX_GAP = 4096
MAX_BUFFERS = 512  # per call; the system allows 1024

_SEEKING = threading.Lock()


class OpenFile:
    """A regular file that is held open: it is read even if its name is removed or given to another file."""

    def __init__(self, path: str) -> None:
        """Open `path`. Raises `CorruptCheckpoint` if it cannot be opened."""
        self.path = path
        try:
            self.fd = open_regular(path)
        except OSError as error:
            raise CorruptCheckpoint(f"{path}: cannot be read: {error.strerror}") from error
        self.size = os.fstat(self.fd).st_size

    def read(self, count: int, offset: int = 0) -> bytes:
        """Return the `count` bytes from `offset` on. Raises `CorruptCheckpoint` if the file ends before."""
        data = bytearray(count)
        read_into([(self, offset, memoryview(data))])
        return bytes(data)

    def close(self) -> None:
        os.close(self.fd)

    def fill(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers, one after the other, with the bytes from `offset` on.

        Raises as `read_into` does.
        """
        while buffers:
            try:
                count = _preadv(self.fd, buffers, offset)
            except OSError as error:
                if error.errno == errno.EFAULT:
                    raise CheckpointError(
                        f"{self.path}: what is read cannot be written to the memory of a tensor; is it read-only?"
                    ) from error
                raise CorruptCheckpoint(f"{self.path}: cannot be read: {error.strerror}") from error
            if count == 0:
                raise CorruptCheckpoint(f"{self.path}: ends at {offset}; it had {self.size} bytes when it was opened")
            offset += count
            buffers = _behind(buffers, count)


class Fillable(Protocol):
    """A file whose bytes can be read into memory. `path`: its name in errors."""

    @property
    def path(self) -> str: ...

    def fill(self, offset: int, buffers: Sequence[memoryview]) -> None: ...


File = TypeVar("File", bound=Fillable)


@dataclass(frozen=True, slots=True)
class _Read:
    """One read: fills `buffers`, one after the other, with the file's bytes from `offset` on."""

    file: Fillable
    offset: int
    buffers: list[memoryview]


@dataclass(frozen=True, slots=True)
class Tuning:
    """How reads are made. `size`: bytes of one. `gap`: as many bytes between two parts are read along with them."""

    size: int
    gap: int
    threads: int


def read_into(parts: Iterable[tuple[File, int, memoryview]], tuning: Tuning | None = None) -> None:
    """Fill each memory with the bytes of its file from the offset on. `tuning`: None means that for local files.

    Raises `CorruptCheckpoint` that names the file if the system cannot read it or it has become shorter. Some of the
    memory is filled then. When this returns or raises, nothing writes to the memory any more.
    """
    tuning = tuning or Tuning(READ_BYTES, MAX_GAP, THREADS)
    reads = deque(_reads(parts, tuning))
    errors: list[BaseException] = []

    def work() -> None:
        while not errors:
            try:
                read = reads.popleft()
            except IndexError:
                return  # no reads are left
            try:
                read.file.fill(read.offset, read.buffers)
            except BaseException as error:
                errors.append(error)

    helpers: list[threading.Thread] = []
    try:
        for _ in range(min(tuning.threads, len(reads)) - 1):
            helper = threading.Thread(target=work, daemon=True)
            try:
                helper.start()
            except RuntimeError:
                break  # the process may not start more threads: use the ones it has
            helpers.append(helper)
        work()
    finally:
        reads.clear()  # in case this was interrupted
        _join(helpers)
    if errors:
        raise errors[0]


def _join(threads: Iterable[threading.Thread]) -> None:
    """Return when all threads have ended. An exception in between, such as KeyboardInterrupt, is raised only then."""
    interrupt: BaseException | None = None
    for thread in threads:
        while thread.is_alive():
            try:
                thread.join()
            except BaseException as error:
                interrupt = error
    if interrupt is not None:
        raise interrupt


def _reads(parts: Iterable[tuple[File, int, memoryview]], tuning: Tuning) -> Iterable[_Read]:
    """Yield the read calls to make, in the order of the files' bytes."""
    scratch = memoryview(bytearray(tuning.gap))
    read: _Read | None = None
    end = size = 0
    for file, offset, memory in sorted(parts, key=lambda part: (part[0].path, part[1])):
        while len(memory):
            gap = offset - end
            if read is None or read.file is not file or not 0 <= gap <= tuning.gap or size >= tuning.size:
                if read is not None:
                    yield read
                read, size, gap = _Read(file, offset, []), 0, 0
            if gap:
                read.buffers.append(scratch[:gap])
            taken = memory[: tuning.size - size]
            read.buffers.append(taken)
            size += gap + len(taken)
            offset, memory = offset + len(taken), memory[len(taken) :]
            end = offset
            if len(read.buffers) >= MAX_BUFFERS:
                size = tuning.size
    if read is not None:
        yield read


def _behind(buffers: Sequence[memoryview], count: int) -> list[memoryview]:
    """Return the buffers that are left to fill after the first `count` bytes."""
    for n, buffer in enumerate(buffers):
        if count < len(buffer):
            return [buffer[count:], *buffers[n + 1 :]]
        count -= len(buffer)
    return []


def _preadv(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    """Read at `offset`. Return how many bytes were read; zero only at the end of the file."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, buffers, offset)
    with _SEEKING, io.FileIO(fd, closefd=False) as file:  # Windows
        file.seek(offset)
        return file.readinto(buffers[0])
