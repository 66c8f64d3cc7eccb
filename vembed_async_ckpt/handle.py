"""What `save()` gives back: where the save is, how it ended, and ways to wait that all have an end."""

from __future__ import annotations

import enum
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
    """Where a save is.

    STAGING -> STAGED -> WRITING -> COMMITTED; any of the first three -> FAILED. WRITING -> STAGED when the writer died and a
    new one gets the job. STAGING -> COMMITTED when a state passed through a small arena in parts. SKIPPED is where a save
    refused by `when_busy="skip"` begins and ends; on the ranks that do not write it comes after STAGING.
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
    """Where the time went, in seconds.

    `stall`: all that the training thread lost: `save()` itself with any wait for a free arena, and steps held up by the copy.
    `staging`: from the start of the copy to its end. `queued`: from staged to the first write. `write`: writing, hashing and
    syncing the files. `commit`: manifest, syncs, rename. `durable`: from the call to durable. `held`: for how long the training's
    device was held back behind the copy, which no clock of the training thread shows; 0 without a device.
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
    """A committed checkpoint. `total_bytes`: on disk without the manifest, a file with two names counted once.
    `files`: size in bytes of each."""

    path: Path
    step: int | None
    total_bytes: int
    files: FrozenDict[str, int]
    timings: Timings


class SaveHandle:
    """One save. Thread-safe; may be awaited on any anyio backend."""

    def __init__(self, step: int | None, path: Path, call: Callable[[Callable[[], None]], None]) -> None:
        """`call` runs a callback, on a thread of its own choice."""
        self.step = step
        self.path = path
        self._call = call
        self._changed = threading.Condition()
        # guarded by _changed:
        self._state = SaveState.STAGING
        self._info: CheckpointInfo | None = None
        self._error: CheckpointError | None = None
        self._read = False  # the failure was seen by whoever holds this handle
        self._callbacks: list[Callable[[SaveHandle], None]] = []
        self._wakers: set[Bell] = set()
        self._progress: Callable[[], tuple[int, int]] = lambda: (0, 0)
        self._saver = threading.get_ident()
        self._called = False  # `save()` has returned
        self._copy_with_more_threads: Callable[[], None] = lambda: None  # stages with more threads

    def __reduce__(self) -> NoReturn:
        raise TypeError("a SaveHandle cannot be pickled or copied: its save is under way; keep what result() returns")

    def __repr__(self) -> str:
        return f"<SaveHandle step={self.step} {self._state.value} {self.path}>"

    @property
    def state(self) -> SaveState:
        return self._state

    @property
    def progress(self) -> tuple[int, int]:
        """(bytes written so far, bytes in all); files are padded to whole pages while they are written."""
        return self._progress()

    def done(self) -> bool:
        """Whether it has ended, one way or another."""
        return self._state in _ENDS

    def wait_staged(self, timeout: float | None = None) -> None:
        """Return once the state is in the arena and a live writer has accepted it: from then on neither the death of the
        trainer nor that of the writer loses it. While the thread that saved waits, here or in `result`, more threads stage.

        Raises TimeoutError after `timeout` seconds, and what failed if it failed first.
        """
        self._wait(lambda: self._state is not SaveState.STAGING, timeout)
        self._raise_if_failed()

    def result(self, timeout: float | None = None) -> CheckpointInfo:
        """Wait until it is durable. Raises what failed, `CheckpointerBusy` for a skipped save, TimeoutError after `timeout`
        seconds; the save goes on."""
        self._wait(self.done, timeout)
        self._raise_if_failed()
        assert self._info is not None
        return self._info

    def exception(self, timeout: float | None = None) -> CheckpointError | None:
        """Wait as `result` does, but return what failed, or None."""
        self._wait(self.done, timeout)
        with _signals.held(), self._changed:
            self._read = True
            return self._error

    def add_done_callback(self, callback: Callable[[SaveHandle], None]) -> None:
        """Call `callback(handle)` on the reporting thread once it has ended; at once if it has. What it raises is logged."""
        with _signals.held():
            with self._changed:
                if not self.done():
                    self._callbacks.append(callback)
                    return
            self._call(lambda: callback(self))

    def __await__(self) -> Generator[Any, Any, CheckpointInfo]:
        """Wait for `result()` without a thread; cancelling the wait does not touch the save."""
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
        """Whether this thread is inside the call of `save()`: it is a signal handler, or code of the user's, that asks."""
        return not self._called and self._saver == threading.get_ident()

    def _waited_for(self, timeout: float | None) -> None:
        """This thread will wait so long (0: it only looks). If it is the one that saved, the training does nothing meanwhile."""
        if timeout != 0 and self._state is SaveState.STAGING and threading.get_ident() == self._saver:
            self._copy_with_more_threads()

    def _raise_if_failed(self) -> None:
        with _signals.held(), self._changed:
            if self._error is not None:
                self._read = True
                raise self._error

    def _move(self, state: SaveState, info: CheckpointInfo | None = None, error: CheckpointError | None = None) -> None:
        """Go to `state`; a handle that has ended stays as it is. Wakes whoever waits and queues the callbacks."""
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
        """What failed, if nobody has read it yet; afterwards it is read."""
        with self._changed:
            read, self._read = self._read, True
            return None if read else self._error

    def _mark_read(self) -> None:
        with self._changed:
            self._read = True
