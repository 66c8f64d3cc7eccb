"""One line that says where a run is: the round, the visit, the time left, and the medians so far."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.status import Status

from .catalog import title_of
from .words import duration, milliseconds

Sample = dict[str, Any]


class Line:
    """Shown on a terminal while a measure lasts, and gone afterwards."""

    def __init__(self, console: Console, measure: str, samples: Sequence[Sample], left: Callable[[], float]) -> None:
        self._console, self._measure, self._samples, self._left = console, measure, samples, left
        self._status = Status(measure, console=console)
        self._round = 0
        self._visits = self._done = 0
        self._begun = time.monotonic()

    def __enter__(self) -> Line:
        self._status.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._status.stop()

    def begin_round(self, number: int, visits: int) -> None:
        self._round, self._visits, self._done = number, visits, 0
        self._begun = time.monotonic()

    def begin_visit(self, engine: str, note: str) -> None:
        name = title_of(engine)
        self._status.update(self.text(f"{name}, {note}" if note else name, self._console.width - 3))

    def end_visit(self) -> None:
        self._done += 1

    def text(self, doing: str, width: int) -> str:
        """The line, with as many medians as fit."""
        left = self._left()
        if left == float("inf") and self._done:
            left = (time.monotonic() - self._begun) / self._done * (self._visits - self._done)
            time_left = f", {duration(left)} left of the round"
        else:
            time_left = "" if left == float("inf") else f", {duration(max(left, 0))} left"
        line = f"{self._measure}, round {self._round + 1}, {self._done + 1} of {self._visits}{time_left}: {doing}"
        separator = "; stops training so far: "
        for engine, seconds in medians(self._samples):
            part = f"{separator}{title_of(engine)} {milliseconds(seconds)} ms"
            if len(line) + len(part) > width:
                break
            line, separator = line + part, ", "
        return line[:width]


def medians(samples: Sequence[Sample]) -> list[tuple[str, float]]:
    """(engine, median of the blocked time so far) of the measures that look at it, the shortest first."""
    found: dict[str, list[float]] = {}
    for sample in samples:
        saves = sample.get("saves") or sample.get("blocked") or ()
        found.setdefault(sample["engine"], []).extend(save["blocked"] for save in saves if "blocked" in save)
    return sorted(
        ((name, statistics.median(values)) for name, values in found.items() if values), key=lambda pair: pair[1]
    )
