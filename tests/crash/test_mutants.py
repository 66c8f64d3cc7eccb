"""The suite finds what it is for: each of these bugs, put into the writer's source, is noticed by a short run of its checks."""

from __future__ import annotations

import errno
import inspect
import itertools
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vembed_async_ckpt import CorruptCheckpoint, verify
from vembed_async_ckpt._disk import commit, direct_io, filesystem, manifests
from vembed_async_ckpt._disk import deletion as removal
from vembed_async_ckpt._writer import server
from vembed_async_ckpt.testing import (
    Change,
    Choose,
    FailingFilesystem,
    PowerCutFilesystem,
    at_random,
    kept,
    lost,
    names_only,
)

from . import checks
from .conftest import Tally
from .inprocess import Hasty, Writer
from .states import Story, crash_states

ENOUGH = 3  # violations
STORY = Story(1, [(1, 1), (2, 2), (3, 2)])


# -- a short run of the suite


def report(directory: Path) -> list[str]:
    """The first violations found, if there are any."""
    found: list[str] = []
    for number, check in enumerate((power, failing_syncs, a_full_disk, altered_files)):
        here = directory / str(number)
        here.mkdir()
        found += itertools.islice(check(here), ENOUGH)
        if len(found) >= ENOUGH:
            break
    return found


def power(directory: Path) -> Iterator[str]:
    """The power fails before any call."""

    def some(unsynced: list[Change]) -> Iterable[tuple[str, Choose]]:
        yield from (("all lost", lost), ("all kept", kept), ("names only", names_only))
        yield from ((f"at random {seed}", at_random(seed)) for seed in range(2))

    for state, problems in crash_states(STORY, PowerCutFilesystem, directory, some):
        yield from (f"power cut at {state}: {problem}" for problem in problems)


def failing_syncs(directory: Path) -> Iterator[str]:
    """Any sync of a file fails once, and when all is done the power fails."""
    for n in itertools.count(1):
        root = directory / str(n)
        root.mkdir()
        disk = PowerCutFilesystem(root)
        fs = FailingFilesystem(disk)
        fs.fail(errno.EIO, "sync", nth=n)
        with Writer(str(root), fs) as writer:
            acknowledged = max(
                (n for n, step in STORY.saves if writer.save(n, step, STORY.keep).acknowledged), default=0
            )
        image = str(disk.image(directory / f"image-{n}"))
        yield from (f"sync {n} fails: {problem}" for problem in checks.after_fault(image, acknowledged))
        if not fs.failed:
            return


def a_full_disk(directory: Path) -> Iterator[str]:
    """Nothing can be written: that is said, once."""
    fs = FailingFilesystem(Hasty())
    fs.fail(errno.ENOSPC, "write", times=None)
    with Writer(str(directory), fs) as writer:
        outcome = writer.save(1, 1, 1)
    if outcome.acknowledged or len(outcome.errors) != 1:
        yield f"the disk is full: {outcome}"


def altered_files(directory: Path) -> Iterator[str]:
    """A bit is flipped, or the data are zeros of the right length."""
    with Writer(str(directory), Hasty()) as writer:
        writer.save(1, 1, 1)
    checkpoint = directory / "checkpoint-1"
    for file in sorted(checkpoint.rglob("*.*")):
        data = file.read_bytes()
        for what, altered in (("a bit", bytes([data[0] ^ 1]) + data[1:]), ("zeros", bytes(len(data)))):
            file.write_bytes(altered)
            try:
                verify(checkpoint)
            except CorruptCheckpoint:
                pass
            else:
                yield f"{what} in {file.name}: not noticed"
        file.write_bytes(data)


# -- bugs


@dataclass(frozen=True)
class Edit:
    """In the source of `module`, `old` becomes `new`; what is defined there as `name` is then used by `users`."""

    module: types.ModuleType
    name: str
    old: str
    new: str
    users: tuple[types.ModuleType, ...] = ()

    def apply(self, patch: pytest.MonkeyPatch) -> None:
        source = inspect.getsource(self.module)
        assert source.count(self.old) == 1, f"{self.module.__name__} has changed; adapt this bug to it: {self.old!r}"
        namespace: dict[str, Any] = dict(vars(self.module))
        exec(compile(source.replace(self.old, self.new), str(self.module.__file__), "exec"), namespace)
        for user in (self.module, *self.users):
            patch.setattr(user, self.name, namespace[self.name])


FINISH = """\
        self._fs.truncate(self._fd, self.slot["size"])
        self._fs.sync(self._fd)
"""
SERVE = {"module": server, "name": "serve"}
FILE_WRITER = {"module": direct_io, "name": "FileWriter", "users": (server,)}
COMMIT = {"module": commit, "name": "commit"}
BUGS: dict[str, list[Edit]] = {
    "no file is synced": [
        Edit(**FILE_WRITER, old=FINISH, new='        self._fs.truncate(self._fd, self.slot["size"])\n'),
    ],
    "a file is synced before it is finished": [
        Edit(
            **FILE_WRITER,
            old=FINISH,
            new='        self._fs.sync(self._fd)\n        self._fs.truncate(self._fd, self.slot["size"])\n',
        ),
    ],
    "the manifest is not synced": [
        Edit(filesystem, "write_synced", old="        fs.sync(fd)\n", new="", users=(commit,))
    ],
    "no directory is synced": [
        Edit(
            **COMMIT,
            old="    for directory in files.walk_directories(work):\n        fs.sync_directory(directory)\n",
            new="",
        ),
    ],
    "the parents are not synced": [
        Edit(
            **COMMIT,
            old="        fs.sync_directory(root)\n        fs.sync_directory(names.work_directory(root))\n",
            new="        pass\n",
        ),
    ],
    "retention comes first": [
        Edit(
            **SERVE,
            old="        sequence = self._next_sequence(",
            new=(
                "        for path, manifest in committed:\n"
                "            removal.dispose(self._fs, self._root, path, os.path.basename(path), manifest.save_id)\n"
                "        sequence = self._next_sequence("
            ),
        ),
    ],
    "acknowledged before it is committed": [
        Edit(
            **SERVE,
            old="        replaced = commits.commit(",
            new=(
                '        early = self._reply(os.path.join(self._root, job["name"]), manifest, pending, begun, written)\n'
                '        self._send(event="committed", serial=pending.serial, **early)\n'
                "        replaced = commits.commit("
            ),
        ),
    ],
    "written in place": [
        Edit(
            **SERVE,
            old='            work = names.save_directory(self._root, job["save_id"], attempt)\n',
            new='            work = os.path.join(self._root, job["name"])\n',
        ),
        Edit(
            commit,
            "_publish",
            "        if not os.path.lexists(target):\n            try:",
            "        return None\n        if 0:\n            try:",
        ),
    ],
    "a failed sync is tried again": [
        Edit(
            **FILE_WRITER,
            old="        self._fs.sync(self._fd)\n",
            new=(
                "        try:\n"
                "            self._fs.sync(self._fd)\n"
                "        except OSError:\n"
                "            self._fs.sync(self._fd)\n"
            ),
        ),
    ],
    "a failure is swallowed": [
        Edit(
            **SERVE,
            old="            self._failed(pending, error)\n            return\n",
            new=(
                "            job = pending.job\n"
                '            untrue = dict(sequence=0, files={}, total_bytes=0, queued=0.0, write=0.0, commit=0.0, path="")\n'
                '            self._send(event="committed", serial=pending.serial, **untrue)\n'
                '            done = dict(save_id=job["save_id"], step=job["step"], pruned=[], freed=0, seconds=0.0)\n'
                '            self._send(event="tidy", serial=pending.serial, **done)\n'
                "            return\n"
            ),
        ),
    ],
    "sizes are all that is verified": [Edit(manifests, "check", 'if verify == "full" and ', "if False and ")],
    "deleted before the way out is durable": [
        Edit(removal, "prune", "    fs.sync_directory(root)\n    dispose(", "    dispose("),
    ],
    "the manifest is deleted first": [
        Edit(
            removal,
            "dispose",
            "    for relative in ours:\n",
            "    _unlink_if_there(fs, os.path.join(directory, names.MANIFEST))\n    for relative in ours:\n",
        ),
    ],
    "the manifest may be deleted first": [
        Edit(
            removal,
            "dispose",
            "        for inner in files.walk_directories(directory):\n            fs.sync_directory(inner)\n",
            "",
        ),
    ],
}


def test_without_a_bug_nothing_is_found(memory: Path) -> None:
    """The short run is silent."""
    assert report(memory) == []


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_found(tally: Tally, memory: Path, monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    """And the short run is not."""
    for edit in BUGS[bug]:
        edit.apply(monkeypatch)
    found = report(memory)
    print(*found, sep="\n")
    assert found
    tally.what = "planted bug"
    tally.fault(bug, [])
