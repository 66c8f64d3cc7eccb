"""Events: immutable records of what happened. They go to the logger, to the user's sinks and to `events()`.

A stage is reported as `started`, then as `complete` or `failed`. Sinks run on one reporting thread, in order. They
never run on the training thread or on the thread that watches the writer. So a slow or failing sink delays reports, not
saves.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from . import _signals

logger = logging.getLogger("vembed_async_ckpt")

Stage = Literal[
    "plan",
    "arena",
    "backpressure",
    "stage",
    "barrier",
    "held",
    "write",
    "save",
    "writer",
    "prewarm",
    "call",
    "retention",
    "after_commit",
    "step",
]
Phase = Literal["started", "complete", "failed"]


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened to a save (`save_id`, `step`) or, with an empty `save_id`, to the engine.

    - `seconds`: how long the stage took; 0.0 in `started`. For `held`, how long the device waited for the copy.
    - `bytes`: the bytes that the stage moved.
    - `detail`: one line of text for people. For `after_commit`, what was done with the checkpoint, or the function's name.
    - `time`: when the stage ended, in seconds since the epoch.
    - `parts`: seconds of the stage's parts. For `write`: the writing and the commit. For `step`: each training step
      since the last such event.

    `step` events go only to sinks whose attribute `wants_steps` is true.
    """

    stage: Stage
    phase: Phase
    save_id: str = ""
    step: int | None = None
    bytes: int = 0
    seconds: float = 0.0
    detail: str = ""
    time: float = field(default_factory=time.time)
    parts: tuple[float, ...] = ()


Sink = Callable[[Event], None]


class Reporter:
    """Delivers events and callbacks in order, on one daemon thread.

    An error in a sink never reaches the reporting code.
    """

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        self._sinks = list(sinks)
        self.closed = False  # closed, and everything is delivered
        self._ending = threading.Lock()
        self._ended = False
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="vembed-ckpt-reporter", daemon=True)
        self._thread.start()

    def emit(self, event: Event) -> None:
        """Queue `event` and return at once."""
        self.call(lambda: self._deliver(event))

    def call(self, callback: Callable[[], None]) -> None:
        """Queue a callback behind the events already queued.

        After `close` it runs at once. Its exceptions are logged.
        """
        with _signals.held(), self._ending:
            if not self._ended:
                self._queue.put(callback)
                return
        _run_logged(callback)

    @property
    def wants_steps(self) -> bool:
        """Whether a sink wants the events of the training's steps."""
        return any(map(_wants_steps, self._sinks))

    def add_sink(self, sink: Sink) -> None:
        self._sinks.append(sink)

    def remove_sink(self, sink: Sink) -> None:
        with contextlib.suppress(ValueError):
            self._sinks.remove(sink)

    @contextlib.contextmanager
    def stage(self, stage: Stage, save_id: str = "", step: int | None = None, bytes: int = 0) -> Iterator[None]:
        """Report a block as one stage: `started`, then `complete` or `failed` with the seconds it took."""
        started = time.perf_counter()
        self.emit(Event(stage, "started", save_id, step, bytes))
        try:
            yield
        except BaseException as error:
            took = time.perf_counter() - started
            self.emit(Event(stage, "failed", save_id, step, bytes, took, f"{type(error).__name__}: {error}"))
            raise
        self.emit(Event(stage, "complete", save_id, step, bytes, time.perf_counter() - started))

    def close(self, timeout: float) -> None:
        """Deliver what is queued, for at most `timeout` seconds, and end the thread."""
        with _signals.held(), self._ending:
            self._ended = True
            self._queue.put(None)
        _signals.join(self._thread, timeout)
        self.closed = True

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            _run_logged(job)

    def _deliver(self, event: Event) -> None:
        level = logging.WARNING if event.phase == "failed" else logging.DEBUG
        logger.log(level, "%s %s step=%s %.3fs %s", event.stage, event.phase, event.step, event.seconds, event.detail)
        for sink in tuple(self._sinks):
            if event.stage == "step" and not _wants_steps(sink):
                continue
            try:
                sink(event)
            except Exception:
                logger.exception("an event sink failed; the save is not affected")


def _wants_steps(sink: Sink) -> bool:
    return bool(getattr(sink, "wants_steps", False))


def _run_logged(callback: Callable[[], None]) -> None:
    try:
        callback()
    except Exception:
        logger.exception("a callback of a checkpoint failed; the save is not affected")
