"""The notes that say which checkpoints are still to be shipped, and where to.

A note is written and synced before its checkpoint is published, and removed when the checkpoint is at every target. So
a crash in between loses nothing: the next run ships it. While there is a note, retention does not delete the
checkpoint. Before the publication only the writer changes a note, afterwards only the shipper; both may remove it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .._format import bounded_json, names
from ..errors import CorruptCheckpoint
from . import manifests
from .filesystem import Filesystem, make_directories, read_regular, write_synced

_FORMAT = "vembed_async_ckpt shipping"
_VERSION = 1
_MAX_BYTES = 1 << 26
_NEW = ".new"  # a note that is being written
_TRIES = (
    10  # times that the directory may vanish before a note is in it: a shipper that ends removes it when it is empty
)


@dataclass(frozen=True)
class Target:
    """Where a checkpoint is to go.

    `spec`: what `shipping.Shipment.spec` returned. `begun`: a shipper has begun. `sent`: the finished objects, as {file
    name: e_tag of the store}. `done`: the checkpoint is there.
    """

    spec: Mapping[str, Any]
    begun: bool = False
    sent: Mapping[str, str] = field(default_factory=dict)
    done: bool = False


@dataclass(frozen=True)
class Note:
    """One checkpoint that is to be shipped.

    `name`: of its directory. `sequence`, `step`: as in its manifest. `most`: how many checkpoints that retention does
    not keep may wait to be shipped; None means any number.
    """

    save_id: str
    name: str
    step: int | None
    sequence: int
    targets: tuple[Target, ...]
    most: int | None = None

    @property
    def begun(self) -> bool:
        return any(target.begun for target in self.targets)

    def with_target(self, index: int, **changes: Any) -> Note:
        """Return the note with one target changed."""
        targets = list(self.targets)
        targets[index] = replace(targets[index], **changes)
        return replace(self, targets=tuple(targets))


def put(fs: Filesystem, root: str, note: Note) -> None:
    """Write a note, or replace it. When this returns, it survives a power cut."""
    path = names.shipping_note(root, note.save_id)
    new = path + _NEW
    for attempt in range(_TRIES):
        try:
            make_directories(fs, os.path.dirname(path))
            with contextlib.suppress(FileNotFoundError):
                fs.unlink(new)  # left by a crash
            write_synced(fs, new, _render(note))
            fs.rename(new, path, "plain")
            fs.sync_directory(os.path.dirname(path))
            return
        except (FileNotFoundError, FileExistsError):
            if attempt + 1 == _TRIES:
                raise


def remove(fs: Filesystem, root: str, save_id: str) -> None:
    """Remove a note, durably. It may be gone already."""
    path = names.shipping_note(root, save_id)
    if os.path.lexists(path):
        with contextlib.suppress(FileNotFoundError):
            fs.unlink(path)
            fs.sync_directory(os.path.dirname(path))


def exists(root: str, save_id: str) -> bool:
    return os.path.lexists(names.shipping_note(root, save_id))


def waiting(root: str) -> set[str]:
    """Return the save ids of all notes, readable or not. Raises OSError if they cannot be listed."""
    return {save_id for save_id in map(names.parse_shipping_note, _entries(root)) if save_id is not None}


def _entries(root: str) -> list[str]:
    try:
        return os.listdir(names.shipping_directory(root))
    except (FileNotFoundError, NotADirectoryError):
        return []


def read(root: str, save_id: str) -> Note | None:
    """Return a note, or None if there is none. Raises `CorruptCheckpoint` if it cannot be read."""
    path = names.shipping_note(root, save_id)
    try:
        body = bounded_json.loads(read_regular(path, _MAX_BYTES))
        if body["format"] != _FORMAT or body["version"] != _VERSION:
            raise ValueError(f"it is {body['format']!r} of version {body['version']!r}")
        return Note(
            save_id=_same(save_id, body["save_id"]),
            name=_plain(body["name"]),
            step=None if body["step"] is None else int(body["step"]),
            sequence=int(body["sequence"]),
            targets=tuple(
                Target(dict(t["spec"]), bool(t["begun"]), dict(t["sent"]), bool(t["done"])) for t in body["targets"]
            ),
            most=None if body["most"] is None else int(body["most"]),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path}: cannot be used: {error}") from error


def readable(root: str, problem: list[str] | None = None) -> list[Note]:
    """Return the notes that can be read, oldest checkpoint first.

    What is wrong with the others is added to `problem`.
    """
    found = []
    for save_id in sorted(waiting(root)):
        try:
            note = read(root, save_id)
        except CorruptCheckpoint as error:
            if problem is not None:
                problem.append(str(error))
            continue
        if note is not None:
            found.append(note)
    return sorted(found, key=lambda note: note.sequence)


def is_published(root: str, note: Note) -> bool:
    """Return whether the checkpoint of a note has its final name."""
    try:
        return manifests.read(os.path.join(root, note.name)).save_id == note.save_id
    except CorruptCheckpoint:
        return False


def drop_unpublished(fs: Filesystem, root: str) -> list[Note]:
    """Remove and return the notes whose checkpoints are gone, were replaced, or were never published.

    Only the holder of the root's lock may call this, when no save is under way. A note stays if the directory of its
    name cannot be read. Notes that a crash left half written are removed too.
    """
    dropped = []
    for entry in _entries(root):
        if entry.endswith(_NEW) and names.parse_shipping_note(entry.removesuffix(_NEW)) is not None:
            with contextlib.suppress(FileNotFoundError):  # a shipper has just finished it
                fs.unlink(os.path.join(names.shipping_directory(root), entry))
    for note in readable(root):
        directory = os.path.join(root, note.name)
        if not os.path.lexists(os.path.join(directory, names.MANIFEST)) or _is_another(directory, note):
            remove(fs, root, note.save_id)
            dropped.append(note)
    return dropped


def not_shipped(note: Note) -> str:
    """Return one line for people about a note that `drop_unpublished` returned."""
    return f"{note.name} was not shipped: the save that was to be shipped is not there, or another one has replaced it"


def giving_way(notes: Iterable[Note]) -> list[Note]:
    """Return which of the checkpoints that retention would delete are no longer kept for being shipped.

    They are the oldest, as many as there are more than allowed. One whose shipping has begun is not among them:
    otherwise a network that is slower than the saves would never let one arrive.
    """
    ordered = sorted(notes, key=lambda note: note.sequence)
    limits = [note.most for note in ordered if note.most is not None]
    excess = max(len(ordered) - min(limits), 0) if limits else 0
    return [note for note in ordered if not note.begun][:excess]


def _is_another(directory: str, note: Note) -> bool:
    try:
        return manifests.read(directory).save_id != note.save_id
    except CorruptCheckpoint:
        return False


def _render(note: Note) -> bytes:
    return json.dumps(
        {
            "format": _FORMAT,
            "version": _VERSION,
            "save_id": note.save_id,
            "name": note.name,
            "step": note.step,
            "sequence": note.sequence,
            "most": note.most,
            "targets": [
                {"spec": dict(t.spec), "begun": t.begun, "sent": dict(t.sent), "done": t.done} for t in note.targets
            ],
        },
        indent=1,
    ).encode()


def _same(expected: str, found: Any) -> str:
    if found != expected:
        raise ValueError(f"it is the note of save {found!r}")
    return expected


def _plain(name: Any) -> str:
    """Return the name of a checkpoint's directory; it must not lead out of the root."""
    if not isinstance(name, str) or "/" in name or name in ("", ".", ".."):
        raise ValueError(f"{name!r} is not the name of a directory in the root")
    return name
