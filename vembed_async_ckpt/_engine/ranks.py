"""The ranks of a distributed training: this process among them, and the thread that looks into the job's store for it.

They speak through the job's own store, by polling. No collective ever runs in the background, and the training thread waits for
nobody. What is in the store, all of it under the root's path:

- `here/{rank}`: that the rank has a checkpointer for this root; changes with every call of `save()` there.
- `beat/{rank}`: changes as long as the rank lives.
- `{kind}/{directory}`: the saves of the directory that the first rank began (see `messages.Entry`).
- `{number}/from/{rank}`: what a rank adds to a save, or why it cannot.
- `{number}/said`: what the first rank last said of it; `{number}/seen`: how many ranks have read its end.

The number is the first rank's. Another rank's call belongs to the oldest save of its directory that it has not taken part in
yet (see `following`), so ranks may call a different number of times.
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

_INSTANCES = itertools.count(1)


class Task(Protocol):
    def poll(self) -> bool:
        """Look once into the store; whether there is nothing more to look for."""

    def fail(self, error: CheckpointError) -> None:
        """The store is gone."""


class Ranks:
    """This process among the ranks of its job, for one checkpointer."""

    def __init__(self, store: Any, rank: int, world_size: int, server: Any = None) -> None:
        """`store` is a torch.distributed.Store that no other thread uses; `server`, which may serve the other ranks, is kept
        alive as long."""
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
        """None unless this process belongs to a torch.distributed job of several ranks. Ranks that save together spell the
        root, an absolute path without symbolic links, alike."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return None
        from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

        shared = _get_default_store()
        # torch before 2.8 cannot clone: then the calls, all short, take turns with the training's own.
        own = shared.clone() if hasattr(shared, "clone") else shared
        return cls(PrefixStore(f"vembed_async_ckpt{root}", own), dist.get_rank(), dist.get_world_size(), shared)

    # -- from any thread

    def add(self, task: Task) -> None:
        """Have `task` polled until it is done."""
        with self._changed:
            broken = self._broken
            if broken is None:
                self._tasks.append(task)
                self._changed.notify_all()
        if broken is not None:
            task.fail(broken)

    def tasks(self) -> list[Task]:
        """Those that are not done."""
        with self._changed:
            return list(self._tasks)

    def close(self, timeout: float) -> None:
        """Let the others read what was said last, for at most `timeout` seconds, and end the thread."""
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

    def check(self) -> None:
        """Raise `StageError` if nobody looks into the store any more."""
        if self._tasks and time.monotonic() - self._looked > 2 * patience.PATIENCE:
            raise StageError("the job's store has not answered for a long time; is the first rank's host gone?")

    # -- on the ranks' thread

    def silence(self, rank: int) -> float | None:
        """Seconds since `rank` gave its last sign of life; None if it never gave one."""
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
        """Say that this rank takes part in saving."""
        self.store.set(f"here/{self.rank}", f"{self._sign}{next(self._signs)}")

    def here(self, rank: int) -> bytes | None:
        """The last sign that `rank` takes part in saving; None if it has no checkpointer for this root."""
        name = f"here/{rank}"
        return bytes(self.store.get(name)) if self.store.check([name]) else None

    def _leave(self) -> None:
        """Take back the sign `here`, unless it is that of a later checkpointer of this process."""
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
        """The tasks to be looked after now; None at the end."""
        with self._changed:
            if not self._closing:
                self._changed.wait(patience.POLL if self._tasks else max(0.0, self._next_beat - time.monotonic()))
            elif self._tasks:
                self._changed.wait(patience.POLL)
            return None if self._closing and not self._tasks else list(self._tasks)
