"""Computes which elements of a tensor a rank holds when the tensor is divided among ranks.

The *whole* is the tensor as on one process. What a rank holds of it consists of *regions* of the whole. They follow
from the whole's shape and from how the mesh of ranks divides it. No rank has to be asked. Positions are row-major.

How a dimension is divided: https://docs.pytorch.org/docs/stable/distributed.tensor.html (`Shard`, as `torch.chunk`
divides). `_StridedShard` is described in torch/distributed/tensor/placement_types.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations, pairwise, product

Span = tuple[int, int]  # (first index, count) along one dimension


@dataclass(frozen=True, slots=True)
class Box:
    """A block of the whole: its first index and its size in each dimension."""

    start: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def count(self) -> int:
        """The number of elements."""
        return math.prod(self.size)


@dataclass(frozen=True, slots=True)
class Run:
    """`count` consecutive elements of the flattened whole. `start` is the first one."""

    start: int
    count: int


Region = Box | Run


@dataclass(frozen=True, slots=True)
class Split:
    """How one dimension of a mesh divides a tensor: along the tensor's dimension `dim`.

    With a `factor` above 1 this is torch's `_StridedShard`: the dimension is first divided into `factor` blocks, and
    every rank gets its part of each block.
    """

    dim: int
    factor: int = 1


class Ambiguous(ValueError):
    """A strided division of an uneven size. It can be read in two ways that give a rank different elements."""


def spans(
    shape: Sequence[int],
    mesh: Sequence[int],
    coordinate: Sequence[int],
    splits: Sequence[Split | None],
    *,
    order: Sequence[int] | None = None,
    in_order: bool = False,
) -> list[list[Span]]:
    """Return for each dimension of the whole the indices that a rank holds, in the order of its local tensor.

    `mesh`: the number of ranks in each dimension of the mesh.
    `coordinate`: where the rank is in it.
    `splits`: how each dimension of the mesh divides the whole; None if it does not.
    `order`: the dimensions of the mesh in the order in which they divide; None for that of the mesh.
    `in_order`: a strided division states the order in which the mesh dimensions divide, as FSDP on top of tensor
        parallelism means it. Otherwise it is only accepted if that and the literal reading give the same elements.

    Raises `Ambiguous` if they do not.
    """
    if order is not None:
        return _divide(shape, mesh, coordinate, [(place, splits[place]) for place in order])
    literal = list(enumerate(splits))
    ordered = _in_order(mesh, splits)
    if ordered is None:
        for _, split in literal:
            if split is not None and split.factor > 1 and not _is_even(shape, mesh, splits, split.dim):
                raise Ambiguous(f"dimension {split.dim} of size {shape[split.dim]} is not divided evenly")
        return _divide(shape, mesh, coordinate, literal)
    found = _divide(shape, mesh, coordinate, ordered)
    if not in_order and found != _divide(shape, mesh, coordinate, literal):
        raise Ambiguous("the size is not divided evenly")
    return found


def _in_order(mesh: Sequence[int], splits: Sequence[Split | None]) -> list[tuple[int, Split | None]] | None:
    """Return the mesh dimensions in the order in which they divide, each with a plain split.

    The factor of a strided split is the number of parts that later mesh dimensions made before it. Return None if a
    factor is no such number.
    """
    order: dict[int, list[int]] = {}
    for place in reversed(range(len(splits))):
        split = splits[place]
        if split is None:
            continue
        before = order.setdefault(split.dim, [])
        made = list(accumulate((mesh[other] for other in before), int.__mul__, initial=1))
        if split.factor not in made:
            return None
        before.insert(made.index(split.factor), place)
    return [(place, Split(dim)) for dim, places in order.items() for place in places]


def _is_even(shape: Sequence[int], mesh: Sequence[int], splits: Sequence[Split | None], dim: int) -> bool:
    parts = [n * split.factor for n, split in zip(mesh, splits, strict=True) if split is not None and split.dim == dim]
    return shape[dim] % math.prod(parts) == 0


def _divide(
    shape: Sequence[int], mesh: Sequence[int], coordinate: Sequence[int], order: Sequence[tuple[int, Split | None]]
) -> list[list[Span]]:
    held: list[list[Span]] = [[(0, n)] if n else [] for n in shape]
    for place, split in order:
        if split is None:
            continue
        spans_of_dim = held[split.dim]
        length = sum(count for _, count in spans_of_dim)
        kept: list[Span] = []
        for block in range(split.factor):
            first, end = _chunk(length, split.factor, block)
            low, high = _chunk(end - first, mesh[place], coordinate[place])
            kept += _part_of(spans_of_dim, first + low, first + high)
        held[split.dim] = list(_joined(kept))
    return held


def _chunk(length: int, parts: int, index: int) -> Span:
    """Return [first, end) of one of the parts into which `torch.chunk` divides `length`. The last may be empty."""
    size = -(-length // parts)
    return min(length, index * size), min(length, (index + 1) * size)


def _part_of(held: Sequence[Span], low: int, high: int) -> Iterator[Span]:
    """Yield positions `low` to `high` of the indices in `held`."""
    at = 0
    for start, count in held:
        first, end = max(low - at, 0), min(high - at, count)
        if first < end:
            yield start + first, end - first
        at += count


def _joined(found: Sequence[Span]) -> Iterator[Span]:
    """Yield the spans, those that follow each other as one."""
    start = end = -1
    for first, count in found:
        if first != end:
            if end > start:
                yield start, end - start
            start = first
        end = first + count
    if end > start:
        yield start, end - start


def boxes(held: Sequence[Sequence[Span]]) -> Iterator[tuple[Box, tuple[int, ...]]]:
    """Yield the boxes that `spans` describes, each with its first index in the local tensor."""
    starts = [list(accumulate((count for _, count in spans_of_dim), initial=0)) for spans_of_dim in held]
    for picked in product(*(range(len(spans_of_dim)) for spans_of_dim in held)):
        chosen = [spans_of_dim[i] for spans_of_dim, i in zip(held, picked, strict=True)]
        box = Box(tuple(start for start, _ in chosen), tuple(count for _, count in chosen))
        yield box, tuple(at[i] for at, i in zip(starts, picked, strict=True))


def extents(shape: Sequence[int], region: Region, itemsize: int) -> Iterator[Span]:
    """Yield (offset, count) in bytes of each stretch of the whole that a region fills, in ascending order.

    Stretches that follow each other are one.
    """
    if isinstance(region, Run):
        if region.count:
            yield region.start * itemsize, region.count * itemsize
        return
    if not region.count:
        return
    inner = len(shape)  # dimensions from here on are complete, so one stretch covers them
    while inner and region.size[inner - 1] == shape[inner - 1]:
        inner -= 1
    strides = [math.prod(shape[dim + 1 :]) * itemsize for dim in range(inner)]
    if not inner:
        yield 0, math.prod(shape) * itemsize
        return
    count = region.size[inner - 1] * strides[-1]
    first = sum(start * stride for start, stride in zip(region.start, strides, strict=False))
    for index in product(*(range(n) for n in region.size[: inner - 1])):
        yield first + sum(i * stride for i, stride in zip(index, strides, strict=False)), count


def boxes_of(shape: Sequence[int], run: Run, first: tuple[int, ...] = ()) -> Iterator[Box]:
    """Yield the boxes of the whole that a run fills, in ascending order. `first`: indices that all of them have."""
    if not run.count:
        return
    dim = len(first)
    if dim == len(shape) - 1:
        yield Box((*first, run.start), (*(1 for _ in first), run.count))
        return
    inner = math.prod(shape[dim + 1 :])
    index, skipped = divmod(run.start, inner)
    left = run.count
    if skipped or left < inner:
        head = min(inner - skipped, left)
        yield from boxes_of(shape, Run(skipped, head), (*first, index))
        index, left = index + 1, left - head
    rows, rest = divmod(left, inner)
    if rows:
        behind = shape[dim + 1 :]
        yield Box((*first, index, *(0 for _ in behind)), (*(1 for _ in first), rows, *behind))
    yield from boxes_of(shape, Run(0, rest), (*first, index + rows))


def fault_of(shape: Sequence[int], regions: Sequence[Region]) -> str | None:
    """Return what is wrong if the regions do not cover a tensor of this shape exactly once, else None."""
    total, covered = math.prod(shape), sum(region.count for region in regions)
    if covered != total:
        return f"the ranks write {covered} of its {total} elements"
    if any(_is_outside(shape, region) for region in regions):
        return "a rank writes elements that it does not have"
    filled = [region for region in regions if region.count]
    runs = sorted((region.start, region.count) for region in filled if isinstance(region, Run))
    if len(runs) == len(filled):
        overlap = any(start + count > following for (start, count), (following, _) in pairwise(runs))
    else:
        overlap = any(_overlap(shape, one, other) for one, other in combinations(filled, 2))
    return "two ranks write the same elements" if overlap else None


def _is_outside(shape: Sequence[int], region: Region) -> bool:
    if isinstance(region, Run):
        return region.start < 0 or region.count < 0 or region.start + region.count > math.prod(shape)
    if len(region.size) != len(shape):
        return True
    return any(a < 0 or n < 0 or a + n > whole for a, n, whole in zip(region.start, region.size, shape, strict=True))


def _overlap(shape: Sequence[int], one: Region, other: Region) -> bool:
    if isinstance(one, Box) and isinstance(other, Box):
        ends = zip(one.start, one.size, other.start, other.size, strict=True)
        return all(a < b + m and b < a + n for a, n, b, m in ends)
    mine, theirs = list(extents(shape, one, 1)), list(extents(shape, other, 1))
    return any(a < b + m and b < a + n for a, n in mine for b, m in theirs)
