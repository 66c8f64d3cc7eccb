"""Moves the handle of a save as the first rank reports it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from ..errors import CheckpointError
from ..events import Event, Phase, Reporter
from ..handle import CheckpointInfo, SaveHandle, SaveState
from .ledger import Ledger


class Outcome:
    """One save, as the first rank reports it.

    `stall`: seconds that the call took. `waited`: returns the seconds for which optimizer steps were held up.
    """

    def __init__(self, handle: SaveHandle, ledger: Ledger, reporter: Reporter) -> None:
        self._handle = handle
        self._ledger = ledger
        self._reporter = reporter
        self.stall = 0.0
        self.waited: Callable[[], float] = float

    def heard(self, state: SaveState, info: CheckpointInfo | None, error: CheckpointError | None) -> None:
        handle = self._handle
        if info is not None:
            info = dataclasses.replace(
                info, timings=dataclasses.replace(info.timings, stall=self.stall + self.waited())
            )
        if state is SaveState.SKIPPED:
            self._ledger.skipped(handle)
            handle._mark_read()
            self._reporter.emit(Event("backpressure", "failed", step=handle.step, detail=str(error or "")))
        handle._move(state, info, error)
        if state in (SaveState.COMMITTED, SaveState.FAILED):
            self._ledger.ended(handle, error)
            phase: Phase = "failed" if error else "complete"
            size = info.total_bytes if info else 0
            self._reporter.emit(Event("save", phase, step=handle.step, bytes=size, detail=str(error or "")))

    def ignore(self, state: SaveState, info: CheckpointInfo | None, error: CheckpointError | None) -> None:
        """Do nothing: the call itself raised, so nobody has the handle."""
