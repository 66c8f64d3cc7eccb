"""Host memory by address: many tensors are read with one call, and no Python object is made for each of them.

Nothing here keeps memory alive, and nothing is checked. Whoever reads must hold the storages, and must have seen that
their memory was not freed. What depends on an address is made again only when the address has changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

PROBE_BYTES = 8

_Array = npt.NDArray[Any]


class _AddressSpace:
    """All addresses from 8 on, as an array of bytes. Only what is mapped may be touched."""

    __array_interface__ = {"data": (8, False), "shape": ((1 << 62) - 8,), "typestr": "|u1", "version": 3}  # noqa: RUF012


_BYTES: _Array = np.asarray(_AddressSpace())
_ARRAYS = {word: _BYTES.view(f"u{word}") for word in (1, 2, 4, 8)}


def _index(addresses: _Array, word: int) -> _Array:
    """Return where the words at these addresses are in `_ARRAYS[word]`."""
    return (addresses - 8) // word


class TailProbe:
    """Reads the last 8 bytes of tensors of known sizes, to notice that one changed while it was copied."""

    def __init__(self, sizes: Sequence[int]) -> None:
        """`sizes`: bytes of each tensor, at least 8."""
        self._offsets = np.array(sizes, dtype=np.int64) - PROBE_BYTES
        self._addresses: Sequence[int] = ()
        self._memory = _BYTES
        self._places: _Array = np.empty((0, PROBE_BYTES), np.int64)

    def read(self, addresses: Sequence[int]) -> _Array:
        """Return the last 8 bytes of each tensor as a number. `addresses`: where each tensor starts."""
        if addresses != self._addresses:
            tails = np.array(addresses, dtype=np.int64) + self._offsets
            word = int(np.gcd.reduce(tails, initial=8))
            self._memory = _ARRAYS[word]
            self._places = _index(tails, word)[:, None] + np.arange(PROBE_BYTES // word)
            self._addresses = list(addresses)
        return self._memory[self._places].view(np.uint64)[:, 0]


class FewBytes:
    """Copies tensors of a few bytes each to fixed places."""

    def __init__(self, places: Sequence[int], sizes: Sequence[int]) -> None:
        """`places`: the address of each destination. `sizes`: the bytes of each."""
        self._places, self._sizes = np.array(places, dtype=np.int64), np.array(sizes, dtype=np.int64)
        self._addresses: Sequence[int] = ()
        self._memory = _BYTES
        self._to: _Array = np.empty(0, np.int64)
        self._of: _Array = np.empty(0, np.int64)

    def fill(self, addresses: Sequence[int]) -> None:
        """Copy the tensors that start at `addresses`."""
        if addresses != self._addresses:
            sources = np.array(addresses, dtype=np.int64)
            word = int(np.gcd.reduce(np.concatenate((self._places, sources, self._sizes)), initial=8))
            counts = self._sizes // word
            within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            self._memory = _ARRAYS[word]
            self._to, self._of = (np.repeat(_index(at, word), counts) + within for at in (self._places, sources))
            self._addresses = list(addresses)
        self._memory[self._to] = self._memory[self._of]
