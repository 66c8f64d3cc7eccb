"""The power fails before every call that changes the disk: what was not synced is lost, what was acknowledged is not.

Both ways of losing are tried: the journal still reaches the disk and the data do not ("logflush": files of zeros), or neither
("nologflush"). O_DIRECT leaves little to lose, so the writer also runs without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from . import checks
from .conftest import Tally
from .faults import Disk, missing, needs_strace
from .nursery import Child, Nursery
from .sweeps import AT_ONCE, PRUNING, Bench, Scenario, Sweep

pytestmark = [needs_strace, pytest.mark.root]
FILE_SYSTEMS = [
    pytest.param(kind, marks=pytest.mark.skipif(bool(missing(kind)), reason=missing(kind))) for kind in ("ext4", "xfs")
]


@pytest.fixture
def benches(kind: str, tmp_path: Path) -> Iterator[list[Bench]]:
    """Places on disks of their own."""
    with ExitStack() as disks:
        found = []
        for n in range(AT_ONCE):
            directory = tmp_path / f"bench-{n}"
            directory.mkdir()
            found.append(Bench(directory, disks.enter_context(Disk(directory, kind))))
        yield found


@pytest.mark.parametrize("kind", FILE_SYSTEMS)
@pytest.mark.parametrize(
    ("how", "direct"),
    [
        pytest.param("nologflush", True, id="nologflush-direct"),
        pytest.param("logflush", False, id="logflush-buffered"),
        pytest.param("nologflush", False, id="nologflush-buffered", marks=pytest.mark.slow),
        pytest.param("logflush", True, id="logflush-direct", marks=pytest.mark.slow),
    ],
)
def test_saves_and_a_retention(victims: Nursery, tally: Tally, benches: list[Bench], how: str, direct: bool) -> None:
    """The power fails before any call of saving and pruning: no harm, and the next start and save are as ever."""
    Sweep(victims, Scenario("trainer", 1, **PRUNING[1], direct=direct), benches).run(
        tally, after_a_power_cut(victims, how, 1)
    )
    tally.settle(at_least=50)


@pytest.mark.parametrize("kind", FILE_SYSTEMS)
def test_with_a_writer_process(victims: Nursery, tally: Tally, benches: list[Bench]) -> None:
    """The same where the writer is a process, with three checkpoints kept."""
    Sweep(victims, Scenario("both", 3, **PRUNING[3]), benches).run(tally, after_a_power_cut(victims, "nologflush", 3))
    tally.settle(at_least=25)


def after_a_power_cut(victims: Nursery, how: str, keep: int):
    def judge(child: Child, bench: Bench) -> list[str]:
        assert bench.disk is not None
        bench.disk.cut_power(how)
        return checks.violations(victims, bench.root, child, keep)

    return judge
