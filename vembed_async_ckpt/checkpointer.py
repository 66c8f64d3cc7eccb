"""The facade: what a user holds. All that works is its session's; when it is dropped, that ends."""

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
from ._engine.options import OnError, Options, Staging, WhenBusy, WriterKind, root_path
from ._engine.session import Session
from ._format import names
from ._memory.profiling import recorded
from .errors import CheckpointError, PlanError
from .events import Event, Sink
from .handle import SaveHandle, SaveState
from .policies import SavePolicy
from .retention import Policy

logger = logging.getLogger("vembed_async_ckpt")


class AsyncCheckpointer:
    """Saves a training's state under one root while the training goes on.

    Behaviour. `root`: directory of the checkpoints, created if need be. `retention`: which checkpoints to keep (`KeepLast(3) |
    KeepBest("loss")`), None for all. `when_busy`: what `save()` does when earlier saves hold every arena: "wait", "skip"
    (the handle says so) or "error". `on_error`: "raise" a background failure once more at the next `save()` or at `close()`
    unless it was read from its handle, or "warn": log it at once and show it in `statistics()`. `save_original_format`,
    `max_shard_size`: as `save_pretrained` has them. `sinks`: called with every `Event`, on a thread of their own. `policy`: when
    `should_save()` says so (`every(steps=500) | on_request()`, see `vembed_async_ckpt.policies`). `latest_link`: keep a
    relative link `latest` in the root that points to the newest checkpoint; something else of that name is left alone.
    `progress`: show each save that is being written in the last line, where standard error is a terminal.

    Performance. `staging`: "overlap" copies what only an optimizer changes while forward and backward run, and lets
    `optimizer.step()` wait for it; "blocking" copies all of it in `save()`. `writer`: a "process" of its own, which survives the
    trainer, or a "thread". `max_in_flight`: arenas, that is saves under way at once; each takes host memory of the size of the
    state; a further one is taken only where as much stays free. `max_host_bytes`: for all arenas together; None is what the
    machine and its cgroup have left. A state that does not fit passes through a smaller arena in parts while training waits.

    The constructor takes the root's lock (raises `CheckpointerBusy` if another process saves there; waits up to 60 s for the
    writer of a dead trainer to finish), and starts the writer, which sweeps what a crash left.
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
            sinks=tuple(sinks),
            policy=policy,
            latest_link=latest_link,
            progress=progress,
        )
        self._session = Session(self._options)
        self._engine, self._reporter, self._decider = (
            self._session.engine,
            self._session.reporter,
            self._session.decider,
        )
        self._dropped = weakref.finalize(self, self._session.drop)
        self._dropped.atexit = False  # at exit all sessions are closed, and failures are told

    def __repr__(self) -> str:
        state = self._session.closed or f"{len(self._session.ledger)} in flight"
        return f"<AsyncCheckpointer {self._options.root!r}: {state}>"

    @property
    def root(self) -> Path:
        """Where the checkpoints are, as an absolute path."""
        return Path(self._options.root)

    @property
    def closed(self) -> bool:
        """Whether no more saves are taken."""
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
        """Save everything as it is now to `root/checkpoint-{step}`; the same step again replaces the directory.

        `model`, `optimizer` and `scheduler` are one object or a mapping of names to objects (each named model gets a directory of
        its name). `dataloader` and `scaler` have `state_dict()`. `processor` has `save_pretrained(directory)`. `config` becomes
        `vembed_config.json`. `extra` is nested dicts, lists and tuples of JSON scalars, tensors, numpy arrays, bytes
        and other data: enums, dataclasses, paths, dates, dtypes, deques, sets. `metrics` are numbers by name, NaN included.

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
        step = step_number(step)
        if all(what is None for what in (model, optimizer, scheduler, dataloader, scaler, processor, config, extra)):
            raise PlanError(
                f"step {step}: nothing was given to save; pass model=, optimizer= and what else the training holds"
            )
        return self.save_as(names.checkpoint(step), step, objects)

    @in_neutral_modes
    def save_as(self, directory: str, step: int | None, objects: Objects) -> SaveHandle:
        """`save()` under any name: publish `objects` as `root/directory`. What the integrations build on."""
        begun = time.perf_counter()
        with _signals.held():
            self._session.refuse_if_closed()
            with recorded("save"):
                handle = self._engine.save(directory, step, objects, begun)
            if self._decider is not None and handle.state is not SaveState.SKIPPED:
                self._decider.saved(step, objects.metrics, begun)
            if self._session.progress is not None:
                self._session.progress.show(handle)
            return handle

    def should_save(self, step: int, metrics: Mapping[str, float] | None = None) -> bool:
        """Whether to save now, at the end of `step`, by the policy. Ask at every step. On every rank the answer is the same.

        `metrics` are for `on_best`. Raises ValueError if the checkpointer was made without a policy, and `CheckpointerClosed`.
        """
        decider = self._decider
        if decider is None or self._session.closed:
            self._session.refuse_if_closed()
            raise ValueError("should_save() needs a policy: AsyncCheckpointer(root, policy=every(steps=500))")
        return decider.ask(step, metrics)

    @in_neutral_modes
    def prewarm(self, *, model: Any = None, optimizer: Any = None) -> None:
        """Plan, allocate, and fault the pages in behind your back, so that the first save costs what every save costs.

        An optimizer without state yet (AdamW before its first step) is sized again after that step. `wait()` returns once the
        pages are there. Raises what `save()` would raise for these objects.
        """
        with _signals.held():
            self._session.refuse_if_closed()
            self._engine.prewarm(model, optimizer)

    # -- waiting and looking

    @in_neutral_modes
    def wait(self, timeout: float | None = None) -> None:
        """Return when no save is in flight and prewarming is complete. Raises TimeoutError after `timeout` seconds.

        Failures are not raised here: they stay on their handles.
        """
        self._session.wait(timeout)

    def in_flight(self) -> list[SaveHandle]:
        """The saves that have not ended yet."""
        return self._session.in_flight()

    def statistics(self) -> dict[str, Any]:
        """Counts of saves (started, committed, failed, skipped), saves in flight, bytes still to be written, arenas free and busy,
        host bytes held, whether the newest save was copied beside the training, and the last failure."""
        with _signals.held():
            return {**self._session.ledger.statistics(), **self._engine.statistics()}

    async def events(self) -> AsyncIterator[Event]:
        """Every event from now on, until `close()`. Works on any anyio backend; holds no thread."""
        bell = Bell()
        received: deque[Event] = deque(maxlen=10_000)

        ringing = threading.Lock()
        over = False

        def sink(event: Event) -> None:
            received.append(event)
            with ringing:
                if not over:  # else the number may be somebody else's file by now
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
        """Wait for the saves in flight, end the writer and let go of root and memory. May be called again.

        Raises TimeoutError if that takes longer than `timeout` seconds (the writer process then finishes on its own), else once
        what a save failed with that nobody has read.
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
