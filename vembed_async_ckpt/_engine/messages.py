"""What the ranks of a job write for each other into its store, and how it is read."""

from __future__ import annotations

import base64
import json
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from .. import errors
from .._frozen import FrozenDict
from ..errors import CheckpointError, StageError
from ..handle import CheckpointInfo, SaveState, Timings

Files = list[tuple[str, bytes]]

ENDS = (SaveState.COMMITTED, SaveState.FAILED, SaveState.SKIPPED)
_CHUNK = 4 << 20  # bytes of one value: the job's store refuses larger ones than 8 MiB


class RaisedElsewhere(StageError):
    """`save()` itself raised it on another rank, where it was seen."""


@dataclass
class Entry:
    """One save in the list of those that the first rank began for a directory. `time`: of the call, since the epoch.
    `released`: it goes on without the ranks that have not added their part."""

    number: int
    step: int | None
    time: float
    released: bool = False


def put_entries(store: Any, name: str, entries: list[Entry]) -> None:
    """Replace the list."""
    if entries:
        store.set(name, json.dumps(list(map(astuple, entries))))
    else:
        store.delete_key(name)


def get_entries(store: Any, name: str) -> list[Entry]:
    """The list, oldest first; empty if there is none."""
    return [Entry(*entry) for entry in json.loads(store.get(name))] if store.check([name]) else []


def put_files(store: Any, name: str, files: Files) -> None:
    """Store a rank's part of a save."""
    _put(store, name, json.dumps({"files": [(file, base64.b64encode(data).decode()) for file, data in files]}))


def put_refusal(store: Any, name: str, reason: str, *, raised: bool) -> None:
    """Store why a rank has no part. `raised`: its own `save()` raised it."""
    _put(store, name, json.dumps({"error": reason, "raised": raised}))


def get_part(store: Any, name: str) -> Files | tuple[str, bool] | None:
    """A rank's part, or (reason, raised) of a rank that has none; None while nothing is there."""
    if not store.check([name]):
        return None
    part = json.loads("".join(store.get(f"{name}/{number}").decode() for number in range(int(store.get(name)))))
    if "error" in part:
        return part["error"], part["raised"]
    return [(file, base64.b64decode(data)) for file, data in part["files"]]


def _put(store: Any, name: str, text: str) -> None:
    """Store a text in pieces; when `name` is there, all of it is."""
    pieces = [text[start : start + _CHUNK] for start in range(0, len(text), _CHUNK)]
    for number, piece in enumerate(pieces):
        store.set(f"{name}/{number}", piece)
    store.set(name, str(len(pieces)))


def take_back(store: Any, name: str) -> None:
    """Remove a rank's part, if it is there."""
    if store.check([name]):
        for number in range(int(store.get(name))):
            store.delete_key(f"{name}/{number}")
        store.delete_key(name)


@dataclass(frozen=True)
class Said:
    """Where a save is. `without`: the ranks whose part is not in it."""

    state: SaveState
    info: CheckpointInfo | None = None
    error: CheckpointError | None = None
    without: tuple[int, ...] = ()


def render(said: Said) -> str:
    """`said` as text."""
    value: dict[str, Any] = {"state": said.state.value, "without": said.without}
    info, error = said.info, said.error
    if info is not None:
        value["info"] = {
            "path": str(info.path),
            "step": info.step,
            "total_bytes": info.total_bytes,
            "files": dict(info.files),
            "timings": asdict(info.timings),
        }
    if error is not None:
        kind = next(base.__name__ for base in type(error).__mro__ if hasattr(errors, base.__name__))
        value["error"] = [kind, str(error), isinstance(error, RaisedElsewhere)]
    return json.dumps(value)


def parse(text: bytes) -> Said:
    """The inverse of `render`."""
    value = json.loads(text)
    info = error = None
    if "info" in value:
        body = value["info"]
        info = CheckpointInfo(
            Path(body["path"]), body["step"], body["total_bytes"], FrozenDict(body["files"]), Timings(**body["timings"])
        )
    if "error" in value:
        kind, message, raised = value["error"]
        error = RaisedElsewhere(message) if raised else getattr(errors, kind)(message)
    return Said(SaveState(value["state"]), info, error, tuple(value["without"]))
