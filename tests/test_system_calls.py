"""System calls that a kernel or a sandbox does not have: there is another way, or the constructor says what is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
    """In one line, at once, with what was refused."""
    done = run(root, "process", {call: "EPERM"})
    assert (done.returncode, done.stdout) == (1, "")
    assert said in done.stderr
    assert done.stderr.startswith("REFUSED ")
    assert len(done.stderr.splitlines()) == 1


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


def test_dependencies_in_several_places(root: Path, tmp_path: Path) -> None:
    """xxhash lies elsewhere than isal, as with `pip --target` or a module's PYTHONPATH: the writer process finds both."""
    import xxhash

    shutil.copytree(Path(xxhash.__file__).parent, tmp_path / "site" / "xxhash")
    done = run(root, "process", {}, PYTHONPATH=f"{tmp_path / 'site'}:{os.environ.get('PYTHONPATH', '')}")
    assert (done.returncode, done.stdout) == (0, "SAVED\n"), done.stderr
