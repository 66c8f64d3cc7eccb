"""Measures what the saves of this run cost, for the policies that depend on it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from ..events import Event

NEIGHBOURS = 16  # steps before and after a save that the save is compared with
_ENOUGH = 8  # the least number of these steps, before and after together


@dataclass
class _Window:
    """The time from the call of a save to its end, in seconds since the epoch."""

    begin: float
    blocked: float = 0.0
    end: float | None = None


class Figures:
    """An event sink that computes the figures below. They are read from the training thread.

    - `steps`: number of steps timed so far.
    - `step_seconds`: median duration of the newest steps.
    - `measured`: number of saves whose cost is known.
    - `cost`: estimated cost of the next save in seconds; None before one is known.
    - `durable`: seconds until a save is durable, 95th percentile.
    """

    wants_steps = True

    def __init__(self) -> None:
        self.steps = 0
        self.step_seconds = 0.0
        self.measured = 0
        self.cost: float | None = None
        self.durable = 0.0
        self._laps: deque[tuple[float, float]] = deque(maxlen=4096)  # (begin, end) of steps
        self._recent: deque[float] = deque(maxlen=NEIGHBOURS)  # seconds of steps
        self._windows: dict[str, _Window] = {}
        self._costs: deque[float] = deque(maxlen=5)
        self._durables: deque[float] = deque(maxlen=200)

    def __call__(self, event: Event) -> None:
        if event.stage == "step":
            self._add_steps(event)
        elif event.stage in ("call", "barrier") and event.phase == "complete":
            window = self._window(event)
            window.blocked += event.seconds
        elif event.stage == "save" and event.phase != "started":
            window = self._window(event)
            window.end = event.time
            if event.phase == "complete":
                self._durables.append(event.seconds)
                ordered = sorted(self._durables)
                self.durable = ordered[int(0.95 * (len(ordered) - 1) + 0.5)]
        self._settle()

    def _add_steps(self, event: Event) -> None:
        begin = event.time - event.seconds
        for seconds in event.parts:
            self._laps.append((begin, begin + seconds))
            self._recent.append(seconds)
            begin += seconds
        self.steps += len(event.parts)
        self.step_seconds = median(self._recent)

    def _window(self, event: Event) -> _Window:
        return self._windows.setdefault(event.save_id, _Window(event.time - event.seconds))

    def _settle(self) -> None:
        """Compute the costs of the saves that have ended and have enough steps after them to compare with."""
        for save_id, window in list(self._windows.items()):
            if window.end is None:
                return
            cost = self._cost(window, list(self._windows.values()))
            if cost is None:
                return
            del self._windows[save_id]
            if self.measured:  # the first save is cold, so its cost says nothing about the next one
                self._costs.append(cost)
            self.cost = max(cost, median(self._costs or [cost]))
            self.measured += 1

    def _cost(self, window: _Window, windows: Sequence[_Window]) -> float | None:
        assert window.end is not None
        busy: list[tuple[float, float]] = []
        before: list[tuple[float, float]] = []
        after: list[tuple[float, float]] = []  # newest first, like the other two lists
        for begin, end in reversed(self._laps):
            if len(before) == NEIGHBOURS:
                break
            if begin < window.end and end > window.begin:
                busy.append((begin, end))
            elif not any(begin < (other.end or end) and end > other.begin for other in windows):
                (before if end <= window.begin else after).append((begin, end))
        after = after[-NEIGHBOURS:]  # those nearest to the save
        followed = any(other.begin > window.begin for other in windows)
        if not followed and (len(after) < 2 or len(before) + len(after) < _ENOUGH):
            return None
        sides = [side for side in (before, after) if side]
        if not sides:
            return window.blocked
        expected = len(busy) * sum(map(_median_of, sides)) / len(sides)
        return max(window.blocked, sum(end - begin for begin, end in busy) - expected)


def _median_of(laps: Sequence[tuple[float, float]]) -> float:
    return median(end - begin for begin, end in laps)
