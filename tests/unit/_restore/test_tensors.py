"""Parts of saved tensors are read into the places that hold them, in any order of bytes and through any staging memory."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from vembed_async_ckpt._capture import memory_format
from vembed_async_ckpt._disk.source import LocalFiles
from vembed_async_ckpt._format.manifest import FileRecord, Manifest
from vembed_async_ckpt._format.ranges import Box, Region, Run
from vembed_async_ckpt._restore import tensors
from vembed_async_ckpt._restore.tensors import Move, Saved, Tensors, part_moves, region_moves

FILE = "optimizer.bin"


class Disk:
    """One file that holds tensors, one after the other."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.data = b"odd"

    def add(self, tensor: torch.Tensor) -> Saved:
        """Store a dense tensor in the order of its strides."""
        strides = memory_format.kept(tensor)
        in_order = tensor if strides is None else tensor.permute(memory_format.order(strides))
        data = bytes(in_order.contiguous().view(-1).view(torch.uint8).numpy())
        saved = Saved(FILE, len(self.data), len(data), tensor.dtype, tuple(tensor.shape), strides)
        self.data += data
        return saved

    def fill(self, moves: Iterable[Move]) -> None:
        (self.directory / FILE).write_bytes(self.data)
        record = FileRecord(len(self.data), "")
        manifest = Manifest("0" * 32, 1, 1, files={FILE: record})
        source = Tensors(LocalFiles(str(self.directory)), manifest)
        source.fill(moves)
        source.close()


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


@pytest.fixture(params=["on the host", "through staging memory", "through 64 bytes of it"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How places are filled: as on the host, or as on a device."""
    if request.param != "on the host":
        monkeypatch.setattr(tensors, "_is_on_host", lambda place: False)
    if "64" in request.param:
        monkeypatch.setattr(tensors, "_STAGING_BYTES", 64)


def whole(shape: tuple[int, ...], order: tuple[int, ...]) -> torch.Tensor:
    """A tensor whose elements are their own positions, and whose dimensions lie in this order in memory."""
    in_memory = torch.empty([shape[dim] for dim in order], dtype=torch.int32)
    tensor = in_memory.permute([order.index(dim) for dim in range(len(order))])
    return tensor.copy_(torch.arange(math.prod(shape)).view(shape))


def cut(tensor: torch.Tensor, region: Region) -> torch.Tensor:
    if isinstance(region, Run):
        return tensor.reshape(-1)[region.start : region.start + region.count]
    return tensor[tuple(slice(a, a + n) for a, n in zip(region.start, region.size, strict=True))]


def test_regions_of_tensors_in_any_memory_format(disk: Disk, place: None):
    """Boxes and runs of random tensors, contiguous or permuted, into contiguous places and into strided ones."""
    rng = random.Random(0)
    moves: list[Move] = []
    expected: list[tuple[torch.Tensor, torch.Tensor]] = []
    for _ in range(150):
        shape = tuple(rng.randint(1, 5) for _ in range(rng.randint(1, 4)))
        order = tuple(rng.sample(range(len(shape)), len(shape)))
        tensor = whole(shape, order)
        if rng.random() < 0.5:
            start = rng.randrange(tensor.numel())
            region: Region = Run(start, rng.randint(1, tensor.numel() - start))
        else:
            first = tuple(rng.randrange(n) for n in shape)
            region = Box(first, tuple(rng.randint(1, n - a) for n, a in zip(shape, first, strict=True)))
        values = cut(tensor, region)
        piece = torch.full(values.shape, -1, dtype=torch.int32)
        if isinstance(region, Box) and rng.random() < 0.5:
            room = torch.full([n + 1 for n in values.shape], -1, dtype=torch.int32)
            piece = room[tuple(map(slice, values.shape))]
        moves += region_moves(piece, disk.add(tensor), region)
        expected.append((piece, values))
    disk.fill(moves)
    assert all(torch.equal(piece, values.to(torch.int32)) for piece, values in expected)


def test_a_part_of_a_tensor_fills_the_pieces_that_hold_it(disk: Disk, place: None):
    """A tensor that was saved in parts: each rank's piece gets its elements of every part, and nothing else changes."""
    shape = (6, 4)
    tensor = torch.arange(24, dtype=torch.int32).view(shape)
    stored = {
        offset: disk.add(tensor.view(-1)[offset : offset + count].clone()) for offset, count in ((0, 10), (10, 6))
    }
    regions: list[Region] = [Box((0, 0), (3, 4)), Box((3, 0), (3, 4)), Box((0, 1), (6, 2)), Run(7, 12)]
    pieces = [torch.full_like(cut(tensor, region), -1).contiguous() for region in regions]
    disk.fill(
        move
        for region, piece in zip(regions, pieces, strict=True)
        for offset, saved in stored.items()
        for move in part_moves(piece, saved, region, shape, offset)
    )
    for region, piece in zip(regions, pieces, strict=True):
        values = cut(tensor, region)
        assert torch.equal(piece, torch.where(values < 16, values, -1))
