"""A rank that does not write.

It adds its own random states and data position to the first rank's checkpoint. Its handles report how that save ended.
State that all ranks hold (weights, optimizers) is copied on the first rank only. Of sharded state, this rank copies its
part into the first rank's arena.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .._capture.request import Objects
from .._capture.scratch import Scratch
from .._capture.training_state import capture_rank
from .._memory.barrier import STEP_BARRIER
from ..errors import CommitError, StageError
from ..events import Event, Reporter
from ..handle import SaveHandle
from .following import Following
from .ledger import Ledger
from .messages import Files
from .options import Options
from .outcome import Outcome
from .ranks import Ranks
from .sharded_follower import ShardedFollower


class Follower:
    """The counterpart of `Leader` on the other ranks. It holds no lock, no arena of its own and no writer."""

    def __init__(
        self, options: Options, ranks: Ranks, ledger: Ledger, reporter: Reporter, allowed: Callable[[], None]
    ) -> None:
        self._options = options
        self._ranks = ranks
        self._scratch = Scratch(options.root)
        self._following = Following(ranks)
        self._sharded: ShardedFollower | None = None
        self._ledger = ledger
        self._reporter = reporter
        self._allowed = allowed
        STEP_BARRIER.install()

    def save(self, directory: str, step: int | None, objects: Objects, begun: float) -> SaveHandle:
        if objects.is_sharded():
            return self._save_share(directory, step, objects, begun)
        handle = SaveHandle(step, Path(self._options.root) / directory, self._reporter.call)
        following = Outcome(handle, self._ledger, self._reporter)
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

    def _save_share(self, directory: str, step: int | None, objects: Objects, begun: float) -> SaveHandle:
        self.refuse_inside_save("save()")
        sharded = self._sharded
        if sharded is None:
            sharded = self._sharded = ShardedFollower(
                self._options, self._ranks, self._ledger, self._reporter, self._allowed, self._scratch
            )
        return sharded.save(directory, step, objects, begun)

    def prewarm(self, model: Any, optimizer: Any) -> None:
        """Do nothing: this rank has no arena, and what is sharded is planned by all ranks together, in a save."""

    def refuse_inside_save(self, what: str) -> None:
        """Raise `CheckpointerBusy` if this thread is inside its own `save()` and `what` cannot be done there."""
        if self._sharded is not None:
            self._sharded.refuse_inside_save(what)

    def check(self) -> None:
        self._ranks.check()
        if self._sharded is not None:
            self._sharded.check()

    @property
    def prewarming(self) -> bool:
        return False

    def statistics(self) -> dict[str, Any]:
        overlap = self._sharded is not None and self._sharded.overlaps
        return {"arenas_free": 0, "arenas_busy": 0, "host_bytes": 0, "overlap": overlap, "writer_pid": None}

    def close(self, deadline: float) -> bool:
        if self._sharded is not None:
            self._sharded.close(deadline)
        self._ranks.close(max(deadline - time.monotonic(), 0.1))
        return True

    def park(self) -> bool:
        return self._ranks.park()

    def refuse_to_delete(self) -> None:
        raise CommitError("only the first rank deletes checkpoints")

    def forget(self) -> None:
        if self._sharded is not None:
            self._sharded.forget()


def _raising(error: BaseException) -> Callable[[], Files]:
    def render() -> Files:
        raise error if isinstance(error, Exception) else StageError(repr(error))

    return render
