"""Uploads while trainer, writer, shipper or store die at random moments: nothing is lost, torn, or sent twice."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest

from vembed_async_ckpt import checkpoints, latest, verify
from vembed_async_ckpt._disk import notes
from vembed_async_ckpt._disk.filesystem import LocalFilesystem
from vembed_async_ckpt._format import names
from vembed_async_ckpt._ship.remote import markers
from vembed_async_ckpt._writer.shipping import Shippers
from vembed_async_ckpt.shipping import Upload
from vembed_async_ckpt.testing import PowerCutFilesystem, kept, lost, names_only

from ..buckets import Bucket, bucket
from .conftest import Tally
from .inprocess import Writer
from .nursery import PATIENCE, Child, Nursery

VICTIMS = ("shipper", "trainer", "writer", "store", "all but the store")
_LATEST_KILL = 0.6  # seconds after the first commit
_OUTAGE = 0.3  # seconds


class Shipping:
    """Trainings of one run, one after another, and what they promised so far."""

    def __init__(self, trainers: Nursery, store: Bucket, root: Path, url: str) -> None:
        self._trainers, self._store = trainers, store
        self._root, self._url = root, url
        self.committed: set[int] = set()

    def killed(self, victim: str, delay: float) -> list[str]:
        """What is wrong after a training whose `victim` was killed `delay` seconds after its first commit."""
        arguments = {"root": str(self._root), "url": self._url, "environment": self._store.environment}
        with self._trainers.child("ship", **arguments) as child:
            writer = int(child.expect("WRITER"))
            child.expect("COMMITTED")
            time.sleep(delay)
            if victim == "store":
                self._interrupt_store()
            if victim in ("shipper", "all but the store"):
                for process in self._shippers():
                    process.kill()
            if victim in ("writer", "all but the store"):
                os.kill(writer, signal.SIGKILL)
            if victim in ("trainer", "all but the store"):
                child.kill()
            else:
                child.expect("COMMITTED")
                child.tell("stop")
                child.expect("CLOSED")
            ended = child.wait()
            self._note(child)
        killed = victim in ("trainer", "all but the store")
        problems = [] if ended == (-signal.SIGKILL if killed else 0) else [f"ended with {ended}: {child}"]
        return problems + self.problems()

    def finish(self) -> list[str]:
        """What is wrong after a last training that was not disturbed: every commit is in the store, whole."""
        problems = self.killed("nobody", 0.0)
        there = {int(str(entry.step)): entry for entry in checkpoints(self._url)}
        problems += [f"step {step} never arrived" for step in sorted(self.committed - there.keys())]
        for entry in there.values():
            verify(entry.path)
        if left := sorted(notes.waiting(str(self._root))):
            problems.append(f"still to be shipped: {left}")
        return problems

    def problems(self) -> list[str]:
        """What is wrong now: the newest is not whole, or a commit is neither here nor there."""
        newest = latest(self._url, verify="full")  # a warning, of one that is broken, is an error
        here = {int(path.name.rpartition("-")[2]) for path in self._root.glob("checkpoint-*")}
        there = {names.parse_checkpoint(key.partition(".")[0]) for _, key in markers(self._url)}
        lost = self.committed - here - there
        return [f"lost: {sorted(lost)}, newest {newest}"] if lost else []

    def _note(self, child: Child) -> None:
        self.committed |= {int(m.split()[1]) for m in child.messages if m.startswith("COMMITTED ")}

    def _interrupt_store(self) -> None:
        if self._store.kind == "moto":  # it would forget everything
            self._store.door.shut()
            time.sleep(_OUTAGE)
            self._store.door.reopen()
        else:
            self._store.kill()
            time.sleep(_OUTAGE)
            self._store.start()

    def _shippers(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                line = process.cmdline()
                if str(self._root) in line and any("_ship.__main__" in word for word in line):
                    found.append(process)
        return found


def ship_and_kill(
    trainers: Nursery, store: Bucket, tally: Tally, directory: Path, monkeypatch: pytest.MonkeyPatch, runs: int
) -> list[str]:
    """Kill `runs` trainings; returns the objects that were sent again although a list had shown them."""
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    seed = int(os.environ.get("CRASH_SEED", random.randrange(1 << 32)))
    print(f"CRASH_SEED={seed}")
    tally.kind += f" CRASH_SEED={seed}"
    chance = random.Random(seed)
    begin = store.log_size()
    prefix = f"kills-{seed}"
    shipping = Shipping(trainers, store, directory / "root", f"s3://bucket/{prefix}")
    for n in range(runs):
        victim, delay = VICTIMS[n % len(VICTIMS)], chance.uniform(0, _LATEST_KILL)
        tally.fault((victim, delay), shipping.killed(victim, delay))
    problems = shipping.finish()
    assert not problems, problems
    assert len(shipping.committed) > runs
    assert trainers.left_alive(PATIENCE) == []
    return store.sent_again(prefix, begin)


@pytest.mark.parametrize("runs", [20, pytest.param(150, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])])
def test_killed_while_it_uploads(
    trainers: Nursery, moto: Bucket, tally: Tally, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: int
) -> None:
    """What the newest marker names is whole, nothing goes here before it is there, no finished object is sent again."""
    sent_again = ship_and_kill(trainers, moto, tally, tmp_path, monkeypatch, runs)
    assert sent_again == []
    tally.settle(at_least=runs)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_killed_while_it_uploads_to_a_store_that_dies(
    trainers: Nursery,
    tally: Tally,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same with a store that is killed itself, and drops metadata: an object may be sent again for each kill."""
    runs = 150
    with bucket("localbucket", tmp_path_factory) as store:
        sent_again = ship_and_kill(trainers, store, tally, tmp_path, monkeypatch, runs)
    assert len(sent_again) <= runs
    tally.settle(at_least=runs)


def test_the_shipper_survives_trainer_and_writer(
    trainers: Nursery, moto: Bucket, tally: Tally, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are killed, with their groups, while the store cannot be reached: all commits arrive, and nothing stays behind."""
    for name, value in moto.environment.items():
        monkeypatch.setenv(name, value)
    root, url = tmp_path / "root", "s3://bucket/orphan"
    moto.door.shut()
    try:
        with trainers.child("ship", root=str(root), url=url, environment=moto.environment) as child:
            writer = int(child.expect("WRITER"))
            for _ in range(2):
                child.expect("COMMITTED")
            os.killpg(writer, signal.SIGKILL)  # its whole group
            child.kill()
            child.wait()
            committed = {int(m.split()[1]) for m in child.messages if m.startswith("COMMITTED ")}
        assert notes.waiting(str(root))
    finally:
        moto.door.reopen()
    deadline = time.monotonic() + PATIENCE
    while Path(names.work_directory(str(root))).exists():
        assert time.monotonic() < deadline, sorted(root.rglob("*"))
        time.sleep(0.1)
    there = {entry.step for entry in checkpoints(url)}
    tally.fault("trainer and writer", [f"step {step} is not there" for step in sorted(committed - there)])
    verify(str(latest(url)))
    tally.settle(at_least=1)


def test_the_note_is_durable_before_the_checkpoint(memory: Path, tally: Tally, monkeypatch: pytest.MonkeyPatch) -> None:
    """The power is cut before each call of two saves: no disk shows a checkpoint that nobody would ship."""
    monkeypatch.setattr(Shippers, "wake", lambda self: None)
    target = Upload("s3://bucket/run").spec()
    for calls in range(1, 1000):
        root = memory / f"root-{calls}"
        root.mkdir()
        disk = PowerCutFilesystem(root)
        disk.after(calls)
        with Writer(str(root), disk) as writer:
            for n in (1, 2):
                if not disk.off:
                    writer.save(n, n, 5, ship=[target])
        for choose in (lost, kept, names_only):
            image = disk.image(memory / f"image-{calls}-{choose.__name__}", choose)
            seen = [path for path in image.glob("checkpoint-*") if (path / names.MANIFEST).exists()]
            unknown = [path.name for path in seen if not notes.exists(str(image), f"{int(path.name[-1]):032x}")]
            tally.fault((calls, choose.__name__), [f"nobody ships {name}" for name in unknown])
            assert [note.name for note in notes.readable(str(image)) if notes.is_published(str(image), note)] == sorted(
                path.name for path in seen
            )
            with Writer(str(image), LocalFilesystem()):
                pass
            left = {note.name for note in notes.readable(str(image))}
            assert left == {path.name for path in image.glob("checkpoint-*")}
            assert not list(image.rglob("*.new"))
        if not disk.off:
            break
    assert calls > 30
    tally.settle(at_least=90)
