"""Which committed checkpoints go. A policy only says what it wants to keep; policies are combined with `|`.

Whatever the policy says, the newest complete checkpoint stays, and so does one that a reader holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .manifest import Manifest


class Policy:
    """Something that names the checkpoints it wants to keep."""

    def keep(self, newest_first: Sequence[Manifest]) -> set[str]:
        """The save ids to keep among all checkpoints of the root, given newest first."""
        raise NotImplementedError

    def spec(self) -> list[dict[str, Any]]:
        """The policy as JSON, for the writer process."""
        return [{"policy": type(self).__name__, **{name: getattr(self, name) for name in self.__dataclass_fields__}}]  # type: ignore[attr-defined]

    def __or__(self, other: Policy) -> Policy:
        return AnyOf((self, other))


@dataclass(frozen=True)
class KeepLast(Policy):
    """Keep the newest `n`."""

    n: int

    def __post_init__(self) -> None:
        _at_least_one("KeepLast", self.n)

    def keep(self, newest_first: Sequence[Manifest]) -> set[str]:
        return {manifest.save_id for manifest in newest_first[: self.n]}


@dataclass(frozen=True)
class KeepEvery(Policy):
    """Keep every checkpoint whose step is a multiple of `steps`."""

    steps: int

    def __post_init__(self) -> None:
        _at_least_one("KeepEvery", self.steps)

    def keep(self, newest_first: Sequence[Manifest]) -> set[str]:
        return {m.save_id for m in newest_first if m.step is not None and m.step % self.steps == 0}


@dataclass(frozen=True)
class KeepBest(Policy):
    """Keep the `n` with the smallest (`mode="min"`) or largest (`"max"`) value of a metric given to `save()`."""

    metric: str
    mode: Literal["min", "max"] = "min"
    n: int = 1

    def __post_init__(self) -> None:
        _at_least_one("KeepBest", self.n)
        if self.mode not in ("min", "max"):
            raise ValueError(f"KeepBest: mode is {self.mode!r}; use 'min' or 'max'")

    def keep(self, newest_first: Sequence[Manifest]) -> set[str]:
        rated = [m for m in newest_first if m.metrics.get(self.metric) == m.metrics.get(self.metric, float("nan"))]
        rated.sort(key=lambda m: m.metrics[self.metric], reverse=self.mode == "max")
        return {manifest.save_id for manifest in rated[: self.n]}


@dataclass(frozen=True)
class AnyOf(Policy):
    """Keep what any of the policies keeps."""

    policies: tuple[Policy, ...]

    def keep(self, newest_first: Sequence[Manifest]) -> set[str]:
        return set().union(*(policy.keep(newest_first) for policy in self.policies))

    def spec(self) -> list[dict[str, Any]]:
        return [item for policy in self.policies for item in policy.spec()]


def _at_least_one(policy: str, n: int) -> None:
    if type(n) is not int or n < 1:
        raise ValueError(f"{policy}: {n!r} is not a whole number of at least 1")


def from_spec(spec: Sequence[Mapping[str, Any]]) -> Policy:
    """The policy that `spec()` described."""
    kinds = {"KeepLast": KeepLast, "KeepEvery": KeepEvery, "KeepBest": KeepBest}
    return AnyOf(tuple(kinds[item["policy"]](**{k: v for k, v in item.items() if k != "policy"}) for item in spec))
