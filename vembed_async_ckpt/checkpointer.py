"""`AsyncCheckpointer`, the object that the user holds.

Its session does the work, and ends when the object is dropped.
"""

from __future__ import annotations

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
from typing import Any, NoReturn

import anyio

from . import _signals
from ._bell import Bell
from ._capture.arguments import step_number
from ._capture.modes import in_neutral_modes
from ._capture.request import Objects
from ._engine.after_commit import AfterCommit
from ._engine.gate import Gate
from ._engine.options import OnError, Options, Staging, WhenBusy, WriterKind, root_path
from ._engine.session import Session
from ._engine.stop import Drain, Stop
from ._format import names
from ._memory.profiling import recorded
from .errors import CheckpointError, PlanError
from .events import Event, Sink
from .handle import SaveHandle, SaveState
from .policies import SavePolicy
from .retention import Policy

logger = logging.getLogger("vembed_async_ckpt")


class AsyncCheckpointer:
    """Saves the state of a training under one root while the training goes on.

    Behaviour:

    - `root`: directory of the checkpoints; created if need be.
    - `retention`: which checkpoints to keep (`KeepLast(3) | KeepBest("loss")`); None keeps all.
    - `when_busy`: what `save()` does when earlier saves hold every arena: "wait", "skip" (the handle's state is
      SKIPPED) or "error".
    - `on_error`: what happens to a background failure that nobody read from its handle. "raise": raise it once, at the
      next `save()` or at `close()`. "warn": log it at once and show it in `statistics()`.
    - `max_shard_size`, `save_original_format`: as in `save_pretrained`.
    - `sinks`: called with every `Event`, on a thread of their own.
    - `policy`: when `should_save()` returns True (`every(steps=500) | on_request()`, see `vembed_async_ckpt.policies`).
    - `latest_link`: keep a relative link `latest` in the root that points to the newest checkpoint. Something else of
      that name is left alone.
    - `after_commit`: what is done with each committed checkpoint, in this order, in the background: functions that take its
      `CheckpointInfo`, and `upload()` and `push_to_hub()` of `vembed_async_ckpt.shipping`. A function is called in this
      process, by the first rank, when the shipments before it are done. Shipments begin at once; a process of its own
      does them, which survives this one. All are tried again when they fail, are reported as events, and never fail a
      save. What was not shipped is shipped by the next run that saves here. Until then retention does not delete it.
      A save under the same name replaces it.
    - `max_unshipped`: how many checkpoints that retention does not keep may wait to be shipped. If more wait, the oldest
      is deleted without being shipped, which a `failed` event says. None: any number, so the disk may become full while
      the network is gone.
    - `progress`: show the save that is being written in the terminal's last line, if standard error is a terminal.

    Performance:

    - `staging`: "overlap" copies what only an optimizer changes while forward and backward run, and lets
      `optimizer.step()` wait for this copy. "blocking" copies everything in `save()`.
    - `writer`: a "process" of its own, which survives the trainer, or a "thread".
    - `max_in_flight`: number of arenas, that is of saves under way at once. Each takes host memory of the size of the
      state. A further arena is allocated only if as much memory stays free.
    - `max_host_bytes`: limit for all arenas together; None means what the machine and its cgroup have left. A state
      that does not fit passes through a smaller arena in parts, while training waits.

    The constructor takes the root's lock. It waits up to 60 s for the writer of a dead trainer to finish, and raises
    `CheckpointerBusy` if another process saves there. Then it starts the writer, which cleans up what a crash left.
    """

    @in_neutral_modes
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
        progress: bool = False,
        after_commit: Sequence[AfterCommit] = (),
        max_unshipped: int | None = None,
    ) -> None:
        if not sys.platform.startswith("linux"):
            raise CheckpointError("saving needs Linux (memfd, flock, O_DIRECT); checkpoints can be loaded everywhere")
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
            sinks=sinks,
            policy=policy,
            latest_link=latest_link,
            progress=progress,
            after_commit=after_commit,
            max_unshipped=max_unshipped,
        )
        self._session = Session(self._options)
        self._engine, self._reporter, self._decider = (
            self._session.engine,
            self._session.reporter,
            self._session.decider,
        )
        self._stop: Stop | None = None
        self._gate: Gate | None = None
        self._dropped = weakref.finalize(self, self._session.drop)
        self._dropped.atexit = False  # at exit all sessions are closed, and failures are reported

    def __repr__(self) -> str:
        state = self._session.closed or f"{len(self._session.ledger)} in flight"
        return f"<AsyncCheckpointer {self._options.root!r}: {state}>"

    @property
    def root(self) -> Path:
        """The directory of the checkpoints, as an absolute path."""
        return Path(self._options.root)

    @property
    def closed(self) -> bool:
        """Whether no more saves are accepted."""
        return bool(self._session.closed)

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
        """Save everything as it is now to `root/checkpoint-{step}`. Saving the same step again replaces the directory.

        - `model`, `optimizer`, `scheduler`: one object, or a mapping of names to objects (each named model gets a
          directory of its name).
        - `dataloader`, `scaler`: objects with `state_dict()`.
        - `processor`: an object with `save_pretrained(directory)`.
        - `config`: saved as `vembed_config.json`.
        - `extra`: nested dicts, lists and tuples of JSON scalars, tensors, numpy arrays, bytes and other data: enums,
          dataclasses, paths, dates, dtypes, deques, sets.
        - `metrics`: numbers by name; NaN is allowed.

        After the call, the next `optimizer.step()` may change everything (with `staging="blocking"`, any code may), and
        the checkpoint still holds the state at the call. Other changes before `handle.wait_staged()` returns are
        detected where possible, and then the save fails. Two things are not detected: a write through `.data`, numpy or
        another process that leaves a tensor's last 8 bytes unchanged, and storage that is freed at the very moment it
        is read.

        If a model is divided among the ranks of this machine (FSDP, tensor parallelism), every rank must call this for
        the same step: each copies what it holds into one checkpoint. If a rank cannot, ends, saves something else, or
        does not call within 120 s, the save fails on every rank with the reason, and the training can go on.

        A signal handler may save, wait and close. It runs after this call, or while the call waits. One exception:
        while a state larger than its memory passes in parts, the handler gets `CheckpointerBusy` and the interrupted
        save goes on.

        Raises `PlanError` for what cannot be saved, before anything is touched. Raises `CheckpointerBusy` with
        `when_busy="error"`, and `CheckpointerClosed`. Also raises the failure of an earlier save once (see `on_error`):
        then nothing of this call was saved, and the call may be repeated.
        """
        objects = Objects(model, optimizer, scheduler, dataloader, scaler, processor, config, extra, metrics)
        step = step_number(step)
        given = (model, optimizer, scheduler, dataloader, scaler, processor, config, extra)
        if all(what is None or (isinstance(what, Mapping) and not what) for what in given):
            raise PlanError(
                f"step {step}: nothing was given to save; pass model=, optimizer= and what else the training holds"
            )
        return self.save_as(names.checkpoint(step), step, objects)

    @in_neutral_modes
    def save_as(self, directory: str, step: int | None, objects: Objects) -> SaveHandle:
        """Save `objects` as `root/directory`, like `save()` but under any name. The integrations use this."""
        begun = time.perf_counter()
        with _signals.held():
            self._session.refuse_if_closed()
            self._session.wait_before_last_save()
            with recorded("save"):
                handle = self._engine.save(directory, step, objects, begun)
            if self._decider is not None and handle.state is not SaveState.SKIPPED:
                self._decider.saved(step, objects.metrics, begun)
            if self._session.progress is not None:
                self._session.progress.show(handle)
            return handle

    def should_save(self, step: int, metrics: Mapping[str, float] | None = None) -> bool:
        """Return whether the policy says to save now, at the end of `step`.

        Call it at every step. All ranks get the same answer.

        `metrics` are for `on_best`. Raises ValueError if the checkpointer was made without a policy, and
        `CheckpointerClosed`.
        """
        decider = self._decider
        if decider is None or self._session.closed:
            self._session.refuse_if_closed()
            raise ValueError("should_save() needs a policy: AsyncCheckpointer(root, policy=every(steps=500))")
        return decider.ask(step, metrics)

    # -- stopping

    def stop_on(self, *signals: int, drain: Drain = "committed", grace: float = 30.0) -> None:
        """Let `signals` ask the training to stop: `stop_on(signal.SIGTERM, signal.SIGUSR1)`. Every rank calls it.

        The loop asks `should_stop(step)`, saves once more and leaves; `sys.exit(checkpointer.exit_code)`.

        - `grace`: seconds from the signal until the platform kills the process. `close()` returns within this time.
        - `drain`: what `close()` then waits for. "committed": the checkpoint is durable. "staged": the writer process
          has the state, and finishes it alone. A platform that ends all processes together (Slurm, Kubernetes, a pid
          namespace whose process 1 this is) loses a staged checkpoint, so this warns there. If the time runs out,
          "committed" falls back to "staged" and logs a warning.

        Handlers that were there before are called too. The handlers are set back by `close()`, unless a stop was asked
        for. A second signal, at least one second after the first, ends the process at once and prints which checkpoint
        is durable. Call this after other libraries have set their handlers. Raises ValueError for what makes no sense
        and outside of the main thread.
        """
        self._session.stop_on(signals, drain, grace)
        assert self._session.stop is not None
        self._stop, self._gate = self._session.stop, self._session.stop.gate

    def should_stop(self, step: int) -> bool:
        """Return whether to stop after `step`: save, then leave the loop.

        Call it at the end of every step, with rising numbers. All ranks get True for the same step, whichever of them
        got the signal: a few steps after it, as they agree without a collective. Raises ValueError without `stop_on()`.
        """
        gate = self._gate
        if gate is None or self._stop is None:
            raise ValueError("should_stop() needs stop_on(): checkpointer.stop_on(signal.SIGTERM)")
        gate.position = step
        return gate.closed and self._stop.reached(step)

    @property
    def exit_code(self) -> int:
        """For `sys.exit`: 128 + the number of the signal for which the training stops, 0 if there was none."""
        return 128 + self._stop.signum if self._stop is not None and self._stop.asked else 0

    @in_neutral_modes
    def prewarm(self, *, model: Any = None, optimizer: Any = None) -> None:
        """Make the plan, allocate the arena and fault its pages in, so that the first save is as fast as later ones.

        The pages are faulted in in the background; `wait()` returns once that is done. If an optimizer has no state yet
        (AdamW before its first step), the arena is sized again after that step. Raises what `save()` would raise for
        these objects. Does nothing if the model is divided among ranks: only a save, in which all ranks take part, can
        plan it.
        """
        with _signals.held():
            self._session.refuse_if_closed()
            self._engine.prewarm(model, optimizer)

    # -- waiting and looking

    @in_neutral_modes
    def wait(self, timeout: float | None = None) -> None:
        """Wait until no save is in flight and prewarming is complete. Raises TimeoutError after `timeout` seconds.

        Failures of saves are not raised here: they stay on their handles.
        """
        self._session.wait(timeout)

    def in_flight(self) -> list[SaveHandle]:
        """Return the saves that have not ended yet."""
        return self._session.in_flight()

    def statistics(self) -> dict[str, Any]:
        """Return counts of saves and figures of memory, by name.

        They are: saves started, committed, failed and skipped; saves in flight; bytes still to be written; arenas free
        and busy; host bytes held; whether the newest save was copied while training went on; the writer's process id;
        and the last failure.
        """
        with _signals.held():
            return {**self._session.ledger.statistics(), **self._engine.statistics()}

    async def events(self) -> AsyncIterator[Event]:
        """Yield every event from now on, until `close()`. Works on any anyio backend and holds no thread."""
        bell = Bell()
        received: deque[Event] = deque(maxlen=10_000)

        ringing = threading.Lock()
        over = False

        def sink(event: Event) -> None:
            received.append(event)
            with ringing:
                if not over:  # else the descriptor's number may belong to another file by now
                    bell.ring()

        self._reporter.add_sink(sink)
        try:
            while True:
                while received:
                    yield received.popleft()
                if self._reporter.closed:
                    return
                with anyio.move_on_after(0.5):
                    await anyio.wait_readable(bell.fd)
                    bell.clear()
        finally:
            self._reporter.remove_sink(sink)
            with _signals.held(), ringing:
                over = True
                bell.close()

    # -- ending

    @in_neutral_modes
    def close(self, timeout: float = 600.0) -> None:
        """Wait for the saves in flight and for `after_commit`, end the writer, and give up the lock and the memory.

        May be called again. If shipping keeps failing, this does not wait for it, and gives a warning.

        Raises TimeoutError if that takes longer than `timeout` seconds; the writer process then finishes on its own.
        Otherwise raises the failure of a save that nobody has read, once. After a signal of `stop_on()` it returns
        within the grace time, and with `drain="staged"` as soon as the writer has the state.
        """
        self._session.close(timeout)

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

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"an AsyncCheckpointer ({self._options.root}) cannot be pickled or copied: it has a writer process and a lock. "
            "Make one where it is needed, or leave it out with __getstate__"
        )
