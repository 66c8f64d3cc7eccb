"""Retention, whatever stands in its way: never fewer than one durable checkpoint, never the wrong one, nothing half deleted.

Order is that of the manifests. The policies' own arithmetic is another test's subject; here it is disks, clocks, readers, crashes.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import pytest

from vembed_async_ckpt import AsyncCheckpointer, KeepBest, KeepLast, latest, verify
from vembed_async_ckpt._disk import deletion as removal
from vembed_async_ckpt._disk.catalog import scan
from vembed_async_ckpt._disk.filesystem import LocalFilesystem, RenameMode
from vembed_async_ckpt._format import names
from vembed_async_ckpt.integrations.rotation import Rotation
from vembed_async_ckpt.testing import (
    Change,
    Choose,
    FailingFilesystem,
    PowerCutFilesystem,
    at_random,
    kept,
    lost,
    use_filesystem,
)

from . import checks
from .conftest import Tally
from .inprocess import Hasty, Outcome, Writer, next_start, without_exchange
from .parallel import shared
from .states import Story, crash_states, except_for, fates
from .test_hostile import rewrite

KEEP = [1, 3]
STEPS = range(1, 7)


@pytest.fixture
def root(memory: Path) -> Path:
    return memory / "root"


def save(root: Path, *saves: tuple[int, int], keep: int, fs: object = None) -> list[Outcome]:
    """Make saves (n, step), one after another."""
    with Writer(str(root), fs or Hasty()) as writer:  # type: ignore[arg-type]
        return [writer.save(n, step, keep) for n, step in saves]


def steps(root: Path) -> list[int | None]:
    """What is there, oldest first; all of it whole."""
    for entry in scan(str(root)):
        verify(entry.path)
    return [entry.manifest.step for entry in scan(str(root)) if entry.manifest]


class Watching(PowerCutFilesystem):
    """Before a checkpoint goes: what a power cut at this moment would leave."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.left: list[list[int]] = []

    def _look(self, path: str) -> None:
        image = Path(self.root).parent / "image"
        self.left.append([entry.manifest.step for entry in scan(str(self.image(image, lost))) if entry.manifest])
        shutil.rmtree(image)

    def rename(self, source: str, target: str, mode: str) -> None:
        if "trash-" in target:
            self._look(source)
        super().rename(source, target, mode)  # type: ignore[arg-type]

    def unlink(self, path: str) -> None:
        if "trash-" in path:
            self._look(path)
        super().unlink(path)


@pytest.mark.parametrize("keep", KEEP)
def test_nothing_goes_before_the_next_is_durable(tally: Tally, root: Path, keep: int) -> None:
    """At every deletion, a power cut would leave all that is kept: what was published last among it."""
    root.mkdir()
    disk = Watching(root)
    with Writer(str(root), disk) as writer:
        for n in STEPS:
            disk.left.clear()
            assert writer.save(n, n, keep).acknowledged
            expected = list(range(max(n - keep, 0) + 1, n + 1))
            for left in disk.left:
                tally.fault(f"save {n}", [] if left[-len(expected) :] == expected else [f"{left}"])
    assert steps(root) == list(STEPS)[-keep:]
    tally.settle(at_least=4 * (len(STEPS) - keep))


def future(n: int) -> float:
    return time.time() + 1e6 - n


def equal(n: int) -> float:
    return 1e9


def backward(n: int) -> float:
    return 1e9 - 1000 * n


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("clock", [future, equal, backward])
def test_file_times_do_not_matter(tally: Tally, root: Path, keep: int, clock: Callable[[int], float]) -> None:
    """Times in the future, all the same, or running backward, in the file system and in the manifests."""
    for n in STEPS:
        assert all(outcome.acknowledged for outcome in save(root, (n, n), keep=keep))
        when = clock(n)
        checkpoint = root / f"checkpoint-{n}"
        rewrite(checkpoint, lambda body, when=when: body.update(time=when))
        for path in [*checkpoint.rglob("*"), checkpoint]:
            os.utime(path, (when, when))
        problems = [] if steps(root) == list(STEPS)[max(n - keep, 0) : n] else [f"{steps(root)}"]
        if latest(root) != checkpoint:
            problems.append(f"latest is {latest(root)}")
        tally.fault(f"{clock.__name__} {n}", problems)
    tally.settle(at_least=len(STEPS))


@pytest.mark.parametrize("keep", KEEP)
def test_a_higher_step_of_an_older_run(tally: Tally, root: Path, keep: int) -> None:
    """After a rollback the newest is the one saved last; the stale, higher steps go first."""
    save(root, (1, 100), (2, 200), (3, 300), keep=9)
    for n, step in ((4, 10), (5, 20), (6, 30)):
        assert all(outcome.acknowledged for outcome in save(root, (n, step), keep=keep))
        tally.fault(step, [] if latest(root) == root / f"checkpoint-{step}" else [f"latest is {latest(root)}"])
    assert steps(root) == [10, 20, 30][-keep:]
    tally.settle(at_least=3)


@pytest.mark.parametrize("keep", KEEP)
def test_the_same_step_again_and_again(tally: Tally, root: Path, keep: int) -> None:
    """It replaces itself, is the newest afterwards, and counts once."""
    save(root, (1, 1), (2, 2), (3, 3), keep=3)
    for n in (4, 5, 6):
        assert all(outcome.acknowledged for outcome in save(root, (n, 2), keep=keep))
        found = steps(root)
        tally.fault(n, [] if found == [1, 3, 2][-keep:] and latest(root) == root / "checkpoint-2" else [f"{found}"])
    assert list(checks.after_fault(str(root), 6)) == []
    tally.settle(at_least=3)


@pytest.mark.parametrize("keep", KEEP)
def test_a_reader_holds_an_old_one(tally: Tally, root: Path, keep: int) -> None:
    """It stays, whole, as long as it is read, and goes with the save after."""
    save(root, *((n, n) for n in range(1, keep + 1)), keep=keep)
    with open(root / "checkpoint-1" / names.MANIFEST, "rb") as manifest:
        fcntl.flock(manifest, fcntl.LOCK_SH)
        for n in range(keep + 1, keep + 4):
            save(root, (n, n), keep=keep)
            found = steps(root)
            tally.fault(n, [] if found == [1, *range(n - keep + 1, n + 1)] else [f"{found}"])
    save(root, (9, 9), keep=keep)
    tally.fault("released", [] if 1 not in steps(root) and len(steps(root)) == keep else [f"{steps(root)}"])
    tally.settle(at_least=4)


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("call", ["rename", "sync_directory", "unlink", "remove_directory"])
@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize("next_in", ["the same run", "the next"])
def test_a_deletion_fails_half_way(tally: Tally, root: Path, keep: int, call: str, nth: int, next_in: str) -> None:
    """The save is right all the same, the failure is said, nothing half deleted is visible, and it is made up for."""
    save(root, *((n, n) for n in range(1, keep + 1)), keep=keep)
    disk = FailingFilesystem(Hasty())
    place = "checkpoint-1" if call == "rename" else "trash-"
    with Writer(str(root), disk) as writer:
        disk.fail(errno.EIO, call, path=place, nth=nth)
        outcome = writer.save(8, 8, keep)
        struck = bool(disk.failed)
        problems = [] if outcome.acknowledged and bool(outcome.warnings) == struck else [f"{outcome}"]
        visible = steps(root)
        if visible[-keep:] != [*range(2, keep + 1), 8][-keep:] or latest(root) != root / "checkpoint-8":
            problems.append(f"visible: {visible}")
        disk.heal()
        if next_in == "the same run":
            problems += [] if writer.save(9, 9, keep).acknowledged else ["the next save failed"]
    if next_in == "the next":
        save(root, (9, 9), keep=keep)
    if steps(root) != [*range(3, keep + 1), 8, 9][-keep:]:
        problems.append(f"then: {steps(root)}")
    if checks.leftovers(str(root)):
        problems.append(f"left over: {checks.leftovers(str(root))}")
    tally.fault(f"{call} {nth}", problems)
    tally.settle(at_least=1)


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("to", ["checkpoint-1", "../elsewhere", "nowhere"])
def test_a_link_named_like_a_checkpoint(tally: Tally, root: Path, memory: Path, keep: int, to: str) -> None:
    """It is neither counted nor deleted nor followed; what it leads to lives or goes as ever."""
    save(root, (1, 1), (2, 2), keep=9)
    shutil.copytree(root / "checkpoint-1", memory / "elsewhere")
    (root / "checkpoint-3").symlink_to(to)
    save(root, (4, 4), (5, 5), keep=keep)
    found = [entry.manifest.step for entry in scan(str(root)) if entry.manifest]
    problems = [] if found == [2, 4, 5][-keep:] else [f"{found}"]
    if os.readlink(root / "checkpoint-3") != to:
        problems.append("the link is another one")
    verify(memory / "elsewhere")
    (outcome,) = save(root, (6, 3), keep=keep)
    if outcome.acknowledged or "checkpoint-3" not in "".join(outcome.errors):
        problems.append(f"saved in its place: {outcome}")
    tally.fault(to, problems)
    tally.settle(at_least=1)


def test_the_best_is_protected(tally: Tally, root: Path) -> None:
    """With the newest only else: the best stays through every prune, until a better one comes; nan is never best."""
    losses = {1: 0.5, 2: 0.2, 3: float("nan"), 4: 0.9, 5: 0.1, 6: 0.3}
    policy = KeepLast(1) | KeepBest("loss", unrated="drop")
    for step, loss in losses.items():
        save(root, (step, step), keep=9)
        rewrite(root / f"checkpoint-{step}", lambda body, loss=loss: body.update(metrics={"loss": loss}))
        committed = [(entry.path, entry.manifest) for entry in scan(str(root)) if entry.manifest]
        removal.prune(Hasty(), str(root), policy, committed, lambda: None)
        best = min((s for s in losses if s <= step and losses[s] == losses[s]), key=lambda s: losses[s])
        tally.fault(step, [] if steps(root) == sorted({best, step}) else [f"{steps(root)}"])
    tally.settle(at_least=len(losses))


def cuts(directory: Path, numbers: Iterable[int], keep: int) -> Iterator[tuple[str, list[str]]]:
    """A deletion that fails at its n-th call, is left, and then the power fails at any call of the clean-up that follows."""
    for k in numbers:
        struck = False
        for broken in (1, 4):
            root = directory / "cut"
            save(root, *((n, n) for n in range(1, keep + 1)), keep=keep)
            disk = FailingFilesystem(Hasty())
            disk.fail(errno.EIO, "unlink", path="trash-", nth=broken, times=None)
            save(root, (8, 8), keep=keep, fs=disk)
            power = PowerCutFilesystem(root)
            power.after(k)
            acknowledged = 8
            with Writer(str(root), power) as writer:
                if not power.off and writer.save(9, 9, keep).acknowledged:
                    acknowledged = 9
            for name, choose in (("lost", lost), ("kept", kept), ("random", at_random(k))):
                image = power.image(directory / "image", choose)
                problems = list(checks.after_fault(str(image), acknowledged)) + list(next_start(str(image), keep))
                yield f"unlink {broken}, call {k}, {name}", problems
                shutil.rmtree(image)
            shutil.rmtree(root)
            struck = struck or power.off
        if not struck:
            return


def of_what_was_replaced(unsynced: list[Change]) -> Iterator[tuple[str, Choose]]:
    """All lost, all kept, and each change below `replaced/` alone."""
    yield from (("lost", lost), ("kept", kept))
    for change in unsynced:
        if f"{names.REPLACED}/" in change.path:
            for fate in fates(change):
                yield f"only {change} {fate}", except_for(change, fate, "lost" if fate == "kept" else "kept")


def test_what_was_replaced_does_not_come_back_for_what_is_no_longer_kept(tally: Tally, memory: Path) -> None:
    """Without exchange: a replacement is pruned; no power cut shows its predecessor, half deleted, in its place."""
    story = Story(1, [(1, 1), (2, 1), (3, 3)])
    disk = without_exchange(PowerCutFilesystem)
    for state, problems in shared(
        lambda place, numbers: crash_states(story, disk, place, of_what_was_replaced, numbers), memory
    ):
        tally.fault(state, problems)
    tally.settle(at_least=200)


@pytest.mark.parametrize("keep", KEEP)
def test_a_deletion_is_interrupted_and_then_the_power_fails(tally: Tally, memory: Path, keep: int) -> None:
    """Whatever of the clean-up reached the disk, every visible checkpoint is whole and the next start ends the work."""
    for where, problems in shared(partial(cuts, keep=keep), memory):
        tally.fault(where, problems)
    tally.settle(at_least=200)


# -- checkpoints that Trainer itself wrote

STOCK = {
    "trainer_state.json": b'{"global_step": 2}',
    "model.safetensors": b"stock",
    "inner/deep/notes.txt": b"whoever's",
}


def stock(root: Path, name: str = "checkpoint-2") -> Path:
    for relative, data in STOCK.items():
        path = root / name / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root / name


def rotate(root: Path, disk: object, limit: int = 1) -> None:
    """As `save_total_limit` has it, to the end or until the disk gives up."""
    with AsyncCheckpointer(root, writer="thread"):  # only who saves in a root deletes there
        with use_filesystem(disk):  # type: ignore[arg-type]
            rotation = Rotation(str(root), limit, None)
        rotation.start(())
        rotation.join()


def test_a_rotation_that_is_cut_off_is_finished(tally: Tally, memory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At any call, whatever of it reached the disk: the checkpoint is whole or never seen again, and nothing of it is left."""
    caplog.set_level(logging.CRITICAL, "vembed_async_ckpt")
    for k in itertools.count(1):
        root = memory / f"root-{k}"
        save(root, (8, 8), keep=1)
        stock(root)
        disk = PowerCutFilesystem(root)
        disk.after(k)
        rotate(root, disk)
        for name, choose in (("lost", lost), ("kept", kept), ("random", at_random(k))):
            image = disk.image(memory / "image", choose)
            problems = []
            with Writer(str(image), Hasty()) as writer:
                if "error" in writer.ready:
                    problems.append(f"{writer.ready}")
            there = {str(path.relative_to(image / "checkpoint-2")) for path in (image / "checkpoint-2").rglob("*.*")}
            if there not in (set(), set(STOCK)):
                problems.append(f"half of it: {there}")
            verify(image / "checkpoint-8")
            if checks.leftovers(str(image)):
                problems.append(f"left over: {checks.leftovers(str(image))}")
            tally.fault(f"call {k}, {name}", problems)
            shutil.rmtree(image)
        if not disk.off:
            break
    assert not (root / "checkpoint-2").exists()
    tally.settle(at_least=20)


def test_a_sweep_deletes_whole_only_what_rotation_was_deleting(tally: Tally, root: Path) -> None:
    """Somebody's directory that was replaced, one on its way out as if it were ours, one of nearly such a name: all of it stays."""
    (outcome,) = save(root, (1, 1), keep=1)
    assert outcome.acknowledged
    work, identity = root / names.WORK, "a" * 32
    mine = [work / name for name in (f"trash-{identity}", f"rotated-{identity}x", f"rotated-{identity}.0", "replaced")]
    for path in (*mine, root / "checkpoint-2"):
        stock(path.parent, path.name)
    stock(work, f"rotated-{identity}")
    (work / f"rotated-{'b' * 32}").symlink_to(root / "checkpoint-2")
    assert all(outcome.acknowledged for outcome in save(root, (2, 2), keep=1))
    found = sorted(path.read_bytes() for path in root.rglob("notes.txt"))
    problems = [] if found == [STOCK["inner/deep/notes.txt"]] * 5 else [f"{found}"]
    if (work / f"rotated-{identity}").exists():
        problems.append("what rotation was deleting is there")
    tally.fault("sweep", problems)
    tally.settle(at_least=1)


class Stubborn(LocalFilesystem):
    """Lets nothing go that a directory of this name holds."""

    def __init__(self, name: str) -> None:
        self._name = name

    def rename(self, source: str, target: str, mode: RenameMode) -> None:
        if os.path.basename(source) == self._name:
            raise PermissionError(errno.EACCES, "not yours", source)
        super().rename(source, target, mode)

    def unlink(self, path: str) -> None:
        if self._name in path.split("/"):
            raise PermissionError(errno.EACCES, "not yours", path)
        super().unlink(path)


def test_what_cannot_be_deleted_does_not_keep_the_rest_from_it(tally: Tally, root: Path) -> None:
    """One leftover that the disk will not let go of: the others go, retention goes on, save after save."""

    work = root / names.WORK
    problems = []
    assert all(outcome.acknowledged for outcome in save(root, (1, 1), keep=1))
    for letter in "ab":
        stock(work, f"rotated-{letter * 32}")
    with Writer(str(root), Stubborn("rotated-" + "a" * 32)) as writer:
        for step in (2, 3):
            outcome = writer.save(step, step, keep=1)
            if not outcome.acknowledged:
                problems.append(f"{step}: {outcome}")
    if (there := sorted(path.name for path in root.glob("checkpoint-*"))) != ["checkpoint-3"]:
        problems.append(f"retention stopped: {there}")
    if (work / f"rotated-{'b' * 32}").exists():
        problems.append("the other leftover stayed")
    tally.fault("undeletable", problems)
    tally.settle(at_least=1)


def test_rotation_goes_on_past_what_cannot_be_deleted(tally: Tally, root: Path) -> None:
    """One of Trainer's own that the disk will not let go of: the others go, and ours too."""
    assert all(outcome.acknowledged for outcome in save(root, (1, 6), (2, 8), keep=9))
    for step in (2, 4):
        stock(root, f"checkpoint-{step}")
        (root / f"checkpoint-{step}" / names.TRAINER_STATE).write_text(f'{{"global_step": {step}}}')
    rotate(root, Stubborn("checkpoint-4"))
    there = sorted(path.name for path in root.glob("checkpoint-*"))
    tally.fault("undeletable", [] if there == ["checkpoint-4", "checkpoint-8"] else [f"{there}"])
    tally.settle(at_least=1)
