"""Where tensors lie in an arena.

A whole tensor is contiguous there. What one rank holds of a tensor lies inside the whole: a block of rows is contiguous,
a block of columns has the strides of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .._format.ranges import Region, Run
from .arena import Arena
from .host_copy import AS_BYTES


@dataclass(frozen=True, slots=True)
class Place:
    """The place of one tensor. Positions are bytes from the start of the arena.

    `start`: of its first element.
    `strides`: its strides in elements; None if it is contiguous.
    """

    start: int
    strides: tuple[int, ...] | None = None

    def end(self, tensor: torch.Tensor) -> int:
        """Return the position behind the last element. `tensor`: what is copied there; it has elements."""
        if self.strides is None:
            return self.start + tensor.nbytes
        last = sum((n - 1) * step for n, step in zip(tensor.shape, self.strides, strict=True))
        return self.start + (last + 1) * tensor.itemsize

    def row(self, tensor: torch.Tensor) -> int:
        """Return how many bytes at the end of the place are contiguous, at least."""
        if self.strides is None:
            return tensor.nbytes
        return tensor.shape[-1] * tensor.itemsize if self.strides[-1] == 1 else tensor.itemsize


def place_of(region: Region, shape: Sequence[int], itemsize: int, offset: int) -> Place:
    """Return the place of a region of a tensor. `shape`: of the whole, which begins at `offset`."""
    if isinstance(region, Run):
        return Place(offset + region.start * itemsize)
    strides = contiguous_strides(shape)
    first = sum(at * step for at, step in zip(region.start, strides, strict=True))
    # Contiguous: behind the first dimension with more than one index, every dimension is whole.
    split = next((d for d, n in enumerate(region.size) if n > 1), len(shape))
    contiguous = tuple(region.size[split + 1 :]) == tuple(shape[split + 1 :])
    return Place(offset + first * itemsize, None if contiguous else tuple(strides))


def contiguous_strides(shape: Sequence[int]) -> list[int]:
    """Return the strides of a contiguous tensor, in elements."""
    return [math.prod(max(n, 1) for n in shape[dim + 1 :]) for dim in range(len(shape))]


class Destinations:
    """The places of tensors in an arena, as tensors. Made once per plan and arena."""

    def __init__(self, arena: Arena, tensors: Sequence[torch.Tensor], places: Sequence[Place]) -> None:
        whole = torch.frombuffer(arena.memory, dtype=torch.uint8)
        self._bases: dict[torch.dtype, torch.Tensor] = {}
        self.tensors = [self._make(whole, t, place) for t, place in zip(tensors, places, strict=True)]

    def _make(self, whole: torch.Tensor, like: torch.Tensor, place: Place) -> torch.Tensor:
        dtype = torch.uint8 if like.dtype in AS_BYTES else like.dtype
        if place.start % dtype.itemsize:  # never happens in our files; as_strided counts in elements
            raise AssertionError(f"offset {place.start} is not a multiple of {dtype.itemsize}")
        base = self._bases.get(dtype)
        if base is None:
            usable = whole.numel() // dtype.itemsize * dtype.itemsize
            base = self._bases[dtype] = whole[:usable].view(dtype)
        strides = contiguous_strides(like.shape) if place.strides is None else place.strides
        return base.as_strided(like.shape, strides, place.start // dtype.itemsize)
