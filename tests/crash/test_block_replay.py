"""Every write and flush that reached a disk is noted, and disks are put together from the log as a power cut would leave them:
what was written before the last flush is there, of the rest any part, sectors torn."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from . import checks
from .conftest import Tally
from .faults import make_file_system, megabytes, missing, mounted, run
from .fuse_disk import FuseDisk, Record
from .inprocess import next_start
from .nursery import Nursery

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="the kernel has no FUSE"),
]
KEEP = 1
SAVES = [(1, 1), (2, 2), (3, 2), (4, 4)]
_SECTOR, _BLOCK = 512, 4096
_AT_ONCE = 2


@dataclass(frozen=True)
class State:
    """A disk as it may be found when the power fails before operation `at`; with a `seed`, what was not flushed is lost in part."""

    at: int
    seed: int | None
    acknowledged: int
    blocks: dict[int, bytes]  # what is not zero

    def __str__(self) -> str:
        return f"block operation {self.at}" + ("" if self.seed is None else f", seed {self.seed}")


def record(victims: Nursery, directory: Path, kind: str, writer: str) -> list[Record]:
    """What a disk is told from its making on, through a few saves; a mark n follows the acknowledgement of save n, mark 0 the
    moment at which the file system is ready."""
    with FuseDisk(directory, megabytes(kind)) as disk:
        make_file_system(kind, disk.path)
        with mounted(kind, disk.path, str(directory / "recording")) as path:
            root = os.path.join(path, "root")
            os.mkdir(root)
            run("sync", "-f", path)
            disk.mark(0)
            arguments = {"root": root, "writer": writer, "keep": KEEP, "direct": writer == "process"}
            with victims.child("obey", **arguments) as child:
                for n, step in SAVES:
                    child.tell(f"save {n} {step}")
                    child.expect(f"ACK {n}")
                    disk.mark(n)
                    child.expect("TIDIED")
                child.tell("close")
                assert child.expect("CLOSED") == "True"
        return list(disk.log())


def states(log: Sequence[Record], chance: random.Random, prefixes: int, torn: int) -> Iterator[State]:
    """Disks at random moments after mark 0: as they were written, and as they may have been lost."""
    begun = next(n for n, entry in enumerate(log) if entry.kind == "M")
    moments = [(chance.randrange(begun, len(log) + 1), None) for _ in range(prefixes)]
    moments += [(chance.randrange(begun, len(log) + 1), chance.randrange(1 << 30)) for _ in range(torn)]
    flushed: dict[int, bytes] = {}
    pending, acknowledged, done = [], 0, 0
    for at, seed in sorted(moments, key=lambda moment: moment[0]):
        for entry in log[done:at]:
            if entry.kind == "M":
                acknowledged = entry.offset
            elif entry.kind == "W":
                pending.append(entry)
            else:
                _write(flushed, pending)
                pending = []
        done = at
        blocks = dict(flushed)
        _write(blocks, pending if seed is None else _torn(pending, random.Random(seed)))
        yield State(at, seed, acknowledged, blocks)


def _write(blocks: dict[int, bytes], entries: Iterable[Record]) -> None:
    for entry in entries:
        end = entry.offset + len(entry.data)
        for start in range(entry.offset // _BLOCK * _BLOCK, end, _BLOCK):
            low, high = max(start, entry.offset), min(start + _BLOCK, end)
            old = blocks.get(start, bytes(_BLOCK))
            blocks[start] = (
                old[: low - start] + entry.data[low - entry.offset : high - entry.offset] + old[high - start :]
            )


def _torn(entries: Sequence[Record], dice: random.Random) -> Iterator[Record]:
    """Some whole, some not at all, some up to a sector."""
    for entry in entries:
        fate = dice.random()
        if fate < 0.45:
            yield entry
        elif fate < 0.6:
            yield Record("W", entry.offset, entry.data[: dice.randrange(len(entry.data) // _SECTOR + 1) * _SECTOR])


@contextmanager
def mounted_as_at_boot(kind: str, image: str, path: str) -> Iterator[str]:
    """Mounted; if that is refused, after a repair: the superblock of ext4 has two sectors and a checksum, and may be torn."""
    twins = ["nouuid"] if kind == "xfs" else []  # it refuses to be mounted twice at once
    with ExitStack() as stack:
        try:
            stack.enter_context(mounted(kind, image, path, *twins))
        except AssertionError:
            if kind != "ext4":
                raise
            assert subprocess.run(["e2fsck", "-fy", image], capture_output=True).returncode < 4
            stack.enter_context(mounted(kind, image, path))
        yield path


def problems(state: State, kind: str, directory: Path) -> list[str]:
    """What is wrong on that disk, once it is mounted again."""
    directory.mkdir()
    image = directory / "image"
    with image.open("wb") as file:
        file.truncate(megabytes(kind) << 20)
        for offset, block in state.blocks.items():
            os.pwrite(file.fileno(), block, offset)
    try:
        with mounted_as_at_boot(kind, str(image), str(directory / "found")) as path:
            root = os.path.join(path, "root")
            found = list(checks.after_fault(root, state.acknowledged))
            return found + [f"after the next start: {problem}" for problem in next_start(root, KEEP)]
    finally:
        shutil.rmtree(directory)


@pytest.mark.parametrize(
    ("kind", "writer", "prefixes", "torn"),
    [
        pytest.param(
            *case, id="-".join(case[:2]), marks=pytest.mark.skipif(bool(missing(case[0])), reason=missing(case[0]))
        )
        for case in [("ext4", "process", 75, 75), ("ext4", "thread", 75, 75), ("xfs", "thread", 50, 50)]
    ],
)
def test_disks_put_together_from_the_log(
    victims: Nursery, tally: Tally, memory: Path, kind: str, writer: str, prefixes: int, torn: int
) -> None:
    """Whole or absent, the acknowledged one there, and the next start and save are as ever."""
    seed = int(os.environ.get("CRASH_SEED", random.randrange(1 << 32)))
    tally.kind += f" CRASH_SEED={seed}"
    log = record(victims, memory, kind, writer)
    assert sum(entry.kind == "F" for entry in log) > 30
    assert sum(entry.kind == "M" for entry in log) == len(SAVES) + 1
    found = states(log, random.Random(seed), prefixes, torn)

    def judge(item: tuple[int, State]) -> tuple[str, list[str]]:
        n, state = item
        return str(state), problems(state, kind, memory / f"state-{n}")

    items = enumerate(found)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        while batch := [item for _, item in zip(range(2 * _AT_ONCE), items, strict=False)]:
            for where, wrong in pool.map(judge, batch):
                tally.fault(where, wrong)
    tally.settle(at_least=prefixes + torn)
