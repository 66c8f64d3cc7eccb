"""What every reader of samples needs: the rounds that count, samples by engine, failures, percentiles."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

Sample = dict[str, Any]
BUSY = 0.1  # share of the machine that other people's processes had, from which a round is left out if enough others remain


def p99(values: Sequence[float]) -> float:
    """The 99th percentile; with fewer than a hundred values, close to their maximum."""
    return statistics.quantiles(values, n=100, method="inclusive")[98] if len(values) > 1 else values[0]


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def quiet_rounds(samples: Sequence[Sample], inner: str | None) -> tuple[list[Sample], Sample]:
    """The samples of the rounds in which others used less than a tenth of the machine, if they are half of all rounds;
    else all.

    A round counts for all engines or for none, so that no engine is chosen for. Also says how many were used. `inner`:
    where the shares of the machine stand in a sample; None is in the sample itself.
    """
    whole = [sample for sample in samples if "error" not in sample]
    others: dict[int, list[float]] = defaultdict(list)
    for sample in whole:
        parts = [sample] if inner is None else sample.get(inner, ())
        others[sample["round"]] += [part["others"] for part in parts]
    quiet = [number for number, shares in others.items() if not shares or statistics.mean(shares) < BUSY]
    used = quiet if 2 * len(quiet) >= len(others) else list(others)
    shares = [share for number in used for share in others[number]]
    said = {"rounds": len(others), "used": len(used), "others": statistics.mean(shares) if shares else 0.0}
    return [sample for sample in whole if sample["round"] in used], said


def by_engine(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        found[sample["engine"]].append(sample)
    return found


def errors(samples: Iterable[Sample]) -> dict[str, str]:
    return {sample["engine"]: sample["error"].strip().splitlines()[-1] for sample in samples if "error" in sample}
