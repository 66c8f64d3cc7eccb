"""Writers that die or stop, and memory or processes that cannot be had: a save is made all the same, or its handle says why not,
and training goes on."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vembed_async_ckpt import latest

from . import checks
from .conftest import Tally
from .dialogue import ask, assert_resumable, delayed, staged
from .faults import needs_strace, tracer_script, watched
from .nursery import PATIENCE, Child, Nursery
from .process import Process

pytestmark = needs_strace
SHARED_MEMORY = "64k"


@pytest.fixture(autouse=True)
def nobody_left(trainers: Nursery, victims: Nursery) -> Iterator[None]:
    """At the end no process is left, and no zombie."""
    yield
    assert trainers.left_alive(PATIENCE) == []
    assert victims.left_alive(PATIENCE) == []


def writers(child: Child) -> list[int]:
    """The writers that were started so far."""
    return [int(message.split()[1]) for message in child.messages if message.startswith("WRITER")]


def settle(trainers: Nursery, tally: Tally, what: str, root: Path, step: int) -> None:
    """The root has `step` and can be resumed from."""
    tally.fault(what, [])
    assert latest(root) == root / f"checkpoint-{step}"
    assert_resumable(trainers, root, step)
    tally.settle(at_least=1)


# -- death


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT], ids=lambda n: n.name)
def test_an_idle_writer_dies(trainers: Nursery, tally: Tally, tmp_path: Path, number: signal.Signals) -> None:
    """The next save gets another one; nobody is bothered."""
    root = tmp_path / "root"
    with trainers.child("obey", root=str(root)) as child:
        writer = staged(child)
        assert ask(child, "result") == "committed 1"
        os.kill(writer, number)
        assert ask(child, "save") == "done"
        assert ask(child, "result") == "committed 2"
        assert ask(child, "close") == "done"
        assert len(writers(child)) == 2
    settle(trainers, tally, number.name, root, 2)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV], ids=lambda n: n.name)
def test_a_writer_dies_at_work(trainers: Nursery, tally: Tally, tmp_path: Path, number: signal.Signals) -> None:
    """What it was writing is written by the next one, from the arena."""
    root = tmp_path / "root"
    deadly = tracer_script(
        tmp_path,
        ["-f", "-o", "/dev/null", "-e", "trace=pwrite64", "-e", f"inject=pwrite64:signal={number.name}:when=2"],
    )
    with trainers.child("obey", root=str(root), tracer=deadly) as child:
        staged(child)
        assert ask(child, "untraced") == "done"
        assert ask(child, "result") == "committed 1"
        assert any(f"killed by signal {number:d}" in message for message in child.messages)
        assert len(writers(child)) == 2
        assert ask(child, "close") == "done"
    settle(trainers, tally, number.name, root, 1)


def test_a_writer_dies_before_any_of_its_answers(victims: Nursery, tally: Tally, tmp_path: Path) -> None:
    """Killed when it was about to say that it has accepted, written, committed, pruned: whether or not it is done already, the next
    one does not do it twice, and the trainer hears it once."""
    for k in range(1, 7):
        root = str(tmp_path / f"root-{k}")
        with victims.child("obey", root=root) as child:
            trainer = Process(child, root)
            trainer.good_save()
            options = ["-f", "-o", "/dev/null", "-e", "trace=sendto", "-e", f"inject=sendto:signal=KILL:when={k}"]
            with watched(trainer.writer, options):
                for n in (2, 3):
                    child.tell(f"save {n} {n}")
                    child.expect(f"ENDED {n}")
                child.tell("close")
                assert child.expect("CLOSED") == "True"
            said = [message for message in child.messages if message.startswith(("ACK", "ERR"))]
            problems = [] if said == ["ACK 1", "ACK 2", "ACK 3"] else [f"said {said}"]
            # By which signal is not always known: while strace has not heard of the death itself, its status is not to be had.
            died = any(message.startswith("LOG writer failed") for message in child.messages)
        problems += [*checks.after_fault(root, 3), *checks.next_start(victims, root, 1)]
        tally.fault(f"answer {k}", problems)
        assert died or k > 4
    tally.settle(at_least=6)


# -- memory


@contextmanager
def memory_cgroup(limit: int) -> Iterator[Path]:
    """A group below our own, whose processes together may have `limit` bytes."""
    groups = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    if "memory" in groups:
        group = Path("/sys/fs/cgroup/memory" + groups["memory"], f"vembed-test-{os.getpid()}")
        name = "memory.limit_in_bytes"
    else:
        group, name = Path("/sys/fs/cgroup" + groups[""], f"vembed-test-{os.getpid()}"), "memory.max"
    group.mkdir()
    try:
        (group / name).write_text(str(limit))
        yield group
    finally:
        group.rmdir()


def test_a_writer_without_memory(trainers: Nursery, tally: Tally, tmp_path: Path) -> None:
    """The kernel's OOM killer takes it when it faults the arena in; another one makes the save, and the likely cause is named."""
    root = tmp_path / "root"
    with memory_cgroup(1 << 20) as group, trainers.child("obey", root=str(root)) as child:
        (group / "cgroup.procs").write_text(child.expect("WRITER"))
        assert ask(child, "save") == "done"
        assert ask(child, "result") == "committed 1"
        assert len(writers(child)) == 2
        assert any("OOM killer" in message for message in child.messages)
        assert ask(child, "close") == "done"
    settle(trainers, tally, "OOM", root, 1)


def test_no_memory_for_an_arena(trainers: Nursery, tally: Tally, tmp_path: Path) -> None:
    """`save()` says so; with memory again, the next one works."""
    root = tmp_path / "root"
    with trainers.child("obey", root=str(root)) as child:
        answer = ask(child, "save without memory")
        assert answer.startswith("StageError")
        assert "no host memory" in answer
        assert ask(child, "save") == "done"
        assert ask(child, "result") == "committed 2"
        assert ask(child, "close") == "done"
    settle(trainers, tally, "RLIMIT_AS", root, 2)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_small_dev_shm(trainers: Nursery, tally: Tally, tmp_path: Path) -> None:
    """As in a container: 64 KiB of it, and 8 MiB of state."""
    root = tmp_path / "root"
    with trainers.child("obey", root=str(root), shared_memory=SHARED_MEMORY) as child:
        assert ask(child, "save") == "done"
        assert ask(child, "result") == "committed 1"
        assert ask(child, "close") == "done"
    settle(trainers, tally, "/dev/shm", root, 1)


# -- writers that cannot be started, or do not move


def test_no_writer_can_be_started(trainers: Nursery, tally: Tally, tmp_path: Path) -> None:
    """The handle says so; when it is possible again, the next save works."""
    root = tmp_path / "root"
    with trainers.child("obey", root=str(root)) as child:
        writer = staged(child)
        assert ask(child, "result") == "committed 1"
        assert ask(child, "no python") == "done"
        os.kill(writer, signal.SIGKILL)
        assert ask(child, "save") == "done"
        answer = ask(child, "result")
        assert answer.startswith("WriteError")
        assert "no writer could be started" in answer
        assert str(root) in answer
        assert "No such file" in answer
        assert ask(child, "untraced") == "done"
        assert ask(child, "save") == "done"
        assert ask(child, "result") == "committed 3"
        assert ask(child, "close") == "done"
    settle(trainers, tally, "exec", root, 3)


@contextmanager
def stopped(writer: int) -> Iterator[None]:
    os.kill(writer, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(writer, signal.SIGCONT)


@pytest.mark.parametrize(("when_busy", "answer"), [("skip", "done"), ("error", "CheckpointerBusy")])
def test_backpressure_of_a_stopped_writer(
    trainers: Nursery, tally: Tally, tmp_path: Path, when_busy: str, answer: str
) -> None:
    """The second save is skipped or refused at once; when the writer moves again, the first is committed and saves go on."""
    root = tmp_path / "root"
    with trainers.child("obey", root=str(root), options={"when_busy": when_busy}) as child:
        writer = staged(child)
        assert ask(child, "result") == "committed 1"
        with stopped(writer):
            assert ask(child, "save") == "done"
            assert ask(child, "impatient").startswith("TimeoutError")
            assert ask(child, "save").startswith(answer)
        if when_busy == "skip":
            assert ask(child, "result").startswith("CheckpointerBusy")
        assert ask(child, "save until accepted") == "done"
        assert ask(child, "close") == "done"
        assert writers(child) == [writer]
    settle(trainers, tally, when_busy, root, 3)


def test_a_save_waits_for_a_stopped_writer(trainers: Nursery, tally: Tally, tmp_path: Path) -> None:
    """`when_busy="wait"`: the second save returns when the first is committed, and says that it waited."""
    root = tmp_path / "root"
    with trainers.child("obey", root=str(root)) as child:
        writer = staged(child)
        assert ask(child, "result") == "committed 1"
        with stopped(writer):
            assert ask(child, "save") == "done"
            child.tell("save")
            child.expect("BACKPRESSURE started")
        assert child.expect("ANSWER") == "done"
        assert ask(child, "result") == "committed 3"
        assert "BACKPRESSURE complete" in child.messages
        assert ask(child, "close") == "done"
        assert writers(child) == [writer]
    settle(trainers, tally, "wait", root, 3)


def test_closing_with_a_stopped_writer(trainers: Nursery, tally: Tally, tmp_path: Path) -> None:
    """`close(timeout)` gives up in time; the trainer's end does not wait either, and the writer finishes when it can."""
    root = tmp_path / "root"
    with trainers.child("obey", root=str(root), tracer=delayed(tmp_path, "mkdirat", 0.3)) as child:
        writer = staged(child)
        with stopped(writer):
            assert ask(child, "close 0.5").startswith("TimeoutError")
            child.tell("end")
            assert child.wait(10) == 0
    settle(trainers, tally, "close", root, 1)
