"""Measures what saving costs a training, in the training's own loop. It works with any engine, ours or another.

    meter = StallMeter()
    for batch in loader:
        with meter.step():                      # the training step, with `optimizer.step()` in it
            train_step(batch)
        if due:
            with meter.save():                  # the call that saves
                handle = checkpointer.save(...)
            meter.watch(handle)                 # tells when the background part has ended
    print(meter.report())

As a sink, `AsyncCheckpointer(root, sinks=[meter])`, the meter learns of saves by itself. Then only `meter.step()` is
needed.

A step is *busy* if a save was in flight at any time during it, else *quiet*. The meter estimates how long busy steps
would have taken without a save. The estimate is the mean of two medians: that of the 16 quiet steps before the busy
ones and that of the 16 after. So neither a step time that drifts over the run nor a few slow steps change the result.
Time outside of `step()` and `save()` is not measured.
"""

from __future__ import annotations

import json
import random
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from statistics import median
from types import TracebackType
from typing import Any

from .ettr import GPUS, RESTART, Advice, advise, mtbf_of
from .events import Event, logger

NEIGHBOURS = 16  # quiet steps on either side of the busy ones
SAMPLES = 4096  # number of blocked times kept, drawn evenly from all
_RECENT = 64  # saves to which a late event may still belong


@dataclass(frozen=True, slots=True)
class StallReport:
    """What saving cost. Times are in seconds. None means that it was not observed.

    - `saves`: saves begun. `failed`: those that failed.
    - `steps`: all steps. `busy_steps`: those with a save in flight.
    - `elapsed`: from the start of the first step to the end of the last.
    - `blocked_*`: what the call took from the training thread. `blocked_first`: the first call, which is cold.
    - `barrier_*`: how long `optimizer.step()` waited for the copy. Known for our engine only, and part of the busy
      steps.
    - `quiet_step`: average estimate of what the busy steps would have taken, from their neighbours. `busy_step`: what
      they took.
    - `inflation`: busy against quiet; 0.02 is 2 % slower.
    - `noise`: the inflation that the neighbours themselves show against their own medians. An inflation that is not
      larger means nothing.
    - `slowed_per_save`: how much longer the steps took, per save.
    - `cost_per_save`: blocked + slowed. `cost_per_hour`: the cost in an hour of this training.
    - `advice`: how often to save, and what that loses in 30 days compared with the interval of this run
      (`vembed_async_ckpt.ettr`); None if the cost is not known.
    """

    saves: int
    failed: int
    steps: int
    busy_steps: int
    elapsed: float
    blocked_p50: float | None
    blocked_p99: float | None
    blocked_max: float | None
    blocked_first: float | None
    blocked_total: float
    barrier_max: float
    barrier_total: float
    quiet_step: float | None
    busy_step: float | None
    inflation: float | None
    noise: float | None
    slowed_per_save: float | None
    cost_per_save: float | None
    cost_per_hour: float | None
    advice: Advice | None = None

    def json(self) -> str:
        """Return the report as one JSON object."""
        return json.dumps(asdict(self))

    def __str__(self) -> str:
        barrier = f"total {_ms(self.barrier_total)}, max {_ms(self.barrier_max)}"
        slower = (
            "" if self.inflation is None or self.noise is None else f", {self.inflation:+.1%} (noise {self.noise:+.1%})"
        )
        share = "" if self.cost_per_hour is None else f" ({self.cost_per_hour / 3600:.3%})"
        rows = [
            ("saves", f"{self.saves} ({self.failed} failed) in {self.elapsed / 3600:.2f} h"),
            ("steps", f"{self.steps}, {self.busy_steps} of them with a save in flight"),
            (
                "blocked by the call",
                f"p50 {_ms(self.blocked_p50)}, p99 {_ms(self.blocked_p99)}, max {_ms(self.blocked_max)}, "
                f"first {_ms(self.blocked_first)}",
            ),
            ("waited at the barrier", barrier),
            ("quiet step", _ms(self.quiet_step)),
            ("busy step", _ms(self.busy_step) + slower),
            ("slower steps, per save", _ms(self.slowed_per_save)),
            ("cost per save", _ms(self.cost_per_save)),
            ("cost per hour", _ms(self.cost_per_hour) + share),
        ]
        if self.advice is not None:
            rows += [("save every", str(self.advice))]
        return "\n".join(f"{name:<24}{value}" for name, value in rows)


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.2f} ms"


class StallMeter:
    """Measures what saving costs the loop that uses it. Only one thread may use `step()`; any thread may call the rest.

    Memory is bounded whatever the run's length. A step costs about a microsecond.
    """

    def __init__(
        self, *, clock: Callable[[], float] = time.perf_counter, wall: Callable[[], float] = time.time
    ) -> None:
        """`clock`: monotonic clock in seconds. `wall`: the clock of the events' time stamps."""
        self._clock = clock
        self._wall = wall
        self._context = _StepContext(self)
        self._inbox: deque[Event] = deque()
        self._lock = threading.RLock()
        # guarded by _lock:
        self._current: _Step | None = None
        self._last: _Step | None = None  # the last step; an event may still concern it
        self._begun: float | None = None
        self._ended = 0.0
        self._steps = 0
        self._account = _Account()
        self._flying: dict[object, _Save] = {}
        self._watched: list[tuple[Any, Callable[[], bool], _Save]] = []
        self._calls: deque[_Save] = deque(maxlen=_RECENT)  # made through `save()`
        self._heard: dict[str, _Save] = {}  # the newest ones, by the events' save_id
        self._saves = 0
        self._failed = 0
        self._blocked = _Sample(SAMPLES)
        self._barrier_total = 0.0
        self._barrier_max = 0.0

    # -- in the loop

    def step(self) -> AbstractContextManager[None]:
        """Use as a context around one training step. A step that raises is not counted."""
        return self._context

    def save(self) -> AbstractContextManager[None]:
        """Use as a context around a call that saves. Inside a `step()`, its time is subtracted from the step's."""
        return _Call(self)

    def watch(self, handle: Any) -> None:
        """Count the newest save as in flight until `handle` is done.

        `handle` is a `SaveHandle`, a `Future`, any object with `done()`, or a function that returns whether the save
        has ended. It is asked before each step. Raises TypeError for another `handle`, and ValueError if there was no
        `save()` before.
        """
        done = getattr(handle, "done", handle)
        if not callable(done):
            raise TypeError(
                f"a {type(handle).__qualname__} has no done() and cannot be called; give a handle or a function"
            )
        with self._lock:
            self._hear()
            if not self._calls:
                raise ValueError("watch() comes after a save in `with meter.save():`")
            save = self._calls[-1]
            self._watched.append((handle, done, save))
            self._take_off(handle, save)

    def __call__(self, event: Event) -> None:
        """Take an event: the meter is a sink of `AsyncCheckpointer`.

        Never waits. If the training thread holds the lock, perhaps because a signal handler interrupted it, the event
        is processed later.
        """
        self._inbox.append(event)
        if self._lock.acquire(blocking=False):
            try:
                self._hear()
            finally:
                self._lock.release()

    def _hear(self) -> None:
        """Process the events that have arrived. Call it under the lock."""
        while self._inbox:
            self._note(self._inbox.popleft())

    def _note(self, event: Event) -> None:
        key = event.save_id or f"step {event.step}"  # ranks that do not write have no save_id
        happened = (event.stage, event.phase)
        ended = self._clock() - max(self._wall() - event.time, 0.0)
        if happened in _BEGINNINGS:
            save = self._save_of(key, ended - event.seconds)
            if event.stage == "call" and not save.called:
                self._note_call(save, ended - event.seconds, event.seconds)
        elif happened == ("backpressure", "failed") and key in self._flying:  # a rank learned that its save was skipped
            del self._flying[key], self._heard[key]
            self._saves -= 1
        elif happened == ("barrier", "complete") and key in self._heard:
            self._note_barrier(self._heard[key], event.seconds)
        elif event.stage == "save" and event.phase != "started":
            save = self._save_of(key, ended - event.seconds)
            self._flying.pop(key, None)
            if not event.save_id:
                del self._heard[key]  # the same step may be saved again
            if event.phase == "failed":
                self._note_failure(save)

    def report(self, *, mtbf: float | None = None, gpus: float = GPUS, restart: float = RESTART) -> StallReport:
        """Return everything measured so far. The measurement goes on.

        For the advice: `mtbf` is the time between two crashes in seconds, by default estimated from the number of
        `gpus`. `restart` is the time in seconds from a crash until the run trains again. The time until a save is
        durable is estimated from the steps with a save in flight.
        """
        between = mtbf_of(gpus) if mtbf is None else mtbf
        with self._lock:
            self._hear()
            account = self._account.copy()
            if self._last is not None:
                account.add(self._last)
            account.settle()
            return self._report(account, between, restart)

    def _report(self, account: _Account, mtbf: float, restart: float) -> StallReport:
        elapsed = 0.0 if self._begun is None else self._ended - self._begun
        blocked = self._blocked
        known = account.known_steps > 0 and account.expected > 0
        slowed = account.taken - account.expected
        no_cost = not self._saves or blocked.first is None or (not known and account.busy_steps > 0)
        cost = None if no_cost else blocked.total + slowed
        near = account.neighbourhood()
        return StallReport(
            saves=self._saves,
            failed=self._failed,
            steps=self._steps,
            busy_steps=account.busy_steps,
            elapsed=elapsed,
            blocked_p50=blocked.percentile(0.5),
            blocked_p99=blocked.percentile(0.99),
            blocked_max=blocked.largest,
            blocked_first=blocked.first,
            blocked_total=blocked.total,
            barrier_max=self._barrier_max,
            barrier_total=self._barrier_total,
            quiet_step=account.expected / account.known_steps if known else near,
            busy_step=account.busy_seconds / account.busy_steps if account.busy_steps else None,
            inflation=slowed / account.expected if known else None,
            noise=account.noise / account.expected if known else None,
            slowed_per_save=None if cost is None else slowed / self._saves,
            cost_per_save=None if cost is None else cost / self._saves,
            cost_per_hour=None if cost is None or elapsed <= 0 else cost / elapsed * 3600,
            advice=None
            if cost is None or elapsed <= 0
            else advise(
                lost=cost / self._saves,
                durable=(blocked.total + account.busy_seconds) / self._saves,
                mtbf=mtbf,
                restart=restart,
                now=elapsed / self._saves,
            ),
        )

    # -- steps

    def _begin_step(self) -> None:
        if self._watched:
            self._ask()
        with self._lock:
            self._hear()
            self._current = step = _Step(bool(self._flying))
            step.start = self._clock()
            if self._begun is None:
                self._begun = step.start

    def _end_step(self, completed: bool) -> None:
        now = self._clock()
        with self._lock:
            self._hear()
            step, self._current = self._current, None
            if step is None or not completed:
                return
            step.end = self._ended = now
            self._steps += 1
            if self._last is not None:
                self._account.add(self._last)
            self._last = step

    def _ask(self) -> None:
        """Ask the watched handles whether they are done.

        This happens outside the lock because it calls code of the user's.
        """
        for entry in tuple(self._watched):
            handle, done, save = entry
            try:
                if not done():
                    continue
                barrier, failed = _outcome(handle, save)
            except Exception:
                logger.exception("a watched save does not say whether it is over; it counts as over")
                barrier, failed = 0.0, False
            with self._lock:
                self._hear()
                self._watched.remove(entry)
                self._flying.pop(id(handle), None)
                self._note_barrier(save, barrier)
                if failed:
                    self._note_failure(save)

    # -- saves; all under the lock

    def _take_off(self, handle: Any, save: _Save) -> None:
        self._flying[id(handle)] = save
        self._mark_busy(save)

    def _mark_busy(self, save: _Save) -> None:
        """Mark the current and the last step as busy: they may have begun before the save was reported."""
        if self._current is not None:
            self._current.busy = True
        if self._last is not None and save.start < self._last.end:
            self._last.busy = True

    def _save_of(self, key: str, start: float) -> _Save:
        save = self._heard.get(key)
        if save is None:
            save = next((call for call in reversed(self._calls) if call.start <= start <= call.end), None)
            if save is None:
                save = _Save(start)
                self._saves += 1
            self._heard[key] = save
            if len(self._heard) > _RECENT:
                oldest = next(iter(self._heard))
                del self._heard[oldest]
                self._flying.pop(oldest, None)  # its end was not reported, and it must have ended long ago
            self._flying[key] = save
            self._mark_busy(save)
        return save

    def _note_call(self, save: _Save, start: float, seconds: float) -> None:
        save.called = True
        save.blocked = seconds
        self._blocked.add(seconds)
        for step in (self._current, self._last):
            if step is not None and step.start <= start < step.end:
                step.taken_out += seconds

    def _note_barrier(self, save: _Save, seconds: float) -> None:
        if seconds > save.barrier:  # an event and the handle may report the same wait
            self._barrier_total += seconds - save.barrier
            self._barrier_max = max(self._barrier_max, seconds)
            save.barrier = seconds

    def _note_failure(self, save: _Save) -> None:
        if not save.failed:
            save.failed = True
            self._failed += 1


# the first events of a save
_BEGINNINGS = {("call", "complete"), ("stage", "complete"), ("write", "started")}
_FOREVER = float("inf")


def _outcome(handle: Any, save: _Save) -> tuple[float, bool]:
    """Return (seconds at the barrier, whether it failed) of a save that has ended.

    This must not mark the failure as read: the user has not seen it.
    """
    state = getattr(getattr(handle, "state", None), "value", None)
    if state == "committed":
        timings = handle.result(0).timings
        return getattr(timings, "barrier", max(timings.stall - save.blocked, 0.0)), False
    if state is None and callable(getattr(handle, "exception", None)):  # a Future
        return 0.0, handle.cancelled() or handle.exception() is not None
    return 0.0, state == "failed"


class _Step:
    __slots__ = ("busy", "end", "start", "taken_out")

    def __init__(self, busy: bool) -> None:
        self.busy = busy
        self.start = 0.0
        self.end = _FOREVER
        self.taken_out = 0.0  # seconds of calls that saved


class _Save:
    __slots__ = ("barrier", "blocked", "called", "end", "failed", "start")

    def __init__(self, start: float) -> None:
        self.start = start
        self.end = _FOREVER  # end of the call
        self.called = False  # the call has ended, and `blocked` is known
        self.blocked = 0.0
        self.barrier = 0.0
        self.failed = False


class _StepContext:
    """The context of every step: only one step runs at a time."""

    __slots__ = ("_meter",)

    def __init__(self, meter: StallMeter) -> None:
        self._meter = meter

    def __enter__(self) -> None:
        self._meter._begin_step()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._meter._end_step(kind is None)


class _Call:
    def __init__(self, meter: StallMeter) -> None:
        self._meter = meter

    def __enter__(self) -> None:
        meter = self._meter
        with meter._lock:
            meter._hear()
            self._save = _Save(meter._clock())
            self._save.called = True
            meter._saves += 1
            meter._calls.append(self._save)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        meter, save = self._meter, self._save
        save.end = meter._clock()
        with meter._lock:
            meter._hear()
            meter._note_call(save, save.start, save.end - save.start)
            if kind is not None:
                meter._note_failure(save)


class _Account:
    """Compares busy steps with their neighbours. An *episode* is a run of busy steps with no quiet step in between."""

    def __init__(self) -> None:
        self.busy_steps = 0
        self.busy_seconds = 0.0
        # of the episodes that had neighbours:
        self.known_steps = 0
        self.taken = 0.0
        self.expected = 0.0
        self.noise = 0.0
        # of the open episode:
        self._count = 0
        self._seconds = 0.0
        self._before: tuple[float, ...] = ()
        self._after = 0  # quiet steps since its last busy step
        self._quiet: deque[float] = deque(maxlen=NEIGHBOURS)  # the newest ones

    def copy(self) -> _Account:
        other = _Account()
        vars(other).update(vars(self))
        other._quiet = self._quiet.copy()
        return other

    def add(self, step: _Step) -> None:
        seconds = step.end - step.start - step.taken_out
        if step.busy:
            if self._after:
                self.settle()
            if not self._count:
                self._before = tuple(self._quiet)
            self._count += 1
            self._seconds += seconds
            self.busy_steps += 1
            self.busy_seconds += seconds
        else:
            self._quiet.append(seconds)
            if self._count:
                self._after += 1
                if self._after == NEIGHBOURS:
                    self.settle()

    def settle(self) -> None:
        """Close the open episode and compare it with the neighbours it has."""
        after = tuple(self._quiet)[-self._after :] if self._after else ()
        sides = [side for side in (self._before, after) if side]
        if self._count and sides:
            near = sum(map(median, sides)) / len(sides)
            self.known_steps += self._count
            self.taken += self._seconds
            self.expected += self._count * near
            self.noise += self._count * (sum(sum(side) / len(side) for side in sides) / len(sides) - near)
        self._count = self._after = 0
        self._seconds = 0.0

    def neighbourhood(self) -> float | None:
        """Return the median of the newest quiet steps, or None if there are none."""
        return median(self._quiet) if self._quiet else None


class _Sample:
    """A sample of at most `size` numbers, drawn evenly from all numbers added.

    `first`, `largest` and `total` cover all numbers added.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept = array("d")
        self._count = 0
        self._chance = random.Random(0)
        self.first: float | None = None
        self.largest: float | None = None
        self.total = 0.0

    def add(self, value: float) -> None:
        self._count += 1
        self.total += value
        self.first = value if self.first is None else self.first
        self.largest = value if self.largest is None else max(self.largest, value)
        if len(self._kept) < self._size:
            self._kept.append(value)
        elif (place := self._chance.randrange(self._count)) < self._size:
            self._kept[place] = value

    def percentile(self, share: float) -> float | None:
        """Return the smallest number that a share `share` of the sample does not exceed; None for an empty sample."""
        ordered: Sequence[float] = sorted(self._kept)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else None
