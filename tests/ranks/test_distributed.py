"""A distributed training under `accelerate launch` (gloo, on the CPU), killed as a whole and started again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vembed_async_ckpt
from vembed_async_ckpt import latest, verify
from vembed_async_ckpt._disk.manifests import read

SCRIPT = Path(__file__).parent / "scripts" / "ddp.py"
PACKAGE = str(Path(vembed_async_ckpt.__file__).parents[1])  # the ranks import what this process imports
PATIENCE = 90.0  # seconds for one launch; it takes a tenth of that on an idle machine


class Job:
    """One launch; its ranks write notes, each a file of its own."""

    def __init__(self, phase: str, directory: Path, world_size: int) -> None:
        self._notes = directory / "notes"
        self._world_size = world_size
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the job
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        options = ["--multi_gpu", f"--num_processes={world_size}", "--num_machines=1", f"--main_process_port={port}"]
        options += ["--mixed_precision=no", "--dynamo_backend=no"]
        self._launcher = subprocess.Popen(
            [sys.executable, "-m", "accelerate.commands.launch", *options, str(SCRIPT), phase, str(directory)],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": PACKAGE},
        )

    def notes(self, what: str) -> list[Any]:
        """What every rank has noted, rank by rank. Waits until all have."""
        files = [self._notes / f"{what}-{rank}.json" for rank in range(self._world_size)]
        deadline = time.monotonic() + PATIENCE
        while not all(file.exists() for file in files):
            assert time.monotonic() < deadline, f"not every rank came to {what!r}: {self.output()}"
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._launcher.wait(0.05)
                assert all(file.exists() for file in files), f"ended before {what!r}: {self.output()}"
        return [json.loads(file.read_text()) for file in files]

    def kill(self) -> None:
        """All of it at once, but the writer, which belongs to nobody any more."""
        self._launcher.kill()
        self._launcher.wait()
        for file in self._notes.glob("pid-*.json"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(json.loads(file.read_text())["pid"], signal.SIGKILL)
            file.unlink()
        self._output.close()

    def wait(self) -> int:
        return self._launcher.wait(PATIENCE)

    def output(self) -> str:
        return os.pread(self._output.fileno(), 1 << 20, 0).decode(errors="replace")[-4000:]


@contextlib.contextmanager
def launched(phase: str, directory: Path, world_size: int) -> Iterator[Job]:
    job = Job(phase, directory, world_size)
    try:
        yield job
    finally:
        job.kill()


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_rank_goes_on_after_the_whole_job_was_killed(root: Path, world_size: int) -> None:
    """Both checkpoints were only staged when all ranks died by SIGKILL. A new job goes on from either, by our load and by
    accelerate's, and every rank comes to the last bit to what it came to without interruption: weights, optimizer, and random
    states of its own. Then one rank dies while the others save: the job fails at once, and the checkpoint before is untouched."""
    directory = root.parent
    with launched("begin", directory, world_size) as job:
        expected = [note["digest"] for note in job.notes("reference")]
        assert len(set(expected)) == world_size, "each has random states of its own"
        job.notes("staged")
        job.kill()
    newest = latest(root)
    assert newest == root / "checkpoint_6"
    for path in (root / "checkpoint-step-6", root / "checkpoint_6"):
        verify(path)
        random_states = {f"random_states_{rank}.pkl" for rank in range(world_size)}
        assert random_states <= set(os.listdir(path))
    with launched("resume", directory, world_size) as job:
        for what in ("checkpoint-ours", "checkpoint-attached", "state-ours", "state-stock"):
            assert [note["digest"] for note in job.notes(what)] == expected, what
        assert job.wait() != 0
    newest = latest(root)
    assert newest == root / "checkpoint_12"
    verify(newest)


def test_only_the_main_process_saves(root: Path) -> None:
    """`if accelerator.is_main_process: save_checkpoint(...)`: every checkpoint is there, and no step waits."""
    with launched("alone", root.parent, 2) as job:
        took, nothing = (note["took"] for note in job.notes("alone"))
        assert job.wait() == 0, job.output()
        output = job.output()
    assert nothing == []
    assert len(took) == 12
    assert max(took[1:]) < 1.5
    assert output.count("did not call save()") == 1, output
    for step in range(1, 13):
        verify(root / f"checkpoint-{step}")
        assert read(str(root / f"checkpoint-{step}")).ranks == (0,)
