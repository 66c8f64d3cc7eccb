"""Sharded saves on a rank that does not write: it copies what it holds into the first rank's arena."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeGuard

from .. import _signals
from .._capture.request import Objects, Request, RequestReader
from .._capture.scratch import Scratch
from .._capture.training_state import capture_rank
from .._memory.staging import StagingThread
from ..errors import CheckpointerBusy, CheckpointError, PlanError, StageError
from ..events import Event, Reporter
from ..handle import SaveHandle, SaveState
from .ledger import Ledger
from .messages import Files, raised_elsewhere
from .node_following import Grant, NodeCall, NodeFollowing, Skipped
from .options import Options
from .outcome import Outcome
from .planning import Planner, own_parts
from .ranks import Ranks
from .share import Share


class ShardedFollower:
    """The sharded saves of a rank that does not write, for one checkpointer."""

    def __init__(
        self,
        options: Options,
        ranks: Ranks,
        ledger: Ledger,
        reporter: Reporter,
        allowed: Callable[[], None],
        scratch: Scratch,
    ) -> None:
        self._options = options
        self._ranks = ranks
        self._ledger = ledger
        self._reporter = reporter
        self._allowed = allowed
        self._node = NodeFollowing(ranks)
        self._staging_thread = StagingThread()
        self._saving = threading.Lock()  # one save() at a time
        self._saver = 0  # id of the thread that holds _saving, else 0
        # touched under _saving only:
        self._reader = RequestReader(
            options.max_shard_size,
            options.save_original_format,
            ranks.world_size,
            scratch,
            rank=ranks.rank,
            gather=self._tell_all,
        )
        self._planner = Planner(options.staging, reporter)
        self._call: NodeCall | None = None  # that of the save() under way

    def save(self, directory: str, step: int | None, objects: Objects, begun: float) -> SaveHandle:
        """Take part in the first rank's save. `begun`: time.perf_counter() of the call.

        Raises what `Leader.save` raises there, and what this rank cannot save.
        """
        with self._alone():
            handle = SaveHandle(step, Path(self._options.root) / directory, self._reporter.call)
            outcome = Outcome(handle, self._ledger, self._reporter)
            call = self._call = self._node.begin(directory, step, outcome.heard)
            self._ledger.begun(handle, self._allowed)
            try:
                self._save(call, outcome, handle, objects)
            except Skipped as skipped:
                outcome.heard(SaveState.SKIPPED, None, skipped.why)
                return handle
            except BaseException as error:
                if isinstance(error, CheckpointerBusy):
                    self._ledger.skipped(handle)
                else:
                    self._ledger.withdrawn(handle)
                if call.refusal is not None:
                    self._ledger.raise_unread()  # the first rank may have raised an earlier failure, as this rank must
                if not self._may_return(error):
                    raise
                outcome.heard(SaveState.FAILED, None, error)
                return handle
            finally:
                self._call = None
            outcome.stall = time.perf_counter() - begun
            handle._called = True
            self._reporter.emit(Event("call", "complete", step=step, seconds=outcome.stall))
            return handle

    def _save(self, call: NodeCall, outcome: Outcome, handle: SaveHandle, objects: Objects) -> None:
        """Copy this rank's part into the arena, except what is copied late. Raises `Skipped` or why it cannot."""
        share: Share | None = None
        try:
            self._ledger.raise_unread()
            self._staging_thread.check()
            request = self._reader.read(call.directory, call.step, objects)
            render = self._capture(objects, request.files)
            grant = call.agree(request)
            share = Share(call, grant, handle, render, self._torn)
            outcome.waited = share.waited
            self._stage(share, grant, request)
        except Skipped:
            raise
        except BaseException as error:
            told = raised_elsewhere(f"{type(error).__name__}: {error}", error)
            if share is None:
                call.refuse(told)
            else:
                share.abandon(told)
            if isinstance(error, RuntimeError):  # torch could not copy
                raise StageError(f"{call.directory}: the state could not be copied: {error}") from error
            raise
        self._staging_thread.submit(share.finish)

    def _capture(self, objects: Objects, further: Files) -> Callable[[], Files]:
        """Capture what this rank adds, and return a function that renders it with the `further` files."""
        state = capture_rank(objects.dialect, objects.dataloader)
        rank, world_size = self._ranks.rank, self._ranks.world_size
        return lambda: [*state.render(rank, world_size), *further] if objects.of_every_rank else []

    def _stage(self, share: Share, grant: Grant, request: Request) -> None:
        plan, places = self._planner.plan(request)
        grant.arena.own = own_parts(places, request)
        copy_plan = self._planner.divide(request, places)
        share.stage(request, plan, places, copy_plan, blocking=not self._planner.overlap)
        self._planner.overlapped = bool(copy_plan.late)

    def _may_return(self, error: BaseException) -> TypeGuard[CheckpointError]:
        """Return whether `save()` leaves this failure to its handle."""
        return (
            isinstance(error, StageError)
            and not isinstance(error, PlanError)
            and self._options.on_error == "warn"
            and not _signals.from_handler(error)
        )

    def _tell_all(self, message: bytes) -> list[bytes]:
        """Return what every rank told where it called this, in the order of the ranks."""
        assert self._call is not None, "only a save asks the other ranks"
        return self._call.tell_all(message)

    def _torn(self) -> None:
        self._planner.overlap = False

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Admit one thread at a time. A signal handler inside its own thread's `save()` is refused."""
        self.refuse_inside_save("save()")
        with self._saving:
            self._saver = threading.get_ident()
            try:
                yield
            finally:
                self._saver = 0

    # -- any thread

    @property
    def overlaps(self) -> bool:
        """Whether the newest save was copied while the training went on."""
        return self._planner.overlap and self._planner.overlapped

    def refuse_inside_save(self, what: str) -> None:
        """Raise `CheckpointerBusy` if this thread is inside its own `save()`."""
        if self._saver == threading.get_ident():
            raise CheckpointerBusy(
                f"{what} was called while this thread is inside save(), by a signal handler perhaps. That save goes on. "
                f"Let the handler set a flag, and call {what} after the step"
            )

    def check(self) -> None:
        self._node.check()

    def close(self, deadline: float) -> None:
        self._staging_thread.close(max(deadline - time.monotonic(), 0.1))
        self._node.close(max(deadline - time.monotonic(), 0.1))

    def forget(self) -> None:
        self._node.forget()
