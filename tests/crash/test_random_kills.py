"""Real trainings killed at random moments: what was promised is there, whole, and training goes on from it."""

from __future__ import annotations

import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vembed_async_ckpt import latest, verify
from vembed_async_ckpt._disk.catalog import scan

from .checks import leftovers
from .conftest import Tally
from .nursery import PATIENCE, Child, Nursery

_LATEST_KILL = 0.4  # seconds after the first save was staged
_AT_ONCE = 2


@pytest.mark.parametrize("runs", [30, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_killed_at_a_random_moment(trainers: Nursery, tally: Tally, tmp_path: Path, runs: int) -> None:
    """Trainer or writer killed: nothing that was staged is lost; both: nothing that was committed."""
    seed = int(os.environ.get("CRASH_SEED", random.randrange(1 << 32)))
    print(f"CRASH_SEED={seed}")
    tally.kind += f" CRASH_SEED={seed}"
    chance = random.Random(seed)
    plans = [(("trainer", "writer", "both")[n % 3], chance.uniform(0, _LATEST_KILL)) for n in range(runs)]

    def run(n: int) -> list[str]:
        return killed_training(trainers, str(tmp_path / f"root-{n}"), *plans[n])

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for n, problems in enumerate(pool.map(run, range(runs))):
            tally.fault(plans[n], problems)
    assert trainers.left_alive(PATIENCE) == []
    tally.settle(at_least=runs)


def killed_training(trainers: Nursery, root: str, victim: str, delay: float) -> list[str]:
    """What is wrong after a training whose `victim` was killed `delay` seconds after its first save was staged."""
    problems = []
    with trainers.child("train", root=root) as child:
        writer = int(child.expect("WRITER"))
        child.expect("STAGED")
        time.sleep(delay)
        if victim in ("writer", "both"):
            os.kill(writer, signal.SIGKILL)
        if victim in ("trainer", "both"):
            child.kill()
        else:
            problems += goes_on(child)
        status = child.wait()
        found = latest(root)  # at once: it waits for a writer that still finishes
        if status != (0 if victim == "writer" else -signal.SIGKILL):
            problems.append(f"the trainer ended with {status}: {child}")
        promised = child.last("COMMITTED" if victim == "both" else "STAGED")
        newest = int(found.name.rpartition("-")[2]) if found else 0
        if newest < promised:
            problems.append(f"{promised} was promised, the newest is {newest}: {child}")
    for entry in scan(root):
        verify(entry.path)
    with trainers.child("resume", root=root) as child:
        if child.wait() != 0 or child.last("FOUND") != newest:
            problems.append(f"{newest} could not be resumed from: {child}")
    return [*problems, *(f"left over: {entry}" for entry in leftovers(root))]


def goes_on(child: Child) -> list[str]:
    """A training that lost its writer gets another one, and commits what was staged then and what is saved later."""
    child.expect("WRITER")
    staged = child.last("STAGED")
    while child.last("COMMITTED") <= staged:
        child.expect("COMMITTED")
    child.tell("stop")
    child.expect("CLOSED")
    return [message for message in child.messages if "was not saved" in message]
