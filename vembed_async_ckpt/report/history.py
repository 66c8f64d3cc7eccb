"""The events of a run, put in order: steps, saves, retention, and what the saves cost."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median

from ..events import Event

NEIGHBOURS = 16  # steps on either side of a save that it is compared with
Span = tuple[float, float]  # begin and end, seconds since the epoch


@dataclass
class Save:
    """One save, as far as its events tell. `blocks`: when it held up the training thread. `slowed`: seconds that the steps beside
    it took longer than their neighbours, beyond what was blocked; None if there are no steps to tell."""

    step: int | None
    begin: float
    end: float | None = None
    call: Span | None = None
    blocks: list[Span] = field(default_factory=list)
    copy: Span | None = None
    write: Span | None = None
    commit: Span | None = None
    size: int = 0
    failed: bool = False
    reason: str = ""
    slowed: float | None = None

    @property
    def blocked(self) -> float:
        """Seconds that the training thread lost."""
        return sum(end - begin for begin, end in self.blocks)

    @property
    def durable(self) -> float | None:
        """Seconds from the call until it was durable."""
        return None if self.end is None or self.failed else self.end - self.begin

    @property
    def rate(self) -> float | None:
        """Bytes per second of writing and committing."""
        if self.write is None or self.commit is None or not self.size:
            return None
        return self.size / max(self.commit[1] - self.write[0], 1e-9)


@dataclass(frozen=True)
class Deletion:
    """Retention deleted something: when, how many bytes, and what."""

    span: Span
    freed: int
    detail: str


@dataclass
class History:
    """A run, or several that wrote to the same file. Times in seconds since the epoch; `steps` and `saves` in order."""

    begin: float = math.inf
    end: float = -math.inf
    starts: list[float] = field(default_factory=list)
    steps: list[Span] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    deletions: list[Deletion] = field(default_factory=list)

    @property
    def wall(self) -> float:
        return self.end - self.begin

    @property
    def ended(self) -> list[Save]:
        return [save for save in self.saves if save.end is not None]


@dataclass(frozen=True)
class Shares:
    """Where the wall time went, in seconds: `training` as it would have been without saves, `blocked` by saves, `slowed` steps
    beside saves, `other` outside of the steps (start-up, evaluation, the time between two runs)."""

    training: float
    blocked: float
    slowed: float
    other: float


def read(events: Iterable[Event]) -> History:
    """The history that `events` tell, in whatever order they come."""
    history = History()
    saves: dict[str, Save] = {}
    for event in events:
        begin = event.time - event.seconds
        history.begin, history.end = min(history.begin, begin), max(history.end, event.time)
        if event.stage == "step":
            for seconds in event.parts:
                history.steps.append((begin, begin + seconds))
                begin += seconds
        elif event.stage == "writer" and event.phase == "started":
            history.starts.append(event.time)
        elif event.stage == "retention":
            history.deletions.append(Deletion((begin, event.time), event.bytes, event.detail))
        elif event.stage in ("call", "stage", "barrier", "write", "save"):
            _note(saves, event, begin)
    history.steps.sort()
    history.saves = sorted(saves.values(), key=lambda save: save.begin)
    for save in history.ended:
        save.slowed = _slowed(history, save)
    return history


def _note(saves: dict[str, Save], event: Event, begin: float) -> None:
    key = event.save_id or f"step {event.step}"
    if event.stage == "write" and event.phase == "started" and key not in saves:
        return  # the events before it are lost; its end says when it began
    save = saves.setdefault(key, Save(event.step, begin))
    if event.stage == "save" and event.phase != "started":
        save.begin, save.end = min(save.begin, begin), event.time
        save.failed, save.reason = event.phase == "failed", event.detail
        save.size = event.bytes
    elif event.phase == "complete":
        span = (begin, event.time)
        if event.stage == "call":
            save.call = span
            save.begin = min(save.begin, begin)
        if event.stage in ("call", "barrier"):
            save.blocks.append(span)
        elif event.stage == "stage":
            save.copy = span
        elif event.stage == "write":
            middle = begin + event.parts[0] if event.parts else event.time
            save.write, save.commit = (begin, middle), (middle, event.time)


def _slowed(history: History, save: Save) -> float | None:
    """Steps that a save was beside, against the steps before and after that no save was beside."""
    assert save.end is not None
    steps = history.steps
    first = bisect.bisect_left(steps, save.begin, key=lambda step: step[1])
    after = bisect.bisect_left(steps, save.end, key=lambda step: step[0])
    busy = [end - begin for begin, end in steps[first:after]]
    sides = [_quiet(history, range(first - 1, -1, -1)), _quiet(history, range(after, len(steps)))]
    known = [median(side) for side in sides if side]
    if not busy or not known:
        return None
    return sum(busy) - len(busy) * sum(known) / len(known) - save.blocked


def _quiet(history: History, numbers: range) -> list[float]:
    """The seconds of the first steps of `numbers` that no save was beside."""
    found: list[float] = []
    for number in numbers[: 4 * NEIGHBOURS]:
        begin, end = history.steps[number]
        if not any(save.begin < end and (save.end or save.begin) > begin for save in _near(history, begin, end)):
            found.append(end - begin)
            if len(found) == NEIGHBOURS:
                break
    return found


def _near(history: History, begin: float, end: float) -> Sequence[Save]:
    """Saves that may be beside [begin, end]: few, as saves begin one after the other and few are under way at once."""
    last = bisect.bisect_right(history.saves, end, key=lambda save: save.begin)
    return history.saves[max(last - 17, 0) : last]


def shares(history: History) -> Shares:
    """Where the wall time went."""
    stepping = sum(end - begin for begin, end in history.steps)
    inside = history.steps[0][0] if history.steps else math.inf
    blocked = sum(save.blocked for save in history.saves)
    within = sum(save.blocked for save in history.saves if save.begin >= inside) if history.steps else 0.0
    slowed = max(sum(save.slowed or 0.0 for save in history.saves), 0.0)
    training = max(stepping - within - slowed, 0.0)
    return Shares(training, blocked, slowed, max(history.wall - training - blocked - slowed, 0.0))


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of `values` that `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(max(math.ceil(share * len(ordered)) - 1, 0), len(ordered) - 1)]
