"""The root's lock: what happens when its file, its directory or the root is removed, and that nothing is left at the end."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from vembed_async_ckpt import AsyncCheckpointer, CommitError, KeepLast, delete, latest, verify
from vembed_async_ckpt._disk.lock import RootLock
from vembed_async_ckpt._format import names

WRITERS = ["process", "thread"]
MODEL = torch.nn.Linear(4, 4)


def steps(root: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in root.glob("checkpoint-*"))


def saved(checkpointer: AsyncCheckpointer, *numbers: int) -> None:
    for step in numbers:
        checkpointer.save(step, model=MODEL).result(60)


@contextlib.contextmanager
def another_job(root: Path, *numbers: int) -> Iterator[subprocess.Popen[str]]:
    """A second process that has the root, saves these steps, and stays."""
    script = (
        "import sys, torch\nfrom vembed_async_ckpt import AsyncCheckpointer\n"
        "checkpointer = AsyncCheckpointer(sys.argv[1], writer='thread')\n"
        "for step in map(int, sys.argv[2:]): checkpointer.save(step, model=torch.nn.Linear(4, 4)).result(60)\n"
        "print('here', flush=True)\nsys.stdin.read()\ncheckpointer.close()\n"
    )
    command = [sys.executable, "-c", script, str(root), *map(str, numbers)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        try:
            yield process
        finally:
            process.communicate(timeout=60)


# -- removed while the training goes on


def without_root(root: Path) -> None:
    shutil.rmtree(root)


def without_content(root: Path) -> None:
    for path in root.iterdir():
        shutil.rmtree(path)


def without_work_directory(root: Path) -> None:
    shutil.rmtree(root / names.WORK)


def without_lock(root: Path) -> None:
    (root / names.WORK / names.LOCK).unlink()


def with_a_copy_of_the_lock(root: Path) -> None:
    lock = root / names.WORK / names.LOCK
    shutil.copy(lock, lock.with_name("copy"))
    lock.with_name("copy").rename(lock)


def moved_away(root: Path) -> None:
    root.rename(root.with_name("moved"))


def moved_and_made_anew(root: Path) -> None:
    moved_away(root)
    root.mkdir()


def moved_with_a_link(root: Path) -> None:
    moved_away(root)
    root.symlink_to(root.with_name("moved"))


KEPT = {without_lock, without_work_directory, with_a_copy_of_the_lock, moved_with_a_link}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
    "remove",
    [*KEPT, without_root, without_content, moved_away, moved_and_made_anew],
    ids=lambda remove: remove.__name__,
)
def test_later_saves_work(tmp_path: Path, writer: str, remove: Callable[[Path], None]) -> None:
    """Whoever cleaned up: what is missing is made again, retention goes on, the root is locked, and nothing is left at the end."""
    root = tmp_path / "root"
    with AsyncCheckpointer(root, writer=writer, retention=KeepLast(2)) as checkpointer:  # type: ignore[arg-type]
        saved(checkpointer, 1, 2)
        checkpointer.wait(60)
        remove(root)
        saved(checkpointer, 3, 4, 5)
        held = (root / names.WORK / names.LOCK).open("r+")
        with held, pytest.raises(BlockingIOError):
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert latest(root) == root / "checkpoint-5"
    assert sorted(os.listdir(root)) == ["checkpoint-4", "checkpoint-5"]
    verify(root.resolve() / "checkpoint-5")


def test_a_dead_writer_is_replaced_where_the_lock_was_removed(root: Path) -> None:
    """The next one does not take what is there for somebody else's."""
    with AsyncCheckpointer(root) as checkpointer:
        saved(checkpointer, 1)
        without_lock(root)
        os.kill(checkpointer.statistics()["writer_pid"], signal.SIGKILL)
        saved(checkpointer, 2, 3)
    assert steps(root) == [1, 2, 3]


def test_what_was_made_again_is_said(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One warning, which names the root and what was missing."""
    with (
        caplog.at_level(logging.WARNING, "vembed_async_ckpt"),
        AsyncCheckpointer(root, writer="thread") as checkpointer,
    ):
        saved(checkpointer, 1)
        without_lock(root)
        saved(checkpointer, 2, 3)
    assert caplog.text.count("its lock file was removed, and was made again") == 1


# -- somebody else


@pytest.mark.parametrize("writer", WRITERS)
def test_another_job_has_taken_the_root(root: Path, writer: str) -> None:
    """The one whose lock file was removed publishes and deletes nothing any more, and names both; also when the other has ended."""
    checkpointer = AsyncCheckpointer(root, writer=writer, retention=KeepLast(1), on_error="warn")  # type: ignore[arg-type]
    saved(checkpointer, 1)
    checkpointer.wait(60)
    without_lock(root)
    with another_job(root, 50, 51) as other:
        error = checkpointer.save(2, model=MODEL).exception(60)
        assert isinstance(error, CommitError)
        assert f"(trainer {other.pid})" in str(error)
        assert f"This is trainer {os.getpid()}" in str(error)
        assert steps(root) == [1, 50, 51]
    assert isinstance(checkpointer.save(3, model=MODEL).exception(60), CommitError)
    checkpointer.close(60)
    assert steps(root) == [1, 50, 51]


def test_another_job_came_and_went(root: Path) -> None:
    """What it saved is not the first one's to delete."""
    checkpointer = AsyncCheckpointer(root, retention=KeepLast(1), on_error="warn")
    saved(checkpointer, 1)
    checkpointer.wait(60)
    without_lock(root)
    with another_job(root, 50):
        pass
    error = checkpointer.save(2, model=MODEL).exception(60)
    assert isinstance(error, CommitError)
    assert "another process saved checkpoint-50 here" in str(error)
    checkpointer.close(60)
    assert steps(root) == [1, 50]


def test_links_are_not_followed(tmp_path: Path) -> None:
    """A link in the place of the work directory or of the root: the save fails and names it; when it is gone, saves work."""
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    (elsewhere / names.WORK).mkdir(parents=True)
    for path, to in ((root / names.WORK, elsewhere / names.WORK), (root, elsewhere)):
        with AsyncCheckpointer(root, on_error="warn") as checkpointer:
            saved(checkpointer, 1)
            path.rename(tmp_path / "aside")
            path.symlink_to(to)
            error = checkpointer.save(2, model=MODEL).exception(60)
            assert isinstance(error, CommitError)
            assert "links are not followed" in str(error)
            assert str(path) in str(error)
            path.unlink()
            (tmp_path / "aside").rename(path)
            saved(checkpointer, 3)
    assert list(elsewhere.rglob("*")) == [elsewhere / names.WORK]


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
@pytest.mark.parametrize("inside", ["", "run", "deep/run"])
def test_an_unmounted_disk_is_not_written_around(tmp_path: Path, inside: str) -> None:
    """With its disk gone, the root would be on another one: the save fails, nothing is made there; mounted again, saves work."""
    mount = tmp_path / "disk"
    mount.mkdir()

    def tool(*command: str) -> None:
        subprocess.run(command, check=True, timeout=60)

    tool("mount", "-t", "tmpfs", "none", str(mount))
    try:
        with AsyncCheckpointer(mount / inside, on_error="warn") as checkpointer:
            saved(checkpointer, 1)
            checkpointer.wait(60)
            tool("umount", "--lazy", str(mount))
            error = checkpointer.save(2, model=MODEL).exception(60)
            assert isinstance(error, CommitError)
            assert "is on another file system than when the training began" in str(error)
            assert list(mount.iterdir()) == []
            tool("mount", "-t", "tmpfs", "none", str(mount))
            checkpointer.close(60)
    finally:
        subprocess.run(["umount", str(mount)], timeout=60)


# -- nothing is left


def test_nothing_is_left_after_close(root: Path) -> None:
    """Only checkpoints, whoever wrote, and after what has no use for the directory."""
    for n, writer in enumerate(WRITERS):
        with AsyncCheckpointer(root, writer=writer, retention=KeepLast(1)) as checkpointer:  # type: ignore[arg-type]
            saved(checkpointer, 2 * n, 2 * n + 1)
            assert (root / names.WORK / names.LOCK).exists()
        assert os.listdir(root) == [f"checkpoint-{2 * n + 1}"]
    assert latest(root) == root / "checkpoint-3"
    delete(root / "checkpoint-3")
    assert os.listdir(root) == []


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("end", ["", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"], ids=["exit", "killed"])
def test_nothing_is_left_when_nobody_closes(root: Path, writer: str, end: str) -> None:
    """At the interpreter's exit, and when the writer of a trainer that was killed has finished."""
    script = (
        "import sys, torch\nfrom vembed_async_ckpt import AsyncCheckpointer\n"
        "checkpointer = AsyncCheckpointer(sys.argv[1], writer=sys.argv[2])\n"
        f"checkpointer.save(1, model=torch.nn.Linear(4, 4)).wait_staged(60)\n{end}\n"
    )
    subprocess.run([sys.executable, "-c", script, str(root), writer], timeout=120)
    if writer == "process":
        assert latest(root) == root / "checkpoint-1", "it waits for the orphan"
        deadline = time.monotonic() + 30
        while (root / names.WORK).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    elif end:
        RootLock.acquire(str(root)).release()  # a thread dies with its process: the next start clears up
        shutil.rmtree(root / names.WORK, ignore_errors=True)
    assert not (root / names.WORK).exists()


def test_what_is_not_ours_to_delete_keeps_the_directory(root: Path) -> None:
    """`replaced/` holds a stranger's file: it stays, with the directory, and no lock is left held."""
    with AsyncCheckpointer(root, retention=KeepLast(1)) as checkpointer:
        saved(checkpointer, 1)
        (root / "checkpoint-1" / "notes.txt").write_text("mine")
        saved(checkpointer, 2)
    assert [path.name for path in (root / names.WORK).rglob("*.txt")] == ["notes.txt"]
    with AsyncCheckpointer(root) as checkpointer:
        saved(checkpointer, 3)
    shutil.rmtree(root / names.WORK)


TURNS = 60


def test_a_lock_that_is_removed_by_its_holder_is_held_by_one(tmp_path: Path) -> None:
    """Two processes take the lock and remove it again and again: never is one there in the other's turn."""
    script = (
        "import os, sys, time\nfrom vembed_async_ckpt._disk.lock import RootLock\n"
        f"for turn in range({TURNS}):\n"
        "    lock = RootLock.acquire(sys.argv[1])\n"
        "    os.close(os.open(sys.argv[2], os.O_CREAT | os.O_EXCL))\n"
        "    time.sleep(turn % 7 / 1000)\n"
        "    os.unlink(sys.argv[2])\n"
        "    lock.release()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "root"), str(tmp_path / "somebody is here")]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert os.listdir(tmp_path / "root") == []
