"""What must hold after every fault, whatever it was (I1 to I6 of the crash-safety notes)."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator

from vembed_async_ckpt import CheckpointError, latest, verify
from vembed_async_ckpt._disk.catalog import scan
from vembed_async_ckpt._format import names
from vembed_async_ckpt._format.manifest import Manifest

from .nursery import Child, Nursery
from .victims import LINK, contents

NEXT = 90  # number and step of the save after the fault

EXPECTED = re.compile(
    r"dropped the unfinished save|finished deleting|finished replacing|brought .* back, whose replacement was never published"
    r"|writer failed step=None .* was killed by signal 9"
)


def violations(nursery: Nursery, root: str, child: Child, keep: int) -> list[str]:
    """Everything that is wrong after `child`, a victim, ended one way or another; the root is then started anew."""
    found = [*after_fault(root, child.last("ACK")), *_complaints(child)]
    return found + [f"after the next start: {problem}" for problem in next_start(nursery, root, keep)]


def _complaints(child: Child) -> Iterator[str]:
    # No victim has a disk that fails, and a killed writer is replaced: nothing may be reported as an error (I6).
    for message in child.messages:
        if message.startswith("ERR") or (message.startswith("LOG") and not EXPECTED.search(message)):
            yield f"I6: {message}"
    if said := child.stderr():
        yield f"stderr: {said}"


def after_fault(root: str, acknowledged: int) -> Iterator[str]:
    """Violations of I1 to I4 as the root lies there now; `acknowledged` is the number of the newest save that was."""
    entries = scan(root)
    newest = 0
    for entry in entries:
        if entry.manifest is None:
            yield f"I1, I3: broken checkpoint visible: {entry.error}"
            continue
        try:
            verify(entry.path)
            newest = _number(entry.path, entry.manifest)
        except (CheckpointError, AssertionError) as error:
            yield f"I1: {error}"
    if newest < acknowledged:
        yield f"I2: save {acknowledged} was acknowledged, the newest that is there is {newest}"
    try:
        found = latest(root)  # that it passes over something, it says as a warning, which is an error in these tests
    except (CheckpointError, Warning) as error:
        yield f"I4: {error}"
    else:
        if str(found) != (entries[-1].path if entries else "None"):
            yield f"I4: latest is {found}"


def _number(path: str, manifest: Manifest) -> int:
    """Which save a checkpoint is; asserts that each of its files is that save's."""
    with open(os.path.join(path, "config.json")) as file:
        n = json.load(file)["n"]
    expected = contents(n)
    expected[LINK[1]] = expected[LINK[0]]
    assert set(manifest.files) == set(expected), f"{path}: has the files {sorted(manifest.files)}"
    for name, data in expected.items():
        with open(os.path.join(path, name), "rb") as file:
            assert file.read() == data, f"{path}: {name} is not that of save {n}"
    return n


def next_start(nursery: Nursery, root: str, keep: int) -> Iterator[str]:
    """Violations of I5: the next start sweeps, and the next save is made, seen, and the newest."""
    with nursery.child("save", root=root, writer="thread", keep=keep, saves=[(NEXT, NEXT)]) as child:
        if child.wait() != 0 or child.last("ACK") != NEXT:
            yield f"I5: the next save failed: {child}"
        yield from _complaints(child)
    yield from after_next_save(root, keep)


def after_next_save(root: str, keep: int) -> Iterator[str]:
    """Violations once the save after the fault was made."""
    yield from after_fault(root, NEXT)
    yield from (f"I5: left over: {entry}" for entry in leftovers(root))
    if len(entries := scan(root)) > keep:
        yield f"I5: {len(entries)} checkpoints are kept"


def leftovers(root: str) -> list[str]:
    """Entries of the work directory besides the lock, and what is in `replaced/`."""
    found = []
    for directory in (names.work_directory(root), names.replaced_directory(root)):
        if os.path.isdir(directory):
            found += [entry for entry in os.listdir(directory) if entry not in (names.LOCK, names.REPLACED)]
    return sorted(found)
