"""When to save: `AsyncCheckpointer(root, policy=every(steps=500) | on_request())`, then in the loop
`if checkpointer.should_save(step): checkpointer.save(step, ...)`.

Policies are combined with `|`: a save is due when one of them says so. What a clock, a request or a metric decides is due until
a save is made.

Several ranks get the same answer for the same step. `every(steps=...)` needs nothing for that. For `on_best` the first rank's
metrics count, and the others wait for its answer where they pass metrics. For the rest the ranks agree, and save a few steps
later: clocks and costs are those of the first rank, a request may come from any.
"""

from __future__ import annotations

import datetime
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from ._disk import catalog
from ._format import names
from .retention import is_rated

__all__ = ["every", "budget", "before_time_limit", "on_request", "on_best", "SavePolicy"]

logger = logging.getLogger("vembed_async_ckpt")
_LOOK = 0.5  # seconds between looks for the file `save-now`


class Run(Protocol):
    """What a policy knows of the run when it is asked.

    `step` is asked about, `before` was the last one, `now` is time.perf_counter(). `saved_at`: when the newest save was begun, or
    the run. `measured`: the costs of all saves so far are known; `cost` is what the next one will cost, in seconds, None if there
    was none yet. `durable`: seconds until a save is durable, rarely more. `step_seconds`: of a usual step.
    """

    root: str
    before: int | None
    step: int
    now: float
    metrics: Mapping[str, float] | None
    saved_at: float

    @property
    def measured(self) -> bool: ...
    @property
    def cost(self) -> float | None: ...
    @property
    def durable(self) -> float: ...
    @property
    def step_seconds(self) -> float: ...


class Rule:
    """A policy at work in one run."""

    def due(self, run: Run) -> bool:
        """Whether to save at `run.step`."""
        raise NotImplementedError

    def saved(self, step: int | None, metrics: Mapping[str, float] | None) -> None:
        """A save was begun."""

    def close(self) -> None:
        """The run is over."""


class SavePolicy:
    """When to save. Made by the functions of this module; `a | b` is due when either is."""

    # Who decides for several ranks. "everywhere": each rank comes to the same answer by itself. "first", "any": the first
    # rank, or any rank, asks all ranks to save, and they agree on the step. "metrics": the first rank answers for the
    # same step, and the others wait for its answer.
    decided: ClassVar[Literal["everywhere", "first", "any", "metrics"]] = "first"
    measures: ClassVar[bool] = False  # it needs to know what saves cost
    asks_for_metrics: ClassVar[bool] = False  # of the step

    def start(self, root: str) -> Rule:
        """The policy at work in a run that saves to `root`."""
        raise NotImplementedError

    def parts(self) -> Iterator[SavePolicy]:
        """The policies that this one is combined of."""
        yield self

    def __or__(self, other: SavePolicy) -> SavePolicy:
        if not isinstance(other, SavePolicy):
            return NotImplemented
        return _AnyOf((*self.parts(), *other.parts()))


@dataclass(frozen=True)
class _AnyOf(SavePolicy):
    policies: tuple[SavePolicy, ...]

    def parts(self) -> Iterator[SavePolicy]:
        yield from self.policies

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.policies))


def every(*, steps: int | None = None, minutes: float | None = None) -> SavePolicy:
    """Save at each multiple of `steps`, or when `minutes` have passed since the last save was begun. Step 0 is not saved.

    A multiple that the loop passes without asking is made up for at the next step it asks about.
    """
    if (steps is None) == (minutes is None):
        raise ValueError("every() takes either steps= or minutes=; combine the two with |")
    if minutes is not None:
        return _EveryMinutes(_positive("every", "minutes", minutes))
    if type(steps) is not int or steps < 1:
        raise ValueError(f"every(): steps is {steps!r}; use a whole number of at least 1")
    return _EverySteps(steps)


@dataclass(frozen=True)
class _EverySteps(SavePolicy, Rule):
    steps: int
    decided: ClassVar = "everywhere"

    def start(self, root: str) -> Rule:
        return self

    def due(self, run: Run) -> bool:
        before = run.before
        if before is None or before > run.step:  # the first step of the run, or it went back
            return run.step > 0 and run.step % self.steps == 0
        return run.step // self.steps > before // self.steps

    def __repr__(self) -> str:
        return f"every(steps={self.steps})"


@dataclass(frozen=True)
class _EveryMinutes(SavePolicy, Rule):
    minutes: float

    def start(self, root: str) -> Rule:
        return self

    def due(self, run: Run) -> bool:
        return run.now - run.saved_at >= self.minutes * 60

    def __repr__(self) -> str:
        return f"every(minutes={self.minutes:g})"


def budget(percent: float = 2.0) -> SavePolicy:
    """Save as often as costs the training at most `percent` of its time, by what this run's saves have cost.

    What a save costs is the time that it blocks, and what the steps beside it take longer than their neighbours. The first save is
    due when 16 steps have been timed; the next ones when the last has paid for itself.
    """
    if _positive("budget", "percent", percent) > 100:
        raise ValueError(f"budget(): percent is {percent!r}; use a number of at most 100")
    return _Budget(float(percent))


@dataclass(frozen=True)
class _Budget(SavePolicy, Rule):
    percent: float
    measures: ClassVar[bool] = True

    def start(self, root: str) -> Rule:
        return self

    def due(self, run: Run) -> bool:
        if not run.measured:
            return False
        cost = run.cost
        return cost is None or run.now - run.saved_at >= cost * 100 / self.percent

    def __repr__(self) -> str:
        return f"budget(percent={self.percent:g})"


def before_time_limit(minutes: float = 5.0, *, end: float | datetime.datetime | None = None) -> SavePolicy:
    """Save once so early that the checkpoint is durable `minutes` before the job's time is up.

    `end`: when that is, in seconds since the epoch or as a datetime; None is what Slurm says (`SLURM_JOB_END_TIME`). What a save
    takes until it is durable (the 95th percentile in this run) and two steps are allowed for.

    Raises ValueError if nothing says when the job ends.
    """
    if isinstance(minutes, bool) or not isinstance(minutes, int | float) or not 0 <= minutes < math.inf:
        raise ValueError(f"before_time_limit(): minutes is {minutes!r}; use a number of at least 0")
    if end is None:
        said = os.environ.get("SLURM_JOB_END_TIME", "")
        if not said.isdecimal():
            raise ValueError(
                f"before_time_limit(): SLURM_JOB_END_TIME is {said!r} and end= was not given; "
                "say when the job ends, in seconds since the epoch"
            )
        end = float(said)
    elif isinstance(end, datetime.datetime):
        end = end.timestamp()
    elif isinstance(end, bool) or not isinstance(end, int | float) or not math.isfinite(end):
        raise ValueError(f"before_time_limit(): end is {end!r}; use seconds since the epoch or a datetime")
    return _BeforeTimeLimit(float(minutes), float(end))


@dataclass(frozen=True)
class _BeforeTimeLimit(SavePolicy):
    minutes: float
    end: float
    measures: ClassVar[bool] = True

    def start(self, root: str) -> Rule:
        return _Once(self.end - self.minutes * 60)

    def __repr__(self) -> str:
        return f"before_time_limit(minutes={self.minutes:g}, end={self.end:.0f})"


class _Once(Rule):
    def __init__(self, latest: float) -> None:
        self._latest = latest  # when the checkpoint should be durable
        self._since: float | None = None

    def due(self, run: Run) -> bool:
        if self._since is None:
            if time.time() < self._latest - run.durable - 2 * run.step_seconds:
                return False
            self._since = run.now
        return run.saved_at < self._since


def on_request(signum: int | None = signal.SIGUSR2) -> SavePolicy:
    """Save when somebody asks for it: by the signal SIGUSR2, or by making a file `save-now` in the root of the checkpoints, which
    is removed when it is seen (within a second).

    The signal's handler is set when the checkpointer is made, which must be in the main thread for it (else only the file asks),
    and set back when it is closed. A handler that was there before is called too. `signum=None`: the file alone.
    """
    if signum is not None:
        signum = signal.Signals(signum)
    return _OnRequest(signum)


@dataclass(frozen=True)
class _OnRequest(SavePolicy):
    signum: signal.Signals | None
    decided: ClassVar = "any"

    def start(self, root: str) -> Rule:
        return _Requests(self.signum, os.path.join(root, names.SAVE_NOW))

    def __repr__(self) -> str:
        return "on_request()" if self.signum == signal.SIGUSR2 else f"on_request({self.signum!r})"


class _Requests(Rule):
    def __init__(self, signum: signal.Signals | None, path: str) -> None:
        self._asked = False
        self._path = path
        self._process = os.getpid()
        self._signum = signum
        self._before: Any = None
        if signum is not None:
            self._take_over(signum)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="vembed-ckpt-requests", daemon=True)
        self._thread.start()

    def due(self, run: Run) -> bool:
        return self._asked

    def saved(self, step: int | None, metrics: Mapping[str, float] | None) -> None:
        self._asked = False

    def close(self) -> None:
        self._over.set()
        if self._signum is None or threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(self._signum) == self._handle:  # else somebody else has the signal now
            signal.signal(self._signum, self._before)

    def _take_over(self, signum: signal.Signals) -> None:
        try:
            self._before = signal.signal(signum, self._handle)
        except ValueError:
            logger.warning(
                "on_request(): %s cannot be listened to, as the checkpointer is made outside of the main thread; "
                "only the file %s asks for a save",
                signum.name,
                self._path,
            )
            self._signum = None
        else:
            if self._before is None:  # set by something that is not Python, and cannot be put back by it
                self._before = signal.SIG_DFL

    def _handle(self, signum: int, frame: Any) -> None:
        if os.getpid() == self._process:  # forked children inherit the handler
            self._asked = True
        if callable(self._before):
            self._before(signum, frame)

    def _watch(self) -> None:
        """On a thread of its own: where the root hangs, only this hangs."""
        failed = False
        while not self._over.wait(_LOOK):
            try:
                os.unlink(self._path)
            except FileNotFoundError:
                failed = False
            except OSError as error:
                if not failed:
                    failed = True
                    logger.warning("%s: cannot be removed, so it asks for no save: %s", self._path, error)
            else:
                self._asked = True


def on_best(metric: str, *, mode: Literal["min", "max"] = "min") -> SavePolicy:
    """Save when `metric` is better than in every checkpoint that was saved to the root so far.

    The loop gives it where it has it: `checkpointer.should_save(step, metrics={"loss": loss})`, and then to `save(...,
    metrics=...)`. Without it no save is due by this policy. NaN is never better.
    """
    if not isinstance(metric, str) or not metric:
        raise ValueError(f"on_best(): metric is {metric!r}; use the name of a metric that is given to should_save()")
    if mode not in ("min", "max"):
        raise ValueError(f"on_best(): mode is {mode!r}; use 'min' or 'max'")
    return _OnBest(metric, mode)


@dataclass(frozen=True)
class _OnBest(SavePolicy):
    metric: str
    mode: Literal["min", "max"]
    decided: ClassVar = "metrics"
    asks_for_metrics: ClassVar[bool] = True

    def start(self, root: str) -> Rule:
        return _Best(self.metric, -1.0 if self.mode == "max" else 1.0, root)

    def __repr__(self) -> str:
        return f"on_best({self.metric!r})" if self.mode == "min" else f"on_best({self.metric!r}, mode='max')"


class _Best(Rule):
    def __init__(self, metric: str, sign: float, root: str) -> None:
        self._metric = metric
        self._sign = sign
        found = [entry.manifest for entry in catalog.scan(root) if entry.manifest is not None]
        self._best = min((sign * m.metrics[metric] for m in found if is_rated(m, metric)), default=math.inf)

    def due(self, run: Run) -> bool:
        return run.metrics is not None and self._value(run.metrics) < self._best

    def saved(self, step: int | None, metrics: Mapping[str, float] | None) -> None:
        if metrics is not None:
            self._best = min(self._best, self._value(metrics))

    def _value(self, metrics: Mapping[str, float]) -> float:
        value = self._sign * float(metrics.get(self._metric, math.nan))
        return math.inf if math.isnan(value) else value


def _positive(policy: str, what: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{policy}(): {what} is {value!r}; use a number above 0")
    return float(value)
