"""Every call of the writer fails, with every error, once or for as long as the disk is broken: one error is reported, nothing that
is visible suffers, and once the disk is well again saves work as ever."""

from __future__ import annotations

import dataclasses
import errno
import os
import resource
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from vembed_async_ckpt._disk.filesystem import LocalFilesystem
from vembed_async_ckpt.testing import FailingFilesystem

from . import checks
from .conftest import Tally
from .faults import Point, inject_options, needs_strace, parse_trace, points, trace_options, watched
from .inprocess import Hasty, Outcome, Writer, next_start, without_exchange
from .nursery import Nursery
from .parallel import shared
from .process import Process, process, said_wrongly, unexpected

ERRORS = [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS]
KEEP = 1
FOREIGN = ("checkpoint-2/notes.txt", b"mine")


def story(root: str, fs: FailingFilesystem, tally_problem: list[str], error: int) -> int:
    """Save 2 retires 1, save 3 replaces 2; then the disk heals and 4 is made. Returns how many calls failed."""
    text = os.strerror(error)
    acknowledged = 1
    with Writer(root, fs) as writer:
        for n, step in ((2, 2), (3, 2)):
            failed_before = len(fs.failed)
            outcome = writer.save(n, step, KEEP)
            if outcome.acknowledged:
                acknowledged = n
            tally_problem += reported(outcome, f"save {n}", root, text, failed=len(fs.failed) > failed_before)
            tally_problem += visible(root, acknowledged)
            if n == 2 and outcome.acknowledged:
                Path(root, FOREIGN[0]).write_bytes(FOREIGN[1])
        failed = len(fs.failed)
        fs.heal()
        outcome = writer.save(4, 4, KEEP)
        if not outcome.acknowledged or outcome.errors or outcome.warnings:
            tally_problem.append(f"after the disk healed: {outcome}")
        tally_problem += checks.after_fault(root, 4)
        tally_problem += unexpected(root)
    return failed


def reported(outcome: Outcome, what: str, root: str, text: str, *, failed: bool) -> list[str]:
    """I6: one error or none, naming path and reason."""
    found = []
    said = outcome.errors + outcome.warnings
    if outcome.acknowledged == bool(outcome.errors):
        found.append(f"{what}: both acknowledged and failed, or neither: {outcome}")
    if len(said) > 1:
        found.append(f"{what}: said more than once: {said}")
    found += [f"{what}: does not say what and where: {line}" for line in said if text not in line or root not in line]
    if said and not failed:
        found.append(f"{what}: complains though nothing failed: {said}")
    return found


def visible(root: str, acknowledged: int) -> list[str]:
    found = list(checks.after_fault(root, acknowledged))
    # Broken between two renames, a disk without exchange cannot take the first one back. That is said, and it passes.
    return [] if any("brings it back" in problem for problem in found) else found


def prepared(root: Path) -> str:
    """A root with save 1."""
    root.mkdir()
    with Writer(str(root), Hasty()) as writer:
        assert writer.save(1, 1, KEEP).acknowledged
    return str(root)


@pytest.mark.parametrize("times", [1, None], ids=["once", "for-ever"])
@pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.__getitem__)
def test_any_call_fails(tally: Tally, memory: Path, error: int, times: int | None) -> None:
    """Call number n of two saves, for every n."""
    sweep(tally, memory, Hasty(), error, times=times)


@pytest.mark.parametrize("times", [1, None], ids=["once", "for-ever"])
def test_any_call_is_done_and_reported_as_failed(tally: Tally, memory: Path, times: int | None) -> None:
    """As on a network file system whose answers are lost: even then nothing is deleted that should not be."""
    sweep(tally, memory, Hasty(), errno.EIO, times=times, done=True)


@pytest.mark.parametrize("done", [False, True], ids=["not-done", "done"])
@pytest.mark.parametrize("times", [1, None], ids=["once", "for-ever"])
def test_any_call_fails_without_exchange(tally: Tally, memory: Path, times: int | None, done: bool) -> None:
    """On NFS or FUSE: a checkpoint that made way for its successor comes back if that cannot come."""
    sweep(tally, memory, without_exchange(Hasty)(), errno.EIO, times=times, done=done)


def sweep(
    tally: Tally, directory: Path, disk: LocalFilesystem, error: int, *, times: int | None, done: bool = False
) -> None:
    def strikes(place: Path, numbers: Iterable[int]) -> Iterator[tuple[object, list[str]]]:
        for n in numbers:
            root = prepared(place / str(n))
            fs = FailingFilesystem(disk)
            fs.fail(error, nth=n, times=times, done=done)
            problems: list[str] = []
            failed = story(root, fs, problems, error)
            if failed > 60:
                problems.append(f"{failed} calls were made on a broken disk")
            problems += next_start(root, KEEP)
            where = fs.failed[0] if fs.failed else None
            yield (n, where), [p for p in problems if "left over: kept-" not in p]
            if not failed:
                return

    for where, problems in shared(strikes, directory):
        tally.fault(where, problems)
    tally.settle(at_least=60)


# -- a writer process, whose system calls fail


def find_points(process: Process, log: Path) -> list[Point]:
    """Where a call of one save can fail; the numbers of this save and the one before are left open."""
    with watched(process.writer, trace_options(str(log))):
        assert process.save() == [f"ACK {process.n}"]

    def opened(path: str) -> str:
        for name, n in (("{this", process.n), ("{last", process.n - 1)):
            path = path.replace(f"{n:032x}", name + ":032x}").replace(f"checkpoint-{n}", f"checkpoint-{name}}}")
        return path

    found = points(parse_trace(log.read_text()), process.root)
    return [dataclasses.replace(point, path=opened(point.path), watched=opened(point.watched)) for point in found]


def strike(process: Process, point: Point, error: int, for_ever: bool) -> list[str]:
    """Have the next save fail at `point`; then all is well again, and another one is made."""
    root = process.root
    here = dataclasses.replace(point, watched=point.watched.format(this=process.n + 1, last=process.n))
    what = f"error={errno.errorcode[error]}:when={point.k}{'+' if for_ever else ''}"
    with watched(process.writer, inject_options(here, root, what)):
        said = process.save()
    found = said_wrongly(said, root, os.strerror(error))
    if error == errno.EINTR and said[0] != f"ACK {process.n}":
        found.append(f"did not go on after EINTR: {said}")
    found += checks.after_fault(root, process.newest(said))
    if (said := process.save()) != [f"ACK {process.n}"]:
        found.append(f"afterwards: {said}")
    return [*found, *checks.after_fault(root, process.n), *unexpected(root)]


@needs_strace
@pytest.mark.parametrize(
    ("error", "for_ever"),
    [(errno.EIO, False), (errno.ENOSPC, True), (errno.EINTR, False)],
    ids=["EIO-once", "ENOSPC-for-ever", "EINTR"],
)
def test_any_system_call_of_a_writer_process_fails(
    victims: Nursery, tally: Tally, tmp_path: Path, error: int, for_ever: bool
) -> None:
    """One writer, fault after fault: each is reported as it should be, and the next save works."""
    with process(victims, str(tmp_path / "root")) as trainer:
        trainer.good_save()
        for point in find_points(trainer, tmp_path / "trace"):
            tally.fault(point, strike(trainer, point, error, for_ever))
    tally.settle(at_least=25)


# -- writes that take less than they were given


@pytest.mark.parametrize("most", [1, 511, 4096])
def test_short_writes(tally: Tally, memory: Path, most: int) -> None:
    """A disk that takes a few bytes at a time gets all of them."""

    class Stingy(Hasty):
        def write(self, fd: int, data: memoryview, offset: int) -> int:
            return super().write(fd, data[:most], offset)

    root = prepared(memory / "root")
    with Writer(root, Stingy()) as writer:
        assert writer.save(2, 2, KEEP) == Outcome(acknowledged=True)
    tally.fault(most, [*checks.after_fault(root, 2), *next_start(root, KEEP)])
    tally.settle(at_least=1)


def test_a_write_that_takes_nothing(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system says 0 and no error: that is an error, not a reason to try for ever."""
    root = prepared(memory / "root")
    with Writer(root, LocalFilesystem()) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", lambda fd, data, offset: 0)
            outcome = writer.save(2, 2, KEEP)
        assert not outcome.acknowledged
        assert len(outcome.errors) == 1
        assert "took nothing" in outcome.errors[0]
        assert writer.save(3, 3, KEEP) == Outcome(acknowledged=True)
    assert [*checks.after_fault(root, 3), *next_start(root, KEEP)] == []


@pytest.mark.parametrize("limit", [10_000, 16_384], ids=["no-whole-block", "whole-blocks"])
def test_a_limit_on_the_size_of_files(victims: Nursery, tally: Tally, tmp_path: Path, limit: int) -> None:
    """RLIMIT_FSIZE: the write is short, the next one fails (EFBIG); that is reported, and lifted, the next save works."""
    with process(victims, str(tmp_path / "root")) as trainer:
        trainer.good_save()
        before = resource.prlimit(trainer.writer, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        said = trainer.save()
        resource.prlimit(trainer.writer, resource.RLIMIT_FSIZE, before)
        problems = said_wrongly(said, trainer.root, os.strerror(errno.EFBIG))
        assert said[0].startswith("ERR")
        problems += checks.after_fault(trainer.root, trainer.newest(said))
        trainer.good_save()
        tally.fault(limit, [*problems, *checks.after_fault(trainer.root, trainer.n), *unexpected(trainer.root)])
    tally.settle(at_least=1)
