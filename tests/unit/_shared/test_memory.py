"""Arenas are mapped so that forks and core dumps leave them alone."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator

import pytest

from vembed_async_ckpt._shared import memory as memories
from vembed_async_ckpt._shared.memory import MEMFD, address_of, map_arena, populate

SIZE = 8 * mmap.PAGESIZE


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.memfd_create(MEMFD)
    os.ftruncate(made, SIZE)
    yield made
    os.close(made)


def flags(memory: mmap.mmap) -> set[str]:
    """The kernel's flags of this mapping."""
    address = f"{address_of(memory):x}"
    here = False
    with open("/proc/self/smaps") as file:
        for line in file:
            if "-" in line.split(" ", 1)[0] and not line.startswith("Vm"):
                here = line.lstrip("0").startswith(address + "-")
            elif here and line.startswith("VmFlags:"):
                return set(line.split()[1:])
    raise AssertionError("it is not mapped")


def test_it_is_shared_with_who_else_maps_it(fd: int) -> None:
    one, other = map_arena(fd, SIZE), map_arena(fd, SIZE)
    one[5:8] = b"abc"
    assert other[5:8] == b"abc"


def test_it_is_in_no_core_dump_and_in_no_forked_child(fd: int) -> None:
    found = flags(map_arena(fd, SIZE))
    assert {"dd", "dc"} <= found, found


def test_its_pages_are_there_after_populate_and_unchanged(fd: int) -> None:
    memory = map_arena(fd, SIZE)
    memory[0:4] = b"here"
    populate(memory, SIZE)
    assert memory[0:8] == b"here\0\0\0\0"
    assert os.fstat(fd).st_blocks * 512 == SIZE


def test_kernels_that_cannot_populate_are_left_to_the_first_copy(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, calls = map_arena(fd, SIZE), []

    class Old:
        def madvise(self, *arguments: int) -> int:
            calls.append(arguments)
            return -1

    monkeypatch.setattr(memories, "_libc", Old())
    monkeypatch.setattr(memories, "_STEP", mmap.PAGESIZE)
    populate(memory, SIZE)
    assert len(calls) == 1


def test_a_forked_child_has_no_descriptor_of_it(fd: int) -> None:
    """Each would keep the memory of the whole arena alive. Other descriptors stay open."""
    memory = map_arena(fd, SIZE)
    kept = os.memfd_create("of the user's")
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        names = []
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # the descriptor that listdir used is closed by now
                names.append(os.readlink(f"/proc/self/fd/{number}"))
        names = [name for name in names if name.startswith("/memfd:")]
        os.write(writing, "\n".join(names).encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as answer:
        names = answer.read().split("\n")
    os.waitpid(child, 0)
    os.close(kept)
    assert [name.split(" (")[0] for name in names] == ["/memfd:of the user's"]
    assert memory[0:1] == b"\0"
