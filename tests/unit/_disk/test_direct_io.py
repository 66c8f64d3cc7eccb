"""Arenas are written to files: every byte, hashed in order, and after an error nothing reads the arena any more."""

from __future__ import annotations

import errno
import itertools
import os
import random
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash

from vembed_async_ckpt._disk import direct_io
from vembed_async_ckpt._disk.direct_io import FileWriter, IOThreads, part_of, sync_all, write_range
from vembed_async_ckpt._disk.filesystem import LocalFilesystem
from vembed_async_ckpt._format.plan import PAGE, pages
from vembed_async_ckpt._shared.protocol import DATA_START, Checksums, FileSlot
from vembed_async_ckpt.testing import FailingFilesystem

DATA = {"a": random.Random(1).randbytes(3 * PAGE + 5), "b": b"", "c": random.Random(2).randbytes(PAGE), "d": b"x"}


@pytest.fixture
def threads() -> Iterator[IOThreads]:
    made = IOThreads()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_io, "CHUNK", PAGE)


def arena() -> tuple[list[FileSlot], bytearray]:
    slots: list[FileSlot] = []
    memory = bytearray(DATA_START)
    for name, data in DATA.items():
        slots.append({"name": name, "start": len(memory), "size": len(data)})
        memory += data.ljust(pages(len(data)), b"\0")
    return slots, memory


class Buffered(LocalFilesystem):
    """No O_DIRECT, as on tmpfs: bytearrays are not aligned."""

    def create(self, path: str, *, direct: bool) -> int:
        if direct:
            raise OSError(errno.EINVAL, "no O_DIRECT", path)
        return super().create(path, direct=False)


def opened(fs: LocalFilesystem | FailingFilesystem, directory: Path, step: int = 100) -> list[FileWriter]:
    return [FileWriter(fs, str(directory / slot["name"]), slot, None, step) for slot in arena()[0]]


@pytest.mark.parametrize("cuts", [[], [PAGE], [2 * PAGE, 3 * PAGE], [4 * PAGE, 5 * PAGE]])
def test_what_is_written_in_parts_is_what_was_there(tmp_path: Path, threads: IOThreads, cuts: list[int]) -> None:
    slots, memory = arena()
    writers = opened(Buffered(), tmp_path)
    counted: list[int] = []
    bounds = [DATA_START, *(DATA_START + cut for cut in cuts), len(memory)]
    for start, end in itertools.pairwise(bounds):
        part = memoryview(bytearray(memory[start:end]))  # a wave: the part lies at another place of the arena
        write_range(writers, part, start, end, 0, threads, counted.append)
    sync_all(writers, threads)
    assert {name: (tmp_path / name).read_bytes() for name in DATA} == DATA
    assert {w.slot["name"]: w.hash.hexdigest() for w in writers} == {
        name: xxhash.xxh3_128_hexdigest(data) for name, data in DATA.items()
    }
    assert sum(counted) == sum(pages(slot["size"]) for slot in slots)


def test_the_system_may_take_less_than_was_given(tmp_path: Path, threads: IOThreads) -> None:
    class Slow(Buffered):
        def write(self, fd: int, data: memoryview, offset: int) -> int:
            return super().write(fd, data[:1000], offset)

    writers = opened(Slow(), tmp_path)
    _, memory = arena()
    write_range(writers, memoryview(memory), DATA_START, len(memory), DATA_START, threads, lambda count: None)
    sync_all(writers, threads)
    assert {name: (tmp_path / name).read_bytes() for name in DATA} == DATA


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM])
def test_where_direct_io_is_refused_it_is_written_without(tmp_path: Path, threads: IOThreads, code: int) -> None:
    disk = FailingFilesystem(Buffered())
    disk.fail(code, "create")
    writer = FileWriter(disk, str(tmp_path / "d"), {"name": "d", "start": DATA_START, "size": 1}, None, 100)
    batch = threads.batch()
    writer.take(memoryview(b"x".ljust(PAGE, b"\0")), 0, batch, lambda count: None)
    batch.wait()
    writer.finish()
    assert (tmp_path / "d").read_bytes() == b"x"


def test_where_direct_writes_are_refused_the_descriptor_is_changed_once(tmp_path: Path, threads: IOThreads) -> None:
    """Some file systems accept the flag and refuse the write."""

    class Refusing(LocalFilesystem):
        def __init__(self) -> None:
            self.direct: set[int] = set()

        def create(self, path: str, *, direct: bool) -> int:
            fd = super().create(path, direct=False)
            self.direct.add(fd)
            return fd

        def write(self, fd: int, data: memoryview, offset: int) -> int:
            if fd in self.direct:
                raise OSError(errno.EINVAL, "not aligned")
            return super().write(fd, data, offset)

        def set_buffered(self, fd: int) -> None:
            self.direct.remove(fd)

    writers = opened(Refusing(), tmp_path)
    _, memory = arena()
    write_range(writers, memoryview(memory), DATA_START, len(memory), DATA_START, threads, lambda count: None)
    sync_all(writers, threads)
    assert {name: (tmp_path / name).read_bytes() for name in DATA} == DATA


def test_a_write_that_stays_invalid_is_an_error_and_no_loop(tmp_path: Path, threads: IOThreads) -> None:
    disk = FailingFilesystem(Buffered())
    disk.fail(errno.EINVAL, "write", times=None)
    writers = opened(disk, tmp_path)
    _, memory = arena()
    with pytest.raises(OSError, match="Invalid argument"):
        write_range(writers, memoryview(memory), DATA_START, len(memory), DATA_START, threads, lambda count: None)


def test_after_an_error_no_write_is_running_or_begun(tmp_path: Path, threads: IOThreads) -> None:
    """Then the arena may be given to the next save."""
    running, begun = 0, 0
    guard = threading.Lock()

    class Failing(Buffered):
        def write(self, fd: int, data: memoryview, offset: int) -> int:
            nonlocal running, begun
            with guard:
                running, begun = running + 1, begun + 1
                mine = begun
            try:
                if mine == 1:
                    raise OSError(errno.ENOSPC, "full")
                time.sleep(0.05)
                return super().write(fd, data, offset)
            finally:
                with guard:
                    running -= 1

    slot: FileSlot = {"name": "f", "start": DATA_START, "size": 100 * PAGE}
    writer = FileWriter(Failing(), str(tmp_path / "f"), slot, None, 1 << 20)
    with pytest.raises(OSError, match="full"):
        write_range(
            [writer], memoryview(bytearray(100 * PAGE)), DATA_START, DATA_START + 100 * PAGE, 0, threads, lambda n: None
        )
    assert running == 0
    assert begun < 20
    after = begun
    time.sleep(0.1)
    assert begun == after
    writer.abandon()


@pytest.mark.parametrize("call", ["truncate", "sync", "close"])
def test_a_file_that_cannot_be_finished_fails_and_is_closed(tmp_path: Path, threads: IOThreads, call: str) -> None:
    disk = FailingFilesystem(Buffered())
    writers = opened(disk, tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    disk.fail(errno.EIO, call)
    with pytest.raises(OSError, match="Input/output"):
        sync_all(writers, threads)
    for writer in writers:
        writer.abandon()
        writer.abandon()
    assert len(os.listdir("/proc/self/fd")) == before - len(writers)


def test_abandon_hides_no_more_than_its_own_close(tmp_path: Path) -> None:
    disk = FailingFilesystem(Buffered())
    writer = opened(disk, tmp_path)[0]
    disk.fail(errno.EIO, "close")
    writer.abandon()
    assert disk.failed == [("close", str(tmp_path / "a"))]


@pytest.mark.parametrize("step", [1, 3, 64, 1 << 20])
@pytest.mark.parametrize("seed", range(4))
def test_checksums_are_filled_in_wherever_a_step_ends(step: int, seed: int) -> None:
    """Also where the four bytes of a sum lie on both sides of a boundary."""
    dice = random.Random(seed)
    records, position = [], dice.randrange(5)
    content = bytearray(dice.randbytes(400))
    for _ in range(3):
        size = dice.randrange(60)
        records.append([position, size, position + size + dice.randrange(3), 0])
        position += size + 8
    start = position + 4
    for n, record in enumerate(records):
        record[3] = n * 5
    checksums: Checksums = {"central_start": start, "records": records}
    expected = bytearray(content)
    for data, size, local, central in records:
        value = zlib.crc32(content[data : data + size]).to_bytes(4, "little")
        expected[local : local + 4] = value
        expected[start + central : start + central + 4] = value
    sums = direct_io._Crc(checksums)
    for at in range(0, len(content), step):
        sums.pass_by(memoryview(content)[at : at + step], at)
    assert content == expected


def test_the_part_of_a_file_in_a_range() -> None:
    slot: FileSlot = {"name": "f", "start": 3 * PAGE, "size": PAGE + 1}
    assert part_of(slot, 0, 9 * PAGE) == (0, 2 * PAGE)
    assert part_of(slot, 4 * PAGE, 9 * PAGE) == (PAGE, 2 * PAGE)
    low, high = part_of(slot, 0, PAGE)
    assert low >= high


def test_threads_end_with_close() -> None:
    made = IOThreads()
    made.close()
    assert not any(thread.is_alive() for thread in made._threads)
