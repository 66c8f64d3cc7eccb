"""The root's lock, from several descriptors of one process: who holds it, who is named, and when it is lost."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from vembed_async_ckpt import CheckpointerBusy, CheckpointError, CommitError
from vembed_async_ckpt._disk import lock as locks
from vembed_async_ckpt._disk.lock import Holder, Process, RootLock, Taken, wait_for_orphan
from vembed_async_ckpt._format import names

THEM = {"where": "another host pid:[1]", "processes": [[1, 1]]}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_GRACE", 0.1)
    monkeypatch.setattr(locks, "_POLL", 0.01)


@pytest.fixture
def lock(root: Path) -> Iterator[RootLock]:
    held = RootLock.acquire(str(root))
    yield held
    held.close()


def dead() -> Process:
    """A process that has ended, and whose id is not in use again with the same start time."""
    child = subprocess.Popen([sys.executable, "-S", "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    found = Process.of(child.pid)
    child.communicate()
    assert found is not None
    assert not found.alive()
    return found


def path_of(root: Path) -> Path:
    return root / names.WORK / names.LOCK


def written(root: Path, content: bytes) -> int:
    """The lock file with that content, locked by a descriptor that is nobody's."""
    fd = os.open(path_of(root), os.O_RDWR | os.O_CREAT, 0o666)
    os.ftruncate(fd, 0)
    os.pwrite(fd, content, 0)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return fd


def test_the_holder_is_named_and_leaves_nothing(root: Path) -> None:
    lock = RootLock.acquire(str(root))
    said = json.loads(path_of(root).read_bytes())
    assert said["processes"] == [[os.getpid(), Process.of(os.getpid()).start]]  # type: ignore[union-attr]
    lock.name(os.getppid())
    with pytest.raises(
        CheckpointerBusy, match=rf"another process saves here \(trainer {os.getpid()}, writer {os.getppid()}\)"
    ):
        RootLock.acquire(str(root))
    lock.release()
    assert list(root.iterdir()) == []
    lock.release()  # again: nothing happens


def test_a_root_is_made_only_when_asked(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        RootLock.acquire(str(tmp_path / "a" / "b"), create=False)
    assert list(tmp_path.iterdir()) == []
    RootLock.acquire(str(tmp_path / "a" / "b")).release()
    assert (tmp_path / "a" / "b").is_dir()


def test_what_somebody_put_beside_the_lock_keeps_the_directory(root: Path, lock: RootLock) -> None:
    (root / names.WORK / names.REPLACED).mkdir()
    (root / names.WORK / "theirs").touch()
    lock.release()
    assert sorted(path.name for path in (root / names.WORK).iterdir()) == ["lock", "theirs"]


def test_a_lost_lock_removes_nothing_of_its_successor(root: Path, lock: RootLock) -> None:
    path_of(root).unlink()
    other = RootLock.acquire(str(root))
    lock.release()
    assert path_of(root).exists()
    other.release()


# -- what the file says


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b"7", b'{"processes":[]}', b'{"processes":[[1,2]]}', b'{"where":"x","processes":[[1]]}',
     b'{"where":"x","processes":[1]}', b'{"where":"x","processes":{"a":1}}', b"\xff\xfe\x00", b"[" * 4096,
     b'{"where":"x","processes":[["1e9",{}]]}',
     b'{"where":"x","processes":[[1e999,1]]}', b"9" * 4096, b'"' + b"\\ud800" * 600 + b'"'],
)  # fmt: skip
def test_a_file_that_says_nonsense_is_one_without_a_name(root: Path, content: bytes) -> None:
    fd = written(root, content)
    with pytest.raises(CheckpointerBusy, match="its name is not written yet"):
        RootLock.acquire(str(root))
    os.close(fd)
    RootLock.acquire(str(root)).release()  # nobody holds it


def test_a_holder_on_another_host_may_live(root: Path) -> None:
    fd = written(root, json.dumps(THEM).encode())
    with pytest.raises(CheckpointerBusy, match=r"trainer 1 in another host pid:\[1\]"):
        RootLock.acquire(str(root))
    wait_for_orphan(str(root))  # somebody trains there: no orphan, so a reader does not wait
    os.close(fd)


def test_the_writer_of_a_dead_trainer_is_waited_for_and_named(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    gone = dead()
    here = locks._here()
    content = {"where": here, "processes": [[gone.pid, gone.start], [os.getpid(), 1]]}
    fd = written(root, json.dumps(content).encode())
    with pytest.raises(
        CheckpointerBusy, match=rf"the writer of a dead trainer \(trainer {gone.pid}, writer .*still at work"
    ):
        RootLock.acquire(str(root), patience=0.05)
    with pytest.raises(CheckpointerBusy, match="still at work"):
        wait_for_orphan(str(root), patience=0.05)
    assert "waiting for the writer of a dead trainer" in caplog.text
    threading.Timer(0.2, os.close, (fd,)).start()
    wait_for_orphan(str(root), patience=20)
    RootLock.acquire(str(root), patience=20).release()


def test_readers_do_not_wait_where_nobody_saves(root: Path, tmp_path: Path) -> None:
    wait_for_orphan(str(root))
    wait_for_orphan(str(tmp_path / "nothing"))
    (tmp_path / "file").touch()
    wait_for_orphan(str(tmp_path / "file"))


def test_a_process_is_known_by_its_start_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """An id that is in use again is another process; a zombie is dead."""
    me = Process.of(os.getpid())
    assert me is not None
    assert me.alive()
    assert not Process(me.pid, me.start - 1).alive()
    child = subprocess.Popen([sys.executable, "-S", "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert Process.of(child.pid) is None, "a zombie"
    child.wait()
    assert Process.of(child.pid) is None
    assert "writer" not in str(Holder(me, None, locks._here()))


def test_a_sandbox_without_proc_has_a_place_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(os, "readlink", fail)
    assert locks._here().endswith(" unknown")


# -- what is no lock file


def test_links_pipes_and_directories_in_its_place_are_refused(root: Path, tmp_path: Path) -> None:
    path_of(root).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is a symbolic link: who saves there is unknown"):
        RootLock.acquire(str(root))
    assert not (tmp_path / "elsewhere").exists()
    path_of(root).unlink()
    os.mkfifo(path_of(root))
    with pytest.raises(CheckpointError, match="is not a regular file; move it away"):
        RootLock.acquire(str(root))
    path_of(root).unlink()
    path_of(root).mkdir()
    with pytest.raises(CheckpointError, match="cannot be opened"):
        RootLock.acquire(str(root))
    path_of(root).rmdir()
    (root / names.WORK).rmdir()
    (tmp_path / "outside").mkdir()
    (root / names.WORK).symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match="links are not followed, move it away"):
        RootLock.acquire(str(root))
    assert list((tmp_path / "outside").iterdir()) == []


def test_a_file_system_without_locks_is_said_to_who_saves_and_not_to_who_reads(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path_of(root).touch()

    def refuse(fd: int, mode: int) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointError, match=r"flock is refused here .*Lustre: -o flock"):
        RootLock.acquire(str(root))
    wait_for_orphan(str(root))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_is_removed_again_and_again_ends_in_an_error(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fcntl.flock

    def removing(fd: int, mode: int) -> None:
        real(fd, mode)
        path_of(root).unlink()

    monkeypatch.setattr(fcntl, "flock", removing)
    with pytest.raises(CheckpointerBusy, match="was removed again and again"):
        RootLock.acquire(str(root))


def test_one_that_is_removed_once_while_it_is_taken_is_taken_anew(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, removals = fcntl.flock, iter([True])

    def removing(fd: int, mode: int) -> None:
        real(fd, mode)
        if next(removals, False):
            path_of(root).unlink()
            (root / names.WORK).rmdir()

    monkeypatch.setattr(fcntl, "flock", removing)
    lock = RootLock.acquire(str(root))
    assert lock.is_held()
    lock.release()


# -- a lock that is lost, or moved


def test_a_held_lock_is_secure(lock: RootLock) -> None:
    assert lock.is_held()
    assert lock.secure() == ""
    lock.refuse_if_lost()


@pytest.mark.parametrize(
    ("remove", "what"), [("lock", "its lock file"), (names.WORK, "its work directory"), (".", "it")]
)
def test_what_was_removed_is_made_again(root: Path, lock: RootLock, remove: str, what: str) -> None:
    path_of(root).unlink()
    if remove != "lock":
        (root / names.WORK).rmdir()
    if remove == ".":
        root.rmdir()
    with pytest.raises(CommitError, match="so nothing is deleted"):
        lock.refuse_if_lost()
    assert lock.secure() == f"{what} was removed, and was made again"
    assert lock.is_held()
    assert json.loads(path_of(root).read_bytes())["processes"][0][0] == os.getpid()


def test_a_root_that_another_has_taken_stays_lost(root: Path, lock: RootLock) -> None:
    path_of(root).unlink()
    other = RootLock.acquire(str(root))
    with pytest.raises(
        Taken, match=rf"another process saves here .* This is trainer {os.getpid()}, whose lock file was removed"
    ):
        lock.secure()
    other.release()


def test_a_root_that_was_moved_and_linked_is_followed(root: Path, tmp_path: Path, lock: RootLock) -> None:
    root.rename(tmp_path / "moved")
    root.symlink_to(tmp_path / "moved")
    assert lock.secure() == f"was moved to {tmp_path / 'moved'}; goes on there"
    assert lock.root == str(tmp_path / "moved")


def test_a_link_to_anything_else_is_refused(root: Path, tmp_path: Path, lock: RootLock) -> None:
    root.rename(tmp_path / "moved")
    (tmp_path / "other").mkdir()
    root.symlink_to(tmp_path / "other")
    with pytest.raises(CommitError, match=r"a symbolic link leads to .*other now; links are not followed"):
        lock.secure()
    root.unlink()
    (tmp_path / "moved").rename(root)
    (root / names.WORK).rename(tmp_path / "work")
    (root / names.WORK).symlink_to(tmp_path / "other")
    with pytest.raises(CommitError, match="is a symbolic link now; links are not followed"):
        lock.secure()
    assert list((tmp_path / "other").iterdir()) == []


def test_a_root_on_another_file_system_is_not_written(
    root: Path, lock: RootLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    path_of(root).unlink()
    monkeypatch.setattr(lock, "_device", -1)
    with pytest.raises(
        CommitError, match="is on another file system than when the training began; was a disk unmounted"
    ):
        lock.secure()
    assert not path_of(root).exists()


def test_a_disk_that_cannot_be_read_is_not_written(root: Path, lock: RootLock, monkeypatch: pytest.MonkeyPatch) -> None:
    path_of(root).unlink()
    real = os.stat

    def fail(path: object, **named: object) -> os.stat_result:
        if path == str(root):
            raise OSError(errno.EIO, "Input/output error")
        return real(path, **named)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(os, "stat", fail)
    with pytest.raises(CommitError, match="cannot be read \\(Input/output error\\); nothing was written there"):
        lock.secure()


def test_what_cannot_be_made_again_is_a_commit_error(root: Path, lock: RootLock) -> None:
    path_of(root).unlink()
    os.mkfifo(path_of(root))
    with pytest.raises(CommitError, match="is not a regular file"):
        lock.secure()


def test_a_forked_child_does_not_hold_it(root: Path, lock: RootLock) -> None:
    """Otherwise the root would stay taken as long as a worker of the training lives."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.write(writing, b"x" if lock.fd == -1 else b"held")
        os._exit(0)
    assert os.read(reading, 9) == b"x"
    os.waitpid(child, 0)
    os.close(reading), os.close(writing)
    assert lock.is_held()
