"""The messages that the ranks of a job write for each other into the job's store: how they are written and read."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from .. import errors
from .._format import bounded_json
from .._frozen import FrozenDict
from ..errors import CheckpointerBusy, CheckpointError, PlanError, StageError
from ..handle import CheckpointInfo, SaveState, Timings

Files = list[tuple[str, bytes]]

ENDS = (SaveState.COMMITTED, SaveState.FAILED, SaveState.SKIPPED)
_CHUNK = 4 << 20  # bytes of one value: the job's store refuses values of more than 8 MiB


class RaisedElsewhere(StageError):
    """`save()` itself raised this error on another rank, so the user saw it there."""


class RefusedElsewhere(PlanError, RaisedElsewhere):
    """`save()` itself raised this `PlanError` on another rank."""


def raised_elsewhere(text: str, error: BaseException) -> CheckpointError:
    """Return what the other ranks raise or report when `save()` raises `error` here, with `text` as its message."""
    if isinstance(error, PlanError):
        return RefusedElsewhere(text)
    return CheckpointerBusy(text) if isinstance(error, CheckpointerBusy) else RaisedElsewhere(text)


@dataclass
class Entry:
    """One save in the list of saves that the first rank began for a directory.

    `number`: assigned by the first rank. `time`: when save() was called, in seconds since the epoch. `released`: the
    save goes on without the ranks that have not added their part.
    """

    number: int
    step: int | None
    time: float
    released: bool = False


def put_entries(store: Any, name: str, entries: list[Entry]) -> None:
    """Replace the list; delete it if `entries` is empty."""
    if entries:
        store.set(name, json.dumps(list(map(astuple, entries))))
    else:
        store.delete_key(name)


def get_entries(store: Any, name: str) -> list[Entry]:
    """Return the list, oldest first; empty if there is none. Raises `StageError` if it is no list of ours."""
    if not store.check([name]):
        return []
    with _reading(name):
        return [Entry(*entry) for entry in bounded_json.loads(store.get(name))]


def put_files(store: Any, name: str, files: Files) -> None:
    """Store a rank's part of a save."""
    _put(store, name, json.dumps({"files": [(file, base64.b64encode(data).decode()) for file, data in files]}))


def put_refusal(store: Any, name: str, reason: str, *, raised: bool) -> None:
    """Store the reason why a rank has no part. `raised`: its own `save()` raised that error."""
    _put(store, name, json.dumps({"error": reason, "raised": raised}))


def get_part(store: Any, name: str) -> Files | tuple[str, bool] | None:
    """Return a rank's part, or (reason, raised) of a rank that has none. Return None while neither is in the store.

    Raises `StageError` if what is there is none of ours.
    """
    if not store.check([name]):
        return None
    with _reading(name):
        part = bounded_json.loads(b"".join(store.get(f"{name}/{number}") for number in range(int(store.get(name)))))
        if "error" in part:
            return str(part["error"]), bool(part["raised"])
        return [(str(file), base64.b64decode(data, validate=True)) for file, data in part["files"]]


def _put(store: Any, name: str, text: str) -> None:
    """Store a text in pieces. `name` itself is set last, so a reader that finds `name` finds every piece."""
    pieces = [text[start : start + _CHUNK] for start in range(0, len(text), _CHUNK)]
    for number, piece in enumerate(pieces):
        store.set(f"{name}/{number}", piece)
    store.set(name, str(len(pieces)))


def take_back(store: Any, name: str) -> None:
    """Remove a rank's part, if there is one."""
    if store.check([name]):
        for number in range(int(store.get(name))):
            store.delete_key(f"{name}/{number}")
        store.delete_key(name)


@dataclass(frozen=True)
class Said:
    """What the first rank reports about a save. `without`: the ranks whose part is not in it."""

    state: SaveState
    info: CheckpointInfo | None = None
    error: CheckpointError | None = None
    without: tuple[int, ...] = ()


def render(said: Said) -> str:
    """Return `said` as text."""
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
        value["error"] = describe(error)
    return json.dumps(value)


def describe(error: CheckpointError) -> list[Any]:
    """Return `error` as JSON values."""
    kind = next(base.__name__ for base in type(error).__mro__ if hasattr(errors, base.__name__))
    return [kind, str(error), isinstance(error, RaisedElsewhere)]


def described(value: list[Any]) -> CheckpointError:
    """Return the error that `describe` made `value` of."""
    kind, message, raised = value
    if raised:
        return RefusedElsewhere(message) if kind == PlanError.__name__ else RaisedElsewhere(message)
    return _ERRORS[kind](message)


def parse(text: bytes) -> Said:
    """Return the `Said` that `render` made `text` of. Raises `StageError` for another text."""
    with _reading("a report"):
        value = bounded_json.loads(text)
        info = error = None
        if "info" in value:
            body = value["info"]
            info = CheckpointInfo(
                Path(body["path"]),
                body["step"],
                body["total_bytes"],
                FrozenDict(body["files"]),
                Timings(**body["timings"]),
            )
        if "error" in value:
            error = described(value["error"])
        return Said(SaveState(value["state"]), info, error, tuple(map(int, value["without"])))


_ERRORS: dict[str, type[CheckpointError]] = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, CheckpointError)
}


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    """Raise `StageError` for what is in the job's store and no rank wrote."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise StageError(
            f"what the job's store has as {name!r} was not written by a rank of this job: {error!r}"
        ) from error
