"""Writes the parts of an arena to files: with O_DIRECT, several writes at once, hashed and checksummed on the way.

The hashing thread reads a file's bytes from memory once, in order. Meanwhile the I/O threads write the chunks before.
The last block is written with padding, the zeros that follow it in the arena. Then the file is truncated to its size.
"""

from __future__ import annotations

import heapq
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import xxhash
from isal import isal_zlib  # three times as fast as zlib; the training may be waiting for this

from .._format.plan import pages
from .._shared.protocol import Checksums, FileSlot
from .filesystem import NO_DIRECT, Filesystem

CHUNK = 16 << 20  # bytes per write
# bytes checksummed and then hashed while in the CPU cache: takes 3/5 of the time of whole chunks, if the GIL is free
STEP = 256 << 10
# writes at once; 4 x 16 MiB reached the disk's own limit, 1 x 16 MiB reached two thirds of it
IN_FLIGHT = 4


class IOThreads:
    """A few daemon threads that run I/O calls. At most `IN_FLIGHT` calls wait or run.

    This is not a ThreadPoolExecutor: the interpreter closes that one before it drains pending saves at exit.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], None], _Batch] | None] = queue.SimpleQueue()
        self._slots = threading.Semaphore(IN_FLIGHT)
        self._threads = [
            threading.Thread(target=self._run, name=f"vembed-ckpt-io-{n}", daemon=True) for n in range(IN_FLIGHT)
        ]
        for thread in self._threads:
            thread.start()

    def batch(self) -> _Batch:
        return _Batch(self)

    def submit(self, call: Callable[[], None], batch: _Batch) -> None:
        self._slots.acquire()
        self._jobs.put((call, batch))

    def close(self) -> None:
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            call, batch = job
            try:
                call()
            except BaseException as error:
                batch.finished(error)
            else:
                batch.finished(None)
            finally:
                self._slots.release()
            del job, call, batch


class _Batch:
    """Calls that are waited for together.

    The first error is kept; after it, no further call of the batch is started.
    """

    def __init__(self, threads: IOThreads) -> None:
        self._threads = threads
        self._changed = threading.Condition()
        self._open = 0
        self._error: BaseException | None = None

    def run(self, call: Callable[[], None]) -> None:
        """Start `call` on an I/O thread. Raises the first error of the batch."""
        with self._changed:
            if self._error is not None:
                raise self._error
            self._open += 1
        self._threads.submit(call, self)

    def finished(self, error: BaseException | None) -> None:
        with self._changed:
            self._open -= 1
            self._error = self._error or error
            self._changed.notify_all()

    def settle(self) -> None:
        """Wait until no call of the batch is running, whether it succeeded or not."""
        with self._changed:
            self._changed.wait_for(lambda: self._open == 0)

    def wait(self) -> None:
        """Wait for all calls. Raises the first error."""
        self.settle()
        if self._error is not None:
            raise self._error


@dataclass
class _Record:
    data: int
    end: int
    local: int
    central: int
    crc: int = 0


class _Crc:
    """Computes the CRC-32 of a zip file's records from its bytes, which come in order, and fills it in."""

    def __init__(self, checksums: Checksums) -> None:
        start = checksums["central_start"]
        self._records = [
            _Record(d, d + size, local, start + central) for d, size, local, central in checksums["records"]
        ]
        self._next = 0
        self._due: list[tuple[int, bytes]] = []  # heap of (position, value) still to be filled in

    def pass_by(self, data: memoryview, begin: int) -> None:
        """Update the sums with `data`, the file's bytes from `begin` on.

        Fill in the sums whose position is in `data`.
        """
        end = begin + len(data)
        while self._next < len(self._records):
            record = self._records[self._next]
            low, high = max(record.data, begin), min(record.end, end)
            if low < high:
                record.crc = isal_zlib.crc32(data[low - begin : high - begin], record.crc)
            if record.end > end:
                break
            for position in (record.local, record.central):
                heapq.heappush(self._due, (position, record.crc.to_bytes(4, "little")))
            self._next += 1
        while self._due and self._due[0][0] < end:
            position, value = heapq.heappop(self._due)
            here = value[: end - position]
            data[position - begin : position - begin + len(here)] = here
            if rest := value[len(here) :]:
                heapq.heappush(self._due, (end, rest))


class FileWriter:
    """One file that is being written. `hash` is complete when all of the file's bytes were passed to `take`."""

    def __init__(self, fs: Filesystem, path: str, slot: FileSlot, checksums: Checksums | None, step: int) -> None:
        """`step`: bytes that are checksummed and hashed at a time."""
        self._fs = fs
        self.path = path
        self.slot = slot
        self.hash = xxhash.xxh3_128()
        self._crc = _Crc(checksums) if checksums else None
        self._step = step
        self._fd, self._direct = self._create()

    def _create(self) -> tuple[int, bool]:
        try:
            return self._fs.create(self.path, direct=True), True
        except OSError as error:
            if error.errno not in NO_DIRECT:
                raise
        return self._fs.create(self.path, direct=False), False

    def take(self, memory: memoryview, begin: int, batch: _Batch, wrote: Callable[[int], None]) -> None:
        """Write `memory`, the file's bytes from `begin` on. At the end of the file it is padded to whole pages."""
        for at in range(0, len(memory), CHUNK):
            padded = memory[at : at + CHUNK]
            self._digest(padded[: self.slot["size"] - begin - at], begin + at)
            batch.run(self._write_call(padded, begin + at, wrote))

    def _digest(self, data: memoryview, begin: int) -> None:
        for at in range(0, len(data), self._step):
            step = data[at : at + self._step]
            if self._crc is not None:
                self._crc.pass_by(step, begin + at)
            self.hash.update(step)

    def _write_call(self, data: memoryview, offset: int, wrote: Callable[[int], None]) -> Callable[[], None]:
        return lambda: self._write(data, offset, wrote)

    def _write(self, data: memoryview, offset: int, wrote: Callable[[int], None]) -> None:
        done = 0
        fell_back = not self._direct
        while done < len(data):
            try:
                count = self._fs.write(self._fd, data[done:], offset + done)
            except OSError as error:
                if error.errno not in NO_DIRECT or fell_back:
                    raise
                self._fs.set_buffered(self._fd)  # some file systems accept the flag and refuse the write
                fell_back = True
                continue
            done += count
            wrote(count)

    def finish(self) -> None:
        """Remove the padding, sync and close. When this returns, the file survives a power cut."""
        self._fs.truncate(self._fd, self.slot["size"])
        self._fs.sync(self._fd)
        self.close()

    def close(self) -> None:
        """Close without any guarantee. May be called again."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            self._fs.close(fd)

    def abandon(self) -> None:
        """Close and ignore an error: either nothing depends on the file any more, or it is closed already."""
        try:
            self.close()
        except OSError:
            pass  # the earlier error is the one to report


def part_of(slot: FileSlot, start: int, end: int) -> tuple[int, int]:
    """Return the part of a file that is in the plan's range [start, end).

    The result is (from, to) in bytes from the file's start, in whole pages.
    """
    return max(start - slot["start"], 0), min(end - slot["start"], pages(slot["size"]))


def write_range(
    writers: Sequence[FileWriter],
    memory: memoryview,
    start: int,
    end: int,
    base: int,
    threads: IOThreads,
    wrote: Callable[[int], None],
) -> None:
    """Write the plan's range [start, end) to the files it belongs to. In `memory` the range starts at `base`.

    Returns when the system has taken every byte (not synced yet). Raises the first OSError, but only after every write
    in flight has ended: afterwards nothing reads the arena any more.
    """
    batch = threads.batch()
    try:
        for writer in writers:
            low, high = part_of(writer.slot, start, end)
            if low < high:
                at = base + writer.slot["start"] + low - start
                writer.take(memory[at : at + high - low], low, batch, wrote)
        batch.wait()
    finally:
        batch.settle()


def sync_all(writers: Sequence[FileWriter], threads: IOThreads) -> None:
    """Finish every file, with several syncs at once. A failed sync is never retried on the same file."""
    batch = threads.batch()
    try:
        for writer in writers:
            batch.run(writer.finish)
        batch.wait()
    finally:
        batch.settle()
