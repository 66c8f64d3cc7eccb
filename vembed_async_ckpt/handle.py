"""The handle that `save()` returns.

It tells the state and the outcome of a save, and can wait for it with a deadline.
"""

from __future__ import annotations

import enum
import os
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import anyio

from . import _signals
from ._bell import Bell
from ._frozen import FrozenDict
from .errors import CheckpointError


class SaveState(enum.Enum):
    """The state of a save.

    STAGING -> STAGED -> WRITING -> COMMITTED. Each of the first three may become FAILED. WRITING -> STAGED if the
    writer died and a new one gets the job. STAGING -> COMMITTED if the state passed through a small arena in parts.
    SKIPPED is the only state of a save that `when_busy="skip"` refused; on ranks that do not write, it comes after
    STAGING.
    """

    STAGING = "staging"
    STAGED = "staged"
    WRITING = "writing"
    COMMITTED = "committed"
    FAILED = "failed"
    SKIPPED = "skipped"


_MOVES = {
    SaveState.STAGING: {SaveState.STAGED, SaveState.COMMITTED, SaveState.FAILED, SaveState.SKIPPED},
    SaveState.STAGED: {SaveState.WRITING, SaveState.COMMITTED, SaveState.FAILED},
    SaveState.WRITING: {SaveState.STAGED, SaveState.COMMITTED, SaveState.FAILED},
    SaveState.COMMITTED: set(),
    SaveState.FAILED: set(),
    SaveState.SKIPPED: set(),
}
_ENDS = {SaveState.COMMITTED, SaveState.FAILED, SaveState.SKIPPED}


@dataclass(frozen=True, slots=True)
class Timings:
    """How long the parts of a save took, in seconds.

    - `stall`: all that the training thread lost: `save()` itself with any wait for a free arena, and steps held up by
      the copy.
    - `staging`: from the start of the copy to its end.
    - `queued`: from staged to the first write.
    - `write`: writing, hashing and syncing the files.
    - `commit`: manifest, syncs, rename.
    - `durable`: from the call until the checkpoint is durable.
    - `held`: how long the training's device waited for the copy. No clock of the training thread shows this. 0 without
      a device.
    """

    stall: float
    staging: float
    queued: float
    write: float
    commit: float
    durable: float
    held: float = 0.0


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A committed checkpoint.

    `path`: its directory. `step`: as given to `save()`. `total_bytes`: bytes on disk without the manifest; a file with
    two names counts once. `files`: size of each file in bytes, by name. `timings`: how long the parts of the save took.
    """

    path: Path
    step: int | None
    total_bytes: int
    files: FrozenDict[str, int]
    timings: Timings


class SaveHandle:
    """One save. Thread-safe. It may be awaited on any anyio backend."""

    def __init__(
        self, step: int | None, path: str | os.PathLike[str], call: Callable[[Callable[[], None]], None]
    ) -> None:
        """`call` runs a callback on a thread of its choice."""
        self.step = step
        self._path = path  # a Path is made when it is asked for
        self._call = call
        self._changed = threading.Condition()
        # guarded by _changed:
        self._state = SaveState.STAGING
        self._info: CheckpointInfo | None = None
        self._error: CheckpointError | None = None
        self._read = False  # whether whoever holds this handle has seen the failure
        self._callbacks: list[Callable[[SaveHandle], None]] = []
        self._wakers: set[Bell] = set()
        self._progress: Callable[[], tuple[int, int]] = lambda: (0, 0)
        self._saver = threading.get_ident()
        self._called = False  # `save()` has returned
        self._copy_with_more_threads: Callable[[], None] = lambda: None  # copies with more threads

    def __reduce__(self) -> NoReturn:
        raise TypeError("a SaveHandle cannot be pickled or copied: its save is under way; keep what result() returns")

    def __repr__(self) -> str:
        return f"<SaveHandle step={self.step} {self._state.value} {self.path}>"

    @property
    def path(self) -> Path:
        """The directory of the checkpoint."""
        return Path(self._path)

    @property
    def state(self) -> SaveState:
        return self._state

    @property
    def progress(self) -> tuple[int, int]:
        """(bytes written so far, bytes in total). While files are written, they are padded to whole pages."""
        return self._progress()

    def done(self) -> bool:
        """Return whether the save has ended: committed, failed or skipped."""
        return self._state in _ENDS

    def wait_staged(self, timeout: float | None = None) -> None:
        """Wait until the state is in the arena and a living writer has accepted it.

        From then on, neither the death of the trainer nor that of the writer loses the state. While the thread that
        saved waits here or in `result`, more threads copy. Raises TimeoutError after `timeout` seconds, and the save's
        failure if it failed first.
        """
        self._wait(lambda: self._state is not SaveState.STAGING, timeout)
        self._raise_if_failed()

    def result(self, timeout: float | None = None) -> CheckpointInfo:
        """Wait until the checkpoint is durable, and return its description.

        Raises the save's failure, `CheckpointerBusy` for a skipped save, and TimeoutError after `timeout` seconds.
        After a TimeoutError the save goes on.
        """
        self._wait(self.done, timeout)
        self._raise_if_failed()
        assert self._info is not None
        return self._info

    def exception(self, timeout: float | None = None) -> CheckpointError | None:
        """Wait as `result` does, but return the failure, or None."""
        self._wait(self.done, timeout)
        with _signals.held(), self._changed:
            self._read = True
            return self._error

    def add_done_callback(self, callback: Callable[[SaveHandle], None]) -> None:
        """Call `callback(handle)` on the reporting thread once the save has ended; at once if it has.

        Its exceptions are logged.
        """
        with _signals.held():
            with self._changed:
                if not self.done():
                    self._callbacks.append(callback)
                    return
            self._call(lambda: callback(self))

    def __await__(self) -> Generator[Any, Any, CheckpointInfo]:
        """Wait for `result()` without a thread. Cancelling the wait does not affect the save."""
        return self._await().__await__()

    async def _await(self) -> CheckpointInfo:
        waker = Bell()
        try:
            with _signals.held(), self._changed:
                if not self.done():
                    self._wakers.add(waker)
            while not self.done():
                await anyio.wait_readable(waker.fd)
        finally:
            with _signals.held(), self._changed:
                self._wakers.discard(waker)
                waker.close()
        return self.result(0)

    # -- for the engine

    def _wait(self, until: Callable[[], bool], timeout: float | None) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        with _signals.held():
            self._waited_for(timeout)
            while True:
                with self._changed:
                    if until():
                        return
                    left = _signals.SLICE if deadline is None else deadline - time.monotonic()
                    if left <= 0:
                        raise TimeoutError(
                            f"checkpoint of step {self.step} is still {self._state.value} after {timeout} s"
                        )
                    self._changed.wait(min(left, _signals.SLICE))
                _signals.deliver()

    def _interrupted(self) -> bool:
        """Return whether this thread is inside the call of `save()`.

        Then a signal handler or code of the user's is asking.
        """
        return not self._called and self._saver == threading.get_ident()

    def _waited_for(self, timeout: float | None) -> None:
        """Note that this thread is going to wait for `timeout` seconds (0: it only looks).

        If it is the thread that saved, the training does nothing meanwhile, so the copy gets more threads.
        """
        if timeout != 0 and self._state is SaveState.STAGING and threading.get_ident() == self._saver:
            self._copy_with_more_threads()

    def _raise_if_failed(self) -> None:
        with _signals.held(), self._changed:
            if self._error is not None:
                self._read = True
                raise self._error

    def _move(self, state: SaveState, info: CheckpointInfo | None = None, error: CheckpointError | None = None) -> None:
        """Change to `state`; a handle that has ended keeps its state.

        Wakes the threads that wait and queues the callbacks.
        """
        with self._changed:
            if state not in _MOVES[self._state]:
                return
            self._state, self._info, self._error = state, info, error
            callbacks = []
            if state in _ENDS:
                callbacks, self._callbacks = self._callbacks, []
                for waker in self._wakers:
                    waker.ring()
            self._changed.notify_all()
        for callback in callbacks:
            self._call(lambda callback=callback: callback(self))  # type: ignore[misc]

    def _skip(self, error: CheckpointError) -> None:
        with self._changed:
            self._state, self._error, self._read = SaveState.SKIPPED, error, True

    def _take_failure(self) -> CheckpointError | None:
        """Return the failure if nobody has read it yet, else None. Afterwards it counts as read."""
        with self._changed:
            read, self._read = self._read, True
            return None if read else self._error

    def _mark_read(self) -> None:
        with self._changed:
            self._read = True
