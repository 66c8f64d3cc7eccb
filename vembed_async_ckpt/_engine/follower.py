"""A rank that does not write.

It adds its own random states and data position to the first rank's checkpoint. Its handles report how that save ended.
The state that all ranks share (weights, optimizers) is copied on the first rank only.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .._capture.request import Objects
from .._capture.scratch import Scratch
from .._capture.training_state import capture_rank
from ..errors import CheckpointError, CommitError, StageError
from ..events import Event, Phase, Reporter
from ..handle import CheckpointInfo, SaveHandle, SaveState
from .following import Following
from .ledger import Ledger
from .messages import Files
from .options import Options
from .ranks import Ranks


class Follower:
    """The counterpart of `Leader` on the other ranks. It holds no lock, no arena and no writer."""

    def __init__(
        self, options: Options, ranks: Ranks, ledger: Ledger, reporter: Reporter, allowed: Callable[[], None]
    ) -> None:
        self._options = options
        self._ranks = ranks
        self._scratch = Scratch(options.root)
        self._following = Following(ranks)
        self._ledger = ledger
        self._reporter = reporter
        self._allowed = allowed

    def save(self, directory: str, step: int | None, objects: Objects, begun: float) -> SaveHandle:
        handle = SaveHandle(step, Path(self._options.root) / directory, self._reporter.call)
        following = _Following(handle, self._ledger, self._reporter)
        self._ledger.begun(handle, self._allowed)
        try:
            self._ledger.raise_unread()
            objects.refuse_shares()
            state = capture_rank(objects.dialect, objects.dataloader)
            with self._scratch.in_use():
                further = objects.further_files()
        except BaseException as error:
            self._ledger.withdrawn(handle)
            self._following.join(directory, step, objects.of_every_rank, _raising(error), following.ignore)
            raise
        rank, world_size = self._ranks.rank, self._ranks.world_size
        following.stall = time.perf_counter() - begun
        self._reporter.emit(Event("call", "complete", step=step, seconds=following.stall))

        def render() -> Files:
            return [*state.render(rank, world_size), *further]

        self._following.join(directory, step, objects.of_every_rank, render, following.heard)
        handle._called = True
        return handle

    def prewarm(self, model: Any, optimizer: Any) -> None:
        """Do nothing: this rank copies nothing."""

    def refuse_inside_save(self, what: str) -> None:
        """Do nothing: this rank never waits inside `save()`."""

    def check(self) -> None:
        self._ranks.check()

    @property
    def prewarming(self) -> bool:
        return False

    def statistics(self) -> dict[str, Any]:
        return {"arenas_free": 0, "arenas_busy": 0, "host_bytes": 0, "overlap": False, "writer_pid": None}

    def close(self, deadline: float) -> bool:
        self._ranks.close(max(deadline - time.monotonic(), 0.1))
        return True

    def refuse_to_delete(self) -> None:
        raise CommitError("only the first rank deletes checkpoints")

    def forget(self) -> None:
        pass


class _Following:
    """One save, as the first rank reports it."""

    def __init__(self, handle: SaveHandle, ledger: Ledger, reporter: Reporter) -> None:
        self._handle = handle
        self._ledger = ledger
        self._reporter = reporter
        self.stall = 0.0

    def heard(self, state: SaveState, info: CheckpointInfo | None, error: CheckpointError | None) -> None:
        handle = self._handle
        if info is not None:
            info = dataclasses.replace(info, timings=dataclasses.replace(info.timings, stall=self.stall))
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


def _raising(error: BaseException) -> Callable[[], Files]:
    def render() -> Files:
        raise error if isinstance(error, Exception) else StageError(repr(error))

    return render
