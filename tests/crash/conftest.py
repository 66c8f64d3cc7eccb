"""Fixtures of the crash tests: warm processes to fork from, and a line in the summary for every sweep of faults."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

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
    found = Tally(request.node.nodeid.rpartition("/")[2])
    request.config.stash.setdefault(_TALLIES, []).append(found)
    return found


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    tallies = config.stash.get(_TALLIES, [])
    if tallies:
        terminalreporter.section("faults")
        for tally in tallies:
            terminalreporter.write_line(
                f"{tally.faults:5} {tally.what}, {len(tally.violations)} violations: {tally.kind}"
            )


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
