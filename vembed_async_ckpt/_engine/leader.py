"""The rank that writes: the only rank of most trainings, the first rank of a distributed one.

For each save it reads the request, makes the plan, takes an arena, copies the state into it, and hands it to the
writer.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from operator import is_not
from pathlib import Path
from typing import Any

from .. import _signals
from .._capture.optimizer import unwrap as unwrap_optimizer
from .._capture.request import Objects, Request, RequestReader, named
from .._capture.scratch import Scratch
from .._disk.lock import RootLock
from .._format.plan import Content, SavePlan, plan
from .._memory import devices, numa, pinning
from .._memory.arena import Arena, ArenaPool
from .._memory.barrier import STEP_BARRIER, CopyPlan, OverlapPolicy, all_now
from .._memory.staging import StagingThread, TornSnapshot
from ..errors import CheckpointerBusy, CheckpointError, StageError, WriteError, warn
from ..events import Event, Reporter, logger
from ..handle import SaveHandle, SaveState
from .assembly import required_bytes
from .ledger import Ledger
from .messages import RaisedElsewhere
from .options import MIN_HOST_BYTES, Options
from .rank_exchange import RankExchange, RankExchanges, SingleRank
from .ranks import Ranks
from .saving import Context, Save
from .supervisor import Supervisor

_SPACE_PATIENCE = 1.0  # seconds that save() waits for the writer to look again whether the disk has room


class Leader:
    """Runs the saves of the rank that writes. Holds the root's lock, the arenas and the writer.

    The constructor raises what the constructor of `AsyncCheckpointer` documents.
    """

    def __init__(
        self, options: Options, ranks: Ranks | None, ledger: Ledger, reporter: Reporter, allowed: Callable[[], None]
    ) -> None:
        """Take the lock and start the writer. `allowed` raises if no save may begin any more."""
        self._options = options
        self._ranks = ranks
        self._exchanges = None if ranks is None else RankExchanges(ranks, options.root)
        self._ledger = ledger
        self._reporter = reporter
        self._allowed = allowed
        try:
            self._lock = RootLock.acquire(options.root)
        except OSError as error:
            raise CheckpointError(
                f"{options.root}: cannot be prepared for saving: {error.strerror or error}"
            ) from error
        world_size = 1 if ranks is None else ranks.world_size
        self._reader = RequestReader(
            options.max_shard_size, options.save_original_format, world_size, Scratch(options.root)
        )
        self._overlap_policy = OverlapPolicy()
        self._staging_thread = StagingThread()
        self._pool = ArenaPool(options.max_in_flight, options.max_host_bytes, self._arena_added, self._arena_dropped)
        self._supervisor = Supervisor(options.root, self._lock, options.writer, self._pool.arenas, reporter)
        try:
            self._supervisor.refuse_without_writer()
        except BaseException:
            self._staging_thread.close(1.0)
            self._supervisor.give_up()
            self._lock.release()
            raise
        self._context = Context(
            root=Path(options.root),
            after={
                "retention": None if options.retention is None else options.retention.spec(),
                "latest_link": options.latest_link,
            },
            supervisor=self._supervisor,
            reporter=reporter,
            release=self._pool.release,
            keep_for_ever=self._pool.keep_for_ever,
            ended=self._save_ended,
        )
        self._serials = itertools.count(1)
        self._saving = threading.Lock()  # one save() at a time goes from request to staged copy
        self._saver = 0  # id of the thread that holds _saving, else 0
        self._waits = False  # whether that thread waits for an arena
        # touched under _saving only:
        self._plan: SavePlan | None = None
        self._planned: tuple[Content, ...] = ()
        self._overlap = options.staging == "overlap"
        # whether the newest save overlapped; before the first save, whether it is expected to
        self._overlapped = self._overlap
        self._warned_of_waves = False
        self.closed = False
        STEP_BARRIER.install()

    def save(self, directory: str, step: int | None, objects: Objects, begun: float) -> SaveHandle:
        """Save `objects`. `begun`: time.perf_counter() of the call."""
        with self._alone():
            exchange = self._exchange(directory, step, objects)
            try:
                self._ledger.raise_unread()
                return self._save(directory, step, objects, begun, exchange)
            except BaseException as error:
                failure = RaisedElsewhere(f"rank 0 did not save {directory}: {type(error).__name__}: {error}")
                exchange.say(SaveState.FAILED, error=failure)
                raise

    def _exchange(self, directory: str, step: int | None, objects: Objects) -> RankExchange:
        return SingleRank() if self._exchanges is None else self._exchanges.meet(directory, step, objects.of_every_rank)

    def _save(
        self, directory: str, step: int | None, objects: Objects, begun: float, exchange: RankExchange
    ) -> SaveHandle:
        try:
            request = self._reader.read(directory, step, objects)
        except WriteError as error:  # no disk has room for the temporary files
            if self._options.on_error == "raise" or _signals.from_handler(error):
                raise
            handle = SaveHandle(step, Path(self._options.root) / directory, self._reporter.call)
            self._ledger.begun(handle, self._allowed)
            self._fail(handle, "", begun, exchange, error)
            return handle
        save_plan = self._plan_for(request)
        save = Save(next(self._serials), request, save_plan, begun, self._context, exchange)
        self._ledger.begun(save.handle, self._allowed)
        try:
            self._start(save, request, save_plan, exchange.room)
        except _NoArena as error:
            self._ledger.skipped(save.handle)
            busy = CheckpointerBusy(str(error))
            if self._options.when_busy == "error":
                raise busy from None
            save.handle._skip(busy)
            exchange.say(SaveState.SKIPPED, error=busy)
            self._reporter.emit(Event("backpressure", "failed", request.save_id, step, detail=str(busy)))
        except (StageError, WriteError) as error:
            if self._options.on_error == "raise" or _signals.from_handler(error):
                self._ledger.withdrawn(save.handle)
                raise
            self._fail(save.handle, request.save_id, begun, exchange, error)
        except BaseException:
            self._ledger.withdrawn(save.handle)
            raise
        else:
            stall = time.perf_counter() - begun
            save.stalled(stall)
            save.handle._called = True
            self._reporter.emit(Event("call", "complete", request.save_id, step, save_plan.end, stall))
        return save.handle

    def _fail(
        self, handle: SaveHandle, save_id: str, begun: float, exchange: RankExchange, error: StageError | WriteError
    ) -> None:
        """End a save that failed during its call. The call does not raise: the handle has the failure."""
        self._save_ended(handle, error)
        handle._move(SaveState.FAILED, error=error)
        exchange.say(SaveState.FAILED, error=error)
        took = time.perf_counter() - begun
        self._reporter.emit(Event("save", "failed", save_id, handle.step, seconds=took, detail=str(error)))

    def _start(self, save: Save, request: Request, save_plan: SavePlan, room: int) -> None:
        needed = required_bytes(save_plan, request) + room
        self._supervisor.check()
        self._staging_thread.check()
        self._refuse_if_disk_is_too_small(save, save_plan.end)
        arena = self._acquire(request, needed)
        save.arena = arena
        try:
            self._fill(save, request, arena, needed)
        except BaseException as error:
            save.abandon()
            if isinstance(error, RuntimeError):  # torch could not copy
                raise StageError(f"step {request.step}: the state could not be copied: {error}") from error
            raise

    def _refuse_if_disk_is_too_small(self, save: Save, needed: int) -> None:
        lacking = self._supervisor.missing_space(needed, patience=_SPACE_PATIENCE)
        if lacking is not None:
            missing, free = lacking
            raise WriteError(
                f"{save.handle.path}: the disk is too small: at least {needed} bytes are needed, {free} are free. Nothing was "
                f"staged, and the checkpoints there are untouched. Free {missing} bytes; a checkpoint that retention will delete "
                "goes only when the new one is durable"
            )

    def _fill(self, save: Save, request: Request, arena: Arena, needed: int) -> None:
        if arena.size < needed:
            self._warn_of_waves(arena.size, needed)
            save.pass_in_waves()
            return
        copy_plan = self._divide(request)
        save.stage(copy_plan, blocking=not self._overlap)
        self._overlapped = bool(copy_plan.late)
        self._staging_thread.submit(save.finish)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Admit one thread at a time.

        A signal handler may interrupt its own thread's `save()`. While that `save()` waits for an arena, the handler
        may save too, and its save comes first. Anywhere else the handler's call raises `CheckpointerBusy`.
        """
        self.refuse_inside_save("save()")
        if self._saver == threading.get_ident():
            self._waits = False
            try:
                yield
            finally:
                self._waits = True
            return
        with self._saving:
            self._saver = threading.get_ident()
            try:
                yield
            finally:
                self._saver = 0

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Mark that nothing of the save has begun, so a signal handler may save, wait and close."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    def refuse_inside_save(self, what: str) -> None:
        """Raise `CheckpointerBusy` if this thread is inside its own `save()` and `what` cannot be done there."""
        if self._saver == threading.get_ident() and not self._waits:
            raise CheckpointerBusy(
                f"{what} was called while this thread is inside save(), by a signal handler perhaps. That save goes on. "
                f"Let the handler set a flag, and call {what} after the step"
            )

    def _refuse_if_ended(self) -> None:
        """Called while the save waits for an arena.

        Raises if none will come or a signal handler closed the checkpointer.
        """
        if self.closed:
            self._allowed()
        self.check()

    def _divide(self, request: Request) -> CopyPlan:
        # A signal handler may save in the middle of a step, and the step goes on afterwards.
        if not self._overlap or STEP_BARRIER.is_stepping():
            return all_now(len(request.tensors))
        key = tuple(map(id, (*request.contents, *(state.optimizer for state in request.optimizers))))
        stepped = [state for state in request.optimizers if state.optimizer is not None]
        return self._overlap_policy.divide(
            key, request.tensors, request.labels, request.owners, request.volatile, stepped
        )

    def _plan_for(self, request: Request) -> SavePlan:
        known = self._planned
        if self._plan is None or len(known) != len(request.contents) or any(map(is_not, known, request.contents)):
            with self._reporter.stage("plan", request.save_id, request.step):
                self._plan = plan(request.contents)
                self._planned = request.contents  # keep the objects alive: no other object can get their id meanwhile
            self._notice_devices(request)
        return self._plan

    def _notice_devices(self, request: Request) -> None:
        devices.notice(request.tensors)
        self._pool.pinned = pinning.can_pin()

    def _acquire(self, request: Request, needed: int) -> Arena:
        arena = self._pool.acquire(needed)
        if arena is None:
            if self._options.when_busy != "wait":
                raise _NoArena(f"all {self._options.max_in_flight} arenas hold saves that are still being written")
            if self._exchanges is not None:
                self._exchanges.stop_holding()
            with self._reporter.stage("backpressure", request.save_id, request.step, needed), self._interruptible():
                arena = self._pool.wait(needed, self._refuse_if_ended)
        if arena.size < min(needed, MIN_HOST_BYTES):
            self._pool.release(arena)
            raise StageError(
                f"step {request.step}: {needed} bytes of host memory are needed, only {arena.size} can be had; "
                "free host memory or raise max_host_bytes"
            )
        return arena

    def _warn_of_waves(self, allowed: int, needed: int) -> None:
        if not self._warned_of_waves:
            self._warned_of_waves = True
            warn(
                f"the state needs an arena of {needed} bytes, {allowed} are allowed or available: every save passes through it "
                "in parts while training waits"
            )

    def prewarm(self, model: Any, optimizer: Any) -> None:
        with self._alone():
            self.reserve(model, optimizer)
        waiting = [
            o for o in map(unwrap_optimizer, named("optimizer", optimizer).values()) if not getattr(o, "state", True)
        ]
        if waiting:
            STEP_BARRIER.add(_AfterFirstStep(self, model, optimizer, waiting))

    def reserve(self, model: Any, optimizer: Any) -> None:
        with self._reporter.stage("prewarm"):
            request = self._reader.read("", None, Objects(model=model, optimizer=optimizer))
            needed = required_bytes(plan(request.contents), request)
            self._notice_devices(request)
            arena = self._pool.acquire(needed)
            if arena is not None:  # else a save is under way, and its arena (or the next one) is the one to warm
                self._pool.release(arena)

    def check(self) -> None:
        self._supervisor.check()
        if self._ranks is not None:
            self._ranks.check()

    @property
    def prewarming(self) -> bool:
        return self._supervisor.populating

    def statistics(self) -> dict[str, Any]:
        return {
            **self._pool.statistics(),
            "overlap": self._overlap and self._overlapped,
            "writer_pid": self._supervisor.writer_pid,
        }

    def close(self, deadline: float) -> bool:
        self.closed = True
        self._staging_thread.close(max(deadline - time.monotonic(), 0.1))
        ended = self._supervisor.close(max(deadline - time.monotonic(), 0.1))
        if ended:
            self._pool.close()
            self._lock.clear()
        if self._ranks is not None:
            self._ranks.close(max(deadline - time.monotonic(), 0.1))
        self._lock.close()
        return ended

    def refuse_to_delete(self) -> None:
        self._lock.refuse_if_lost()

    def forget(self) -> None:
        self.closed = True
        self._lock.close()
        self._supervisor.forget()
        self._pool.forget()

    # -- bookkeeping

    def _save_ended(self, handle: SaveHandle, error: CheckpointError | None) -> None:
        if isinstance(error, TornSnapshot):
            self._overlap = False
        self._ledger.ended(handle, error)

    def _arena_added(self, arena: Arena) -> None:
        device = devices.in_use()
        if device is not None and (node := numa.node_of(device)) is not None:
            numa.prefer(arena.address, arena.size, node)
        self._supervisor.add_arena(arena)
        self._reporter.emit(Event("arena", "complete", bytes=arena.size))

    def _arena_dropped(self, arena: Arena) -> None:
        self._supervisor.drop_arena(arena)


class _NoArena(Exception):
    """All arenas are busy, and `when_busy` says not to wait."""


class _AfterFirstStep:
    """Sizes the arena again after the first step of optimizers that had no state.

    The step barrier calls it before every optimizer step, until each of these optimizers has state.
    """

    def __init__(self, leader: Leader, model: Any, optimizer: Any, waiting: Sequence[Any]) -> None:
        self._leader = weakref.ref(leader)
        self._waiting = [weakref.ref(inner) for inner in waiting]
        self._objects = [
            (name, weakref.ref(value)) for what in (model, optimizer) for name, value in named("object", what).items()
        ]
        self._models = len(named("model", model))

    def barrier(self) -> None:
        leader = self._leader()
        over = leader is None or leader.closed
        if not over and any(inner is not None and not inner.state for inner in (ref() for ref in self._waiting)):
            return
        STEP_BARRIER.remove(self)
        alive = [(name, ref()) for name, ref in self._objects]
        if leader is None or over or any(value is None for _, value in alive):
            return
        model, optimizer = (_unnamed(part) for part in (alive[: self._models], alive[self._models :]))
        try:
            with leader._alone():
                leader.reserve(model, optimizer)
        except Exception as error:  # a failure here must not break the training step; `save()` will raise it
            logger.warning("%s: prewarming after the first step failed: %s", leader._options.root, error)


def _unnamed(objects: Sequence[tuple[str, Any]]) -> Any:
    """The inverse of `named`: return the single unnamed object, or the dict of named ones."""
    return objects[0][1] if [name for name, _ in objects] == [""] else dict(objects)
