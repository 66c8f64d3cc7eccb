"""The rank that writes: the only rank of most trainings, the first rank of a distributed one.

For each save it reads the request, makes the plan, takes an arena, copies the state into it, and hands it to the
writer. Where the tensors are sharded, the other ranks copy their parts into the same arena (see `node_exchange`).
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .. import _signals
from .._capture.optimizer import unwrap as unwrap_optimizer
from .._capture.request import Objects, Request, RequestReader, named
from .._capture.scratch import Scratch
from .._disk.lock import RootLock
from .._format.plan import SavePlan, plan
from .._memory import devices, numa, pinning
from .._memory.arena import Arena, ArenaPool
from .._memory.barrier import STEP_BARRIER
from .._memory.places import Place
from .._memory.staging import StagingThread, TornSnapshot
from ..errors import CheckpointerBusy, CheckpointError, PlanError, StageError, WriteError, warn
from ..events import Event, Reporter, logger
from ..handle import SaveHandle, SaveState
from .after_commit import AfterCommits
from .assembly import required_bytes
from .ledger import Ledger
from .messages import RaisedElsewhere, raised_elsewhere
from .node_exchange import NodeExchange, NodeExchanges
from .options import MIN_HOST_BYTES, Options
from .planning import Planner, own_parts
from .rank_exchange import RankExchange, RankExchanges, SingleRank
from .ranks import Ranks
from .saving import Context, Save
from .supervisor import Supervisor

_ENDING = 5.0  # seconds of the deadline of close() that are kept for the end of the writer
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
            options.max_shard_size,
            options.save_original_format,
            world_size,
            Scratch(options.root),
            gather=self._tell_all,
        )
        self._staging_thread = StagingThread()
        self._pool = ArenaPool(options.max_in_flight, options.max_host_bytes, self._arena_added, self._arena_dropped)
        self._after_commits = AfterCommits(options.after_commit, reporter)
        self._supervisor = Supervisor(
            options.root,
            self._lock,
            options.writer,
            self._pool.arenas,
            reporter,
            shipping=self._after_commits.heard,
        )
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
                "ship": self._after_commits.shipments,
                "max_unshipped": options.max_unshipped,
            },
            supervisor=self._supervisor,
            reporter=reporter,
            release=self._pool.release,
            retire=self._pool.retire,
            keep_for_ever=self._pool.keep_for_ever,
            committed=self._after_commits.committed,
            ended=self._save_ended,
        )
        self._serials = itertools.count(1)
        self._saving = threading.Lock()  # one save() at a time goes from request to staged copy
        self._saver = 0  # id of the thread that holds _saving, else 0
        self._waits = False  # whether that thread waits for an arena
        self._node: NodeExchanges | None = None
        # touched under _saving only:
        self._planner = Planner(options.staging, reporter)
        self._exchange: RankExchange = SingleRank()  # that of the newest save
        self._own: list[tuple[int, int]] | None = None  # `own` of an arena that is made now
        self._warned_of_waves = False
        self.closed = False
        STEP_BARRIER.install()

    def save(self, directory: str, step: int | None, objects: Objects, begun: float) -> SaveHandle:
        """Save `objects`. `begun`: time.perf_counter() of the call."""
        with self._alone():
            exchange = self._exchange = self._meet(directory, step, objects)
            try:
                self._ledger.raise_unread()
                return self._save(directory, step, objects, begun, exchange)
            except BaseException as error:
                text = f"rank 0 did not save {directory}: {type(error).__name__}: {error}"
                sharded = isinstance(exchange, NodeExchange)
                failure = raised_elsewhere(text, error) if sharded else RaisedElsewhere(text)
                exchange.say(SaveState.FAILED, error=failure)
                raise

    def _meet(self, directory: str, step: int | None, objects: Objects) -> RankExchange:
        """Begin the exchange with the other ranks for one save."""
        if self._ranks is None or self._exchanges is None:
            return SingleRank()
        if not objects.is_sharded():
            return self._exchanges.meet(directory, step, objects.of_every_rank)
        if self._node is None:
            self._node = NodeExchanges(self._ranks)
        return self._node.begin(directory, step, objects.of_every_rank)

    def _tell_all(self, message: bytes) -> list[bytes]:
        """Return what every rank told where it called this, in the order of the ranks."""
        return self._exchange.tell_all(message) if isinstance(self._exchange, NodeExchange) else [message]

    def _save(
        self, directory: str, step: int | None, objects: Objects, begun: float, exchange: RankExchange
    ) -> SaveHandle:
        try:
            request = self._reader.read(directory, step, objects)
            exchange.agree(request)
        except (StageError, WriteError) as error:  # another rank did not come; no disk has room for the temporary files
            if isinstance(error, PlanError) or self._options.on_error == "raise" or _signals.from_handler(error):
                raise
            handle = SaveHandle(step, Path(self._options.root) / directory, self._reporter.call)
            self._ledger.begun(handle, self._allowed)
            self._fail(handle, "", begun, exchange, error)
            return handle
        save_plan, places = self._planner.plan(request)
        self._pool.pinned = pinning.can_pin()
        save = Save(next(self._serials), request, save_plan, places, begun, self._context, exchange)
        self._ledger.begun(save.handle, self._allowed)
        try:
            self._start(save, request, save_plan, places, exchange)
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

    def _start(
        self, save: Save, request: Request, save_plan: SavePlan, places: Sequence[Place], exchange: RankExchange
    ) -> None:
        needed = required_bytes(save_plan, request) + exchange.room
        self._supervisor.check()
        self._staging_thread.check()
        self._refuse_if_disk_is_too_small(save, save_plan.end)
        self._own = own = own_parts(places, request)
        arena = self._acquire(request, needed, exchange)
        arena.own = own
        save.arena = arena
        try:
            self._fill(save, request, places, needed, exchange)
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

    def _fill(self, save: Save, request: Request, places: Sequence[Place], needed: int, exchange: RankExchange) -> None:
        arena = save.arena
        if arena.size < needed and isinstance(exchange, NodeExchange):
            raise StageError(
                f"step {request.step}: the state needs {needed} bytes of host memory, {arena.size} are allowed or available. A "
                "state of several ranks does not pass through less memory in parts: raise max_host_bytes or free memory"
            )
        if arena.size < needed:
            self._warn_of_waves(arena.size, needed)
            save.pass_in_waves()
            return
        exchange.grant(arena, request.save_id)
        copy_plan = self._planner.divide(request, places)
        save.stage(copy_plan, blocking=not self._planner.overlap)
        self._planner.overlapped = bool(copy_plan.late)
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

    def _acquire(self, request: Request, needed: int, exchange: RankExchange) -> Arena:
        if self._node is not None:
            self._node.wait_for_stragglers()
        arena = self._pool.acquire(needed)
        if arena is None:
            if self._options.when_busy != "wait":
                raise _NoArena(f"all {self._options.max_in_flight} arenas hold saves that are still being written")
            if self._exchanges is not None:
                self._exchanges.stop_holding()
            # The other ranks wait for this sharded save, so no other save may come before it.
            waiting = contextlib.nullcontext() if isinstance(exchange, NodeExchange) else self._interruptible()
            with self._reporter.stage("backpressure", request.save_id, request.step, needed), waiting:
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
        if Objects(model=model, optimizer=optimizer).is_sharded():
            return  # only a save, in which all ranks take part, can plan what is sharded
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
            devices.notice(request.tensors)
            self._pool.pinned = pinning.can_pin()
            arena = self._pool.acquire(needed)
            if arena is not None:  # else a save is under way, and its arena (or the next one) is the one to warm
                self._pool.release(arena)

    def check(self) -> None:
        self._supervisor.check()
        if self._ranks is not None:
            self._ranks.check()
        if self._node is not None:
            self._node.check()

    @property
    def prewarming(self) -> bool:
        return self._supervisor.populating

    def statistics(self) -> dict[str, Any]:
        return {
            **self._pool.statistics(),
            "overlap": self._planner.overlap and self._planner.overlapped,
            "writer_pid": self._supervisor.writer_pid,
        }

    def close(self, deadline: float) -> bool:
        self.closed = True
        self._staging_thread.close(max(deadline - time.monotonic(), 0.1))
        left = self._after_commits.drain(deadline - min(_ENDING, (deadline - time.monotonic()) / 4))
        ended = self._supervisor.close(max(deadline - time.monotonic(), 0.1))
        if self._node is not None:
            self._node.close(max(deadline - time.monotonic(), 0.1))
        if ended:
            self._pool.close()
            self._lock.clear()
        if self._ranks is not None:
            self._ranks.close(max(deadline - time.monotonic(), 0.1))
        self._lock.close()
        if left:
            warn(f"{self._options.root}: {left}")
        return ended

    def park(self) -> bool:
        parked = self._supervisor.park()
        return (self._ranks is not None and self._ranks.park()) or parked

    def refuse_to_delete(self) -> None:
        self._lock.refuse_if_lost()

    def forget(self) -> None:
        self.closed = True
        self._lock.close()
        self._supervisor.forget()
        if self._node is not None:
            self._node.forget()
        self._after_commits.forget()
        self._pool.forget()

    # -- bookkeeping

    def _save_ended(self, handle: SaveHandle, error: CheckpointError | None) -> None:
        if isinstance(error, TornSnapshot):
            self._planner.overlap = False
        self._ledger.ended(handle, error)

    def _arena_added(self, arena: Arena) -> None:
        device = devices.in_use()
        if device is not None and (node := numa.node_of(device)) is not None:
            numa.prefer(arena.address, arena.size, node)
        arena.own = self._own
        self._supervisor.add_arena(arena)
        self._reporter.emit(Event("arena", "complete", bytes=arena.size))

    def _arena_dropped(self, arena: Arena) -> None:
        self._supervisor.drop_arena(arena)
        if self._node is not None:
            self._node.dropped(arena)


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
