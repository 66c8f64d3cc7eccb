"""The facade: it wires request, plan, arena, staging, supervisor and handle, and decides nothing else."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import os
import sys
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from operator import is_not
from pathlib import Path
from types import TracebackType
from typing import Any

import anyio

from .._arena.arena import Arena, ArenaPool
from .._arena.barrier import GATE, Division, Earned, all_now
from .._arena.staging import StagingThread, TornSnapshot
from .._plan.plan import Content, SavePlan, plan
from .._request.optimizer import unwrap as unwrap_optimizer
from .._request.request import Objects, Request, RequestReader, named
from .._store import names
from .._store.lock import RootLock
from .._store.retention import Policy
from ..errors import CheckpointerBusy, CheckpointerClosed, CheckpointError, PlanError, StageError, WriteError
from ..events import Event, Reporter, Sink
from .assembly import required_bytes
from .handle import SaveHandle, SaveState
from .ledger import Ledger
from .options import MIN_HOST_BYTES, OnError, Options, Staging, WhenBusy, WriterKind, root_path
from .saving import Context, Save
from .supervisor import Supervisor

logger = logging.getLogger("vembed_async_ckpt")
EXIT_DEADLINE = 600.0  # seconds for pending saves at interpreter exit

_LIVING: weakref.WeakSet[AsyncCheckpointer] = weakref.WeakSet()


class AsyncCheckpointer:
    """Saves a training's state under one root while the training goes on.

    Behaviour. `root`: directory of the checkpoints, created if need be. `retention`: which checkpoints to keep (`KeepLast(3) |
    KeepBest("loss")`), None for all. `when_busy`: what `save()` does when earlier saves hold every arena: "wait", "skip"
    (the handle says so) or "error". `on_error`: "raise" a background failure once more at the next `save()` or at `close()`
    unless it was read from its handle, or "warn": log it at once and show it in `statistics()`. `save_original_format`,
    `max_shard_size`: as `save_pretrained` has them. `sinks`: called with every `Event`, on a thread of their own.

    Performance. `staging`: "overlap" copies what only an optimizer changes while forward and backward run, and lets
    `optimizer.step()` wait for it; "blocking" copies all of it in `save()`. `writer`: a "process" of its own, which survives the
    trainer, or a "thread". `max_in_flight`: arenas, that is saves under way at once; each takes host memory of the size of the
    state. `max_host_bytes`: for all arenas together; None is what the machine and its cgroup have left. A state that does not fit
    passes through a smaller arena in parts while training waits.

    The constructor takes the root's lock (raises `CheckpointerBusy` if another process saves there; waits up to 60 s for the
    writer of a dead trainer to finish), and starts the writer, which sweeps what a crash left.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        retention: Policy | None = None,
        when_busy: WhenBusy = "wait",
        on_error: OnError = "raise",
        staging: Staging = "overlap",
        writer: WriterKind = "process",
        max_in_flight: int = 1,
        max_host_bytes: int | None = None,
        max_shard_size: str | int = "50GB",
        save_original_format: bool = True,
        sinks: Sequence[Sink] = (),
    ) -> None:
        if not sys.platform.startswith("linux"):
            raise CheckpointError("saving needs Linux (memfd, pidfd, renameat2); checkpoints can be loaded everywhere")
        self._options = Options(
            root=root_path(root),
            retention=retention,
            when_busy=when_busy,
            on_error=on_error,
            staging=staging,
            writer=writer,
            max_in_flight=max_in_flight,
            max_host_bytes=max_host_bytes,
            max_shard_size=max_shard_size,
            save_original_format=save_original_format,
            sinks=tuple(sinks),
        )
        options = self._options
        os.makedirs(options.root, exist_ok=True)
        self._lock = RootLock.acquire(options.root)
        self._reporter = Reporter(options.sinks)
        self._ledger = Ledger(on_error)
        self._reader = RequestReader(max_shard_size, save_original_format)
        self._earned = Earned()
        self._staging_thread = StagingThread()
        self._pool = ArenaPool(max_in_flight, max_host_bytes, self._arena_added, self._arena_dropped)
        self._supervisor = Supervisor(options.root, self._lock, writer, self._pool.arenas, self._reporter)
        self._context = Context(
            root=options.root,
            retention=None if retention is None else retention.spec(),
            supervisor=self._supervisor,
            reporter=self._reporter,
            release=self._pool.release,
            ended=self._save_ended,
        )
        self._serials = itertools.count(1)
        self._saving = threading.Lock()  # one save() at a time goes from request to staged copy
        self._saver = 0  # the thread inside
        self._closed = ""  # why no more saves are taken
        # touched under _saving only:
        self._plan: SavePlan | None = None
        self._planned: tuple[Content, ...] = ()
        self._overlap = staging == "overlap"
        self._warned_of_waves = False
        GATE.install()
        _LIVING.add(self)

    def __repr__(self) -> str:
        state = self._closed or f"{len(self._ledger)} in flight"
        return f"<AsyncCheckpointer {self._options.root!r}: {state}>"

    @property
    def root(self) -> Path:
        """Where the checkpoints are, as an absolute path."""
        return Path(self._options.root)

    @property
    def closed(self) -> bool:
        """Whether no more saves are taken."""
        return bool(self._closed)

    # -- saving

    def save(
        self,
        step: int,
        *,
        model: Any = None,
        optimizer: Any = None,
        scheduler: Any = None,
        dataloader: Any = None,
        scaler: Any = None,
        processor: Any = None,
        config: Any = None,
        extra: Any = None,
        metrics: Mapping[str, float] | None = None,
    ) -> SaveHandle:
        """Save everything as it is now to `root/checkpoint-{step}`; the same step again replaces the directory.

        `model`, `optimizer` and `scheduler` are one object or a mapping of names to objects (each named model gets a directory of
        its name). `dataloader` and `scaler` have `state_dict()`. `processor` has `save_pretrained(directory)`. `config` becomes
        `vembed_config.json`. `extra` is nested dicts, lists and tuples of JSON scalars, tensors, numpy arrays and bytes.

        When this returns, everything may be changed by the next `optimizer.step()` (with `staging="blocking"`: by anything), and
        the checkpoint will be what it was at the call. Other changes before `handle.wait_staged()` returns are noticed where
        they can be, and fail the save.

        Raises `PlanError` for what cannot be saved, before anything is touched; `CheckpointerBusy` with `when_busy="error"`;
        `CheckpointerClosed`; and once what an earlier save failed with (see `on_error`): then nothing of this call was saved,
        and the call may be repeated.
        """
        objects = Objects(model, optimizer, scheduler, dataloader, scaler, processor, config, extra, metrics)
        if step is None:
            raise PlanError("step is None; use a whole number of at least 0")
        return self.save_as(names.checkpoint(step), step, objects)

    def save_as(self, directory: str, step: int | None, objects: Objects) -> SaveHandle:
        """`save()` under any name: publish `objects` as `root/directory`. What the integrations build on."""
        begun = time.perf_counter()
        self._refuse_if_closed()
        self._ledger.raise_unread()
        with self._alone():
            request = self._reader.read(directory, step, objects)
            save_plan = self._plan_for(request)
            save = Save(next(self._serials), request, save_plan, begun, self._context)
            self._ledger.begun(save.handle, self._refuse_if_closed)
            try:
                self._start(save, request, save_plan)
            except CheckpointerBusy as error:
                self._ledger.skipped(save.handle)
                if self._options.when_busy == "error":
                    raise
                save.handle._skip(error)
                self._reporter.emit(Event("backpressure", "failed", request.save_id, step, detail=str(error)))
            except (StageError, WriteError) as error:
                if self._options.on_error == "raise":
                    self._ledger.withdrawn(save.handle)
                    raise
                self._save_ended(save.handle, error)
                save.handle._move(SaveState.FAILED, error=error)
            except BaseException:
                self._ledger.withdrawn(save.handle)
                raise
            save.stalled(time.perf_counter() - begun)
        return save.handle

    def _start(self, save: Save, request: Request, save_plan: SavePlan) -> None:
        needed = required_bytes(save_plan, request)
        self._supervisor.check()
        self._staging_thread.check()
        arena = self._acquire(request, needed)
        save.arena = arena
        try:
            self._fill(save, request, arena, needed)
        except BaseException as error:
            save.abandon()
            if isinstance(error, RuntimeError):  # torch could not copy
                raise StageError(f"step {request.step}: the state could not be copied: {error}") from error
            raise

    def _fill(self, save: Save, request: Request, arena: Arena, needed: int) -> None:
        if arena.size < needed:
            self._warn_of_waves(arena.size, needed)
            save.pass_in_waves()
            return
        save.stage(self._divide(request))
        self._staging_thread.submit(save.hand_over())

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One thread at a time; a signal handler that interrupts its own thread's `save()` is refused instead of waiting for it."""
        if self._saver == threading.get_ident():
            raise CheckpointerBusy(
                "save() was called while this thread is inside save(), by a signal handler perhaps; "
                "let the handler set a flag, and save at the next step"
            )
        with self._saving:
            self._saver = threading.get_ident()
            try:
                yield
            finally:
                self._saver = 0

    def _divide(self, request: Request) -> Division:
        if not self._overlap:
            return all_now(len(request.tensors))
        key = tuple(map(id, (*request.contents, *(state.optimizer for state in request.optimizers))))
        return self._earned.divide(key, request.tensors, request.labels, request.owners, request.volatile)

    def _plan_for(self, request: Request) -> SavePlan:
        known = self._planned
        if self._plan is None or len(known) != len(request.contents) or any(map(is_not, known, request.contents)):
            with self._reporter.stage("plan", request.save_id, request.step):
                self._plan = plan(request.contents)
                self._planned = request.contents  # held: as long as they are, nothing else has their identity
        return self._plan

    def _acquire(self, request: Request, needed: int) -> Arena:
        try:
            try:
                arena = self._pool.acquire(needed, "error", self._supervisor.check)
            except CheckpointerBusy:
                if self._options.when_busy != "wait":
                    raise
                with self._reporter.stage("backpressure", request.save_id, request.step, needed):
                    arena = self._pool.acquire(needed, "wait", self._supervisor.check)
        except (MemoryError, OSError) as error:
            raise StageError(f"step {request.step}: no host memory for {needed} bytes of state: {error}") from error
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
            warnings.warn(
                f"the state needs an arena of {needed} bytes, {allowed} are allowed or available: every save passes through it "
                "in parts while training waits",
                stacklevel=4,
            )

    def prewarm(self, *, model: Any = None, optimizer: Any = None) -> None:
        """Plan, allocate, and fault the pages in behind your back, so that the first save costs what every save costs.

        An optimizer without state yet (AdamW before its first step) is sized again after that step. `wait()` returns once the
        pages are there. Raises what `save()` would raise for these objects.
        """
        self._refuse_if_closed()
        with self._alone():
            self._reserve(model, optimizer)
        waiting = [
            o for o in map(unwrap_optimizer, named("optimizer", optimizer).values()) if not getattr(o, "state", True)
        ]
        if waiting:
            GATE.add(_AfterFirstStep(self, model, optimizer, waiting))

    def _reserve(self, model: Any, optimizer: Any) -> None:
        with self._reporter.stage("prewarm"):
            request = self._reader.read("", None, Objects(model=model, optimizer=optimizer))
            needed = required_bytes(plan(request.contents), request)
            try:
                self._pool.release(self._pool.acquire(needed, "error", self._supervisor.check))
            except CheckpointerBusy:
                pass  # a save is under way; the arena it has, or the next, is what there is to warm

    # -- waiting and looking

    def wait(self, timeout: float | None = None) -> None:
        """Return when no save is in flight and prewarming is complete. Raises TimeoutError after `timeout` seconds.

        Failures are not raised here: they stay on their handles.
        """
        self._ledger.wait(timeout, lambda: self._supervisor.populating, self._supervisor.check)

    def statistics(self) -> dict[str, Any]:
        """Counts of saves (started, committed, failed, skipped), saves in flight, bytes still to be written, arenas free and busy,
        host bytes held, whether overlap is on, and the last failure."""
        return {
            **self._ledger.statistics(),
            **self._pool.statistics(),
            "overlap": self._overlap,
            "writer_pid": self._supervisor.writer_pid,
        }

    async def events(self) -> AsyncIterator[Event]:
        """Every event from now on, until `close()`. Works on any anyio backend; holds no thread."""
        bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        received: deque[Event] = deque(maxlen=10_000)

        ringing = threading.Lock()
        over = False

        def sink(event: Event) -> None:
            received.append(event)
            with ringing:
                if not over:  # else the number may be somebody else's file by now
                    os.eventfd_write(bell, 1)

        self._reporter.add_sink(sink)
        try:
            while True:
                while received:
                    yield received.popleft()
                if self._reporter.closed:
                    return
                with anyio.move_on_after(0.5):
                    await anyio.wait_readable(bell)
                    os.eventfd_read(bell)
        finally:
            self._reporter.remove_sink(sink)
            with ringing:
                over = True
                os.close(bell)

    # -- ending

    def close(self, timeout: float = 600.0) -> None:
        """Wait for the saves in flight, end the writer and let go of root and memory. May be called again.

        Raises TimeoutError if that takes longer than `timeout` seconds (the writer process then finishes on its own), else once
        what a save failed with that nobody has read.
        """
        deadline = time.monotonic() + timeout
        with self._ledger.changing():
            if self._closed:
                return
            self._closed = "closed"
        try:
            self.wait(timeout)
        finally:
            ended = self._end(deadline)
        if not ended:
            raise TimeoutError(
                f"{self._options.root}: the writer has not ended after {timeout} s; it finishes on its own"
            )
        self._ledger.raise_unread()

    def _end(self, deadline: float) -> bool:
        self._staging_thread.close(max(deadline - time.monotonic(), 0.1))
        ended = self._supervisor.close(max(deadline - time.monotonic(), 0.1))
        if ended:
            self._pool.close()
        self._lock.close()
        self._reporter.close(max(deadline - time.monotonic(), 0.1))
        _LIVING.discard(self)
        return ended

    def __enter__(self) -> AsyncCheckpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except Exception:
            logger.exception("%s: saves failed while another exception ended the training", self._options.root)

    async def __aenter__(self) -> AsyncCheckpointer:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self.__exit__, kind, error, traceback)

    # -- bookkeeping

    def _save_ended(self, handle: SaveHandle, error: CheckpointError | None) -> None:
        if isinstance(error, TornSnapshot):
            self._overlap = False
        self._ledger.ended(handle, error)

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise CheckpointerClosed(f"{self._options.root}: the checkpointer is {self._closed}; make a new one")

    def _arena_added(self, arena: Arena) -> None:
        self._supervisor.add_arena(arena)
        self._reporter.emit(Event("arena", "complete", bytes=arena.size))

    def _arena_dropped(self, arena: Arena) -> None:
        self._supervisor.drop_arena(arena)

    def _forget(self) -> None:
        """In a forked child: the parent's writer, lock and memory are not ours."""
        self._closed = "that of the parent process"
        self._lock.close()
        self._supervisor.forget()
        self._pool.forget()


class _AfterFirstStep:
    """Waits at the barrier for the first step of optimizers that had no state, then has the arena sized again."""

    def __init__(self, checkpointer: AsyncCheckpointer, model: Any, optimizer: Any, waiting: Sequence[Any]) -> None:
        self._checkpointer = weakref.ref(checkpointer)
        self._waiting = [weakref.ref(inner) for inner in waiting]
        self._objects = [
            (name, weakref.ref(value)) for what in (model, optimizer) for name, value in named("object", what).items()
        ]
        self._models = len(named("model", model))

    def barrier(self) -> None:
        checkpointer = self._checkpointer()
        over = checkpointer is None or checkpointer.closed
        if not over and any(inner is not None and not inner.state for inner in (ref() for ref in self._waiting)):
            return
        GATE.remove(self)
        alive = [(name, ref()) for name, ref in self._objects]
        if checkpointer is None or over or any(value is None for _, value in alive):
            return
        model, optimizer = (_unnamed(part) for part in (alive[: self._models], alive[self._models :]))
        try:
            with checkpointer._alone():
                checkpointer._reserve(model, optimizer)
        except Exception as error:  # not the training step's business; `save()` will raise it
            logger.warning("%s: prewarming after the first step failed: %s", checkpointer.root, error)


def _unnamed(objects: Sequence[tuple[str, Any]]) -> Any:
    """The inverse of `named`."""
    return objects[0][1] if [name for name, _ in objects] == [""] else dict(objects)


@atexit.register
def _drain_at_exit() -> None:
    for checkpointer in list(_LIVING):
        if checkpointer._closed:
            continue
        try:
            checkpointer.close(EXIT_DEADLINE)
        except Exception as error:  # every root gets its turn
            print(f"vembed_async_ckpt: at exit: {type(error).__name__}: {error}", file=sys.stderr)


def _forget_in_child() -> None:
    for checkpointer in list(_LIVING):
        checkpointer._forget()
    _LIVING.clear()


os.register_at_fork(after_in_child=_forget_in_child)
