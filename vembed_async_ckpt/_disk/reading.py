"""Reads parts of files into existing memory: one copy, several reads at once, no mmap."""

from __future__ import annotations

import errno
import io
import os
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class _Read:
    """One read call: fills `buffers`, one after the other, with the file's bytes from `offset` on."""

    file: OpenFile
    offset: int
    buffers: list[memoryview]

    def run(self) -> None:
        offset, buffers = self.offset, self.buffers
        while buffers:
            try:
                count = _preadv(self.file.fd, buffers, offset)
            except OSError as error:
                if error.errno == errno.EFAULT:
                    raise CheckpointError(
                        f"{self.file.path}: what is read cannot be written to the memory of a tensor; is it read-only?"
                    ) from error
                raise CorruptCheckpoint(f"{self.file.path}: cannot be read: {error.strerror}") from error
            if count == 0:
                raise CorruptCheckpoint(
                    f"{self.file.path}: ends at {offset}; it had {self.file.size} bytes when it was opened"
                )
            offset += count
            buffers = _behind(buffers, count)


def read_into(parts: Iterable[tuple[OpenFile, int, memoryview]]) -> None:
    """Fill each memory with the bytes of its file from the offset on.

    Raises `CorruptCheckpoint` that names the file if the system cannot read it or it has become shorter. Some of the
    memory is filled then. When this returns or raises, nothing writes to the memory any more.
    """
    reads = deque(_reads(parts))
    errors: list[BaseException] = []

    def work() -> None:
        while not errors:
            try:
                read = reads.popleft()
            except IndexError:
                return  # no reads are left
            try:
                read.run()
            except BaseException as error:
                errors.append(error)

    helpers: list[threading.Thread] = []
    try:
        for _ in range(min(THREADS, len(reads)) - 1):
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


def _reads(parts: Iterable[tuple[OpenFile, int, memoryview]]) -> Iterable[_Read]:
    """Yield the read calls to make, in the order of the files' bytes."""
    scratch = memoryview(bytearray(MAX_GAP))
    read: _Read | None = None
    end = size = 0
    for file, offset, memory in sorted(parts, key=lambda part: (part[0].path, part[1])):
        while len(memory):
            gap = offset - end
            if read is None or read.file is not file or not 0 <= gap <= MAX_GAP or size >= READ_BYTES:
                if read is not None:
                    yield read
                read, size, gap = _Read(file, offset, []), 0, 0
            if gap:
                read.buffers.append(scratch[:gap])
            taken = memory[: READ_BYTES - size]
            read.buffers.append(taken)
            size += gap + len(taken)
            offset, memory = offset + len(taken), memory[len(taken) :]
            end = offset
            if len(read.buffers) >= MAX_BUFFERS:
                size = READ_BYTES
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
