"""Regions of divided tensors, compared with torch.chunk on meshes of one to three dimensions. One process, no ranks."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from vembed_async_ckpt._format.ranges import Ambiguous, Box, Run, Split, boxes, boxes_of, extents, fault_of, spans


def literal(
    whole: torch.Tensor, mesh: tuple[int, ...], at: tuple[int, ...], splits: list[Split | None]
) -> torch.Tensor:
    """What the rank at `at` holds, mesh dimension by mesh dimension."""
    for parts, index, split in zip(mesh, at, splits, strict=True):
        if split is not None:
            blocks = torch.tensor_split(whole, ends(whole.shape[split.dim], split.factor), split.dim)
            whole = torch.cat([chunk(block, parts, index, split.dim) for block in blocks], split.dim)
    return whole


def ends(size: int, parts: int) -> list[int]:
    return [min(size, -(-size // parts) * number) for number in range(1, parts)]


def chunk(tensor: torch.Tensor, parts: int, index: int, dim: int) -> torch.Tensor:
    """torch.chunk, with the empty parts that it leaves out."""
    found = tensor.chunk(parts, dim)
    return found[index] if index < len(found) else tensor.narrow(dim, 0, 0)


def held_by(whole: torch.Tensor, found: list[list[tuple[int, int]]]) -> torch.Tensor:
    """The local tensor that `spans` describes, put together from its boxes."""
    local = torch.full([sum(count for _, count in of_dim) for of_dim in found], -1, dtype=whole.dtype)
    for box, start in boxes(found):
        here = tuple(slice(a, a + n) for a, n in zip(start, box.size, strict=True))
        there = tuple(slice(a, a + n) for a, n in zip(box.start, box.size, strict=True))
        local[here] = whole[there]
    return local


def drawn(choose: random.Random) -> tuple[tuple[int, ...], tuple[int, ...], list[Split | None]]:
    shape = tuple(choose.choice([0, 1, 2, 3, 5, 8, 9, 12, 24]) for _ in range(choose.randint(1, 3)))
    mesh = tuple(choose.choice([1, 2, 3, 4]) for _ in range(choose.randint(1, 3)))
    splits = [choose.choice([None, *(Split(choose.randrange(len(shape)), n) for n in (1, 1, 2, 3))]) for _ in mesh]
    return shape, mesh, splits


def test_every_rank_of_random_meshes_holds_what_torch_chunk_gives_it():
    """1,000 cases with up to three mesh dimensions: the elements, their bytes in the whole, and all ranks together."""
    choose, seen, refused, strided = random.Random(13), 0, 0, 0
    for _ in range(1000):
        shape, mesh, splits = drawn(choose)
        whole = torch.arange(math.prod(shape)).view(shape)
        regions, accepted = [], 0
        for at in itertools.product(*map(range, mesh)):
            try:
                found = spans(shape, mesh, at, splits)
            except Ambiguous:
                assert any(split is not None and split.factor > 1 for split in splits)
                refused += 1
                continue
            expected = literal(whole, mesh, at, splits)
            assert torch.equal(held_by(whole, found), expected)
            held = [box for box, _ in boxes(found)]
            filled = [
                i for box in held for start, n in extents(shape, box, 8) for i in range(start // 8, (start + n) // 8)
            ]
            assert sorted(filled) == sorted(expected.flatten().tolist())
            seen += 1
            strided += len(held) > 1
            if all(i == 0 for i, split in zip(at, splits, strict=True) if split is None):
                regions += held
            accepted += 1
        if accepted == math.prod(mesh):
            assert fault_of(shape, regions) is None, (shape, mesh, splits)
    assert seen > 3500
    assert strided > 20
    assert refused > 200


@pytest.mark.parametrize(("mesh", "sizes"), [((4, 2), [9, 5, 3]), ((2, 2, 2), [11, 7]), ((3, 4), [10, 25])])
def test_strided_placements_are_read_as_fsdp_means_them(mesh: tuple[int, ...], sizes: list[int]):
    """FSDP divides what tensor parallelism left: the last mesh dimension first. Uneven sizes are accepted only then."""
    for size in sizes:
        splits: list[Split | None] = [Split(0, math.prod(mesh[place + 1 :])) for place in range(len(mesh))]
        whole = torch.arange(size)
        for at in itertools.product(*map(range, mesh)):
            expected = whole
            for parts, index in reversed(list(zip(mesh, at, strict=True))):
                expected = chunk(expected, parts, index, 0)
            assert torch.equal(held_by(whole, spans([size], mesh, at, splits, in_order=True)), expected)
            order = list(reversed(range(len(mesh))))
            plain: list[Split | None] = [Split(0)] * len(mesh)
            assert torch.equal(held_by(whole, spans([size], mesh, at, plain, order=order)), expected)


def test_an_uneven_strided_placement_of_unknown_meaning_is_refused():
    """9 rows on 4 x 2 ranks: two of the ranks hold other elements if it is read literally."""
    splits: list[Split | None] = [Split(0, 2), Split(0)]
    assert sum(is_refused(9, (4, 2), at, splits) for at in itertools.product(range(4), range(2))) == 2
    assert not any(is_refused(16, (4, 2), at, splits) for at in itertools.product(range(4), range(2)))


def is_refused(size: int, mesh: tuple[int, ...], at: tuple[int, ...], splits: list[Split | None]) -> bool:
    try:
        spans([size], mesh, at, splits)
    except Ambiguous:
        return True
    return False


def test_a_scalar_and_an_empty_tensor_have_one_extent_and_none():
    scalar = list(boxes(spans([], [2], [1], [None])))
    assert scalar == [(Box((), ()), ())]
    assert list(extents([], Box((), ()), 4)) == [(0, 4)]
    assert list(boxes(spans([0, 3], [2], [0], [Split(1)]))) == []


def test_extents_join_whole_rows():
    assert list(extents([4, 6], Box((1, 0), (2, 6)), 2)) == [(12, 24)]
    assert list(extents([4, 6], Box((1, 2), (2, 3)), 2)) == [(16, 6), (28, 6)]
    assert list(extents([2, 2, 6], Box((0, 1, 0), (2, 1, 6)), 1)) == [(6, 6), (18, 6)]
    assert list(extents([4, 6], Run(5, 3), 4)) == [(20, 12)]


@pytest.mark.parametrize(
    ("regions", "fault"),
    [
        ([Box((0, 0), (2, 3)), Box((2, 0), (2, 3))], None),
        ([Run(0, 5), Box((2, 0), (2, 3)), Run(5, 1)], None),
        ([Run(7, 5), Run(0, 7), Run(3, 0)], None),
        ([Run(0, 7)], "7 of its 12"),
        ([Box((0, 0), (2, 3)), Box((1, 0), (2, 3))], "the same elements"),
        ([Run(0, 6), Run(5, 6)], "the same elements"),
        ([Run(0, 6), Run(0, 6)], "the same elements"),
        ([Run(0, 6), Box((1, 0), (2, 3))], "the same elements"),
        ([Run(0, 6), Run(7, 6)], "does not have"),
        ([Box((0,), (12,))], "does not have"),
        ([Box((0, 0), (3, 4))], "does not have"),
    ],
)
def test_gaps_and_overlaps_of_all_ranks_are_found(regions: list[Box | Run], fault: str | None):
    found = fault_of([4, 3], regions)
    assert (found is None) == (fault is None)
    assert fault is None or fault in str(found)


def test_a_run_is_a_few_boxes():
    """The boxes of random runs hold exactly the elements of the run, in ascending order, and are at most 2 n - 1."""
    rng = random.Random(0)
    for _ in range(500):
        shape = tuple(rng.randint(1, 5) for _ in range(rng.randint(1, 4)))
        start = rng.randint(0, math.prod(shape))
        run = Run(start, rng.randint(0, math.prod(shape) - start))
        positions = torch.arange(math.prod(shape)).view(shape)
        found = list(boxes_of(shape, run))
        held = [
            positions[tuple(map(slice, box.start, map(sum, zip(box.start, box.size, strict=True))))] for box in found
        ]
        elements = [int(i) for part in held for i in part.flatten()]
        assert elements == list(range(run.start, run.start + run.count))
        assert len(found) <= 2 * len(shape) - 1
