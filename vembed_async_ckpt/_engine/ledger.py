"""Keeps the record of the saves.

It knows which saves are in flight, how many ended in which way, and which failures nobody has read.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .. import _signals
from ..errors import CheckpointError
from ..handle import SaveHandle
from .messages import RaisedElsewhere
from .options import OnError


class Ledger:
    """The record of one checkpointer's saves. Thread-safe.

    A failure stays on its handle. If nobody reads it there, `raise_unread` raises it once. With `on_error="warn"` it is
    not raised. The failure's event is logged in both cases.
    """

    def __init__(self, on_error: OnError) -> None:
        self._on_error = on_error
        self._changed = threading.Condition()
        # guarded by _changed:
        self._in_flight: set[SaveHandle] = set()
        self._unread: deque[SaveHandle] = deque(maxlen=100)
        self._counts: Counter[str] = Counter()
        self._last_error: str | None = None
        self.newest: Path | None = None  # the checkpoint that became durable last

    def __len__(self) -> int:
        return len(self._in_flight)

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """No save begins or ends inside this context."""
        with self._changed:
            yield

    def begun(self, handle: SaveHandle, allowed: Callable[[], None]) -> None:
        """Record that a save begins. `allowed` raises if no save may begin any more."""
        with self._changed:
            allowed()
            self._in_flight.add(handle)
            self._counts["started"] += 1

    def withdrawn(self, handle: SaveHandle) -> None:
        """Record that `save()` itself raises, so that nobody gets the handle."""
        with self._changed:
            self._in_flight.discard(handle)
            self._counts["failed"] += 1
            self._changed.notify_all()

    def skipped(self, handle: SaveHandle) -> None:
        with self._changed:
            self._in_flight.discard(handle)
            self._counts["started"] -= 1
            self._counts["skipped"] += 1
            self._changed.notify_all()

    def ended(self, handle: SaveHandle, error: CheckpointError | None) -> None:
        with self._changed:
            if handle not in self._in_flight:
                return  # withdrawn
            self._in_flight.discard(handle)
            self._counts["failed" if error else "committed"] += 1
            if error is None:
                self.newest = handle.path
            else:
                self._last_error = str(error)
                if self._on_error == "raise" and not isinstance(error, RaisedElsewhere):
                    self._unread.append(handle)
            self._changed.notify_all()

    def raise_unread(self) -> None:
        """Raise the oldest failure that nobody has read from its handle. Each failure is raised once."""
        with self._changed:
            # each call raises one failure; the next one follows at the next call
            ended = [handle for handle in self._unread if handle.done()]
        for handle in ended:
            with self._changed:
                self._unread.remove(handle)
            error = handle._take_failure()
            if error is not None:
                raise error

    def wait(self, timeout: float | None, busy: Callable[[], bool], alive: Callable[[], None]) -> None:
        """Return when no save is in flight and `busy` returns False.

        Raises TimeoutError after `timeout` seconds. Also raises what `alive` raises, which is called repeatedly. A
        `save()` call that a signal handler has interrupted is not waited for: it cannot end before the handler returns.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        for handle in self.in_flight():
            handle._waited_for(timeout)
        while True:
            with self._changed:
                left = sum(not handle._interrupted() for handle in self._in_flight)
                if not left and not busy():
                    return
                if deadline is not None and time.monotonic() >= deadline:
                    raise TimeoutError(f"{left} saves are still in flight after {timeout} s")
                self._changed.wait(_signals.SLICE if left else 0.01)
            _signals.deliver()
            alive()

    def in_flight(self) -> list[SaveHandle]:
        with self._changed:
            return list(self._in_flight)

    def statistics(self) -> dict[str, Any]:
        with self._changed:
            handles = list(self._in_flight)
            counts = {name: self._counts[name] for name in ("started", "committed", "failed", "skipped")}
            error = self._last_error
        pending = sum(total - written for written, total in (handle.progress for handle in handles))
        return {**counts, "in_flight": len(handles), "bytes_pending": pending, "last_error": error}
