"""The checkpointers that the integrations make: one for each directory of checkpoints. They are drained together."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Collection
from typing import Any

from .. import _signals
from .._engine.session import EXIT_DEADLINE, open_sessions
from ..checkpointer import AsyncCheckpointer
from ..errors import CommitError
from ..handle import SaveHandle, SaveState
from ..sinks import SaveFigures

_SHARED: dict[str, tuple[AsyncCheckpointer, dict[str, Any]]] = {}  # by root, with the options of each
_LOCK = threading.RLock()  # reentrant: a signal handler may save while the same thread holds it


@_signals.held()
def shared(root: str, options: dict[str, Any] | None = None) -> AsyncCheckpointer:
    """Return the open checkpointer of `root`, made with `options` (None: with any options).

    One that was made with other options is drained and closed first. If memory allows, two saves may be under way,
    because training loops may save a step and an epoch back to back. Raises what `AsyncCheckpointer` raises.
    """
    with _LOCK:
        known, made_with = _SHARED.get(root, (None, {}))
        if known is not None and not known.closed and (options is None or options == made_with):
            return known
    if known is not None:
        known.close()  # not under the lock, because it waits
    with _LOCK:
        known, _ = _SHARED.get(root, (None, {}))
        if known is None or known.closed:
            known = AsyncCheckpointer(root, **{"max_in_flight": 2, **(options or {})})
            _SHARED[root] = known, options or {}
        return known


def figures_of(handle: SaveHandle) -> SaveFigures:
    """Return the cost and the figures of a save that has ended."""
    if handle.state is not SaveState.COMMITTED:
        return SaveFigures(handle.step, 0.0, True, 0.0, 0, 0.0, time.time())
    info = handle.result(0)
    timings = info.timings
    rate = info.total_bytes / max(timings.write + timings.commit, 1e-9)
    return SaveFigures(handle.step, timings.stall, False, timings.durable, info.total_bytes, rate, time.time())


@_signals.held()
def open_at(root: str) -> AsyncCheckpointer | None:
    """Return the checkpointer of `root`, or None if none is open."""
    with _LOCK:
        known, _ = _SHARED.get(root, (None, {}))
        return None if known is None or known.closed else known


def wait_for_all(root: str) -> None:
    """Wait until no save to `root` is in flight, from any checkpointer of this process.

    Failures stay on their handles.
    """
    for session in open_sessions():
        if session.options.root == root:
            session.wait(EXIT_DEADLINE)


def wait_for(path: str) -> None:
    """Wait until no save of the checkpoint `path` is in flight, like `wait_for_all`."""
    for session in open_sessions():
        if any(os.fspath(handle.path) == path for handle in session.in_flight()):
            session.wait(EXIT_DEADLINE)


def refuse_to_delete(root: str) -> None:
    """Raise `CommitError` unless this process saves to `root` and still holds its lock."""
    for session in open_sessions():
        if session.options.root == root:
            session.refuse_to_delete()
            return
    raise CommitError("this process does not save there any more, so nothing is deleted")


def close_shared(timeout: float = EXIT_DEADLINE, roots: Collection[str] | None = None) -> None:
    """Drain and close the checkpointers of `roots` (None: all of them). Raises a failure after all are closed."""
    with _signals.held(), _LOCK:
        chosen = [root for root in _SHARED if roots is None or root in roots]
        checkpointers = [_SHARED.pop(root)[0] for root in chosen]
    failures: list[Exception] = []
    for checkpointer in checkpointers:
        try:
            checkpointer.close(timeout)
        except Exception as error:
            failures.append(error)
    if failures:
        raise failures[0]
