"""A few bytes of many tensors, to notice that one was changed while it was copied."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from operator import add, attrgetter

PROBE_BYTES = 8

_VALUE = attrgetter("value")


class TailProbe:
    """The last 8 bytes of tensors of known sizes."""

    def __init__(self, sizes: Sequence[int]) -> None:
        """`sizes` in bytes, none below 8."""
        self._starts = [size - PROBE_BYTES for size in sizes]

    def read(self, addresses: Sequence[int]) -> list[int]:
        """Those of tensors that begin at these addresses of host memory, which must be readable."""
        return list(map(_VALUE, map(ctypes.c_uint64.from_address, map(add, addresses, self._starts))))
