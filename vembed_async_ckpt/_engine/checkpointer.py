"""The facade: it wires options, ledger, reporter and the part of this rank, and decides nothing else."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import anyio

from .. import _signals
from .._arena.profiling import recorded
from .._request.request import Objects
from .._store import names
from .._store.retention import Policy
from ..errors import CheckpointerClosed, CheckpointError, PlanError
from ..events import Event, Reporter, Sink
from ..policies import SavePolicy
from .follower import Follower
from .handle import SaveHandle, SaveState
from .leader import Leader
from .ledger import Ledger
from .options import OnError, Options, Staging, WhenBusy, WriterKind, root_path
from .ranks import Ranks
from .steps import StepClock
from .when import Decider, refuse_for_ranks

logger = logging.getLogger("vembed_async_ckpt")
EXIT_DEADLINE = 600.0  # seconds for pending saves at interpreter exit

_LIVING: weakref.WeakSet[AsyncCheckpointer] = weakref.WeakSet()


class AsyncCheckpointer:
    """Saves a training's state under one root while the training goes on.

    Behaviour. `root`: directory of the checkpoints, created if need be. `retention`: which checkpoints to keep (`KeepLast(3) |
    KeepBest("loss")`), None for all. `when_busy`: what `save()` does when earlier saves hold every arena: "wait", "skip"
    (the handle says so) or "error". `on_error`: "raise" a background failure once more at the next `save()` or at `close()`
    unless it was read from its handle, or "warn": log it at once and show it in `statistics()`. `save_original_format`,
    `max_shard_size`: as `save_pretrained` has them. `sinks`: called with every `Event`, on a thread of their own. `policy`: when
    `should_save()` says so (`every(steps=500) | on_request()`, see `vembed_async_ckpt.policies`). `latest_link`: keep a
    relative link `latest` in the root that points to the newest checkpoint; something else of that name is left alone.

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
        policy: SavePolicy | None = None,
        latest_link: bool = False,
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
            policy=policy,
            latest_link=latest_link,
        )
        self._closed = ""  # why no more saves are taken
        self._ended = False  # and all is given back
        self._closer = 0  # the thread that closes it
        with _signals.held():
            self._begin()

    def _begin(self) -> None:
        policy = self._options.policy
        self._reporter = Reporter(self._options.sinks)
        self._ledger = Ledger(self._options.on_error)
        ranks = Ranks.of_this_process(self._options.root)
        parts = (self._ledger, self._reporter, self._refuse_if_closed)
        self._engine: Leader | Follower
        self._decider: Decider | None = None
        self._clock: StepClock | None = None
        try:
            refuse_for_ranks(policy, 1 if ranks is None else ranks.world_size)
            if ranks is None or ranks.rank == 0:
                self._engine = Leader(self._options, ranks, *parts)
            else:
                self._engine = Follower(self._options, ranks, *parts)
        except BaseException:
            self._reporter.close(1.0)
            if ranks is not None:
                ranks.close(1.0)
            raise
        try:
            if policy is not None:
                self._decider = Decider(policy, self._options.root, self._reporter)
        except BaseException:
            self._end(time.monotonic() + 10.0)
            raise
        if self._reporter.wants_steps:
            self._clock = StepClock(self._reporter)
            if self._decider is not None:
                self._decider.time_steps_with(self._clock)
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
        they can be, and fail the save. Not noticed: a write through `.data`, numpy or another process that leaves a tensor's last
        8 bytes as they were, and storage that is freed at the very moment it is read.

        A signal handler may save, wait and close: handlers run after the call, or where it waits. (`CheckpointerBusy`, and the save
        that was interrupted goes on, while a state larger than its memory passes in parts.)

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
        with _signals.held():
            self._refuse_if_closed()
            with recorded("save"):
                handle = self._engine.save(directory, step, objects, begun)
            if self._decider is not None and handle.state is not SaveState.SKIPPED:
                self._decider.saved(step, objects.metrics, begun)
            return handle

    def should_save(self, step: int, metrics: Mapping[str, float] | None = None) -> bool:
        """Whether to save now, at the end of `step`, by the policy. Ask at every step. On every rank the answer is the same.

        `metrics` are for `on_best`. Raises ValueError if the checkpointer was made without a policy, and `CheckpointerClosed`.
        """
        decider = self._decider
        if decider is None or self._closed:
            self._refuse_if_closed()
            raise ValueError("should_save() needs a policy: AsyncCheckpointer(root, policy=every(steps=500))")
        return decider.ask(step, metrics)

    def prewarm(self, *, model: Any = None, optimizer: Any = None) -> None:
        """Plan, allocate, and fault the pages in behind your back, so that the first save costs what every save costs.

        An optimizer without state yet (AdamW before its first step) is sized again after that step. `wait()` returns once the
        pages are there. Raises what `save()` would raise for these objects.
        """
        with _signals.held():
            self._refuse_if_closed()
            self._engine.prewarm(model, optimizer)

    # -- waiting and looking

    def wait(self, timeout: float | None = None) -> None:
        """Return when no save is in flight and prewarming is complete. Raises TimeoutError after `timeout` seconds.

        Failures are not raised here: they stay on their handles.
        """
        with _signals.held():
            self._engine.refuse_inside_save("wait()")
            self._ledger.wait(timeout, lambda: self._engine.prewarming, self._engine.check)

    def in_flight(self) -> list[SaveHandle]:
        """The saves that have not ended yet."""
        with _signals.held():
            return self._ledger.in_flight()

    def statistics(self) -> dict[str, Any]:
        """Counts of saves (started, committed, failed, skipped), saves in flight, bytes still to be written, arenas free and busy,
        host bytes held, whether overlap is on, and the last failure."""
        with _signals.held():
            return {**self._ledger.statistics(), **self._engine.statistics()}

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
            with _signals.held(), ringing:
                over = True
                os.close(bell)

    # -- ending

    def close(self, timeout: float = 600.0) -> None:
        """Wait for the saves in flight, end the writer and let go of root and memory. May be called again.

        Raises TimeoutError if that takes longer than `timeout` seconds (the writer process then finishes on its own), else once
        what a save failed with that nobody has read.
        """
        with _signals.held():
            self._engine.refuse_inside_save("close()")
            self._close(timeout)

    def _close(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        if not self._may_close(deadline):
            return
        try:
            try:
                self.wait(timeout)
            finally:
                ended = self._end(deadline)
                self._ended = True
        finally:
            self._closer = 0
        if not ended:
            raise TimeoutError(
                f"{self._options.root}: the writer has not ended after {timeout} s; it finishes on its own"
            )
        self._ledger.raise_unread()

    def _may_close(self, deadline: float) -> bool:
        """Whether this thread is to close it: not if that is done, or once another thread has done it. A signal handler that
        interrupted `close()` does it all the same."""
        while True:
            with self._ledger.changing():
                if self._ended:
                    return False
                if self._closer in (0, threading.get_ident()):
                    self._closer = threading.get_ident()
                    self._closed = self._closed or "closed"
                    return True
            if time.monotonic() >= deadline:
                raise TimeoutError(f"{self._options.root}: another thread has not closed the checkpointer in time")
            time.sleep(_signals.SLICE)
            _signals.deliver()

    def _end(self, deadline: float) -> bool:
        if self._decider is not None:
            self._decider.close()
        ended = self._engine.close(deadline)
        if self._clock is not None:
            self._clock.close()
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

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise CheckpointerClosed(f"{self._options.root}: the checkpointer is {self._closed}; make a new one")

    def _forget(self) -> None:
        """In a forked child: the parent's writer, lock and memory are not ours."""
        self._closed = "that of the parent process"
        self._ended = True
        self._engine.forget()


def living() -> list[AsyncCheckpointer]:
    """The checkpointers of this process that are not closed."""
    return [checkpointer for checkpointer in list(_LIVING) if not checkpointer.closed]


class _Unclean:
    """A standard stream as it was, but the interpreter's last flush of it fails: that is how Python itself knows that cleaning up
    went wrong, and ends with exit code 120 (see `sys.exit`) after everybody's exit handlers have run."""

    closed = False

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def flush(self) -> None:
        if self._stream is not None and not getattr(self._stream, "closed", False):
            self._stream.flush()
        if sys.is_finalizing():
            raise OSError("checkpoints were lost at exit")


@atexit.register
def _drain_at_exit() -> None:
    """What nobody closed is closed, within `EXIT_DEADLINE`. What failed is printed, and the exit code is 120, whatever it would
    have been: no other way is left to say it, and a script that looks at the code must not go on as if all had been saved."""
    interrupt: BaseException | None = None
    for checkpointer in list(_LIVING):
        if checkpointer._ended:
            continue
        try:
            checkpointer.close(EXIT_DEADLINE)
        except BaseException as error:  # every root gets its turn
            interrupt = interrupt or (None if isinstance(error, Exception) else error)
            said = f"vembed_async_ckpt: at exit: {type(error).__name__}: {error}"
            with contextlib.suppress(OSError, ValueError):  # nobody reads it, but the exit code still says it
                if sys.stderr is not None:
                    print(said, file=sys.stderr)
            if not isinstance(sys.stderr, _Unclean):
                sys.stderr = _Unclean(sys.stderr)
    if interrupt is not None:
        raise interrupt


def _forget_in_child() -> None:
    for checkpointer in list(_LIVING):
        checkpointer._forget()
    _LIVING.clear()


os.register_at_fork(after_in_child=_forget_in_child)
