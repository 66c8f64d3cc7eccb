"""Reads a few bytes of many tensors, to notice that one changed while it was copied."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from operator import add, attrgetter

PROBE_BYTES = 8

_VALUE = attrgetter("value")


class TailProbe:
    """Reads the last 8 bytes of tensors of known sizes."""

    def __init__(self, sizes: Sequence[int]) -> None:
        """`sizes`: bytes of each tensor, at least 8."""
        self._starts = [size - PROBE_BYTES for size in sizes]

    def read(self, addresses: Sequence[int]) -> list[int]:
        """Return the last 8 bytes of each tensor. `addresses` are the starts of the tensors in readable host memory."""
        return list(map(_VALUE, map(ctypes.c_uint64.from_address, map(add, addresses, self._starts))))
