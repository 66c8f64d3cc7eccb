"""The power fails before every call of the writer, and every kind of disk that may then be found is recovered from.

The disk is a `PowerCutFilesystem`, which keeps what was synced and loses, tears or keeps each other change on its own: it knows no
journal, so it is less kind than any real file system.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from vembed_async_ckpt.testing import PowerCutFilesystem

from .conftest import Tally
from .inprocess import without_exchange
from .parallel import shared
from .states import Story, crash_states

DISKS = {"exchange": PowerCutFilesystem, "no-exchange": without_exchange(PowerCutFilesystem)}
STORIES = {
    "retention": Story(1, [(1, 1), (2, 2), (3, 3)]),
    "retention of what was replaced": Story(1, [(1, 1), (2, 1), (3, 3)]),
    "the same step again": Story(
        3, [(1, 1), (2, 1)], {"checkpoint-1/notes.txt": b"mine", "checkpoint-1/inner/mine.bin": bytes(range(256)) * 40}
    ),
}


@pytest.mark.parametrize("disk", DISKS)
@pytest.mark.parametrize("story", STORIES)
def test_every_disk_that_may_be_found_is_recovered_from(tally: Tally, memory: Path, disk: str, story: str) -> None:
    """Whole or absent, the acknowledged one there, leftovers gone, foreign files untouched, the next save works."""
    for state, problems in shared(
        lambda place, numbers: crash_states(STORIES[story], DISKS[disk], place, numbers=numbers), memory
    ):
        tally.fault(state, problems)
    tally.settle(at_least=700)
