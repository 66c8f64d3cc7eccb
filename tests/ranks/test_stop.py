"""Several ranks stop after the same step: real processes, torchrun, Trainer and Lightning."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import vembed_async_ckpt
from vembed_async_ckpt._disk.catalog import scan

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "faults" / "stops.py"
PACKAGE = str(Path(vembed_async_ckpt.__file__).parents[1])
ENVIRONMENT = {**os.environ, "PYTHONPATH": PACKAGE, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
PATIENCE = 180.0


def play(*arguments: str) -> int:
    """How many rounds of `benchmarks/faults/stops.py` were right."""
    command = [sys.executable, str(SCRIPT), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 0, result.stdout + result.stderr
    return int(json.loads(result.stdout.splitlines()[-1])["right"])


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--rounds", "2", "--world", "2"], id="two that wait for each other"),
        pytest.param(
            ["--rounds", "1", "--world", "4", "--free", "--late", "5", "--late-rank", "2"], id="four apart, one late"
        ),
        pytest.param(["--rounds", "1", "--world", "3", "--free", "--dead"], id="three apart, one dead"),
    ],
)
def test_ranks_stop_after_the_same_step(arguments: list[str]) -> None:
    """And the next round resumes from it. The first rank serves the store and is the last to leave."""
    assert play("ranks", *arguments) == int(arguments[1])


def test_under_torchrun() -> None:
    """The signal goes to torchrun, which ends with 1; the ranks have stopped after the same step."""
    assert play("torchrun", "--world", "2", "--rounds", "2") == 2


@pytest.mark.slow
@pytest.mark.timeout(14400)
@pytest.mark.parametrize(
    ("kind", "rounds", "further"),
    [
        ("torchrun", "300", ["--world", "2"]),
        ("torchrun", "60", ["--world", "4"]),
        ("ranks", "300", ["--world", "2"]),
        ("ranks", "60", ["--world", "4"]),
        ("ranks", "60", ["--world", "4", "--free"]),
    ],
)
def test_many_random_stops(kind: str, rounds: str, further: list[str]) -> None:
    assert play(kind, "--rounds", rounds, *further) == int(rounds)


@pytest.mark.parametrize("framework", ["trainer", "lightning"])
def test_a_framework_under_torchrun(framework: str, tmp_path: Path) -> None:
    """One rank alone gets the signal. All save at the steps of the policy before, and at the one of the stop."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = str(Path(__file__).parent / "scripts" / "stopped.py")
    launcher = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)),
            *(script, framework, str(tmp_path)),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT,
    )
    try:
        deadline = time.monotonic() + PATIENCE
        while len(list(tmp_path.glob("ready-*"))) < 2:
            assert time.monotonic() < deadline
            assert launcher.poll() is None, launcher.communicate()[0]
            time.sleep(0.05)
        while not list((tmp_path / "root").glob("*/vembed_manifest.json")):  # by the policy
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with open(f"/proc/{launcher.pid}/task/{launcher.pid}/children") as file:
            ranks = sorted(map(int, file.read().split()))
        os.kill(ranks[-1], signal.SIGTERM)
        said = launcher.communicate(timeout=PATIENCE)[0]
    finally:
        launcher.kill()
        launcher.wait()
    assert launcher.returncode == 1, said
    steps = {(tmp_path / f"stopped-{rank}").read_text() for rank in range(2)}
    assert len(steps) == 1, said
    newest = scan(str(tmp_path / "root"))[-1].manifest
    assert newest is not None
    assert {str(newest.step)} == steps
    assert said.count("exitcode  : 143") >= 1, said
