"""Fixtures of the crash tests: warm processes to fork from, and a line in the summary for every sweep of faults."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from .nursery import Nursery


@dataclass
class Tally:
    """How many faults of a kind were tried, and what was wrong afterwards."""

    kind: str
    faults: int = 0
    what: str = "faults"
    violations: list[str] = field(default_factory=list)

    def fault(self, where: object, violations: list[str]) -> None:
        self.faults += 1
        self.violations += [f"{where}: {violation}" for violation in violations]

    def settle(self, at_least: int) -> None:
        """Assert that enough faults were tried and that none did harm."""
        assert not self.violations, f"{len(self.violations)} violations in {self.faults} faults:\n" + "\n".join(
            self.violations[:20]
        )
        assert self.faults >= at_least


_TALLIES = pytest.StashKey[list[Tally]]()


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    """The tally of this test; it is printed at the end of the session."""
    found = Tally(f"{request.node.path.name}::{request.node.name}")
    request.config.stash.setdefault(_TALLIES, []).append(found)
    return found


KINDS = {
    "test_kill_sweep": "SIGKILL before a call that changes the disk",
    "test_random_kills": "SIGKILL at a random moment of a real training",
    "test_power_cut": "power cut before a call, ext4 and xfs",
    "test_block_replay": "power cut, the disk put together from its block log",
    "test_power_states": "power cut, every disk that may be found",
    "test_io_errors": "a call that fails",
    "test_devices": "a disk that is full, broken or refuses",
    "test_slow_disk": "a disk that hangs, is slow, or fails for a time",
    "test_writer_death": "a writer that dies or stops; no memory, no process",
    "test_exits": "an end of the training",
    "test_damaged": "a damaged file or root, read",
    "test_retention_faults": "retention, with something in its way",
    "test_snapshot": "a state that is overwritten right after the call",
    "test_hostile": "a directory made to do harm",
    "test_compound": "a fault while another one is dealt with",
    "test_order": "calls followed by the order oracle",
    "test_shipping": "an upload, disturbed",
    "test_mutants": "planted bugs, each noticed",
}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    tallies = config.stash.get(_TALLIES, [])
    if not tallies:
        return
    terminalreporter.section("faults")
    for tally in tallies:
        terminalreporter.write_line(f"{tally.faults:6} {tally.what}, {len(tally.violations)} violations: {tally.kind}")
    terminalreporter.write_line("")
    by_kind: dict[str, list[Tally]] = {}
    for tally in tallies:
        module = tally.kind.partition(".py")[0]
        by_kind.setdefault(KINDS.get(module, module), []).append(tally)
    for kind, group in by_kind.items():
        terminalreporter.write_line(f"{sum(tally.faults for tally in group):6} {kind}")
    violations = sum(len(tally.violations) for tally in tallies)
    faults = sum(tally.faults for tally in tallies if tally.what == "faults")
    terminalreporter.write_line(f"{faults:6} faults in all, {violations} violations")


@pytest.fixture
def memory() -> Iterator[Path]:
    """An empty directory in memory, for what is about thousands of states of a disk and not about the disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as directory:
        yield Path(directory)


@pytest.fixture(scope="session")
def victims() -> Iterator[Nursery]:
    """Forks processes that save without torch."""
    nursery = Nursery("victims")
    yield nursery
    nursery.close()


@pytest.fixture(scope="session")
def trainers() -> Iterator[Nursery]:
    """Forks real trainers, torch loaded."""
    nursery = Nursery("trainers")
    yield nursery
    nursery.close()
