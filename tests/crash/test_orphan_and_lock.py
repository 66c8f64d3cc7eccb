"""Who survives whom: writers without a trainer, trainers without a writer, forked children, signals, and every kind of exit."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vembed_async_ckpt
from vembed_async_ckpt import latest
from vembed_async_ckpt._format import names

from .dialogue import ask, assert_resumable, delayed, staged
from .faults import needs_strace, tracer_script
from .nursery import PATIENCE, Nursery, wait_for_end

pytestmark = needs_strace


@pytest.fixture(autouse=True)
def nobody_left(trainers: Nursery) -> Iterator[None]:
    """At the end no process is left, and no zombie."""
    yield
    assert trainers.left_alive(PATIENCE) == []


@pytest.fixture
def slow(tmp_path: Path) -> str:
    """A writer that takes a while before it begins to write."""
    return delayed(tmp_path, "mkdirat", 0.7)


@pytest.fixture
def slow_to_commit(tmp_path: Path) -> str:
    """A writer that takes a while before it publishes."""
    return delayed(tmp_path, "renameat2", 2.0)


# -- orphans


def test_latest_waits_for_an_orphan(
    trainers: Nursery, tmp_path: Path, slow: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Trainer killed right after staged, before a byte was written: `latest` says that it waits, and finds the checkpoint."""
    root = tmp_path / "root"
    with trainers.child("obey", root=str(root), tracer=slow) as child:
        staged(child)
        child.kill()
        child.wait()
        assert latest(root) == root / "checkpoint-1"
    assert "waiting for the writer of a dead trainer" in caplog.text
    assert_resumable(trainers, root, 1)


def test_the_next_start_waits_for_an_orphan(trainers: Nursery, tmp_path: Path, slow: str) -> None:
    """A new checkpointer on the root says that it waits, and goes on from what the orphan committed."""
    root = tmp_path / "root"
    with trainers.child("obey", root=str(root), tracer=slow) as child:
        staged(child)
        child.kill()
        child.wait()
        said = assert_resumable(trainers, root, 1)
    assert any("waiting for the writer of a dead trainer" in message for message in said)


def test_two_trainers_on_one_root(trainers: Nursery, tmp_path: Path) -> None:
    """The second is refused, and told the process ids of the first and of its writer; the first is not disturbed."""
    root = tmp_path / "root"
    with trainers.child("obey", root=str(root)) as child:
        writer = staged(child)
        with trainers.child("refused", root=str(root)) as second:
            message = second.expect("BUSY")
        assert f"trainer {child.pid}, writer {writer}" in message
        assert str(root) in message
        assert ask(child, "result") == "committed 1"
        assert ask(child, "close") == "done"


# -- forked children


@pytest.mark.parametrize("how", ["fork exit", "fork stay"])
def test_a_forked_child_does_not_touch_the_writer(trainers: Nursery, tmp_path: Path, how: str) -> None:
    """A DataLoader-like child that ends, or is killed, leaves writer and saves alone."""
    root = tmp_path / "root"
    with trainers.child("obey", root=str(root)) as child:
        writer = staged(child)
        forked = int(ask(child, how).split()[1])
        if how == "fork stay":
            os.kill(forked, signal.SIGKILL)
        assert ask(child, "save") == "done"
        assert ask(child, "result") == "committed 2"
        assert [m for m in child.messages if m.startswith("WRITER")] == [f"WRITER {writer}"]
        child.kill()
        child.wait()
    assert_resumable(trainers, root, 2)


@pytest.mark.parametrize("how", ["fork stay", "fork raw"])
def test_the_trainers_death_is_noticed_though_a_forked_child_lives(trainers: Nursery, tmp_path: Path, how: str) -> None:
    """The writer finishes and ends while the child still lives, also when the child was made without Python's knowledge."""
    root = tmp_path / "root"
    with trainers.child("obey", root=str(root)) as child:
        writer = os.pidfd_open(staged(child))
        forked = int(ask(child, how).split()[1])
        try:
            child.kill()
            child.wait()
            assert wait_for_end(writer, 20)
            os.close(writer)
            os.kill(forked, 0)  # it lives
            if how == "fork stay":
                assert_resumable(trainers, root, 1)  # and the lock is not with it
        finally:
            os.kill(forked, signal.SIGKILL)
    assert latest(root) is not None


# -- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_does_not_stop_the_writer(trainers: Nursery, tmp_path: Path, number: signal.Signals) -> None:
    """What schedulers and terminals send to everybody: the same writer commits what it has and what comes."""
    root = tmp_path / "root"
    with trainers.child("obey", root=str(root)) as child:
        writer = staged(child)
        os.kill(writer, number)
        assert ask(child, "result") == "committed 1"
        os.kill(writer, number)
        assert ask(child, "save") == "done"
        assert ask(child, "result") == "committed 2"
        assert [m for m in child.messages if m.startswith("WRITER")] == [f"WRITER {writer}"]
        assert ask(child, "close") == "done"


def test_a_stopped_writer(trainers: Nursery, tmp_path: Path) -> None:
    """SIGSTOP: waiting raises TimeoutError and changes nothing; after SIGCONT the save is committed."""
    root = tmp_path / "root"
    with trainers.child("obey", root=str(root)) as child:
        writer = int(child.expect("WRITER"))
        assert ask(child, "save") == "done"
        assert ask(child, "result") == "committed 1"
        os.kill(writer, signal.SIGSTOP)
        try:
            assert ask(child, "save") == "done"
            assert ask(child, "impatient").startswith("TimeoutError: checkpoint of step 2 is still staging")
        finally:
            os.kill(writer, signal.SIGCONT)
        assert ask(child, "result") == "committed 2"
        assert ask(child, "close") == "done"


def test_a_job_that_kills_its_writers(trainers: Nursery, tmp_path: Path) -> None:
    """Three writers die of one job: the handle says so, the earlier checkpoint stays, and the next save works."""
    root = tmp_path / "root"
    with trainers.child("obey", root=str(root)) as child:
        staged(child)
        assert ask(child, "result") == "committed 1"
        assert ask(child, "close") == "done"
        child.kill()
    deadly = tracer_script(
        tmp_path, ["-f", "-o", "/dev/null", "-e", "trace=renameat2", "-e", "inject=renameat2:signal=KILL"]
    )
    with trainers.child("obey", root=str(root), tracer=deadly) as child:
        assert ask(child, "save") == "done"
        assert ask(child, "staged") == "done"
        answer = ask(child, "result")
        assert answer.startswith("WriteError")
        assert "killed by signal 9" in answer
        assert "previous checkpoints are untouched" in answer
        assert latest(root) == root / "checkpoint-1"
        assert ask(child, "untraced") == "done"
        assert ask(child, "save") == "done"
        assert ask(child, "result") == "committed 2"
        assert len([m for m in child.messages if m.startswith("WRITER")]) == 4
        assert ask(child, "close") == "done"
    assert_resumable(trainers, root, 2)


# -- exits


@pytest.mark.parametrize(
    ("end", "code"), [("end", 0), ("end sys.exit", 7), ("end exception", 1), ("end exception in with", 1)]
)
def test_an_exit_drains_what_is_pending(
    trainers: Nursery, tmp_path: Path, slow_to_commit: str, end: str, code: int
) -> None:
    """However the interpreter ends by itself, the pending save is committed first, and an exception keeps its traceback."""
    root = tmp_path / "root"
    with trainers.child("obey", root=str(root), tracer=slow_to_commit) as child:
        staged(child)
        child.tell(end)
        assert child.wait() == code
        assert names.checkpoint(1) in os.listdir(root)
        said = child.stderr()
        if "exception" in end:
            assert said.rstrip().endswith("RuntimeError: the training itself broke")
            assert said.count("Traceback") == 1
        else:
            assert said == ""
    assert_resumable(trainers, root, 1)


def test_os_exit_leaves_an_orphan_that_finishes(trainers: Nursery, tmp_path: Path, slow: str) -> None:
    """`os._exit` after staged runs no exit handlers; the writer commits all the same."""
    root = tmp_path / "root"
    with trainers.child("obey", root=str(root), tracer=slow) as child:
        staged(child)
        child.tell("end os._exit")
        assert child.wait() == 7
        assert latest(root) == root / "checkpoint-1"
    assert_resumable(trainers, root, 1)


def test_whoever_reads_a_trainers_output_does_not_wait_for_its_writer(tmp_path: Path) -> None:
    """`subprocess.run(capture_output=True)` returns when the trainer ends, while its writer is still at work."""
    root = tmp_path / "root"
    script = f"""
import os, sys, torch
from vembed_async_ckpt import AsyncCheckpointer
sys.executable = {delayed(tmp_path, "renameat2", 5.0)!r}
model = torch.nn.Linear(4, 4)
AsyncCheckpointer({str(root)!r}).save(1, model=model).wait_staged(100)
print("staged", flush=True)
os._exit(0)
"""
    package = os.path.dirname(os.path.dirname(vembed_async_ckpt.__file__))
    environment = {**os.environ, "PYTHONPATH": package}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=PATIENCE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "staged\n", "")
    with open(names.lock_file(str(root))) as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # its writer has it still
    assert latest(root) == root / "checkpoint-1"


def test_an_idle_thread_writer_uses_no_processor(victims: Nursery, tmp_path: Path) -> None:
    """Between saves nothing spins: a writer in the trainer's process would take time from the training."""
    with victims.child("idle", root=str(tmp_path / "root")) as child:
        used = float(child.expect("USED"))
    assert used < 0.05
