"""SIGKILL before every call that changes the disk: what is visible is whole, what was acknowledged is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import checks
from .conftest import Tally
from .faults import needs_strace
from .nursery import Nursery
from .sweeps import Scenario, Sweep, scenarios

pytestmark = needs_strace
KILLED = ["trainer", "writer", "both"]


@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("killed", KILLED)
def test_two_saves_and_a_retention(victims: Nursery, tally: Tally, tmp_path: Path, killed: str, keep: int) -> None:
    """Killed before any call of two saves and what they prune: no harm, and the next start and save are as ever."""
    sweep = Sweep(victims, Scenario(killed, keep, **scenarios(keep)), str(tmp_path / "root"), tmp_path)
    for point, child in sweep.killed_at_each(sweep.lay_out):
        problems = checks.violations(victims, sweep.root, child, keep)
        if killed == "writer" and "CLOSED" not in child.messages:
            problems.append(f"the trainer did not come to its end: {child}")
        tally.fault(point, problems)
    assert victims.descendants() == []
    tally.settle(at_least=40)
