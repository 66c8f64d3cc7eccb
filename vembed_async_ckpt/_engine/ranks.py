"""The ranks of a distributed training: this process among them, and the thread that polls the job's store.

The ranks exchange messages through the job's own store, by polling. No collective ever runs in the background, and the
training thread waits for no other rank. The keys in the store, all under the root's path:

- `here/{rank}`: the rank has a checkpointer for this root. The value changes with every call of `save()` there.
- `beat/{rank}`: changes as long as the rank lives.
- `{kind}/{directory}`: the saves of the directory that the first rank began (see `messages.Entry`).
- `{number}/from/{rank}`: what a rank adds to a save, or why it cannot.
- `{number}/said`: the latest report of the first rank about the save.
- `{number}/seen`: how many ranks have read how the save ended.

The first rank assigns the number. Another rank's call belongs to the oldest save of its directory in which it has not
taken part yet (see `following`). So ranks may call `save()` a different number of times.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from typing import Any, Protocol

import torch.distributed as dist

from .. import _signals
from ..errors import CheckpointError, StageError
from . import patience
from .parking import Parked

_INSTANCES = itertools.count(1)


class Task(Protocol):
    def poll(self) -> bool:
        """Look into the store once. Return True when the task is done."""

    def fail(self, error: CheckpointError) -> None:
        """Called when the store cannot be used any more."""


class Ranks:
    """This process among the ranks of its job, for one checkpointer."""

    def __init__(self, store: Any, rank: int, world_size: int, server: Any = None) -> None:
        """Start the thread.

        `store`: a torch.distributed.Store that no other thread uses. `server`: kept alive as long as this object,
        because it may serve the other ranks.
        """
        self.rank = rank
        self.world_size = world_size
        self.store = store
        self._server = server
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._beats = 0
        self._looked = time.monotonic()
        self._next_beat = 0.0
        self._signs = itertools.count(1)
        self._sign = f"{os.getpid()}-{next(_INSTANCES)}-"
        self._changed = threading.Condition()
        # guarded by _changed:
        self._tasks: list[Task] = []
        self._closing = False
        self._broken: CheckpointError | None = None
        self.called()
        self._thread = threading.Thread(target=self._run, name="vembed-ckpt-ranks", daemon=True)
        self._thread.start()

    @classmethod
    def of_this_process(cls, root: str) -> Ranks | None:
        """Return the ranks of this process's job, or None unless it is a torch.distributed job of several ranks.

        The root is an absolute path without symbolic links. It must be spelled the same on all ranks that save
        together.
        """
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return None
        from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

        shared = _get_default_store()
        # Before 2.8, torch cannot clone a store. Then our calls, which are all short, take turns with the training's
        # own calls.
        own = shared.clone() if hasattr(shared, "clone") else shared
        return cls(PrefixStore(f"vembed_async_ckpt{root}", own), dist.get_rank(), dist.get_world_size(), shared)

    # -- from any thread

    def add(self, task: Task) -> None:
        """Poll `task` until it is done."""
        with self._changed:
            broken = self._broken
            if broken is None:
                self._tasks.append(task)
                self._changed.notify_all()
        if broken is not None:
            task.fail(broken)

    def tasks(self) -> list[Task]:
        """Return the tasks that are not done."""
        with self._changed:
            return list(self._tasks)

    def close(self, timeout: float) -> None:
        """Let the other ranks read the last reports, for at most `timeout` seconds, and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        _signals.join(self._thread, timeout)
        with self._changed:
            left, self._tasks = self._tasks, []
            self._changed.notify_all()
        for task in left:
            task.fail(StageError("the checkpointer was closed before all ranks knew the end of the save"))
        self._thread.join(1.0)

    def park(self) -> bool:
        """Let the thread do nothing any more (see `Supervisor.park`). Returns False if it has ended already."""
        if not self._thread.is_alive():
            return False
        parked = Parked()
        self.add(parked)
        parked.wait()
        return True

    def check(self) -> None:
        """Raise `StageError` if the thread has not looked into the store for a long time."""
        if self._tasks and time.monotonic() - self._looked > 2 * patience.PATIENCE:
            raise StageError("the job's store has not answered for a long time; is the first rank's host gone?")

    # -- on the ranks' thread

    def silence(self, rank: int) -> float | None:
        """Return the seconds since `rank` gave its last sign of life; None if it never gave one."""
        name = f"beat/{rank}"
        now = time.monotonic()
        if not self.store.check([name]):
            return None
        beat = bytes(self.store.get(name))
        known = self._heard.get(rank)
        if known is None or known[0] != beat:
            known = self._heard[rank] = (beat, now)
        return now - known[1]

    def called(self) -> None:
        """Announce that this rank takes part in saving."""
        self.store.set(f"here/{self.rank}", f"{self._sign}{next(self._signs)}")

    def here(self, rank: int) -> bytes | None:
        """Return the last sign that `rank` takes part in saving; None if it has no checkpointer for this root."""
        name = f"here/{rank}"
        return bytes(self.store.get(name)) if self.store.check([name]) else None

    def _leave(self) -> None:
        """Remove this rank's `here` sign, unless a later checkpointer of this process wrote it."""
        if (self.here(self.rank) or b"").startswith(self._sign.encode()):
            self.store.delete_key(f"here/{self.rank}")

    def _run(self) -> None:
        try:
            while (tasks := self._wait()) is not None:
                self._looked = time.monotonic()
                if time.monotonic() >= self._next_beat:
                    self._beats += 1
                    self.store.set(f"beat/{self.rank}", str(self._beats))
                    self._next_beat = time.monotonic() + patience.BEAT
                for task in tasks:
                    if task.poll():
                        with self._changed, contextlib.suppress(ValueError):
                            self._tasks.remove(task)
            self._leave()
        except Exception as error:
            broken = StageError(f"the ranks cannot speak to each other any more: {type(error).__name__}: {error}")
            broken.__cause__ = error
            with self._changed:
                self._broken = broken
                tasks, self._tasks = self._tasks, []
            for task in tasks:
                task.fail(broken)

    def _wait(self) -> list[Task] | None:
        """Wait until it is time to poll. Return the tasks to poll now, or None at the end."""
        with self._changed:
            if not self._closing:
                self._changed.wait(patience.POLL if self._tasks else max(0.0, self._next_beat - time.monotonic()))
            elif self._tasks:
                self._changed.wait(patience.POLL)
            return None if self._closing and not self._tasks else list(self._tasks)
