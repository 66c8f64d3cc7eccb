"""Decides which committed checkpoints are deleted.

A policy names the checkpoints to keep; policies are combined with `|`.

These are kept whatever the policy says: the newest complete checkpoint, a checkpoint that a reader holds, and an
incomplete one.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, SupportsIndex, get_args

from ._format.manifest import Manifest

Mode = Literal["min", "max"]
Unrated = Literal["keep", "drop"]


class Policy:
    """Names the checkpoints to keep."""

    def keep(self, newest_first: Sequence[Manifest]) -> set[str]:
        """Return the save ids to keep. `newest_first` has all checkpoints of the root."""
        raise NotImplementedError

    def spec(self) -> list[dict[str, Any]]:
        """Return the policy as JSON, for the writer process."""
        return [{"policy": type(self).__name__, **{name: getattr(self, name) for name in self.__dataclass_fields__}}]  # type: ignore[attr-defined]

    def __or__(self, other: Policy) -> Policy:
        """Return a policy that keeps what either of the two keeps."""
        if not isinstance(other, Policy):
            return NotImplemented
        return AnyOf((self, other))


@dataclass(frozen=True)
class KeepLast(Policy):
    """Keep the newest `n`."""

    n: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", _at_least_one("KeepLast", "n", self.n))

    def keep(self, newest_first: Sequence[Manifest]) -> set[str]:
        return {manifest.save_id for manifest in newest_first[: self.n]}


@dataclass(frozen=True)
class KeepEvery(Policy):
    """Keep every checkpoint whose step is a multiple of `steps`, and every checkpoint saved without a step."""

    steps: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", _at_least_one("KeepEvery", "steps", self.steps))

    def keep(self, newest_first: Sequence[Manifest]) -> set[str]:
        return {m.save_id for m in newest_first if m.step is None or m.step % self.steps == 0}


@dataclass(frozen=True)
class KeepBest(Policy):
    """Keep the `n` checkpoints with the best value of a metric given to `save()`.

    The best value is the smallest (`mode="min"`) or the largest (`"max"`). Among equal values the newest is kept. A
    checkpoint is unrated if it lacks the metric or has NaN for it. `unrated="keep"` keeps all unrated checkpoints,
    `"drop"` keeps none. While no checkpoint is rated, all are kept.
    """

    metric: str
    mode: Mode = "min"
    n: int = 1
    unrated: Unrated = "keep"

    def __post_init__(self) -> None:
        if not isinstance(self.metric, str) or not self.metric:
            raise ValueError(f"KeepBest: metric is {self.metric!r}; use the name of a metric that is given to save()")
        object.__setattr__(self, "n", _at_least_one("KeepBest", "n", self.n))
        for name, allowed in (("mode", Mode), ("unrated", Unrated)):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in get_args(allowed):
                raise ValueError(f"KeepBest: {name} is {value!r}; use {' or '.join(map(repr, get_args(allowed)))}")

    def keep(self, newest_first: Sequence[Manifest]) -> set[str]:
        rated = [m for m in newest_first if is_rated(m, self.metric)]
        if not rated:
            return {manifest.save_id for manifest in newest_first}
        sign = -1 if self.mode == "max" else 1
        rated.sort(key=lambda m: sign * m.metrics[self.metric])
        kept = {manifest.save_id for manifest in rated[: self.n]}
        if self.unrated == "keep":
            kept |= {m.save_id for m in newest_first if not is_rated(m, self.metric)}
        return kept


@dataclass(frozen=True)
class AnyOf(Policy):
    """Keep every checkpoint that at least one of the policies keeps."""

    policies: tuple[Policy, ...]

    def keep(self, newest_first: Sequence[Manifest]) -> set[str]:
        return set().union(*(policy.keep(newest_first) for policy in self.policies))

    def spec(self) -> list[dict[str, Any]]:
        return [item for policy in self.policies for item in policy.spec()]


def is_rated(manifest: Manifest, metric: str) -> bool:
    """Return whether the checkpoint has a value for the metric that can be compared (a number, not NaN)."""
    value: Any = manifest.metrics.get(metric)
    return isinstance(value, int | float) and value == value


def unknown_metrics(policy: Policy, manifests: Iterable[Manifest]) -> list[str]:
    """Return one message for each metric that the policy uses and no checkpoint has."""
    manifests = list(manifests)
    there = sorted({name for manifest in manifests for name in manifest.metrics})
    have = f"they have {', '.join(map(repr, there))}" if there else "they have no metrics at all"
    return [
        f"no checkpoint has the metric {best.metric!r}; {have}"
        for best in _leaves(policy)
        if isinstance(best, KeepBest) and not any(is_rated(m, best.metric) for m in manifests)
    ]


def _leaves(policy: Policy) -> Iterator[Policy]:
    if isinstance(policy, AnyOf):
        for inner in policy.policies:
            yield from _leaves(inner)
    else:
        yield policy


def _at_least_one(policy: str, what: str, value: SupportsIndex) -> int:
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{policy}: {what} is {value!r}; use a whole number of at least 1")
    return number


def from_spec(spec: Sequence[Mapping[str, Any]]) -> Policy:
    """Return the policy that `spec()` described."""
    kinds = {"KeepLast": KeepLast, "KeepEvery": KeepEvery, "KeepBest": KeepBest}
    return AnyOf(tuple(kinds[item["policy"]](**{k: v for k, v in item.items() if k != "policy"}) for item in spec))
