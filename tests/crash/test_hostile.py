"""Directories made by somebody who means harm: refused with a reason, and nothing outside of the root is read, written or deleted.

What is a name, a link or a pipe is shown to the real writer and readers; what is a tensor, to `load`.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import socket
import stat
import struct
import subprocess
import sys
import threading
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import xxhash

from vembed_async_ckpt import CheckpointError, CorruptCheckpoint, cli, latest, verify
from vembed_async_ckpt._disk import catalog
from vembed_async_ckpt._disk import deletion as removal
from vembed_async_ckpt._disk import filesystem as fs
from vembed_async_ckpt._disk.lock import RootLock
from vembed_async_ckpt._disk.stored_tensors import stored_tensors
from vembed_async_ckpt._format import names

from .conftest import Tally
from .inprocess import Hasty, Outcome, Writer, without_exchange
from .victims import contents

PATIENCE = 20.0
WORK, MANIFEST = names.WORK, names.MANIFEST
OTHER = "f" * 32  # the id of a save that never was


@pytest.fixture
def root(memory: Path) -> Path:
    """Three checkpoints, beside what is nobody's business: `outside`."""
    found = memory / "root"
    with Writer(str(found), Hasty()) as writer:
        for n in (1, 2, 3):
            assert writer.save(n, n, keep=9).acknowledged
    return found


@pytest.fixture
def outside(memory: Path) -> Iterator[Path]:
    """A tree with files of the names that a checkpoint has; at the end it is as it was."""
    found = memory / "outside"
    for name, data in contents(1).items():
        path = found / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    for name in (f"work-{OTHER}.0", f"trash-{OTHER}", f"swap-{OTHER}.checkpoint-9"):
        (found / name).mkdir()
        (found / name / "precious").write_bytes(b"mine")
    before = snapshot(found)
    yield found
    assert snapshot(found) == before


def snapshot(directory: Path) -> dict[str, Any]:
    """Everything there is: contents, modes and times."""
    return {
        str(path.relative_to(directory)): (
            path.lstat().st_mode,
            path.lstat().st_mtime_ns,
            path.read_bytes() if path.is_file() else sorted(os.listdir(path)),
        )
        for path in sorted(directory.rglob("*"))
    }


def in_time(action: Callable[[], Any]) -> Any:
    """What `action` returns or raises; it must not hang."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(action())
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive(), f"{action} hangs"
    return result[0]


def save(root: Path, n: int, keep: int = 9) -> tuple[Outcome, dict[str, Any]]:
    """Make save `n`, as the next start does; what it said, and what the sweep had to say."""
    with Writer(str(root), Hasty()) as writer:
        return writer.save(n, n, keep), writer.ready


def rewrite(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest, and make its own hash right again."""
    body = json.loads((checkpoint / MANIFEST).read_bytes())
    body.pop("self")
    change(body)
    content = json.dumps(body).encode()[:-1] + b","
    digest = xxhash.xxh3_128_hexdigest(content).encode()
    (checkpoint / MANIFEST).write_bytes(content + b'"self":"' + digest + b'"}')


# -- manifests

RECORD = {"size": 4, "xxh3_128": xxhash.xxh3_128_hexdigest(b"mine")}
BAD_NAMES = [
    "../outside/precious", "/etc/passwd", "a/../../b", "a/../b", "./a", "a//b", "", ".", "..", "a\0b", "x" * 256, "a/" + "x" * 256,
    "a\\..\\b", "a/", "\ud800" * 90,
]  # fmt: skip
BAD_KEYS = {
    "save_id": ["../../outside", "x/../../../outside", "", "a\0b", 7, None, "F" * 32, "f" * 32 + "\n"],
    "step": ["x", [], float("inf"), {}],
    "sequence": [float("inf"), None, "x", float("nan")],
    "world_size": [None, float("inf")],
    "time": [None, {}],
    "files": [[], None, {"model.safetensors": 3}, {"a": {"size": -1, "xxh3_128": ""}}, {"a": {"size": True, "xxh3_128": ""}}],
    "metrics": [[], 3, {"loss": "x"}, {"loss": None}],
    "names": [[], 3],
    "tensors": [None, "x"],
    "version": [2, None, True + 1],
    "format": ["pickle", None],
}  # fmt: skip


def refused(root: Path) -> list[str]:
    """What is wrong, if the newest checkpoint of `root` is not refused with a reason, by everybody who looks at it."""
    newest = root / "checkpoint-3"
    found = []
    error = in_time(lambda: verify(newest))
    if not isinstance(error, CorruptCheckpoint) or MANIFEST not in str(error):
        found.append(f"verify: {error!r}")
    with pytest.warns(UserWarning, match="skipped a broken checkpoint"):
        chosen = latest(root)
    if chosen != root / "checkpoint-2":
        found.append(f"latest: {chosen}")
    outcome, ready = save(root, 4, keep=2)
    if not outcome.acknowledged or outcome.warnings or "error" in ready:
        found.append(f"the next save: {outcome} {ready}")
    if sorted(os.listdir(root)) != [WORK, "checkpoint-2", "checkpoint-3", "checkpoint-4"]:
        found.append(f"retention left {sorted(os.listdir(root))}")
    return found


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: ascii(name)[:24].replace("/", "|"))
def test_a_manifest_names_no_file_elsewhere(tally: Tally, root: Path, outside: Path, name: str) -> None:
    """Such a name makes it unusable; retention goes on around it."""
    rewrite(root / "checkpoint-3", lambda body: body["files"].update({name: RECORD}))
    tally.fault(name, refused(root))
    tally.settle(at_least=1)


@pytest.mark.parametrize("key", BAD_KEYS)
def test_a_manifest_of_other_values(tally: Tally, root: Path, outside: Path, key: str) -> None:
    """No value of a wrong kind gets further than the parser."""
    good = (root / "checkpoint-3" / MANIFEST).read_bytes()
    for value in BAD_KEYS[key]:
        rewrite(root / "checkpoint-3", lambda body, value=value: body.update({key: value}))
        error = in_time(lambda: verify(root / "checkpoint-3"))
        refusal = isinstance(error, CorruptCheckpoint) and MANIFEST in str(error)
        tally.fault(value, [] if refusal else [f"{error!r}"])
    last = refused(root)
    tally.fault(f"{key}, the next start", last)
    (root / "checkpoint-3" / MANIFEST).write_bytes(good)
    tally.settle(at_least=2)


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b'{"a":' * 100_000, b'{"step":' + b"9" * 5000 + b"}", b"\xff" * 64, b"[]"],
    ids=["list", "object", "digits", "no text", "empty list"],
)
def test_a_manifest_that_is_no_json_of_ours(tally: Tally, root: Path, content: bytes) -> None:
    """100,000 levels deep, numbers of 5,000 digits, no text: unusable, said in time."""
    (root / "checkpoint-3" / MANIFEST).write_bytes(content)
    tally.fault(content[:8], refused(root))
    tally.settle(at_least=1)


def test_a_manifest_of_many_lists(tally: Tally, root: Path) -> None:
    """Each would take twenty times its bytes in memory, gigabytes in all: refused before any is made."""
    dense = b'{"tensors":[' + b"[]," * (1 << 22) + b"[]]}"
    (root / "checkpoint-3" / MANIFEST).write_bytes(dense)
    tracemalloc.start()
    try:
        error = in_time(lambda: verify(root / "checkpoint-3"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    problems = [] if isinstance(error, CorruptCheckpoint) and "lists and objects" in str(error) else [f"{error!r}"]
    if peak > 4 * len(dense):
        problems.append(f"{peak >> 20} MB for a manifest of {len(dense) >> 20}")
    tally.fault("many lists", problems)
    tally.settle(at_least=1)


# -- links, pipes and what else has a name


def link(path: Path, target: Path) -> None:
    """Put a symbolic link in the place of whatever has the name."""
    if path.is_dir() and not path.is_symlink():
        path.rename(path.with_name("moved"))
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


@pytest.mark.parametrize("make", [fifo, unix_socket, Path.mkdir], ids=["FIFO", "socket", "directory"])
@pytest.mark.parametrize("name", ["model.safetensors", "inner/tokens.bin", MANIFEST], ids=os.path.basename)
def test_no_file_in_place_of_a_file(tally: Tally, root: Path, name: str, make: Callable[[Path], object]) -> None:
    """Nobody waits for the other end of a pipe: the checkpoint is broken, and the file is named."""
    path = root / "checkpoint-3" / name
    path.unlink()
    make(path)
    for error in (in_time(lambda: verify(root / "checkpoint-3")),):
        tally.fault(name, [] if isinstance(error, CorruptCheckpoint) and name in str(error) else [repr(error)])
    with pytest.warns(UserWarning, match="skipped a broken checkpoint"):
        assert in_time(lambda: latest(root)) == root / "checkpoint-2"
    tally.settle(at_least=1)


@pytest.mark.parametrize("name", ["model.safetensors", "inner", MANIFEST, ""])
def test_links_in_a_checkpoint_are_not_followed(tally: Tally, root: Path, outside: Path, name: str) -> None:
    """A file, a directory of it, its manifest, or all of it: broken, though what the link leads to has the right bytes."""
    (outside / MANIFEST).write_bytes((root / "checkpoint-1" / MANIFEST).read_bytes())
    os.utime(outside, ns=(0, 0))
    before = snapshot(outside)
    link(root / "checkpoint-1" / name, outside / name)
    error = in_time(lambda: verify(root / "checkpoint-1"))
    refusal = isinstance(error, CorruptCheckpoint) and ("link" in str(error) or "symbolic" in str(error))
    tally.fault(name, [] if refusal else [repr(error)])
    if name != MANIFEST and name:
        manifest = verify(root / "checkpoint-2")
        with pytest.raises(CorruptCheckpoint, match="link"):
            list(stored_tensors(str(root / "checkpoint-1"), manifest))
    assert save(root, 4, keep=1)[0].acknowledged
    with warnings.catch_warnings(action="ignore"):  # where it still lies there
        assert latest(root) == root / "checkpoint-4"
    assert snapshot(outside) == before, "retention followed a link"
    (outside / MANIFEST).unlink()
    tally.settle(at_least=1)


PLANTED = ["", "lock", "replaced", "orphan.log", f"work-{OTHER}.0", f"trash-{OTHER}"]


@pytest.mark.parametrize("name", PLANTED, ids=lambda name: name or "the work directory")
def test_planted_links_among_what_is_no_checkpoint(tally: Tally, root: Path, outside: Path, name: str) -> None:
    """A start is refused with the path, or goes around it; what they lead to stays as it is."""
    link(root / WORK / name, outside / "config.json" if name in ("lock", "orphan.log") else outside)
    problems = []
    if name in ("", "lock"):
        for who in (lambda: RootLock.acquire(str(root)), lambda: latest(root)):
            error = in_time(who)
            if not isinstance(error, CheckpointError) or "symbolic link" not in str(error):
                problems.append(repr(error))
    else:
        outcome, ready = save(root, 4, keep=1)
        if not outcome.acknowledged or outcome.warnings or "error" in ready:
            problems.append(f"{outcome} {ready}")
        if latest(root) != root / "checkpoint-4":
            problems.append("not the newest")
    (root / WORK / name).unlink()
    tally.fault(name, problems)
    tally.settle(at_least=1)


def test_what_is_put_aside_does_not_leave_the_root(tally: Tally, root: Path, outside: Path) -> None:
    """`replaced` is a link: a directory with foreign files stays where it is, rather than going where the link leads."""
    link(root / WORK / "replaced", outside)
    (root / "checkpoint-1" / "notes.txt").write_bytes(b"mine")
    outcome, _ = save(root, 4, keep=1)
    assert outcome.acknowledged
    found = [path for path in root.rglob("notes.txt") if path.read_bytes() == b"mine"]
    tally.fault("replaced", [] if len(found) == 1 and outcome.warnings else [f"{outcome}, {found}"])
    tally.settle(at_least=1)


def test_a_planted_link_under_the_name_of_a_work_directory(tally: Tally, root: Path, outside: Path) -> None:
    """The save that would use the name does not write through it, nor clean up behind it."""
    for attempt in range(3):
        (root / WORK / f"work-{4:032x}.{attempt}").symlink_to(outside)
    outcome, _ = save(root, 4)
    tally.fault("work", [] if outcome.errors and not outcome.acknowledged else [f"{outcome}"])
    assert latest(root) == root / "checkpoint-3"
    tally.settle(at_least=1)


@pytest.mark.parametrize("make", [fifo, unix_socket], ids=["FIFO", "socket"])
def test_a_pipe_in_what_is_replaced_without_hard_links(
    tally: Tally, root: Path, make: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot be copied, and is kept where what is replaced is kept; a file beside it is carried over, piece by piece."""
    monkeypatch.setattr(fs, "_COPY_CHUNK", 1000)
    monkeypatch.setattr(removal, "_CHUNK", 1000)
    make(root / "checkpoint-3" / "pipe")
    (root / "checkpoint-3" / "notes").write_bytes(bytes(range(256)) * 17)
    with Writer(str(root), without_exchange(Hasty)()) as writer:
        outcome = in_time(lambda: writer.save(4, 3, keep=9))
    problems = [] if outcome == Outcome(acknowledged=True) else [f"{outcome}"]
    if (root / "checkpoint-3" / "notes").read_bytes() != bytes(range(256)) * 17:
        problems.append("the file beside it is not the same")
    kept = [str(path.relative_to(root)) for path in root.rglob("*") if path.name in ("pipe", "notes")]
    if sorted(kept) != [f"{WORK}/replaced/kept-{4:032x}.checkpoint-3/pipe", "checkpoint-3/notes"]:
        problems.append(f"{kept}")
    tally.fault("pipe", problems)
    tally.settle(at_least=1)


class Swap:
    """At the n-th look for a directory, before it or right after it, `victim` makes way for a link to `elsewhere`."""

    def __init__(
        self, patch: pytest.MonkeyPatch, victim: Path, put: Callable[[Path], object], n: int, late: bool
    ) -> None:
        self.victim, self.moved = victim, victim.with_name("moved")
        self.struck = self.over = False
        really = fs.parent_of
        counting = itertools.count(1)

        @contextmanager
        def parent_of(path: str) -> Iterator[tuple[int, str]]:
            strikes = next(counting) >= n
            if strikes and not late:
                self.strike(put)
            with really(path) as found:
                if strikes and late:
                    self.strike(put)
                yield found

        patch.setattr(fs, "parent_of", parent_of)

    def strike(self, put: Callable[[Path], object]) -> None:
        if not self.struck and self.victim.is_dir():
            self.victim.rename(self.moved)
            put(self.victim)
            self.struck = True

    def undo(self) -> None:
        """The directory is back, unless what was put there has gone elsewhere."""
        if self.victim.is_symlink():
            self.victim.unlink()
            self.moved.rename(self.victim)


def broken(visible: list[catalog.Entry], outcome: Outcome) -> list[str]:
    """What is visible and not whole; it may be so only where it was changed after the last look, and then that was said."""
    problems = []
    for entry in visible:
        try:
            verify(entry.path)
        except CorruptCheckpoint as error:
            if "changed it while it was published" not in "".join(outcome.errors):
                problems.append(f"{error}, {outcome}")
    return problems


@pytest.mark.parametrize("late", [False, True], ids=["before", "right after"])
@pytest.mark.parametrize("victim", ["..", ".", WORK, "work", "work/inner"])
def test_a_link_is_put_in_the_place_of_a_directory_that_is_written(
    tally: Tally, root: Path, memory: Path, victim: str, late: bool
) -> None:
    """At any moment of a save with a replacement and a retention: it fails with a reason, or all of it is there; nothing that the
    link leads to is written or deleted."""
    outside = memory / "elsewhere"
    shutil.copytree(memory / "root", outside / "root")
    shutil.copytree(root / "checkpoint-1", outside / "inner")
    for on_its_way_out in (f"work-{4:032x}.0", f"trash-{1:032x}"):
        shutil.copytree(root / "checkpoint-1", outside / "root" / WORK / on_its_way_out)
    before = snapshot(outside)
    to = {"..": outside, ".": outside / "root", WORK: outside / "root" / WORK}.get(victim, outside)
    for n in itertools.count(1):
        here = memory / f"{n}" / "root"
        shutil.copytree(root, here)
        place = Path(
            os.path.normpath(
                here / victim.replace("work", f"{WORK}/work-{4:032x}.0") if victim != WORK else here / WORK
            )
        )
        with pytest.MonkeyPatch.context() as patch, Writer(str(here), fs.LocalFilesystem()) as writer:
            swap = Swap(patch, place, lambda path: path.symlink_to(to), n, late)
            outcome = writer.save(4, 3, keep=2)
        swap.undo()
        problems = [] if snapshot(outside) == before else ["what is outside was changed"]
        if not outcome.acknowledged and not outcome.errors:
            problems.append(f"neither done nor failed: {outcome}")
        visible = [entry for entry in catalog.scan(str(here)) if entry.manifest]
        problems += broken(visible, outcome)
        if outcome.acknowledged and visible[-1].manifest.save_id != f"{4:032x}":  # type: ignore[union-attr]
            problems.append("acknowledged, and not there")
        if len(visible) < 1:
            problems.append("nothing is there")
        shutil.rmtree(memory / f"{n}")
        if not swap.struck:
            break
        tally.fault(f"call {n}", problems)
    tally.settle(at_least=5)


def test_another_directory_is_put_in_the_place_of_the_one_that_is_written(
    tally: Tally, root: Path, memory: Path
) -> None:
    """At any moment of a save but the very last: nothing is published that misses what was written before."""
    doubtful = 0
    for n in itertools.count(1):
        here = memory / f"{n}" / "root"
        shutil.copytree(root, here)
        with pytest.MonkeyPatch.context() as patch, Writer(str(here), fs.LocalFilesystem()) as writer:
            swap = Swap(patch, here / WORK / f"work-{4:032x}.0", Path.mkdir, n, late=False)
            outcome = writer.save(4, 4, keep=9)
        if not swap.struck:
            break
        problems = broken(catalog.scan(str(here)), outcome)
        doubtful += "while it was published" in "".join(outcome.errors)
        if outcome.acknowledged == bool(outcome.errors):
            problems.append(f"neither done nor failed: {outcome}")
        tally.fault(f"call {n}", problems)
        shutil.rmtree(memory / f"{n}")
    assert doubtful <= 2, "source and target of the one rename"
    tally.settle(at_least=5)


@pytest.mark.parametrize("kind", ["link", "FIFO", "file"])
def test_something_else_has_the_final_name(tally: Tally, root: Path, outside: Path, kind: str) -> None:
    """The save is refused and names it; it is neither replaced nor followed."""
    target = root / "checkpoint-4"
    {"link": lambda: target.symlink_to(outside), "FIFO": lambda: os.mkfifo(target), "file": target.touch}[kind]()
    outcome, _ = save(root, 4)
    right = not outcome.acknowledged and "not a directory" in "".join(outcome.errors) and os.path.lexists(target)
    tally.fault(kind, [] if right else [f"{outcome}"])
    tally.settle(at_least=1)


@pytest.mark.parametrize("name", ["lock", "orphan.log", f"work-{OTHER}.0", f"trash-{OTHER}"])
@pytest.mark.parametrize("make", [fifo, Path.touch], ids=["FIFO", "file"])
def test_pipes_among_what_is_no_checkpoint(tally: Tally, root: Path, name: str, make: Callable[[Path], object]) -> None:
    """Nobody hangs: the next start goes around it, or `latest` says what is in the way."""
    make(root / WORK / name)
    problems = []
    if name == "lock" and make is fifo:
        for who in (lambda: latest(root), lambda: RootLock.acquire(str(root))):
            error = in_time(who)
            if not isinstance(error, CheckpointError) or "regular file" not in str(error):
                problems.append(repr(error))
    else:
        outcome, ready = in_time(lambda: save(root, 4, keep=1))
        if not outcome.acknowledged or outcome.warnings or "error" in ready or latest(root) != root / "checkpoint-4":
            problems.append(f"{outcome} {ready}")
    tally.fault(name, problems)
    tally.settle(at_least=1)


@pytest.mark.parametrize(
    "content", [b"[" * 4096, b"[]", b'{"where": 1, "processes": [[1e999, 1]]}', b'{"processes": []}', b"\xff", b""]
)
def test_a_lock_file_that_says_nonsense(tally: Tally, root: Path, content: bytes) -> None:
    """It names nobody; whether the root is locked does not depend on what it says."""
    (root / WORK / "lock").write_bytes(content)
    assert latest(root) == root / "checkpoint-3"
    lock = RootLock.acquire(str(root))
    tally.fault(content[:20], [])
    lock.close()
    tally.settle(at_least=1)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_modes_follow_the_umask(tally: Tally, memory: Path, umask: int) -> None:
    """Files are 0666 & ~umask and directories 0777 & ~umask: others of the group can read what they are meant to."""
    before = os.umask(umask)
    try:
        root = memory / "root"
        assert save(root, 1)[0].acknowledged
    finally:
        os.umask(before)
    for path in [root / "checkpoint-1", *(root / "checkpoint-1").rglob("*")]:
        mode, expected = stat.S_IMODE(path.stat().st_mode), (0o777 if path.is_dir() else 0o666) & ~umask
        tally.fault(path.name, [] if mode == expected else [f"{mode:o}, not {expected:o}"])
    tally.settle(at_least=5)


# -- tensors


def raw(header: Any, data: bytes = bytes(8), length: int | None = None) -> bytes:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def tensor(shape: Any = (2,), offsets: Any = (0, 8), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


ONE = json.dumps(tensor()).encode()
HEADERS: dict[str, bytes] = {
    "empty file": b"",
    "7 bytes": bytes(7),
    "header length 0": struct.pack("<Q", 0),
    "all zeros": bytes(4096),
    "header length > file": raw(b"{}", b"", 1 << 20),
    "header length 2^64-1": raw(b"{}", b"", 2**64 - 1),
    "header length 100,000,001": struct.pack("<Q", 100_000_001) + b"{" + b" " * 64,
    "not JSON": raw(b"x" * 16),
    "a list": raw(b"[]"),
    "invalid UTF-8": raw(b'{"\xff\xfe":1}'),
    "truncated data": raw({"a": tensor()}, bytes(4)),
    "trailing bytes": raw({"a": tensor()}, bytes(9)),
    "hole between tensors": raw({"a": tensor(), "b": tensor(offsets=(12, 20))}, bytes(20)),
    "does not start at 0": raw({"a": tensor(offsets=(4, 12))}, bytes(12)),
    "overlapping tensors": raw({"a": tensor(), "b": tensor(offsets=(4, 12))}, bytes(12)),
    "two names, same bytes": raw({"a": tensor(), "b": tensor()}),
    "end < begin": raw({"a": tensor(offsets=(8, 0))}),
    "shape*dtype != size": raw({"a": tensor((3,))}),
    "shape overflow 2^64": raw({"a": tensor((2**62, 4))}),
    "shape 0 x 2^62 x 2^62": raw({"a": tensor((0, 2**62, 2**62), (0, 0))}, b""),
    "shape 0 x 2^64": raw({"a": tensor((0, 2**64), (0, 0))}, b""),
    "negative shape": raw({"a": tensor((-1,))}),
    "shape of floats": raw({"a": tensor((2.0,))}),
    "shape is no list": raw({"a": tensor(2)}),
    "unknown dtype": raw({"a": tensor(dtype="EVIL")}),
    "dtype is a list": raw({"a": tensor(dtype=["F32"])}),
    "half a byte": raw({"a": tensor((), (0, 0), "F4")}, b""),
    "odd rows of half bytes": raw({"a": tensor((3, 3), (0, 4), "F4")}, bytes(4)),
    "offsets are negative": raw({"a": tensor(offsets=(-8, 0))}),
    "three offsets": raw({"a": tensor(offsets=(0, 4, 8))}),
    "an entry is a number": raw({"a": 1}),
    "duplicate key": raw(b'{"a":%s,"a":%s}' % (ONE, ONE)),
    "metadata of numbers": raw({"__metadata__": {"k": 1}, "a": tensor()}),
    "metadata is a list": raw({"__metadata__": [1], "a": tensor()}),
    "JSON 100,000 deep": raw(b'{"a":' * 100_000),
    "a name that leaves": raw({"../../etc/x": tensor()}),
    "a name with NUL": raw({"a\0b": tensor()}),
    "a name with half a character": raw(b'{"\\ud800":%s}' % ONE),
    "no tensors": raw(b"{}", b""),
    "a tensor of another shape": raw({"a": tensor((1, 2))}),
}

# A file that may be so, only not of this model.
WELL_FORMED = {
    "a name that leaves", "a name with NUL", "a name with half a character", "no tensors", "a tensor of another shape",
}  # fmt: skip


@pytest.fixture(scope="module")
def of_one_tensor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a model that has one tensor, `a`, and an optimizer with state for it."""
    import torch

    from vembed_async_ckpt import AsyncCheckpointer

    model = one_tensor()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.a.grad = torch.ones(2)
    optimizer.step()
    with AsyncCheckpointer(tmp_path_factory.mktemp("one"), writer="thread") as checkpointer:
        return checkpointer.save(1, model=model, optimizer=optimizer).result(PATIENCE).path


def one_tensor() -> Any:
    import torch

    model = torch.nn.Module()
    model.register_parameter("a", torch.nn.Parameter(torch.ones(2)))
    return model


def replace_file(checkpoint: Path, name: str, content: bytes) -> None:
    """Other bytes, and a manifest that says they are right."""
    (checkpoint / name).write_bytes(content)
    record = {"size": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
    rewrite(checkpoint, lambda body: body["files"].update({name: record}))


@pytest.mark.parametrize("what", HEADERS)
def test_a_hostile_safetensors_file(tally: Tally, of_one_tensor: Path, tmp_path: Path, what: str) -> None:
    """With a manifest that vouches for it: `load` refuses it by its path, and the model keeps what it had."""
    import shutil

    from vembed_async_ckpt import load

    checkpoint = Path(shutil.copytree(of_one_tensor, tmp_path / "checkpoint-1"))
    replace_file(checkpoint, "model.safetensors", HEADERS[what])
    model = one_tensor()
    problems = []
    for how in ("full", "none"):
        error = in_time(lambda how=how: load(checkpoint, model=model, verify=how))
        if not isinstance(error, CheckpointError if what in WELL_FORMED else CorruptCheckpoint) or str(
            checkpoint
        ) not in str(error):
            problems.append(repr(error))
    if model.a.tolist() != [1, 1]:
        problems.append("the model was changed")
    tally.fault(what, problems)
    tally.settle(at_least=1)


# -- the command line


def sparse(checkpoint: Path, name: str, start: bytes, size: int) -> None:
    """A file that says it is large, and takes no space."""
    with open(checkpoint / name, "wb") as file:
        file.write(start)
        file.truncate(size)
    if name != MANIFEST:
        rewrite(checkpoint, lambda body: body["files"].update({name: {"size": size, "xxh3_128": "0" * 32}}))


def listed(*entry: Any) -> Callable[[Path], object]:
    """A manifest that says where a tensor is in a file that is not safetensors."""
    return lambda path: rewrite(path, lambda body: body.update(tensors={"inner/tokens.bin": {"w": list(entry)}}))


def set_to(**values: Any) -> Callable[[Path], object]:
    return lambda path: rewrite(path, lambda body: body.update(values))


INDEX = json.dumps({"weight_map": {"w": "../../outside/model.safetensors", "v": "/etc/passwd"}}).encode()
LOOKED_AT: dict[str, tuple[int, Callable[[Path], object]]] = {
    **{
        f"header: {what}": (int(what not in WELL_FORMED), lambda path, data=data: replace_file(path, "model.safetensors", data))  # type: ignore[misc]
        for what, data in HEADERS.items()
    },
    "a header of 100 MB": (1, lambda path: sparse(path, "model.safetensors", struct.pack("<Q", 10**8), 10**8 + 8)),
    "a manifest of 1 TB": (1, lambda path: sparse(path, MANIFEST, b"{", 1 << 40)),
    "a config of 1 TB": (1, lambda path: sparse(path, names.CONFIG, b"{", 1 << 40)),
    "a config that is deep": (1, lambda path: replace_file(path, names.CONFIG, b"[" * 100_000)),
    "an index that leaves": (0, lambda path: replace_file(path, "model.safetensors.index.json", INDEX)),
    "a pipe": (1, lambda path: fifo(path / "model.safetensors")),
    "a link": (1, lambda path: link(path / "model.safetensors", Path("/dev/zero"))),
    "an offset behind the end": (1, listed("F32", [2], 1 << 60)),
    "a negative offset": (1, listed("F32", [2], -4)),
    "a negative shape": (1, listed("F32", [-2], 0)),
    "a shape too large": (1, listed("F32", [1 << 62, 1 << 62], 0)),
    "a dtype in a list": (1, listed(["F32"], [2], 0)),
    "an entry of two": (1, listed("F32", [2])),
    "tensors in a list": (1, set_to(tensors={"inner/tokens.bin": ["w"]})),
    "a metric too large": (1, set_to(metrics={"loss": 10**400})),
    "a size too large": (1, set_to(files={"model.safetensors": {"size": 10**400, "xxh3_128": ""}})),
    "a time that is none": (0, set_to(time=1e300)),
    "names with markup": (0, set_to(metrics={"[/]": 1.0}, versions={"[/bold]": "[/]"})),
    "a file name with markup": (0, lambda path: ((path / "[").mkdir(), replace_file(path, "[/red]", b"mine"))),
    "a metric that is no text": (0, set_to(metrics={"\ud800": 1.0}, versions={"\ud800": "1"})),
}  # fmt: skip


@pytest.mark.parametrize("what", LOOKED_AT, ids=lambda what: what.replace("/", "|"))
def test_the_command_line_looks_at_it(
    tally: Tally,
    root: Path,
    outside: Path,
    what: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """What is well formed is shown; of the rest a line says why not, with exit code 1, in time and without taking much memory."""
    code, spoil = LOOKED_AT[what]
    checkpoint = root / "checkpoint-3"
    (checkpoint / "model_state_dict.safetensors").unlink()
    rewrite(checkpoint, lambda body: body["files"].pop("model_state_dict.safetensors"))
    spoil(checkpoint)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    problems = []
    for arguments in (
        ("inspect", "--tensors", checkpoint),
        ("inspect", "--json", checkpoint),
        ("diff", checkpoint, root / "checkpoint-2"),
        ("ls", root),
        *([("verify", checkpoint)] if "TB" not in what else []),
    ):
        monkeypatch.setattr(sys, "argv", ["vembed-ckpt", *map(str, arguments)])
        ended = in_time(lambda: cli_code())
        said = capfd.readouterr()
        expected = {code} if arguments[0] == "inspect" else {0, 1}
        if (what.startswith(("a config", "header")) and arguments[:2] == ("inspect", "--tensors")) or arguments[0] in (
            "ls",
            "verify",
        ):
            expected = {0, 1}
        if ended not in expected or "Traceback" in said.err or (ended == 1 and not said.out + said.err):
            problems.append(f"{arguments}: {ended!r} {said.err[-500:]}")
        if code and arguments[0] == "inspect" and ended and str(checkpoint) not in said.err:
            problems.append(f"{arguments}: {said.err}")
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > 500_000:
        problems.append("it took much memory")
    tally.fault(what, problems)
    tally.settle(at_least=1)


def cli_code() -> Any:
    try:
        cli.main()
    except SystemExit as end:
        return end.code


STATES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a tensor of no dtype": lambda body: body.update(tensors=changed(body, 0, "EVIL")),
    "a dtype that is no dtype": lambda body: body.update(tensors=changed(body, 0, "nn")),
    "a dtype in a list": lambda body: body.update(tensors=changed(body, 0, ["F32"])),
    "a negative shape": lambda body: body.update(tensors=changed(body, 1, [-1])),
    "another shape": lambda body: body.update(tensors=changed(body, 1, [2**62, 4])),
    "a shape of text": lambda body: body.update(tensors=changed(body, 1, "x")),
    "nothing times too much": lambda body: body.update(tensors=changed(body, 1, [0, 2**62, 2**62])),
    "a negative offset": lambda body: body.update(tensors=changed(body, 2, -8)),
    "an offset behind the end": lambda body: body.update(tensors=changed(body, 2, 2**70)),
    "an offset of text": lambda body: body.update(tensors=changed(body, 2, "0")),
    "an entry of two": lambda body: body.update(tensors={"optimizer.bin": {"0.momentum_buffer": ["F32", [2]]}}),
    "a list of tensors": lambda body: body.update(tensors={"optimizer.bin": ["0.momentum_buffer"]}),
    "a key that is no parameter": lambda body: body["tensors"]["optimizer.bin"].update({"x.y": ["F32", [0], 0]}),
    "a parameter that is not there": lambda body: body["tensors"]["optimizer.bin"].update({"9.y": ["F32", [0], 0]}),
    "a model of nothing": lambda body: body.update(names={"": {}}),
    "a model that is a list": lambda body: body.update(names={"": []}),
    "a file elsewhere": lambda body: body["names"][""].update(files=["../../outside/config.json"]),
    "a file that is absolute": lambda body: body["names"][""].update(files=["/etc/passwd"]),
    "files of numbers": lambda body: body["names"][""].update(files=[3]),
    "a part too far": lambda body: body["names"][""].update(renamed={"model.safetensors": {"a": ["a", [[2], [1], 2**60]]}}),
    "a part before": lambda body: body["names"][""].update(renamed={"model.safetensors": {"a": ["a", [[2], [1], -4]]}}),
    "a part that goes back": lambda body: body["names"][""].update(renamed={"model.safetensors": {"a": ["a", [[2], [-1], 1]]}}),
    "a part of text": lambda body: body["names"][""].update(renamed={"model.safetensors": {"a": ["a", "x"]}}),
    "a tie of lists": lambda body: body["names"][""].update(ties={"b": ["a"]}),
}  # fmt: skip


def changed(body: dict[str, Any], place: int, value: Any) -> dict[str, Any]:
    for entry in body["tensors"]["optimizer.bin"].values():
        entry[place] = value
    return body["tensors"]


@pytest.mark.parametrize("what", STATES)
def test_a_hostile_description_of_tensors(tally: Tally, of_one_tensor: Path, tmp_path: Path, what: str) -> None:
    """Where a manifest says that tensors are: refused with the path; neither model nor optimizer is touched."""
    import shutil

    import torch

    from vembed_async_ckpt import load

    checkpoint = Path(shutil.copytree(of_one_tensor, tmp_path / "checkpoint-1"))
    rewrite(checkpoint, STATES[what])
    model = one_tensor()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    error = in_time(lambda: load(checkpoint, model=model, optimizer=optimizer))
    right = isinstance(error, CheckpointError) and str(checkpoint) in str(error)
    untouched = model.a.tolist() == [1, 1] and optimizer.param_groups[0]["lr"] == 0.5
    tally.fault(what, [] if right and untouched else [repr(error)])
    tally.settle(at_least=1)


@pytest.mark.parametrize("depth", [400, 900, 100_000])
def test_a_training_state_that_is_deep(tally: Tally, of_one_tensor: Path, tmp_path: Path, depth: int) -> None:
    """Too deep to be read, or to be decoded: refused, whichever it is."""
    import shutil

    from vembed_async_ckpt import load

    checkpoint = Path(shutil.copytree(of_one_tensor, tmp_path / "checkpoint-1"))
    state = json.loads((checkpoint / names.TRAINING_STATE).read_bytes())
    state["extra"] = "HERE"
    deep = b'{"$tuple":[' * depth + b"]}" * depth
    replace_file(checkpoint, names.TRAINING_STATE, json.dumps(state).encode().replace(b'"HERE"', deep))
    error = in_time(lambda: load(checkpoint, model=one_tensor()))
    tally.fault(depth, [] if isinstance(error, CheckpointError) and str(checkpoint) in str(error) else [repr(error)])
    tally.settle(at_least=1)


SCRIPT = """
import sys, torch
from vembed_async_ckpt import AsyncCheckpointer, latest, load, verify
model = torch.nn.Linear(3, 2)
optimizer = torch.optim.AdamW(model.parameters())
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
def train():
    model(torch.ones(1, 3)).sum().backward(); optimizer.step(); scheduler.step()
train()
with AsyncCheckpointer(sys.argv[1], writer="thread") as checkpointer:
    checkpointer.save(1, model=model, optimizer=optimizer, scheduler=scheduler, extra={"a": (1, b"x")}).result(60)
    found = []
    sys.addaudithook(lambda event, arguments: found.append((event, arguments)) if event == "pickle.find_class" else None)
    train()
    checkpointer.save(2, model=model, optimizer=optimizer, scheduler=scheduler, extra={"a": (1, b"x")}).result(60)
    verify(latest(sys.argv[1]))
    load(latest(sys.argv[1]), model=model, optimizer=optimizer, scheduler=scheduler)
print(len(found), found[:3])
torch.load(latest(sys.argv[1]) / "scheduler.bin", weights_only=False)
import pickle; pickle.loads(pickle.dumps(print))
assert found, "the hook would have seen it"
"""


def test_no_class_is_looked_up_for_a_pickle(tally: Tally, tmp_path: Path) -> None:
    """A whole save, verification and load: no audit event of `pickle.find_class`."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "root")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    tally.fault("find_class", [] if done.stdout.startswith("0 ") else [done.stdout])
    tally.settle(at_least=1)
