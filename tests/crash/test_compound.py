"""A second fault while the first one is dealt with: clean-up killed, power cut at the next start, the replacement killed too."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import sys
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import pytest

from vembed_async_ckpt import CorruptCheckpoint, latest, verify
from vembed_async_ckpt._disk.catalog import scan
from vembed_async_ckpt._format import names
from vembed_async_ckpt.testing import Choose, FailingFilesystem, PowerCutFilesystem, at_random, kept, lost

from . import checks
from .conftest import Tally
from .dialogue import ask, assert_resumable, delayed, staged
from .faults import Call, needs_strace
from .inprocess import Hasty, Writer, next_start, without_exchange
from .nursery import PATIENCE, Child, Nursery
from .parallel import shared
from .sweeps import AT_ONCE, Bench, Scenario, Sweep

ID = "{:032x}".format
LAST = 5  # number and step of the save of the start that is struck


# -- a crash while the next start cleans up


def leftovers(directory: Path) -> dict[str, bytes]:
    """What crashes can leave of saves 7 to 9: unfinished; on its way out; replaced by save 2, by exchange and without one."""
    with Writer(str(directory), Hasty()) as writer:
        for n in (7, 8, 9):
            assert writer.save(n, n, 9).acknowledged
    work, found = names.WORK, {}
    for n, place in (
        (7, f"{work}/trash-{ID(7)}"),
        (8, f"{work}/work-{ID(2)}.0"),
        (9, f"{work}/replaced/swap-{ID(2)}.checkpoint-2"),
    ):
        for path in sorted((directory / f"checkpoint-{n}").rglob("*"), key=lambda path: len(path.parts)):
            if path.is_file():
                found[f"{place}/{path.relative_to(directory / f'checkpoint-{n}')}"] = path.read_bytes()
    found[f"{work}/work-{ID(6)}.1/model.safetensors"] = b"half of it"
    found[f"{work}/work-{ID(6)}.1/inner/tokens.bin"] = b""
    return found


class CleaningUp(Sweep):
    """Only the calls before the save that comes after the clean-up."""

    def trace(self) -> tuple[list[Call], str]:
        calls, root = super().trace()
        first = next(n for n, call in enumerate(calls) if any(f"work-{ID(LAST)}" in path for path in call.paths))
        return calls[:first], root


@needs_strace
@pytest.mark.parametrize("killed", ["trainer", "both"])
def test_killed_while_cleaning_up(victims: Nursery, tally: Tally, tmp_path: Path, killed: str) -> None:
    """Before any call of the sweep of all that crashes leave: the start after that ends it, and no checkpoint suffered."""

    def judge(child: Child, bench: Bench) -> list[str]:
        there = {entry.manifest.step for entry in scan(bench.root) if entry.manifest}
        lost = [f"of checkpoints 1 and 2, {there} are there"] if not there >= {1, 2} else []
        return lost + checks.violations(victims, bench.root, child, keep=3)

    (tmp_path / "made").mkdir()
    foreign = leftovers(tmp_path / "made")
    for name in foreign:
        (tmp_path / "bench-0" / "template" / name).parent.mkdir(parents=True, exist_ok=True)
    benches = [Bench(tmp_path / f"bench-{n}") for n in range(AT_ONCE)]
    scenario = Scenario(killed, 3, [(LAST, LAST)], [(1, 1), (2, 2)], foreign)
    CleaningUp(victims, scenario, benches).run(tally, judge)
    assert victims.left_alive(PATIENCE) == []
    tally.settle(at_least=15)


# -- power


EVERY = 13  # of the calls of the second start, another one for every call of the first
CHOICES: dict[str, Choose] = {"lost": lost, "kept": kept}


def second_cuts(
    directory: Path, numbers: Iterable[int], disk: type[PowerCutFilesystem], keep: int
) -> Iterator[tuple[str, list[str]]]:
    """The power fails at any call of saves with a retention and a replacement, and again at every few calls of the next start."""
    for k in numbers:
        first = disk(make(directory / "first"))
        first.after(k)
        acknowledged = tell(first, keep, [(1, 1), (2, 2), (3, 2)])
        for j in range(1 + k % EVERY, 999, EVERY):
            name = "random" if j % 3 == 0 else "kept" if j % 3 == 1 else "lost"
            choose = CHOICES.get(name, at_random(k * 1000 + j))
            root = first.image(directory / "second", choose)
            second = disk(root)
            second.after(j)
            now = tell(second, keep, [(4, 4)]) or acknowledged
            image = str(second.image(directory / "third", at_random(j)))
            yield f"calls {k} and {j}, {name}", problems(image, now, keep)
            shutil.rmtree(image)
            shutil.rmtree(root)
            if not second.off:
                break
        shutil.rmtree(first.root)
        if not first.off:
            return


def make(path: Path) -> Path:
    path.mkdir()
    return path


def tell(disk: PowerCutFilesystem, keep: int, saves: list[tuple[int, int]]) -> int:
    """Save until the end or until the power fails; returns the number of the last save that was acknowledged."""
    acknowledged = 0
    with Writer(disk.root, disk) as writer:
        for n, step in saves:
            if not disk.off and writer.save(n, step, keep).acknowledged:
                acknowledged = n
    return acknowledged


def problems(root: str, acknowledged: int, keep: int) -> list[str]:
    found = list(checks.after_fault(root, acknowledged))
    if any("brings it back" in problem for problem in found):
        found = []  # without exchange there is such a moment; the next start ends it
    return found + [f"after the next start: {problem}" for problem in next_start(root, keep)]


@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "without exchange"])
def test_the_power_fails_again_at_the_next_start(tally: Tally, memory: Path, keep: int, exchange: bool) -> None:
    """Two cuts, each at any call, each leaving any disk: what was acknowledged is there and the third start is as ever."""
    disk = PowerCutFilesystem if exchange else without_exchange(PowerCutFilesystem)
    for where, found in shared(partial(second_cuts, disk=disk, keep=keep), memory):
        tally.fault(where, found)
    tally.settle(at_least=100)


# -- a disk that fails while something else is wrong


@pytest.mark.parametrize("how", ["open", "read"])
@pytest.mark.parametrize("name", ["model.safetensors", "inner/tokens.bin", names.MANIFEST], ids=os.path.basename)
def test_the_disk_fails_while_latest_looks(
    tally: Tally, memory: Path, monkeypatch: pytest.MonkeyPatch, how: str, name: str
) -> None:
    """EIO in the newest: the one before it, and the file is named; EIO everywhere: an error, not None."""
    root = memory / "root"
    with Writer(str(root), Hasty()) as writer:
        for n in (1, 2):
            assert writer.save(n, n, 3).acknowledged
    bad = [root / "checkpoint-2" / name]
    real_open, real_read, real_fdopen = os.open, os.read, os.fdopen

    def fail(path: str) -> None:
        if Path(path) in bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    def opened(path: str, *arguments: int, **more: int) -> int:
        if how == "open":
            fail(os.fspath(path))
        return real_open(path, *arguments, **more)

    def read(fd: int, count: int) -> bytes:
        if how == "read":
            fail(os.readlink(f"/proc/self/fd/{fd}"))
        return real_read(fd, count)

    def fdopen(fd: int, *arguments: str) -> object:
        file = real_fdopen(fd, *arguments)
        try:
            if how == "read":
                fail(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            file.close()
            raise
        return file

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "read", read)
    monkeypatch.setattr(os, "fdopen", fdopen)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = latest(root, verify="full")
    text = "".join(str(warning.message) for warning in said)
    right = found == root / "checkpoint-1" and str(bad[0]) in text and os.strerror(errno.EIO) in text
    tally.fault("newest", [] if right else [f"{found}, {text!r}"])
    bad.append(root / "checkpoint-1" / name)
    with pytest.raises(CorruptCheckpoint, match=os.strerror(errno.EIO)):
        latest(root, verify="full")
    tally.fault("all", [])
    bad.clear()
    verify(root / "checkpoint-2")
    tally.settle(at_least=2)


@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["make_directory", "create", "write", "sync", "rename", "sync_directory", None])
@pytest.mark.parametrize("clean", [True, False], ids=["cleans up", "cannot clean up"])
def test_a_full_disk_with_retention(
    tally: Tally, memory: Path, keep: int, error: int, call: str | None, clean: bool
) -> None:
    """No save gets through, so nothing old may go, save after save; with room again, the next save and its retention do."""
    root = memory / "root"
    disk = FailingFilesystem(Hasty())
    if not clean:
        inner = Hasty()
        inner.unlink = inner.remove_directory = refuse  # type: ignore[method-assign, assignment]
        disk = FailingFilesystem(inner)
    with Writer(str(root), Hasty()) as writer:
        for n in range(1, keep + 1):
            assert writer.save(n, n, keep).acknowledged
    found = []
    with Writer(str(root), disk) as writer:
        place = names.work_directory(str(root)) if call != "sync_directory" else f"work-{ID(20)}"
        disk.fail(error, call, path="" if call is None else place if call == "sync_directory" else "work-", times=None)
        for n in (20, 21):
            outcome = writer.save(n, n, keep)
            if call == "sync_directory" and n == 21:
                continue  # only the first one was to fail
            if outcome.acknowledged or os.strerror(error) not in "".join(outcome.errors):
                found.append(f"save {n}: {outcome}")
            found += checks.after_fault(str(root), keep)
            if len(scan(str(root))) != keep:
                found.append(f"save {n}: {len(scan(str(root)))} are left")
        disk.heal()
        vars(disk._inner).clear()
        found += [] if writer.save(22, 22, keep).acknowledged else ["with room again: not saved"]
    found += checks.after_fault(str(root), 22)
    found += [f"left over: {entry}" for entry in checks.leftovers(str(root))]
    found += [] if len(scan(str(root))) == keep else [f"with room again: {len(scan(str(root)))} are kept"]
    tally.fault(call, found)
    tally.settle(at_least=1)


def refuse(path: str) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO), path)


# -- processes


def deadly(directory: Path, call: str, times: int) -> str:
    """An interpreter that is killed at its first `call`, the first `times` times that it is started."""
    script, count = directory / "deadly-python", directory / "starts"
    strace = f"strace -qq -f -o /dev/null -e trace={call} -e inject={call}:signal=KILL:when=1 {sys.executable}"
    script.write_text(
        f'#!/bin/sh\necho >> {count}\nif [ $(wc -l < {count}) -le {times} ]; then exec {strace} "$@"; fi\n'
        f'exec {sys.executable} "$@"\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return str(script)


@needs_strace
@pytest.mark.parametrize("call", ["mkdirat", "renameat2"])
def test_the_writer_after_the_killed_one_is_killed_too(
    trainers: Nursery, tally: Tally, tmp_path: Path, call: str
) -> None:
    """As by the kernel when memory is short: the third writer commits what was staged once."""
    root = tmp_path / "root"
    with trainers.child("obey", root=str(root), tracer=deadly(tmp_path, call, 2)) as child:
        staged(child)
        assert ask(child, "result") == "committed 1"
        assert ask(child, "save") == "done"
        assert ask(child, "result") == "committed 2"
        assert ask(child, "close") == "done"
        writers = [message for message in child.messages if message.startswith("WRITER")]
        tally.fault(call, [] if len(writers) == 3 else [f"{writers}"])
    assert latest(root) == root / "checkpoint-2"
    assert trainers.left_alive(PATIENCE) == []
    assert_resumable(trainers, root, 2)
    tally.settle(at_least=1)


@needs_strace
def test_a_failed_save_and_then_a_signal(trainers: Nursery, tally: Tally, tmp_path: Path) -> None:
    """SIGTERM while the save after a failed one is staged: it is committed all the same."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "checkpoint-1").write_text("in the way")
    with trainers.child("obey", root=str(root), tracer=delayed(tmp_path, "renameat2", 0.5)) as child:
        assert ask(child, "save") == "done"
        answer = ask(child, "result")
        assert "exists and is not a directory" in answer, answer
        assert ask(child, "save") == "done"
        assert ask(child, "staged") == "done"
        child.kill(signal.SIGTERM)
        assert child.wait() == -signal.SIGTERM
        found = latest(root)
        tally.fault("SIGTERM", [] if found == root / "checkpoint-2" else [f"{found}"])
    assert (root / "checkpoint-1").read_text() == "in the way"
    assert trainers.left_alive(PATIENCE) == []
    assert_resumable(trainers, root, 2)
    tally.settle(at_least=1)
