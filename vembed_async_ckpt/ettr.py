"""How often to save: the effective training time ratio (ETTR) with asynchronous checkpoints, and the interval at which it
is best.

ETTR is the share of the wall time that ends up as training that is kept. A save begins every `interval` seconds. From its
start it costs the training `lost` seconds in all: what it blocks and what the steps are slower until the checkpoint is
durable, which is
`durable` seconds after its start. The run crashes every `mtbf` seconds of running time on average (exponentially distributed),
goes back to the state at the start of its newest durable save, and needs `restart` seconds before it trains again. With
T = interval, w = lost, D = durable, M = mtbf, R = restart, and D <= T (one save in flight):

    ETTR = exp(-D/M) [ (T - w) / (exp(T/M) - 1) + w exp(-T/M) ] / (M + R)

A life of length x, exponential with mean M, leaves k = floor((x - D) / T) durable saves; they hold T + (k - 1)(T - w)
seconds of training, as nothing is in flight before the first one. Summed over all lives this is the expression above; the
tests check it against a simulation that walks through lives. Work done on checkpoints by a process that outlives the
trainer is not counted in our favour: D is the time until durable, also for crashes that take the trainer alone.

R and D are factors and hardly move the best interval, which is close to sqrt(2 w M). A `lost` that is wrong by 25 % moves
it by 12 % and the hours lost by less than 1 %.

Sources: Young, CACM 17(9), 1974, and Daly, FGCS 22, 2006, doi 10.1016/j.future.2004.11.016 (the best interval); Kokolis et al.,
arXiv 2410.21680, HPCA 2025 (ETTR); Mohan et al., CheckFreq, FAST 2021 (an interval from an overhead that is allowed: T = w
/ share); Llama Team, arXiv 2407.21783 (419 unexpected interruptions in 54 days on 16,384 GPUs: one in 50,677 GPU hours).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

GPU_HOURS_PER_INTERRUPTION = 50_677.0
GPUS = 8  # unless the number is given
RESTART = 60.0
HOURS = 720.0  # of 30 days


def mtbf_of(gpus: float) -> float:
    """Seconds of running time between two crashes with that many GPUs, at Llama 3's rate."""
    return GPU_HOURS_PER_INTERRUPTION * 3600 / gpus


def ettr(interval: float, *, lost: float, durable: float, mtbf: float, restart: float) -> float:
    """The share of the wall time that is kept. Raises `ValueError` for an interval shorter than `lost` or `durable`."""
    if interval < max(lost, durable):
        raise ValueError(f"a save every {interval:g} s cannot be made: it takes {max(lost, durable):g} s")
    kept = (interval - lost) / math.expm1(interval / mtbf) + lost * math.exp(-interval / mtbf)
    return math.exp(-durable / mtbf) * kept / (mtbf + restart)


def best_interval(*, lost: float, durable: float, mtbf: float) -> float:
    """The interval with the highest ETTR, found by golden section; the shortest possible one if a save costs nothing."""
    low, high = math.log(max(lost, durable, 1e-3)), math.log(max(20 * mtbf, 2 * lost, 2 * durable))
    share = (math.sqrt(5) - 1) / 2

    def kept(point: float) -> float:
        interval = math.exp(point)
        return (interval - lost) / math.expm1(interval / mtbf) + lost * math.exp(-interval / mtbf)

    left, right = high - share * (high - low), low + share * (high - low)
    at_left, at_right = kept(left), kept(right)
    while high - low > 1e-6:
        if at_left > at_right:
            high, right, at_right = right, left, at_left
            left = high - share * (high - low)
            at_left = kept(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + share * (high - low)
            at_right = kept(right)
    return math.exp((low + high) / 2)


def hours_lost(
    interval: float, *, lost: float, durable: float, mtbf: float, restart: float, load: float = 0.0
) -> float:
    """Of 30 days, to saving, to work that is done again after crashes, and to loading; the restarts themselves are not counted."""
    kept = ettr(interval, lost=lost, durable=durable, mtbf=mtbf, restart=restart + load)
    return HOURS * (1 - kept * (mtbf + restart) / mtbf)


@dataclass(frozen=True, slots=True)
class Advice:
    """How often to save. `interval`: the best one in seconds, `hours_lost` of 30 days at it. `now_interval` and
    `now_hours_lost`: the same as it is. `mtbf`: the seconds between crashes that were assumed."""

    interval: float
    hours_lost: float
    now_interval: float | None
    now_hours_lost: float | None
    mtbf: float

    def __str__(self) -> str:
        text = f"{_time(self.interval)}, loses {_time(self.hours_lost * 3600)} in 30 days"
        if self.now_interval is not None and self.now_hours_lost is not None:
            text += f"; as now, every {_time(self.now_interval)}, {_time(self.now_hours_lost * 3600)}"
        return f"{text} (a crash every {_time(self.mtbf)})"


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("min", 60.0), ("h", 3600.0)):
        if seconds < 120 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86400:.3g} d"


def advise(
    *,
    lost: float,
    durable: float,
    mtbf: float,
    restart: float = RESTART,
    load: float = 0.0,
    now: float | None = None,
) -> Advice:
    """The best interval for saves that cost that much, against `now`, which is lengthened to what a save takes."""
    lost, durable = max(lost, 0.0), max(durable, 0.0)
    best = best_interval(lost=lost, durable=durable, mtbf=mtbf)
    now = None if now is None else max(now, lost, durable)

    def hours(interval: float) -> float:
        return hours_lost(interval, lost=lost, durable=durable, mtbf=mtbf, restart=restart, load=load)

    return Advice(best, hours(best), now, None if now is None else hours(now), mtbf)
