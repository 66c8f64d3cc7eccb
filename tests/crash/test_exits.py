"""Every way in which a training can end: what is pending is committed or reported, and the end comes in time."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vembed_async_ckpt import latest

from .conftest import Tally
from .dialogue import ask, assert_resumable, delayed, staged
from .faults import Disk, missing, needs_strace, run
from .nursery import PATIENCE, Nursery

pytestmark = needs_strace
IN_TIME = 20  # seconds, on the busiest of machines, for what has deadlines of a second and less


@pytest.fixture(autouse=True)
def nobody_left(trainers: Nursery) -> Iterator[None]:
    """At the end no process is left, and no zombie."""
    yield
    assert trainers.left_alive(PATIENCE) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda n: n.name)
def test_a_signal_ends_the_training(trainers: Nursery, tally: Tally, tmp_path: Path, number: signal.Signals) -> None:
    """Python runs its exit handlers for SIGINT only; whichever it is, what was staged is committed."""
    root = tmp_path / "root"
    with trainers.child("obey", root=str(root), tracer=delayed(tmp_path, "renameat2", 0.5)) as child:
        staged(child)
        child.kill(number)
        assert child.wait() == -number
        assert latest(root) == root / "checkpoint-1"
        said = child.stderr()
        assert said.rstrip().endswith("KeyboardInterrupt") if number == signal.SIGINT else said == ""
        assert said.count("Traceback") == (number == signal.SIGINT)
    tally.fault(number.name, [])
    assert_resumable(trainers, root, 1)
    tally.settle(at_least=1)


@pytest.mark.parametrize(("end", "code"), [("end", 120), ("close in the end", 1)])
def test_the_last_save_fails(trainers: Nursery, tally: Tally, tmp_path: Path, end: str, code: int) -> None:
    """At exit that is printed, and the exit code is Python's for a clean-up that went wrong; `close()` raises it, so that the
    training ends with an error."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "checkpoint-1").write_text("in the way")
    with trainers.child("obey", root=str(root)) as child:
        assert ask(child, "save") == "done"
        child.tell(end)
        assert child.wait() == code
        said = child.stderr()
        assert said.count(str(root / "checkpoint-1")) >= 1
        assert said.count("exists and is not a directory") == 1
        assert said.count("Traceback") == (code == 1)
    tally.fault(end, [])
    tally.settle(at_least=1)


AT_EXIT = """
import atexit, sys
atexit.register(lambda: print("registered before", flush=True))
from vembed_async_ckpt import AsyncCheckpointer
atexit.register(lambda: (print("registered after", file=sys.stderr), sys.stderr.flush()))
checkpointer = AsyncCheckpointer(sys.argv[1], writer="thread", on_error=sys.argv[2])
handle = checkpointer.save(1, extra={"a": 1})
atexit.register(lambda: sys.argv[3] == "read" and handle.exception(60))
sys.stdout.write("not flushed")
if sys.argv[3] == "raise":
    raise RuntimeError("the training itself broke")
"""


@pytest.mark.parametrize(
    ("on_error", "what", "code"),
    [("raise", "end", 120), ("raise", "raise", 120), ("raise", "read", 0), ("warn", "end", 0)],
)
def test_the_exit_code_says_that_a_checkpoint_was_lost(
    tally: Tally, tmp_path: Path, on_error: str, what: str, code: int
) -> None:
    """Unless somebody has read of it or asked for a warning only; everybody's exit handlers run, and all output is there."""
    (tmp_path / "checkpoint-1").write_text("in the way")
    done = subprocess.run(
        [sys.executable, "-c", AT_EXIT, str(tmp_path), on_error, what], capture_output=True, text=True, timeout=120
    )
    said = (done.returncode, sorted(done.stdout.split("\n")), done.stderr.count("registered after"))
    right = said == (code, ["", "not flushedregistered before"], 1)
    if ("at exit: WriteError" in done.stderr) != (code == 120) or done.stderr.count("Traceback") != (what == "raise"):
        right = False
    tally.fault(what, [] if right else [f"{done}"])
    tally.settle(at_least=1)


INTERRUPTED = """
import sys
from vembed_async_ckpt import AsyncCheckpointer
from vembed_async_ckpt._engine.session import Session

close = Session.close

def interrupted(self, *arguments):
    close(self, *arguments)
    print("closed", flush=True)
    raise KeyboardInterrupt

Session.close = interrupted
kept = [AsyncCheckpointer(f"{sys.argv[1]}/{name}") for name in "ab"]
"""


def test_an_impatient_ctrl_c_at_exit(tally: Tally, tmp_path: Path) -> None:
    """Every root gets its turn, and the exit code says that something was cut short."""
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    right = (done.stdout, done.returncode) == ("closed\nclosed\n", 120) and "at exit: KeyboardInterrupt" in done.stderr
    tally.fault("interrupted", [] if right else [f"{done}"])
    tally.settle(at_least=1)


def test_a_save_in_an_exit_handler(trainers: Nursery, tally: Tally, tmp_path: Path) -> None:
    """It is made and drained like any other."""
    root = tmp_path / "root"
    with trainers.child("obey", root=str(root)) as child:
        staged(child)
        assert ask(child, "save at exit") == "done"
        child.tell("end")
        assert child.wait() == 0
        assert child.stderr() == ""
    tally.fault("atexit", [])
    assert latest(root) == root / "checkpoint-2"
    tally.settle(at_least=1)


def test_forked_data_loader_workers(trainers: Nursery, tally: Tally, tmp_path: Path) -> None:
    """Workers of a DataLoader come and go while saves are made: one writer makes them all."""
    root = tmp_path / "root"
    with trainers.child("obey", root=str(root)) as child:
        staged(child)
        assert ask(child, "load data") == "done"
        child.tell("end")
        assert child.wait() == 0
        assert child.stderr() == ""
        assert len([message for message in child.messages if message.startswith("WRITER")]) == 1
    tally.fault("DataLoader", [])
    assert_resumable(trainers, root, 13)
    tally.settle(at_least=1)


# -- a disk that does not answer


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with Disk(tmp_path, "ext4", megabytes=64) as disk:
        yield disk


@pytest.mark.root
@pytest.mark.skipif(bool(missing("ext4")), reason=missing("ext4"))
@pytest.mark.parametrize("ending", ["close 0.5", "end"])
def test_a_frozen_disk(trainers: Nursery, tally: Tally, disk: Disk, ending: str) -> None:
    """`save()` does not notice; `close(timeout)` and the exit give up in time; thawed, the save is committed."""
    root = Path(disk.path, "root")
    with trainers.child("obey", root=str(root), exit_deadline=1.0) as child:
        staged(child)
        assert ask(child, "result") == "committed 1"
        run("fsfreeze", "-f", disk.path)
        try:
            assert ask(child, "save") == "done"
            assert ask(child, "staged") == "done"
            assert ask(child, "impatient").startswith("TimeoutError")
            if ending.startswith("close"):
                assert ask(child, ending).startswith("TimeoutError")
            child.tell("end")
            assert child.wait(IN_TIME) == (120 if ending == "end" else 0)
            if ending == "end":
                assert "at exit: TimeoutError" in child.stderr()
        finally:
            run("fsfreeze", "-u", disk.path)
        assert latest(root) == root / "checkpoint-2"
    tally.fault(ending, [])
    assert_resumable(trainers, root, 2)
    tally.settle(at_least=1)
