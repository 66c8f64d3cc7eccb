"""SIGKILL before every call that changes the disk: what is visible is whole, what was acknowledged is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import checks
from .conftest import Tally
from .faults import needs_strace
from .nursery import PATIENCE, Child, Nursery
from .sweeps import AT_ONCE, PRUNING, Bench, Scenario, Sweep

pytestmark = needs_strace
KILLED = ["trainer", "writer", "both"]
FOREIGN = {"checkpoint-1/notes.txt": b"mine", "checkpoint-1/inner/mine.bin": bytes(range(256)) * 40}


def benches(directory: Path) -> list[Bench]:
    return [Bench(directory / f"bench-{n}") for n in range(AT_ONCE)]


@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("killed", KILLED)
def test_saves_and_a_retention(victims: Nursery, tally: Tally, tmp_path: Path, killed: str, keep: int) -> None:
    """Killed before any call of saving and pruning: no harm, and the next start and save are as ever."""

    def judge(child: Child, bench: Bench) -> list[str]:
        problems = checks.violations(victims, bench.root, child, keep)
        if killed == "writer" and child.last("ACK") != PRUNING[keep]["saves"][-1][0]:
            problems.append(f"the trainer lost a save with its writer: {child}")
        return problems

    Sweep(victims, Scenario(killed, keep, **PRUNING[keep]), benches(tmp_path)).run(tally, judge)
    assert victims.left_alive(PATIENCE) == []
    tally.settle(at_least=25)


@pytest.mark.parametrize("killed", KILLED)
def test_the_same_step_again(victims: Nursery, tally: Tally, tmp_path: Path, killed: str) -> None:
    """Killed before any call of replacing a checkpoint: the old one or the new one is there, foreign files always."""

    def judge(child: Child, bench: Bench) -> list[str]:
        before = lost(bench.root)
        return [*before, *checks.violations(victims, bench.root, child, keep=3), *lost(bench.root)]

    def lost(root: str) -> list[str]:
        there = {name: Path(root, name) for name in FOREIGN}
        return [f"{n}: lost or altered" for n, p in there.items() if not p.exists() or p.read_bytes() != FOREIGN[n]]

    Sweep(victims, Scenario(killed, 3, [(2, 1)], [(1, 1)], FOREIGN), benches(tmp_path)).run(tally, judge)
    tally.settle(at_least=25)
