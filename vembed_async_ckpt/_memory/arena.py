"""Arenas and their pool, the only limiter of how much is in flight.

An arena is a memfd, so the writer process maps the very same pages; it is not bound by the size of /dev/shm, and it vanishes
with the last process that has it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

from .. import _signals
from .._shared.memory import MEMFD, address_of, map_arena
from ..errors import StageError

_F_ADD_SEALS, _F_SEAL_SHRINK, _F_SEAL_GROW = 1033, 2, 4  # linux/fcntl.h
_ROUND = 2 << 20  # one huge page
_PIN_TRIES = 3


class Arena:
    """`size` bytes of shared memory. `image` is the plan whose headers are in it now, with what was made for it."""

    def __init__(self, number: int, size: int) -> None:
        self.number = number
        self.size = size
        self.fd = os.memfd_create(MEMFD, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, size)
            # With its size sealed, no process can make the other's mapping fault (SIGBUS).
            with contextlib.suppress(OSError):  # a precaution, which a sandbox may refuse
                fcntl.fcntl(self.fd, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW)
            self.memory: mmap.mmap = map_arena(self.fd, size)
        except BaseException:
            os.close(self.fd)
            raise
        self.address = address_of(self.memory)
        self.image: Any = None
        self._pinning = threading.Lock()
        self._pinned = False
        self._pin_tries = 0

    def write(self, start: int, data: bytes) -> None:
        """Put `data` at `start`."""
        self.memory[start : start + len(data)] = data

    def clear(self, start: int, end: int) -> None:
        """Zero the range."""
        ctypes.memset(self.address + start, 0, end - start)

    def pin(self) -> None:
        """Have CUDA devices copy into it by themselves; once, as it takes as long as faulting the pages in. What failed, as it does
        while a graph is recorded, is tried again by the next save."""
        from . import pinning  # torch: only whoever has used a device needs it

        with self._pinning:
            if not self._pinned and self._pin_tries < _PIN_TRIES and self.fd >= 0 and pinning.can_pin():
                self._pin_tries += 1
                self._pinned = pinning.pin(self.address, self.size)

    def forget(self) -> None:
        """In a forked child: the memory is the parent's, its descriptors are closed (see `map_arena`)."""
        self.fd = -1
        self._pinned = False
        self._pinning = threading.Lock()  # that of the parent may have been held
        self.close()

    def close(self) -> None:
        """Give the memory back once the last view of it is gone."""
        self.image = None
        with self._pinning:  # else it could be pinned after this, for ever
            if self._pinned:
                from . import pinning

                pinning.unpin(self.address)
                self._pinned = False
            if self.fd >= 0:
                os.close(self.fd)
                self.fd = -1


class ArenaPool:
    """At most `count` arenas, together at most `max_bytes` (None: what the machine and its cgroup have left).

    `added` and `dropped` are told of arenas that come and go; they must not block.
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
        self.pinned = False  # arenas will be pinned, so that the machine cannot swap them out
        self._numbers: Iterator[int] = iter(range(1, 1 << 31))

    def limit(self) -> int:
        """Bytes that one arena may have at this moment, were the free ones given back."""
        with self._changed:
            held = sum(arena.size for arena in self._free)
            busy = sum(arena.size for arena in self._busy)
        # Training goes on allocating: not all that is left is ours.
        room = (available_memory() + held) * (6 if self.pinned else 9) // 10
        if self._max_bytes is not None:
            room = min(room, self._max_bytes - busy)
        return max(room, 0) // mmap.PAGESIZE * mmap.PAGESIZE

    def acquire(self, capacity: int) -> Arena | None:
        """A free arena of at least `capacity` bytes, or the largest one allowed if that much memory cannot be had; None while all
        are busy. The caller gives it back with `release`. Raises `StageError` if the machine gives no memory at all."""
        with self._changed:
            fitting = sorted((a for a in self._free if a.size >= capacity), key=lambda a: a.size)
            if fitting:
                return self._take(fitting[0])
            return self._make(capacity) if self._free or len(self._busy) < self._count else None

    def wait(self, capacity: int, alive: Callable[[], None]) -> Arena:
        """The same, but waits while all are busy. Calls `alive` again and again, which raises if nothing will ever be given back,
        and delivers signals that are held back. Raises what `acquire`, `alive` and the signals' handlers raise."""
        while (arena := self.acquire(capacity)) is None:
            with self._changed:
                self._changed.wait(_signals.SLICE)
            _signals.deliver()
            alive()
        return arena

    def _make(self, capacity: int) -> Arena | None:
        """A new arena, or None while memory for it is held by a save in flight."""
        size = -(-capacity // _ROUND) * _ROUND
        allowed = self.limit()
        if self._busy and self._max_bytes is None:
            allowed //= 2  # a further one: it shortens a wait, and must not bring the training near the machine's limit
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
            # The free ones are too small: they go as far as their number or their bytes stand in the way.
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
        """Give an arena back; a save waiting for one goes on."""
        with self._changed:
            if arena in self._busy:
                self._busy.remove(arena)
                self._free.append(arena)
            self._changed.notify_all()

    def keep_for_ever(self, arena: Arena) -> None:
        """Neither give an arena out again nor its memory back: a device that does not answer may still write to it."""
        with self._changed:
            if arena in self._busy:
                self._busy.remove(arena)
                self._kept.append(arena)
                self._dropped(arena)
            self._changed.notify_all()

    def arenas(self) -> list[Arena]:
        """All arenas there are, for a new writer."""
        with self._changed:
            return [*self._free, *self._busy]

    def statistics(self) -> dict[str, int]:
        with self._changed:
            return {
                "arenas_free": len(self._free),
                "arenas_busy": len(self._busy),
                "host_bytes": sum(arena.size for arena in (*self._free, *self._busy)),
            }

    def forget(self) -> None:
        """In a forked child: close the descriptors and touch nothing else."""
        for arena in (*self._free, *self._busy):
            arena.forget()

    def close(self) -> None:
        """Close every arena, free or not."""
        with self._changed:
            for arena in (*self._free, *self._busy):
                arena.close()
            self._free, self._busy = [], []


def available_memory() -> int:
    """Bytes that can still be taken without swapping: of the machine and of every memory cgroup above this process."""
    room = _meminfo_available()
    for limit, usage in _cgroup_limits():
        room = min(room, limit - usage)
    return room


def _meminfo_available() -> int:
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return 1 << 62  # kernels before 3.14 do not say; nothing to go by


def _cgroup_limits() -> Iterator[tuple[int, int]]:
    """(limit, usage without reclaimable file cache) of the memory cgroups of this process, version 1 and 2."""
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
    except (OSError, ValueError):  # no such group here, or "max"
        return None


def _file_cache(group: str) -> int:
    try:
        with open(os.path.join(group, "memory.stat")) as file:
            fields = dict(line.split() for line in file)
    except (OSError, ValueError):
        return 0
    return int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))
