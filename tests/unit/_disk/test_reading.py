"""Parts of files arrive where they belong, whatever the system gives at a time; and a checkpoint is held while it is read."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from vembed_async_ckpt import CheckpointError, CorruptCheckpoint
from vembed_async_ckpt._disk import reader
from vembed_async_ckpt._disk.deletion import in_use
from vembed_async_ckpt._disk.reading import MAX_GAP, READ_BYTES, OpenFile, read_into
from vembed_async_ckpt._format import names
from vembed_async_ckpt._format.manifest import Manifest

from ..by_hand import checkpoint, save_id


@pytest.fixture
def files(tmp_path: Path) -> Any:
    dice = random.Random(0)
    opened = []
    for n, size in enumerate((READ_BYTES * 3 + 17, 70_000, 5, 0)):
        (tmp_path / f"{n}").write_bytes(dice.randbytes(size))
        opened.append(OpenFile(str(tmp_path / f"{n}")))
    yield opened
    for file in opened:
        file.close()


def parts_of(files: list[OpenFile], count: int, seed: int) -> list[tuple[OpenFile, int, bytearray]]:
    dice = random.Random(seed)
    parts = []
    for _ in range(count):
        file = dice.choice(files)
        offset = dice.randrange(file.size + 1)
        parts.append((file, offset, bytearray(min(dice.choice((0, 1, 500, MAX_GAP, READ_BYTES)), file.size - offset))))
    return parts


def check(parts: list[tuple[OpenFile, int, bytearray]]) -> None:
    for file, offset, memory in parts:
        assert memory == Path(file.path).read_bytes()[offset : offset + len(memory)]


@pytest.mark.parametrize("seed", range(5))
def test_parts_overlap_repeat_and_come_in_any_order(files: list[OpenFile], seed: int) -> None:
    parts = parts_of(files, 200, seed)
    read_into((file, offset, memoryview(memory)) for file, offset, memory in parts)
    check(parts)


def test_thousands_of_small_parts_take_few_calls(files: list[OpenFile], monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [(files[1], offset, bytearray(10)) for offset in range(0, 60_000, 20)]
    calls: list[int] = []
    real = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda fd, buffers, offset: (calls.append(len(buffers)), real(fd, buffers, offset))[1]
    )
    read_into((file, offset, memoryview(memory)) for file, offset, memory in parts)
    check(parts)
    assert len(calls) < 20
    assert max(calls) <= 1024


@pytest.mark.parametrize("most", [1, 7, 4096])
def test_the_system_may_give_less_than_was_asked_for(
    files: list[OpenFile], monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    real = os.preadv

    def little(fd: int, buffers: list[memoryview], offset: int) -> int:
        return real(fd, [buffers[0][:most]], offset)

    monkeypatch.setattr(os, "preadv", little)
    parts = [(files[1], 3, bytearray(2000)), (files[1], 2500, bytearray(1000)), (files[2], 0, bytearray(5))]
    read_into((file, offset, memoryview(memory)) for file, offset, memory in parts)
    check(parts)


def test_without_preadv_the_same_arrives(files: list[OpenFile], monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows."""
    monkeypatch.delattr(os, "preadv")
    parts = parts_of(files, 60, 1)
    read_into((file, offset, memoryview(memory)) for file, offset, memory in parts)
    check(parts)


def test_without_more_threads_the_same_arrives(files: list[OpenFile], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    parts = parts_of(files, 60, 2)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        read_into((file, offset, memoryview(memory)) for file, offset, memory in parts)
    check(parts)


def test_a_file_that_became_shorter_is_named(files: list[OpenFile]) -> None:
    os.truncate(files[1].path, 100)
    with pytest.raises(CorruptCheckpoint, match=r"1: ends at 100; it had 70000 bytes when it was opened"):
        files[1].read(200)
    assert files[1].read(100) == Path(files[1].path).read_bytes()


@pytest.mark.parametrize(
    ("code", "kind", "said"),
    [(errno.EIO, CorruptCheckpoint, "cannot be read"), (errno.EFAULT, CheckpointError, "is it read-only")],
)
def test_an_error_names_the_file(
    files: list[OpenFile], monkeypatch: pytest.MonkeyPatch, code: int, kind: type[Exception], said: str
) -> None:
    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(kind, match=said) as raised:
        files[0].read(READ_BYTES * 3)
    assert type(raised.value) is kind
    assert files[0].path in str(raised.value)


def test_an_interrupt_is_raised_when_nothing_writes_any_more(
    files: list[OpenFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while the helpers read: the memory is the caller's again only when they have ended."""
    real_join, real_read = threading.Thread.join, os.preadv
    interrupted, helping, helpers = threading.Event(), threading.Event(), []

    def join(self: threading.Thread, timeout: float | None = None) -> None:
        if not interrupted.is_set():
            interrupted.set()
            raise KeyboardInterrupt
        real_join(self, timeout)

    def read(fd: int, buffers: list[memoryview], offset: int) -> int:
        if threading.current_thread() is threading.main_thread():
            helping.wait(20)
        else:
            helpers.append(threading.current_thread())
            helping.set()
            interrupted.wait(20)
        return real_read(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", read)
    monkeypatch.setattr(threading.Thread, "join", join)
    with pytest.raises(KeyboardInterrupt):
        files[0].read(READ_BYTES * 3)
    assert helpers
    assert not any(thread.is_alive() for thread in helpers)


def test_what_cannot_be_opened_is_corrupt(tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpoint, match="cannot be read: No such file"):
        OpenFile(str(tmp_path / "nothing"))


# -- a checkpoint that goes while it is read


@pytest.fixture(autouse=True)
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_MOMENT", 0.0)


def test_retention_sees_that_it_is_read(root: Path) -> None:
    path = str(checkpoint(root / "checkpoint-1", 1))
    assert reader.reading(path, lambda manifest: (manifest.save_id, in_use(path))) == (save_id(1), True)
    assert not in_use(path)


def test_one_that_is_replaced_meanwhile_is_read_again(root: Path) -> None:
    path = checkpoint(root / "checkpoint-1", 1)

    def look(manifest: Manifest) -> str:
        if manifest.save_id == save_id(1):
            shutil.rmtree(path)
            checkpoint(path, 2)
            raise CorruptCheckpoint("half of each")
        return manifest.save_id

    assert reader.reading(str(path), look) == save_id(2)


def test_one_that_goes_is_gone_and_not_corrupt(root: Path) -> None:
    path = checkpoint(root / "checkpoint-1", 1)

    def look(manifest: Manifest) -> None:
        shutil.rmtree(path)
        raise CorruptCheckpoint("a file is missing")

    with pytest.raises(reader.Gone, match="it was deleted or replaced while it was read"):
        reader.reading(str(path), look)


def test_one_that_is_replaced_each_time_is_given_up(root: Path) -> None:
    path, numbers = checkpoint(root / "checkpoint-1", 1), iter(range(2, 99))

    def look(manifest: Manifest) -> None:
        shutil.rmtree(path)
        checkpoint(path, next(numbers))
        raise CorruptCheckpoint("half of each")

    with pytest.raises(reader.Gone):
        reader.reading(str(path), look)
    assert next(numbers) <= 6


def test_a_damaged_one_is_corrupt_and_no_checkpoint_is_said(root: Path) -> None:
    path = checkpoint(root / "checkpoint-1", 1)
    (path / names.MANIFEST).write_bytes(b"damaged")
    with pytest.raises(CorruptCheckpoint, match="unusable manifest"):
        reader.reading(str(path), lambda manifest: None)
    with pytest.raises(CheckpointError, match="does not exist") as raised:
        reader.reading(str(root / "nothing"), lambda manifest: None)
    assert not isinstance(raised.value, CorruptCheckpoint)

    def look(manifest: Manifest) -> None:
        raise CorruptCheckpoint("what look says")

    with pytest.raises(CorruptCheckpoint, match="what look says"):
        reader.reading(str(checkpoint(root / "checkpoint-2", 2)), look)


def test_one_that_is_moved_away_for_a_moment_is_waited_for(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaced without an exchange: there is a moment with nothing under the name."""
    path = root / "checkpoint-1"
    monkeypatch.setattr(reader.time, "sleep", lambda seconds: checkpoint(path, 3))
    assert reader.reading(str(path), lambda manifest: manifest.save_id) == save_id(3)


def test_without_locks_it_is_read_all_the_same(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, mode: int) -> None:
        raise OSError(errno.ENOTSUP, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    path = checkpoint(root / "checkpoint-1", 1)
    assert reader.reading(str(path), lambda manifest: manifest.step) == 1
    assert not in_use(str(path))
