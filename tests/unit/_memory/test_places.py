"""Places of pieces inside whole tensors, and what is pinned of an arena."""

from __future__ import annotations

import math
import os
import random
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vembed_async_ckpt._format.ranges import Box, Run
from vembed_async_ckpt._memory import arena as arenas
from vembed_async_ckpt._memory import host_copy, pinning
from vembed_async_ckpt._memory.arena import Arena, ArenaPool, whole_pages
from vembed_async_ckpt._memory.barrier import STEP_BARRIER, OverlapPolicy
from vembed_async_ckpt._memory.host_copy import copy_alone, copy_blocking
from vembed_async_ckpt._memory.places import Destinations, Place, place_of
from vembed_async_ckpt._memory.staging import DeferredCopy, LatePlaces

DTYPES = (torch.float32, torch.bfloat16, torch.uint8, torch.complex64)


@pytest.mark.parametrize("seed", range(40))
def test_pieces_fill_the_whole(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any boxes and runs that cover a tensor make it up, whichever way they are copied: large and small parts, whole rows and
    columns, in one call or in parts."""
    draw = random.Random(seed)
    monkeypatch.setattr(host_copy, "GROUP_BYTES", draw.choice((64, 1 << 20)))
    monkeypatch.setattr(host_copy, "SERIAL", draw.choice((4, 1 << 20)))
    dtype = draw.choice(DTYPES)
    shape = [draw.randint(1, 7) for _ in range(draw.randint(0, 4))]
    count = math.prod(shape)
    whole = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8).view(dtype).reshape(shape)
    regions: list[Box | Run] = []
    pieces = []
    if draw.random() < 0.3:
        first, rest = 0, count
        while rest:
            size = draw.randint(1, rest)
            regions.append(Run(first, size))
            pieces.append(whole.reshape(-1)[first : first + size].clone())
            first, rest = first + size, rest - size
    else:
        grid: list[list[tuple[int, int]]] = []
        for n in shape:
            cuts = sorted({0, n, *(draw.randint(0, n) for _ in range(draw.randint(0, 2)))})
            grid.append(list(pairwise(cuts)))
        boxes: list[list[tuple[int, int]]] = [[]]
        for cuts_of_dim in grid:
            boxes = [[*box, cut] for box in boxes for cut in cuts_of_dim]
        for box in boxes:
            regions.append(Box(tuple(a for a, _ in box), tuple(b - a for a, b in box)))
            pieces.append(whole[tuple(slice(a, b) for a, b in box)].clone())
    offset = 64
    arena = Arena(1, 1 << 16)
    places = [place_of(region, shape, dtype.itemsize, offset) for region in regions]
    targets = Destinations(arena, pieces, places).tensors
    for place, piece, target in zip(places, pieces, targets, strict=True):
        assert (place.strides is None) == target.is_contiguous() or piece.numel() == 1 or target.shape == ()
        assert 0 <= place.start - offset <= place.end(piece) - offset <= count * dtype.itemsize
    draw.choice((copy_alone, copy_blocking))(targets, pieces)
    assert bytes(arena.memory[offset : offset + count * dtype.itemsize]) == bytes(
        whole.contiguous().reshape(-1).view(torch.uint8).numpy()
    )
    assert not any(arena.memory[:offset])
    assert not any(arena.memory[offset + count * dtype.itemsize :])
    arena.close()


class _Saved:
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def parameter_ids(self) -> set[int] | None:
        return None


def divided(columns: int) -> tuple[Any, list[torch.nn.Parameter], list[torch.Tensor], Arena]:
    """A copy plan of one parameter that is a block of `columns` columns in a whole of ten, and its place."""
    STEP_BARRIER.install()
    parameter = torch.nn.Parameter(torch.arange(600.0 * columns).reshape(600, columns))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    arena = Arena(1, 1 << 20)
    places = [place_of(Box((0, 2), (600, columns)), (600, 10), 4, 4096)]
    tensors = [parameter.detach()]
    copy_plan = OverlapPolicy().divide(
        "key", tensors, lambda: ["weight"], lambda: [parameter], frozenset(), [_Saved(optimizer)], places
    )
    return copy_plan, [parameter], Destinations(arena, tensors, places).tensors, arena


def test_columns_are_probed_at_their_own_end(small_is_late: None) -> None:
    """The last bytes of a block of columns lie inside the whole. A change of them is found, and without one nothing is."""
    copy_plan, (parameter,), (target,), _ = divided(4)
    assert (len(copy_plan.late), len(copy_plan.now)) == (1, 0)
    for change in (False, True):
        deferred = DeferredCopy(copy_plan, LatePlaces(copy_plan, [target]), [parameter.detach()])
        if change:
            parameter.data[-1, -1] += 1  # no counter shows it
        copy_alone([target], [parameter.detach()])
        assert deferred.check() == ("weight" if change else None)


def test_a_row_that_is_shorter_than_the_probe_is_copied_at_once(small_is_late: None) -> None:
    copy_plan, *_ = divided(1)
    assert (len(copy_plan.late), len(copy_plan.now)) == (0, 1)


@pytest.mark.parametrize("which", ["tensor", "wrapper"])
def test_both_counters_of_a_wrapped_tensor_are_compared(small_is_late: None, which: str) -> None:
    """A DTensor and its local tensor have a version counter each, and a change through one moves only that."""
    copy_plan, (parameter,), (target,), _ = divided(4)
    local, wrapper = parameter.detach(), torch.zeros(3)
    deferred = DeferredCopy(copy_plan, LatePlaces(copy_plan, [target]), [local], [wrapper])
    copy_alone([target], [local])
    assert deferred.check() is None
    (local if which == "tensor" else wrapper).add_(0)
    assert deferred.check() == "weight"


@pytest.mark.parametrize(
    ("parts", "pages"),
    [
        ([], []),
        ([(10, 20)], [(0, 4096)]),
        ([(8192, 8193), (10, 20)], [(0, 4096), (8192, 12288)]),
        ([(10, 4096), (4096, 5000)], [(0, 8192)]),
        ([(10, 4097), (5000, 6000), (100000, 100001)], [(0, 8192), (98304, 100001)]),
    ],
)
def test_parts_are_whole_pages(parts: list[tuple[int, int]], pages: list[tuple[int, int]]) -> None:
    """Few of them: those that touch are one, and none ends behind the memory (100,001 bytes here)."""
    assert whole_pages(parts, 100_001) == pages


def test_many_parts_are_pinned_as_one() -> None:
    parts = [(n * 8192, n * 8192 + 1) for n in range(arenas._MAX_PINNED_PARTS + 1)]
    assert whole_pages(parts[:-1], 1 << 30) == [(a, a + 4096) for a, _ in parts[:-1]]
    assert whole_pages(parts, 1 << 30) == [(0, parts[-1][0] + 4096)]


class Runtime:
    """Stands for the CUDA runtime: refuses what overlaps, as it does, and notes what is pinned."""

    def __init__(self) -> None:
        self.pinned: dict[int, int] = {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if any(a < address + size and address < a + n for a, n in self.pinned.items()):
            return pinning._ALREADY_REGISTERED
        self.pinned[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        return 0 if self.pinned.pop(address, None) else 713


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    runtime = Runtime()
    monkeypatch.setattr(pinning, "can_pin", lambda: True)
    monkeypatch.setattr(pinning, "in_use", lambda: None)
    monkeypatch.setattr(pinning, "_pinned", {})
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    return runtime


def test_a_rank_pins_its_own_parts(runtime: Runtime) -> None:
    """Those of the newest plan; what stays the same stays pinned; at the end nothing is."""
    arena, page = Arena(1, 1 << 20), 4096

    def pinned() -> list[tuple[int, int]]:
        return sorted((a - arena.address, a - arena.address + n) for a, n in runtime.pinned.items())

    arena.own = [(page, 2 * page), (10 * page, 11 * page + 1)]
    arena.pin()
    assert pinned() == [(page, 2 * page), (10 * page, 12 * page)]
    arena.own = [(page, 2 * page), (11 * page, 13 * page)]
    arena.pin()
    assert pinned() == [(page, 2 * page), (11 * page, 13 * page)]
    arena.own = None
    arena.pin()
    assert pinned() == [(0, 1 << 20)]
    arena.close()
    assert runtime.pinned == {}


def test_memory_that_is_in_use_is_never_unpinned(runtime: Runtime, caplog: pytest.LogCaptureFixture) -> None:
    """A second registration over it fails, and says so. Registrations that an earlier owner left are replaced."""
    assert pinning.pin(1 << 20, 8192)
    assert not pinning.pin(1 << 20, 4096)
    assert "could not be pinned" in caplog.text
    assert runtime.pinned == {1 << 20: 8192}
    runtime.pinned[2 << 20] = 4096  # nobody knows of it any more
    assert pinning.pin(2 << 20, 8192)
    assert runtime.pinned[2 << 20] == 8192


def test_a_retired_arena_is_used_again_when_it_is_released() -> None:
    """Until then another one is made, and the limit of bytes counts both."""
    dropped: list[int] = []
    pool = ArenaPool(1, 6 << 20, lambda arena: None, lambda arena: dropped.append(arena.number))
    first = pool.acquire(2 << 20)
    assert first is not None
    pool.retire(first)
    assert first in pool.arenas()
    assert pool.statistics()["host_bytes"] == first.size
    second = pool.acquire(2 << 20)
    assert second is not None
    assert second is not first
    assert pool.limit() <= 2 << 20
    pool.release(second)
    pool.release(first)
    assert (dropped, first.fd) == ([1], -1), "one arena is enough"
    third = pool.acquire(2 << 20)
    assert third is second
    pool.retire(third)
    pool.release(third)
    assert pool.acquire(2 << 20) is third
    pool.close()


def test_an_arena_of_another_process_must_be_as_large_as_it_is_said_to_be() -> None:
    arena = Arena(1, 8192)
    with pytest.raises(ValueError, match="8192 bytes, not 12288"):
        Arena(1, 12288, os.dup(arena.fd))
    arena.close()


def test_a_place_says_where_it_ends() -> None:
    like: Any = SimpleNamespace(shape=(3, 2), nbytes=24, itemsize=4)
    assert Place(8).end(like) == 32
    assert Place(8, (10, 1)).end(like) == 8 + 22 * 4
    assert Place(8, (10, 1)).row(like) == 8
    assert Place(8, (1, 10)).row(like) == 4
