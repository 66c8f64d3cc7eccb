"""Some of many values, chosen by index again and again."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import TypeVar

_Value = TypeVar("_Value")


class Chosen:
    """The indices of some of many values. The values are taken by a loop that runs in C."""

    def __init__(self, indices: Sequence[int]) -> None:
        self._indices = indices
        self._several = itemgetter(*indices) if len(indices) > 1 else None

    def __len__(self) -> int:
        return len(self._indices)

    def of(self, values: Sequence[_Value]) -> list[_Value]:
        """Return the values at these indices."""
        return [values[n] for n in self._indices] if self._several is None else list(self._several(values))
