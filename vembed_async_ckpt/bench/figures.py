"""From a result to what is said about each engine: one `Quantity` for each question, with the visits that it came from.

A difference between two quantities is claimed only if it is larger than the noise of the run: a factor of 1.25 between the medians,
and no overlap between the medians of the visits. One visit alone is judged by its samples; of four visits and more the outermost
quarters are left aside, so that more visits tell more and not less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from .options import DISK
from .samples import Sample, by_engine, errors, quiet_rounds

FACTOR = 1.25
QUESTIONS = {
    "blocked": "stops training",
    "lost": "costs training in all",
    "durable": "is safe after",
    "loaded": "is loaded back in",
}


@dataclass(frozen=True)
class Quantity:
    """Samples of one kind, by visit."""

    visits: tuple[tuple[float, ...], ...]

    @property
    def samples(self) -> list[float]:
        return [value for visit in self.visits for value in visit]

    @property
    def median(self) -> float:
        return median(self.samples)

    @property
    def low(self) -> float:
        return min(self.samples)

    @property
    def high(self) -> float:
        return max(self.samples)

    @property
    def spread(self) -> float:
        """Half of the way from the smallest sample to the largest."""
        return (self.high - self.low) / 2

    @property
    def of_visits(self) -> list[float]:
        """The median of each visit."""
        return [median(visit) for visit in self.visits]

    def _middle(self) -> list[float]:
        """The medians of the visits in order, without a quarter of them at either end; of fewer than four, all."""
        ordered = sorted(self.of_visits)
        aside = len(ordered) // 4
        return ordered[aside : len(ordered) - aside]

    def above(self, other: Quantity) -> bool:
        """Whether it is larger, beyond the noise."""
        alone = len(self.visits) < 2 or len(other.visits) < 2
        apart = self.low > other.high if alone else self._middle()[0] > other._middle()[-1]
        return apart and self.median > max(FACTOR * other.median, 0.0)


@dataclass(frozen=True)
class Figures:
    """What is known of one engine. `durable`: with nothing beside it; `beside`: while training goes on. `lost`: what a
    save costs the training until it is durable. `first`: blocked by the first save. `written`: bytes on disk. Times are in
    seconds."""

    engine: str
    quantities: dict[str, Quantity]

    def __contains__(self, key: str) -> bool:
        return key in self.quantities

    def __getitem__(self, key: str) -> Quantity:
        return self.quantities[key]

    def median(self, key: str) -> float | None:
        return self.quantities[key].median if key in self.quantities else None


@dataclass(frozen=True)
class Measured:
    """All that a result says: `engines` in the order of what a save costs them, `disk`: the raw disk, if it was looked at;
    `others`: the share of the machine that other people's processes had; `rounds` of which `used` count."""

    engines: dict[str, Figures]
    disk: Figures | None
    errors: dict[str, str]
    others: float
    rounds: int
    used: int


def of(result: Sample) -> Measured:
    """The figures in a result, of the measure `cost` or, in older files, of `stall`, `durable` and `restore`."""
    found: dict[str, dict[str, Quantity]] = {}
    failed: dict[str, str] = {}
    said: Sample = {"rounds": 0, "used": 0, "others": 0.0}
    for measure in ("restore", "durable", "stall", "cost"):  # a later one has the last word
        samples = result["measures"].get(measure, {}).get("samples", [])
        if not samples:
            continue
        inner = {"restore": "loads", "durable": "saves", "stall": "blocked", "cost": None}[measure]
        used, said = quiet_rounds(samples, inner)
        failed |= errors(samples)
        for name, visits in by_engine(used).items():
            for key, take in _TAKE[measure].items():
                values = [value for value in (tuple(take(visit)) for visit in visits) if value]
                if values:
                    found.setdefault(name, {})[key] = Quantity(tuple(values))
    disk = found.pop(DISK, None)
    engines = [Figures(name, quantities) for name, quantities in found.items()]
    return Measured(
        {figures.engine: figures for figures in sorted(engines, key=_order)},
        None if disk is None else Figures(DISK, disk),
        failed,
        said["others"],
        said["rounds"],
        said["used"],
    )


def _order(figures: Figures) -> tuple[bool, float]:
    value = next((figures[key].median for key in ("lost", "blocked", "durable", "loaded") if key in figures), 0.0)
    return "lost" not in figures, value


def _each(parts: Iterable[Sample], key: str) -> list[float]:
    return [part[key] for part in parts if key in part]


_TAKE: dict[str, dict[str, Callable[[Sample], Sequence[float]]]] = {
    "cost": {
        "first": lambda visit: _each([visit.get("first", {})], "blocked"),
        "blocked": lambda visit: _each(visit.get("saves", ()), "blocked"),
        "lost": lambda visit: _each(visit.get("steps", ()), "lost"),
        "beside": lambda visit: _each(visit.get("steps", ()), "durable"),
        "durable": lambda visit: _each(visit.get("alone", ()), "durable") or visit.get("writes", ()),
        "written": lambda visit: _each(visit.get("alone", ()), "bytes"),
        "loaded": lambda visit: _each(visit.get("loads", ()), "warm"),
        "cold": lambda visit: _each(visit.get("loads", ()), "cold") or visit.get("reads", ()),
        "floor": lambda visit: visit.get("floor", ()),
    },
    "stall": {
        "blocked": lambda visit: _each(visit["blocked"], "blocked"),
        "lost": lambda visit: visit["steps"][-1]["lost"],
    },
    "durable": {
        "durable": lambda visit: _each(visit["saves"], "durable"),
        "written": lambda visit: _each(visit["saves"], "bytes"),
    },
    "restore": {
        "loaded": lambda visit: _each(visit["loads"], "warm"),
        "cold": lambda visit: _each(visit["loads"], "cold"),
    },
}


def summary(samples: Sequence[Sample]) -> dict[str, Any]:
    """Medians and ranges of the measure `cost`, for who reads the file without this library."""
    measured = of({"measures": {"cost": {"samples": samples}}})
    everything = [*measured.engines.values(), *([measured.disk] if measured.disk else [])]
    return {
        "rounds": measured.rounds,
        "used": measured.used,
        "others": measured.others,
        "engines": {
            figures.engine: {
                f"{key}{'_bytes' if key == 'written' else '_s'}": {
                    "median": quantity.median,
                    "low": quantity.low,
                    "high": quantity.high,
                    "of_visits": quantity.of_visits,
                }
                for key, quantity in figures.quantities.items()
            }
            for figures in everything
        },
        "errors": measured.errors,
    }
