"""A disk that hangs, is slow, or fails for a time: training does not wait for it before its next save does, and nothing is lost."""

from __future__ import annotations

import errno
import itertools
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from .conftest import Tally
from .dialogue import ask, assert_resumable, delayed
from .faults import Disk, missing, needs_strace, run, watched
from .nursery import Child, Nursery


def not_lost(trainers: Nursery, root: Path, child: Child, step: int) -> list[str]:
    """What is wrong once all is committed: `step` is the newest, and every number in it is of that step."""
    problems = [] if ask(child, "result") == f"committed {step}" else [f"{child}"]
    child.tell("end")
    if child.wait() != 0:
        problems.append(f"{child}")
    assert_resumable(trainers, root, step)
    return problems


def visible(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob("checkpoint-*"))


@needs_strace
@pytest.mark.parametrize(("call", "seconds"), [("pwrite64", 0.5), ("fsync", 0.2), ("renameat2", 1.0)])
def test_a_slow_disk(trainers: Nursery, tally: Tally, tmp_path: Path, call: str, seconds: float) -> None:
    """Every such call takes long: `save()` is over before anything is written, the next one waits for the arena, and what each of
    them writes is the state of its own step."""
    root = tmp_path / "root"
    with trainers.child("obey", root=str(root), tracer=delayed(tmp_path, call, seconds)) as child:
        for word in ("save", "staged", "save"):  # one right after another, however busy this process is
            child.tell(word)
        problems = []
        for _ in range(2):
            if child.expect("ANSWER") != "done" or "SAVE 1 complete" in child.messages:
                problems.append(f"waited for the disk: {child.messages}")
        assert child.expect("ANSWER") == "done"
        if visible(root) != ["checkpoint-1"]:
            problems.append(f"the second save did not wait for the first: {visible(root)}")
        problems += not_lost(trainers, root, child, 2)
        if "BACKPRESSURE complete" not in child.messages:
            problems.append(f"it does not say that it waited: {child.messages}")
        tally.fault(call, problems)
    tally.settle(at_least=1)


@contextmanager
def frozen(path: str) -> Iterator[None]:
    """Nothing can be written on the file system of `path`: whoever tries waits."""
    run("fsfreeze", "-f", path)
    try:
        yield
    finally:
        run("fsfreeze", "-u", path)


@pytest.mark.root
@pytest.mark.skipif(bool(missing("ext4")), reason=missing("ext4"))
@pytest.mark.parametrize("writer", ["process", "thread"])
def test_a_disk_that_hangs_for_a_time(trainers: Nursery, tally: Tally, tmp_path: Path, writer: str) -> None:
    """A save made meanwhile returns, and training goes on; two are made when it is over."""
    with Disk(tmp_path, "ext4", 64) as disk, ExitStack() as stack:
        root = Path(disk.path) / "root"
        child = stack.enter_context(trainers.child("obey", root=str(root), options={"writer": writer}))
        assert ask(child, "save") == "done"
        assert ask(child, "result") == "committed 1"
        with frozen(disk.path):
            assert ask(child, "save") == "done"
            assert ask(child, "staged") == "done"
            child.tell("save")
            child.expect("BACKPRESSURE started")
            problems = [] if visible(root) == ["checkpoint-1"] else [f"on a frozen disk: {visible(root)}"]
        assert child.expect("ANSWER") == "done"
        tally.fault(writer, problems + not_lost(trainers, root, child, 3))
    tally.settle(at_least=1)


# -- errors that pass


def errno_of(name: str) -> str:
    return f"Errno {getattr(errno, name)}"


def said_of(child: Child, what: str) -> list[str]:
    """What was logged of it: a failure is on its handle before its event has reached the log."""
    deadline = time.monotonic() + 20
    while True:
        child.listen(0.2)  # the second of two would come right behind the first
        found = [message for message in child.messages if message.startswith("LOG") and what in message]
        if found or time.monotonic() > deadline:
            return found


@needs_strace
def test_a_disk_that_fails_for_a_time(trainers: Nursery, tally: Tally, tmp_path: Path) -> None:
    """Again and again: every save meanwhile fails, and is logged once; the writer stays, and the first save on the mended disk is
    made."""
    root = tmp_path / "root"
    with trainers.child("obey", root=str(root), options={"on_error": "warn"}) as child:
        writer, step = int(child.expect("WRITER")), 0
        for call, error in itertools.product(("pwrite64", "fsync", "renameat2"), ("EIO", "ENOSPC")):
            problems, first = [], step + 1
            with watched(
                writer, ["-f", "-o", "/dev/null", "-e", f"trace={call}", "-e", f"inject={call}:error={error}"]
            ):
                for step in (first, first + 1):
                    assert ask(child, "save") == "done"
                    answer = ask(child, "result")
                    if f"checkpoint-{step} was not saved" not in answer or f"[{errno_of(error)}]" not in answer:
                        problems.append(answer)
            step += 1
            assert ask(child, "save") == "done"
            if (answer := ask(child, "result")) != f"committed {step}":
                problems.append(f"afterwards: {answer}")
            problems += [
                f"step {n} was logged {len(said)} times: {said}"
                for n in (first, first + 1)
                if len(said := said_of(child, f"checkpoint-{n} was not saved")) != 1
            ]
            tally.fault((call, error), problems)
        tally.fault("in the end", not_lost(trainers, root, child, step))
    tally.settle(at_least=7)


@pytest.mark.root
@pytest.mark.skipif(bool(missing("ext4")), reason=missing("ext4"))
def test_a_disk_that_is_too_small_for_a_time(trainers: Nursery, tally: Tally, tmp_path: Path) -> None:
    """What is refused before it begins is logged once too; with room again the next save is made."""
    with Disk(tmp_path, "ext4", 64) as disk:
        root = Path(disk.path) / "root"
        with trainers.child("obey", root=str(root), options={"on_error": "warn"}) as child:
            ballast = Path(disk.path) / "ballast"
            free = os.statvfs(disk.path).f_bavail * os.statvfs(disk.path).f_bsize
            run("fallocate", "-l", str(free - (13 << 20)), str(ballast))  # a checkpoint takes 8 MiB
            assert ask(child, "save") == "done"
            assert ask(child, "result") == "committed 1"
            assert ask(child, "save") == "done"
            problems = [] if "the disk is too small" in (answer := ask(child, "result")) else [answer]
            if len(said := said_of(child, "the disk is too small")) != 1:
                problems.append(f"logged {len(said)} times: {said}")
            ballast.unlink()
            assert ask(child, "save") == "done"
            tally.fault("too small", problems + not_lost(trainers, root, child, 3))
    tally.settle(at_least=1)
