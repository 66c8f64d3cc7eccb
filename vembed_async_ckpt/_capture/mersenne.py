"""The states of the Mersenne Twisters of Python and numpy, read from memory.

`random.getstate()` and `np.random.get_state()` make an object for each of more than 600 numbers, which takes longer than
all else that is read of random generators. Reading their bytes takes a few microseconds. Where the bytes are is found by
trial, when this module is imported. Without that, and for any other kind of generator, there is nothing to read.

Layouts: `RandomObject` in CPython's Modules/_randommodule.c; `mt19937_state` and `aug_bitgen_t` in numpy's
random/src/mt19937/mt19937.h and random/src/legacy/legacy-distributions.h.
"""

from __future__ import annotations

import ctypes
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

_PYTHON = struct.Struct("=i624I")
_NUMPY = struct.Struct("=624Ii")
_GAUSS = struct.Struct("=i4xd")


@dataclass(frozen=True, slots=True)
class PythonState:
    """The state of a `random.Random`, not taken apart yet."""

    content: bytes
    gauss: float | None

    def value(self) -> Any:
        """Return what `getstate()` would have returned."""
        index, *numbers = _PYTHON.unpack(self.content)
        return (random.Random.VERSION, (*numbers, index), self.gauss)


def of_python() -> PythonState | None:
    """Return the state of the generator behind `random.random()`, or None if it cannot be read."""
    generator: Any = getattr(random.getstate, "__self__", None)
    if _PYTHON_AT is None or type(generator) is not random.Random:
        return None
    return PythonState(ctypes.string_at(id(generator) + _PYTHON_AT, _PYTHON.size), vars(generator)["gauss_next"])


def of_numpy() -> tuple[Any, int, int, float] | None:
    """Return (keys, position, has_gauss, gauss) of the generator behind `np.random.rand()`, or None if they cannot be read.

    They are what `np.random.get_state()` returns behind the name. `keys` is an array of its own.
    """
    generator: Any = getattr(np.random.get_state, "__self__", None)
    if _GAUSS_AT is None or type(generator) is not np.random.RandomState:
        return None
    bits = generator._bit_generator
    return _numpy_state(generator, bits) if type(bits) is np.random.MT19937 else None


def _numpy_state(generator: Any, bits: Any) -> tuple[Any, int, int, float]:
    assert _GAUSS_AT is not None
    content = bytearray(ctypes.string_at(bits.ctypes.state_address, _NUMPY.size))
    has_gauss, gauss = _GAUSS.unpack(ctypes.string_at(id(generator) + _GAUSS_AT, _GAUSS.size))
    (position,) = struct.unpack_from("=i", content, 4 * 624)
    return np.frombuffer(content, np.uint32, 624), position, has_gauss, gauss


def _find_python() -> int | None:
    """Return the offset of the state in a `random.Random`, or None if it cannot be read there."""
    trial = random.Random(5)
    trial.gauss(0, 1)
    numbers = trial.getstate()[1]
    memory = ctypes.string_at(id(trial), random.Random.__basicsize__)
    found = memory.find(_PYTHON.pack(numbers[-1], *numbers[:-1]))
    return None if found < 0 else found


def _find_gauss() -> int | None:
    """Return the offset of (has_gauss, gauss) in a `np.random.RandomState`, or None if its state cannot be read."""
    global _GAUSS_AT
    trial = np.random.RandomState(np.random.MT19937(5))
    trial.standard_normal()
    known = trial.get_state(legacy=False)
    memory = ctypes.string_at(id(trial), np.random.RandomState.__basicsize__)
    found = memory.find(struct.pack("=d", known["gauss"])) - 8
    if found < 0:
        return None
    _GAUSS_AT = found
    for _ in range(2):
        known = trial.get_state(legacy=False)
        keys, position, has_gauss, gauss = _numpy_state(trial, trial._bit_generator)
        expected = (known["state"]["pos"], known["has_gauss"], known["gauss"])
        if (position, has_gauss, gauss) != expected or not np.array_equal(keys, known["state"]["key"]):
            return None
        trial.standard_normal()
    return found


def _or_none(find: Callable[[], int | None]) -> int | None:
    try:
        return find()
    except Exception:  # another interpreter, or another version of numpy
        return None


_GAUSS_AT: int | None = None
_PYTHON_AT = _or_none(_find_python)
_GAUSS_AT = _or_none(_find_gauss)
