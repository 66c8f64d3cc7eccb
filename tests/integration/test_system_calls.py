"""System calls that a kernel or a sandbox does not have: there is another way, or the constructor says what is missing."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vembed_async_ckpt import AsyncCheckpointer, CheckpointError, verify
from vembed_async_ckpt._disk.filesystem import FILESYSTEM_OVERRIDE, LocalFilesystem
from vembed_async_ckpt._engine import supervisor

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="denies system calls with strace")
SCRIPT = """
import sys, torch
from vembed_async_ckpt import AsyncCheckpointer, CheckpointError, load, verify
root, writer = sys.argv[1:]
try:
    checkpointer = AsyncCheckpointer(root, writer=writer)
except CheckpointError as error:
    sys.exit(f"REFUSED {error}")
with checkpointer:
    for n in range(3):
        model = torch.nn.Linear(8, 8)
        path = checkpointer.save(n // 2, model=model).result(60).path
    verify(path)
    load(path, model=torch.nn.Linear(8, 8))
print("SAVED")
"""


def run(root: Path, writer: str, denied: dict[str, str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Save, replace, verify and load where these system calls fail with these errors, in every process."""
    inject = [word for call, error in denied.items() for word in ("-e", f"inject={call}:error={error}")]
    strace = ["strace", "-f", "-o", "/dev/null", "-e", f"trace={','.join(denied)}", *inject] if denied else []
    command = [*strace, sys.executable, "-c", SCRIPT, str(root), writer]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment})


@needs_strace
@pytest.mark.parametrize("writer", ["process", "thread"])
@pytest.mark.parametrize("error", ["ENOSYS", "EPERM"])
def test_there_is_another_way(root: Path, writer: str, error: str) -> None:
    """Without all of these at once: saving, replacing, verifying and loading work."""
    calls = ("pidfd_open", "eventfd2", "renameat2", "madvise", "setpriority", "statfs", "fallocate", "mlock")
    calls += ("io_uring_setup", "mbind", "process_vm_readv")
    done = run(root, writer, dict.fromkeys(calls, error))
    assert (done.returncode, done.stdout) == (0, "SAVED\n"), done.stderr
    assert sorted(os.listdir(root)) == ["checkpoint-0", "checkpoint-1"]


@needs_strace
@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("memfd_create", "memfd_create is refused by this kernel or sandbox (Operation not permitted); allow the call"),
        ("fsync", "fsync is refused by this kernel or sandbox (Operation not permitted)"),
        ("flock", "flock is refused here (Operation not permitted), so nothing keeps two trainings apart"),
        ("sendmsg", "(SCM_RIGHTS) is refused by this kernel or sandbox (Operation not permitted); allow the call"),
    ],
)
def test_the_constructor_names_what_is_missing(root: Path, call: str, said: str) -> None:
    """In one line, at once, with what was refused; of what the thread needs too, also there."""
    for writer in ("process", "thread") if call != "fsync" else ("process",):
        done = run(root, writer, {call: "EPERM"})
        assert (done.returncode, done.stdout) == (1, ""), writer
        assert said in done.stderr, writer
        assert done.stderr.startswith("REFUSED ")
        assert len(done.stderr.splitlines()) == 1


class NoDirect(LocalFilesystem):
    """Has no O_DIRECT, and says so with `code` when a file is made, or when it is written."""

    def __init__(self, code: int, late: bool) -> None:
        self.code, self.late = code, late
        self.refused = 0

    def create(self, path: str, *, direct: bool) -> int:
        if direct and not self.late:
            self.refused += 1
            raise OSError(self.code, os.strerror(self.code), path)
        return super().create(path, direct=direct)

    def write(self, fd: int, data: memoryview, offset: int) -> int:
        if self.late and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            self.refused += 1
            raise OSError(self.code, os.strerror(self.code))
        return super().write(fd, data, offset)


@pytest.mark.parametrize("late", [False, True], ids=["when made", "when written"])
@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM], ids=errno.errorcode.get)
def test_a_place_without_direct_io(root: Path, code: int, late: bool) -> None:
    """Then files are written through the page cache."""
    import torch

    filesystem = NoDirect(code, late)
    token = FILESYSTEM_OVERRIDE.set(filesystem)
    try:
        with AsyncCheckpointer(root, writer="thread") as checkpointer:
            path = checkpointer.save(1, model=torch.nn.Linear(300, 300)).result(60).path
    finally:
        FILESYSTEM_OVERRIDE.reset(token)
    verify(path)
    assert filesystem.refused > 0 or (late and not has_direct(root))


def has_direct(directory: Path) -> bool:
    try:
        os.close(os.open(directory / "trial", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        return False
    finally:
        (directory / "trial").unlink(missing_ok=True)
    return True


def test_a_process_that_cannot_start_is_found_out_by_the_constructor(root: Path) -> None:
    """The python that is to run is none: the error names it and the writer that needs no process; the root is free afterwards."""
    script = SCRIPT.replace("root, writer =", "sys.executable = '/nowhere/python'\nroot, writer =")
    for writer, said in (("process", "/nowhere/python cannot be started"), ("thread", "")):
        done = subprocess.run(
            [sys.executable, "-c", script, str(root), writer], capture_output=True, text=True, timeout=120
        )
        assert said in done.stderr
        assert ("writer='thread'" in done.stderr) == (writer == "process")
    assert done.stdout == "SAVED\n"


@pytest.fixture
def mute_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A python that never comes to anything, for the writer; returns where it writes its process id."""
    python, pid = tmp_path / "python", tmp_path / "pid"
    python.write_text(f"#!/bin/sh\necho $$ > {pid}\nexec sleep 600\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(supervisor, "_UNDISTURBED", 1.0)
    return pid


def assert_ended(pid: Path) -> None:
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_a_writer_that_does_not_answer_is_ended(root: Path, mute_python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The constructor says so after its deadline; no process, thread or lock stays."""
    monkeypatch.setattr(supervisor, "_START_DEADLINE", 3.0)
    with pytest.raises(CheckpointError, match="its writer has not answered for 3 s"):
        AsyncCheckpointer(root)
    assert_ended(mute_python)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("vembed-ckpt")]
    assert list(root.iterdir()) == []


def test_ctrl_c_ends_the_wait_for_a_writer(root: Path, mute_python: Path) -> None:
    """Long before the deadline; no process and no lock stays."""
    began = time.monotonic()
    timer = threading.Timer(1.5, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        AsyncCheckpointer(root)
    timer.join()
    assert time.monotonic() - began < supervisor._START_DEADLINE / 2
    assert_ended(mute_python)
    assert list(root.iterdir()) == []


def test_dependencies_in_several_places(root: Path, tmp_path: Path) -> None:
    """xxhash lies elsewhere than isal, as with `pip --target` or a module's PYTHONPATH: the writer process finds both."""
    import xxhash

    shutil.copytree(Path(xxhash.__file__).parent, tmp_path / "site" / "xxhash")
    done = run(root, "process", {}, PYTHONPATH=f"{tmp_path / 'site'}:{os.environ.get('PYTHONPATH', '')}")
    assert (done.returncode, done.stdout) == (0, "SAVED\n"), done.stderr
