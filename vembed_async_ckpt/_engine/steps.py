"""Times the steps of the training, for the sinks that want this."""

from __future__ import annotations

import time
from itertools import pairwise

from .._memory.barrier import STEP_BARRIER
from ..events import Event, Reporter

REPORT_EVERY = 1.0  # seconds of training that one event covers


class StepClock:
    """Notes when each training step ends. About once a second it reports the steps in one `step` event.

    A step ends where the loop calls `should_save()`. In a loop that never calls it, a step ends where an optimizer
    steps.
    """

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._ends: list[float] = []  # time.perf_counter(); the first one is the end of the step before
        self._due = 0.0
        self._step: int | None = None
        self._asked = False
        STEP_BARRIER.install()
        STEP_BARRIER.add(self)

    def barrier(self) -> None:
        """Called before each step of an optimizer."""
        self._note(time.perf_counter())

    def tick(self, step: int, now: float) -> None:
        """The loop is at the end of `step`. `now` is time.perf_counter()."""
        if not self._asked:
            self._asked = True
            STEP_BARRIER.remove(self)
            self._ends.clear()
        self._step = step
        self._note(now)

    def close(self) -> None:
        """Report the remaining steps."""
        STEP_BARRIER.remove(self)
        self._report()

    def _note(self, now: float) -> None:
        self._ends.append(now)
        if now >= self._due:
            self._due = now + REPORT_EVERY
            self._report()

    def _report(self) -> None:
        ends = self._ends
        if len(ends) < 2:
            return
        self._ends = ends[-1:]
        ended = time.time() - (time.perf_counter() - ends[-1])
        step = self._step

        def tell() -> None:
            seconds = tuple(after - before for before, after in pairwise(ends))
            self._reporter.emit(Event("step", "complete", "", step, 0, ends[-1] - ends[0], "", ended, seconds))

        self._reporter.call(tell)
