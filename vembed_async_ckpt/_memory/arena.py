"""Arenas and the pool that owns them. The pool alone limits how many saves are in flight.

An arena is a memfd, so the writer process can map the same pages. The size of /dev/shm does not limit it, and the
kernel frees it when the last process that holds it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .. import _signals
from .._shared.memory import MEMFD, address_of, map_arena
from ..errors import StageError

_F_ADD_SEALS, _F_SEAL_SHRINK, _F_SEAL_GROW = 1033, 2, 4  # linux/fcntl.h
_ROUND = 2 << 20  # one huge page
_PIN_TRIES = 3
_MAX_PINNED_PARTS = 256  # each costs a call; more are pinned as one part from the first to the last


class Arena:
    """`size` bytes of shared memory.

    `image`: the plan that is laid out in the memory now (`_engine.images.Image`), or None.
    `own`: [first byte, end] of each part into which this process copies from a device; None if it may be all of it.
    """

    def __init__(self, number: int, size: int, fd: int | None = None) -> None:
        """`fd`: the memory, if another process made it; it is closed with the arena.

        Raises OSError or ValueError if the memory cannot be had.
        """
        self.number = number
        self.size = size
        self.fd = os.memfd_create(MEMFD, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING) if fd is None else fd
        try:
            if fd is None:
                os.ftruncate(self.fd, size)
                # A sealed size: no process can shrink the file and make the other's mapping fault (SIGBUS).
                with contextlib.suppress(OSError):  # only a precaution, and a sandbox may refuse it
                    fcntl.fcntl(self.fd, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW)
            elif os.fstat(fd).st_size < size:
                raise ValueError(f"shared memory of {os.fstat(fd).st_size} bytes, not {size}")
            self.memory: mmap.mmap = map_arena(self.fd, size)
        except BaseException:
            os.close(self.fd)
            raise
        self.address = address_of(self.memory)
        self.image: Any = None
        self.own: Sequence[tuple[int, int]] | None = None
        self._pinning = threading.Lock()
        self._pinned: list[tuple[int, int]] = []
        self._pin_tries = 0

    def write(self, start: int, data: bytes) -> None:
        """Write `data` at offset `start`."""
        self.memory[start : start + len(data)] = data

    def clear(self, start: int, end: int) -> None:
        """Zero the bytes from `start` to `end`."""
        ctypes.memset(self.address + start, 0, end - start)

    def pin(self) -> None:
        """Pin the memory for CUDA devices, so that they copy into it by DMA.

        Only the `own` parts are pinned, and only if they are not yet, because it takes as long as faulting the pages in.
        If it fails, as it does while a CUDA graph is recorded, the next save tries again, three times in all. No copy may
        run while `own` changes.
        """
        from . import pinning  # it imports torch, which only a training with a device needs here

        wanted = [(0, self.size)] if self.own is None else whole_pages(self.own, self.size)
        with self._pinning:
            if wanted == self._pinned or self._pin_tries >= _PIN_TRIES or self.fd < 0 or not pinning.can_pin():
                return
            # A copy must lie in one pinned part, so parts that grow together are pinned anew.
            self._unpin([part for part in self._pinned if part not in wanted])
            for part in wanted:
                if part not in self._pinned:
                    if not pinning.pin(self.address + part[0], part[1] - part[0]):
                        self._pin_tries += 1
                        return
                    self._pinned.append(part)
            self._pinned.sort()

    def _unpin(self, parts: Sequence[tuple[int, int]]) -> None:
        if parts:
            from . import pinning

            for part in parts:
                pinning.unpin(self.address + part[0])
                self._pinned.remove(part)

    def forget(self) -> None:
        """In a forked child: drop the memory, which belongs to the parent.

        Its descriptors are closed already (see `map_arena`).
        """
        self.fd = -1
        self._pinned = []
        self._pinning = threading.Lock()  # a thread of the parent may have held the old one
        self.close()

    def close(self) -> None:
        """Unpin the memory and close the descriptor. The memory is freed when its last view is gone."""
        self.image = None
        with self._pinning:  # otherwise another thread could pin the memory after this and never unpin it
            self._unpin(list(self._pinned))
            if self.fd >= 0:
                os.close(self.fd)
                self.fd = -1


def whole_pages(parts: Sequence[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """Return the pages of `parts`, as few parts in ascending order of which no two touch. `size`: where the memory ends."""
    pages: list[tuple[int, int]] = []
    for start, end in sorted(parts):
        start -= start % mmap.PAGESIZE
        end = min(end // -mmap.PAGESIZE * -mmap.PAGESIZE, size)
        if pages and start <= pages[-1][1]:
            pages[-1] = (pages[-1][0], max(end, pages[-1][1]))
        elif start < end:
            pages.append((start, end))
    return [(pages[0][0], pages[-1][1])] if len(pages) > _MAX_PINNED_PARTS else pages


class ArenaPool:
    """At most `count` arenas, with at most `max_bytes` together.

    If `max_bytes` is None, the limit is the memory that the machine and its cgroup have left. `added` and `dropped` are
    called with each arena that is made or dropped. They must not block.
    """

    def __init__(
        self, count: int, max_bytes: int | None, added: Callable[[Arena], None], dropped: Callable[[Arena], None]
    ) -> None:
        self._count = count
        self._max_bytes = max_bytes
        self._added = added
        self._dropped = dropped
        self._changed = threading.Condition()
        self._free: list[Arena] = []
        self._busy: list[Arena] = []
        self._kept: list[Arena] = []
        self._retired: list[Arena] = []
        self.pinned = False  # whether arenas will be pinned; the machine cannot swap out pinned memory
        self._numbers: Iterator[int] = iter(range(1, 1 << 31))

    def limit(self) -> int:
        """Return how many bytes one arena may have now if the free arenas were dropped."""
        with self._changed:
            held = sum(arena.size for arena in self._free)
            busy = sum(arena.size for arena in (*self._busy, *self._retired))
        # Take only a part of what is left, because the training goes on allocating.
        room = (available_memory() + held) * (6 if self.pinned else 9) // 10
        if self._max_bytes is not None:
            room = min(room, self._max_bytes - busy)
        return max(room, 0) // mmap.PAGESIZE * mmap.PAGESIZE

    def acquire(self, capacity: int) -> Arena | None:
        """Return a free arena of at least `capacity` bytes, or None while all are busy. Give it back with `release`.

        If that much memory cannot be had, the arena is the largest one allowed. Raises `StageError` if the machine
        gives no memory at all.
        """
        with self._changed:
            fitting = sorted((a for a in self._free if a.size >= capacity), key=lambda a: a.size)
            if fitting:
                return self._take(fitting[0])
            return self._make(capacity) if self._free or len(self._busy) < self._count else None

    def wait(self, capacity: int, alive: Callable[[], None]) -> Arena:
        """Like `acquire`, but wait while all arenas are busy.

        The wait calls `alive` repeatedly and delivers signals that are held back. `alive` must raise if no arena will
        ever be given back. Raises what `acquire`, `alive` and the signal handlers raise.
        """
        while (arena := self.acquire(capacity)) is None:
            with self._changed:
                self._changed.wait(_signals.SLICE)
            _signals.deliver()
            alive()
        return arena

    def _make(self, capacity: int) -> Arena | None:
        """Return a new arena, or None while a save in flight holds the memory for it."""
        size = -(-capacity // _ROUND) * _ROUND
        allowed = self.limit()
        if self._busy and self._max_bytes is None:
            allowed //= 2  # a second arena only shortens a wait; it must not bring the training near the memory limit
        if capacity <= allowed < size:
            size = capacity // -mmap.PAGESIZE * -mmap.PAGESIZE
        if size > allowed:
            if self._busy:
                return None
            size = allowed
            for arena in self._free:
                if arena.size >= size * 9 // 10:
                    return self._take(arena)
        for arena in sorted(self._free, key=lambda arena: arena.size):
            # The free arenas are too small. Drop as many as the limits on number and bytes require.
            held = sum(other.size for other in (*self._free, *self._busy))
            if len(self._free) + len(self._busy) >= self._count or (self._max_bytes and held + size > self._max_bytes):
                self._drop(arena)
        try:
            arena = Arena(next(self._numbers), max(size, mmap.PAGESIZE))
        except (MemoryError, OSError) as error:
            raise StageError(f"no host memory for {size} bytes of state: {error}") from error
        self._added(arena)
        self._busy.append(arena)
        return arena

    def _take(self, arena: Arena) -> Arena:
        self._free.remove(arena)
        self._busy.append(arena)
        return arena

    def _drop(self, arena: Arena) -> None:
        self._free.remove(arena)
        self._dropped(arena)
        arena.close()

    def release(self, arena: Arena) -> None:
        """Give an arena back. A save that waits for one continues."""
        with self._changed:
            if arena in self._busy:
                self._busy.remove(arena)
                self._free.append(arena)
            elif arena in self._retired:
                self._retired.remove(arena)
                self._free.append(arena)
                if len(self._free) + len(self._busy) > self._count:
                    self._drop(arena)
            self._changed.notify_all()

    def retire(self, arena: Arena) -> None:
        """Do not use this arena, and do not count it, until `release`: another process may still write to it."""
        with self._changed:
            if arena in self._busy:
                self._busy.remove(arena)
                self._retired.append(arena)
            self._changed.notify_all()

    def keep_for_ever(self, arena: Arena) -> None:
        """Never reuse or free this arena: a device that does not answer may still write to it."""
        with self._changed:
            if arena in self._busy:
                self._busy.remove(arena)
                self._kept.append(arena)
                self._dropped(arena)
            self._changed.notify_all()

    def arenas(self) -> list[Arena]:
        """Return all arenas that a save may use now or later. A new writer needs them."""
        with self._changed:
            return [*self._free, *self._busy, *self._retired]

    def statistics(self) -> dict[str, int]:
        with self._changed:
            return {
                "arenas_free": len(self._free),
                "arenas_busy": len(self._busy),
                "host_bytes": sum(arena.size for arena in (*self._free, *self._busy, *self._retired)),
            }

    def forget(self) -> None:
        """In a forked child: drop every arena and touch nothing else."""
        for arena in (*self._free, *self._busy, *self._retired):
            arena.forget()

    def close(self) -> None:
        """Close every arena, whether it is in use or not."""
        with self._changed:
            for arena in (*self._free, *self._busy, *self._retired):
                arena.close()
            self._free, self._busy, self._retired = [], [], []


def available_memory() -> int:
    """Return how many bytes can be allocated without swapping.

    This respects the machine and every memory cgroup above this process.
    """
    room = _meminfo_available()
    for limit, usage in _cgroup_limits():
        room = min(room, limit - usage)
    return room


def _meminfo_available() -> int:
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return 1 << 62  # kernels before 3.14 do not report it: assume no limit


def _cgroup_limits() -> Iterator[tuple[int, int]]:
    """Yield (limit, usage) in bytes for the memory cgroups of this process, version 1 and 2.

    The usage does not count reclaimable file cache.
    """
    try:
        with open("/proc/self/cgroup") as file:
            groups = [line.rstrip("\n").split(":", 2) for line in file]
    except OSError:
        return
    for _, controllers, path in groups:
        if controllers == "":
            base, limit_name, usage_name = "/sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, limit_name, usage_name = "/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts), -1, -1):
            group = os.path.join(base, *parts[:depth])
            limit, usage = _number(group, limit_name), _number(group, usage_name)
            if limit is not None and usage is not None and limit < 1 << 60:
                yield limit, usage - _file_cache(group)


def _number(group: str, name: str) -> int | None:
    try:
        with open(os.path.join(group, name)) as file:
            return int(file.read())
    except (OSError, ValueError):  # no such cgroup here, or no limit ("max")
        return None


def _file_cache(group: str) -> int:
    try:
        with open(os.path.join(group, "memory.stat")) as file:
            fields = dict(line.split() for line in file)
    except (OSError, ValueError):
        return 0
    return int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))
