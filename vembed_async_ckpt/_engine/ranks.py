"""The ranks of a distributed training: what each adds to a save, and what the first tells the others of it.

They speak through the job's own store, by polling, on a thread of their own. No collective ever runs in the background; a rank
that fails, dies or never comes makes the save fail on all of them, with the reason.

Every call of `save()` for a directory has a number, which is the same on all ranks because all of them call it. Under
`{directory}/{number}/` stand: `from/{rank}` what a rank adds or why it cannot, `said` what the first rank last said of the save,
`seen` how many ranks have read its end. `beat/{rank}` changes as long as a rank lives.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch.distributed as dist

from .. import errors
from ..errors import CheckpointError, StageError
from .handle import CheckpointInfo, SaveState, Timings

POLL = 0.05  # seconds between looks into the store while something is awaited
BEAT = 2.0  # seconds between signs of life
SILENCE = 60.0  # seconds without a sign of life after which a rank is given up
ARRIVAL = 120.0  # seconds that the first rank waits for the others to come to a save
PATIENCE = 600.0  # seconds that the others wait for the first to come: it may be evaluating
ROOM = 256 << 10  # bytes that a rank's files are expected to take, until more has been seen

Files = list[tuple[str, bytes]]
Gathered = Files | CheckpointError

_ENDS = (SaveState.COMMITTED, SaveState.FAILED, SaveState.SKIPPED)
_INSTANCES: Counter[str] = Counter()  # checkpointers made for roots of a name: the same on every rank
_CHUNK = 4 << 20  # bytes of one value: the job's store refuses larger ones than 8 MiB


class RaisedElsewhere(StageError):
    """`save()` itself raised it on another rank, where it was seen."""


class Meeting(Protocol):
    """One save on the rank that writes it, and the others' part in it."""

    room: int  # bytes of an arena to be kept for the others' files

    def gather(self, done: Callable[[Gathered], None]) -> None:
        """Call `done` once, with what the other ranks add or with why the save must fail, at the latest after `ARRIVAL`."""

    def say(self, state: SaveState, info: CheckpointInfo | None = None, error: CheckpointError | None = None) -> None:
        """Let the other ranks know where the save is."""


class Alone:
    """The meeting of a training that has one rank."""

    room = 0

    def gather(self, done: Callable[[Gathered], None]) -> None:
        done([])

    def say(self, state: SaveState, info: CheckpointInfo | None = None, error: CheckpointError | None = None) -> None:
        pass


class _Task(Protocol):
    def poll(self) -> bool:
        """Look once into the store; whether there is nothing more to look for."""

    def fail(self, error: CheckpointError) -> None:
        """The store is gone."""


class Ranks:
    """This process among the ranks of its job, for one checkpointer."""

    def __init__(self, store: Any, rank: int, world_size: int, server: Any = None) -> None:
        """`store` is a torch.distributed.Store that no other thread uses; `server`, which may serve the other ranks, is kept
        alive as long."""
        self.rank = rank
        self.world_size = world_size
        self.room = ROOM
        self.store = store
        self._server = server
        self._calls: Counter[tuple[str, bool]] = Counter()
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._beats = 0
        self._looked = time.monotonic()
        self._next_beat = 0.0
        self._changed = threading.Condition()
        # guarded by _changed:
        self._tasks: list[_Task] = []
        self._closing = False
        self._broken: CheckpointError | None = None
        self._thread = threading.Thread(target=self._run, name="vembed-ckpt-ranks", daemon=True)
        self._thread.start()

    @classmethod
    def of_this_process(cls, root: str) -> Ranks | None:
        """None unless this process belongs to a torch.distributed job of several ranks. Every rank must make its
        checkpointers of a root in the same order."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return None
        from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

        shared = _get_default_store()
        name = os.path.basename(root)  # where the root is mounted may differ from node to node
        number = _INSTANCES[name] = _INSTANCES[name] + 1
        # torch before 2.8 cannot clone: then the calls, all short, take turns with the training's own.
        own = shared.clone() if hasattr(shared, "clone") else shared
        store = PrefixStore(f"vembed_async_ckpt/{name}/{number}", own)
        return cls(store, dist.get_rank(), dist.get_world_size(), shared)

    @staticmethod
    def forget(root: str) -> None:
        """The checkpointer that was to be made of `root` was not: the next one takes its number."""
        _INSTANCES[os.path.basename(root)] -= 1

    # -- from any thread

    def meet(self, directory: str, of_every_rank: bool) -> Meeting:
        """On the first rank: one call of `save()`. With `of_every_rank` all the others must come too."""
        key = self._key(directory, of_every_rank)
        if not of_every_rank:
            before, _, number = key.rpartition("/")
            self.add(_TakeBack(self, f"{before}/{int(number) - 1}/said"))  # nobody says that he has read it
        return _Meeting(self, key, directory, of_every_rank)

    def join(
        self,
        directory: str,
        of_every_rank: bool,
        render: Callable[[], Files],
        heard: Callable[[SaveState, CheckpointInfo | None, CheckpointError | None], None],
    ) -> None:
        """On the others: add what `render` gives, and pass on what the first rank says until the save has ended. Both are
        called on the ranks' thread; what `render` raises fails the save everywhere."""
        self.add(_Follow(self, self._key(directory, of_every_rank), directory, of_every_rank, render, heard))

    def add(self, task: _Task) -> None:
        with self._changed:
            broken = self._broken
            if broken is None:
                self._tasks.append(task)
                self._changed.notify_all()
        if broken is not None:
            task.fail(broken)

    def close(self, timeout: float) -> None:
        """Let the others read what was said last, for at most `timeout` seconds, and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout)
        with self._changed:
            left, self._tasks = self._tasks, []
            self._changed.notify_all()
        for task in left:
            task.fail(StageError("the checkpointer was closed before all ranks knew the end of the save"))
        self._thread.join(1.0)

    def check(self) -> None:
        """Raise `StageError` if nobody looks into the store any more."""
        if self._tasks and time.monotonic() - self._looked > 2 * PATIENCE:
            raise StageError("the job's store has not answered for a long time; is the first rank's host gone?")

    def silence(self, rank: int) -> float | None:
        """Seconds since `rank` gave its last sign of life; None if it never gave one. On the ranks' thread."""
        name = f"beat/{rank}"
        now = time.monotonic()
        if not self.store.check([name]):
            return None
        beat = bytes(self.store.get(name))
        known = self._heard.get(rank)
        if known is None or known[0] != beat:
            known = self._heard[rank] = (beat, now)
        return now - known[1]

    def _key(self, directory: str, of_every_rank: bool) -> str:
        number = self._calls[directory, of_every_rank] = self._calls[directory, of_every_rank] + 1
        return f"{directory}/{'all' if of_every_rank else 'first'}/{number}"

    # -- on the ranks' thread

    def _run(self) -> None:
        try:
            while (tasks := self._wait()) is not None:
                self._looked = time.monotonic()
                if time.monotonic() >= self._next_beat:
                    self._beats += 1
                    self.store.set(f"beat/{self.rank}", str(self._beats))
                    self._next_beat = time.monotonic() + BEAT
                for task in tasks:
                    if task.poll():
                        with self._changed, contextlib.suppress(ValueError):
                            self._tasks.remove(task)
        except Exception as error:
            broken = StageError(f"the ranks cannot speak to each other any more: {type(error).__name__}: {error}")
            broken.__cause__ = error
            with self._changed:
                self._broken = broken
                tasks, self._tasks = self._tasks, []
            for task in tasks:
                task.fail(broken)

    def _wait(self) -> list[_Task] | None:
        """The tasks to be looked after now; None at the end."""
        with self._changed:
            if not self._closing:
                self._changed.wait(POLL if self._tasks else max(0.0, self._next_beat - time.monotonic()))
            elif self._tasks:
                self._changed.wait(POLL)
            return None if self._closing and not self._tasks else list(self._tasks)


class _Meeting:
    def __init__(self, ranks: Ranks, key: str, directory: str, of_every_rank: bool) -> None:
        self._ranks = ranks
        self._key = key
        self._directory = directory
        self._of_every_rank = of_every_rank
        self.room = ranks.room * (ranks.world_size - 1) if of_every_rank else 0
        self._over = False
        self.say(SaveState.STAGING)

    def gather(self, done: Callable[[Gathered], None]) -> None:
        if self._of_every_rank:
            self._ranks.add(_Gather(self._ranks, self._key, self._directory, done))
        else:
            done([])

    def say(self, state: SaveState, info: CheckpointInfo | None = None, error: CheckpointError | None = None) -> None:
        if self._over:
            return
        self._over = state in _ENDS
        self._ranks.add(_Say(self._ranks, f"{self._key}/said", _said(state, info, error)))
        if self._over and self._of_every_rank:
            self._ranks.add(_Forget(self._ranks, self._key))


class _Say:
    def __init__(self, ranks: Ranks, name: str, value: str) -> None:
        self._ranks, self._name, self._value = ranks, name, value

    def poll(self) -> bool:
        self._ranks.store.set(self._name, self._value)
        return True

    def fail(self, error: CheckpointError) -> None:
        pass  # the others notice by themselves that the store is gone


class _TakeBack:
    def __init__(self, ranks: Ranks, name: str) -> None:
        self._ranks, self._name = ranks, name

    def poll(self) -> bool:
        self._ranks.store.delete_key(self._name)
        return True

    def fail(self, error: CheckpointError) -> None:
        pass


class _Forget:
    """When every rank has read the end of a save its keys are taken back. One that comes much later still finds the end."""

    def __init__(self, ranks: Ranks, key: str) -> None:
        self._ranks = ranks
        self._key = key
        self._deadline = time.monotonic() + SILENCE

    def poll(self) -> bool:
        store, others = self._ranks.store, self._ranks.world_size - 1
        seen = store.add(f"{self._key}/seen", 0)
        if seen < others and time.monotonic() < self._deadline:
            return False
        for rank in range(1, others + 1):
            _take_back(store, f"{self._key}/from/{rank}")
        if seen >= others:
            store.delete_key(f"{self._key}/seen")
            store.delete_key(f"{self._key}/said")
        return True

    def fail(self, error: CheckpointError) -> None:
        pass


class _Gather:
    """The first rank waits for what the others add."""

    def __init__(self, ranks: Ranks, key: str, directory: str, done: Callable[[Gathered], None]) -> None:
        self._ranks = ranks
        self._key = key
        self._directory = directory
        self._done = done
        self._missing = list(range(1, ranks.world_size))
        self._files: dict[int, Files] = {}
        self._begun = time.monotonic()

    def poll(self) -> bool:
        store = self._ranks.store
        for rank in list(self._missing):
            name = f"{self._key}/from/{rank}"
            if not store.check([name]):
                continue
            added = json.loads(_get(store, name))
            if "error" in added:
                kind = RaisedElsewhere if added["raised"] else StageError
                self._done(kind(f"rank {rank} cannot take part in saving {self._directory}: {added['error']}"))
                return True
            self._files[rank] = [(name, base64.b64decode(data)) for name, data in added["files"]]
            self._ranks.room = max(self._ranks.room, sum(len(data) + 8192 for _, data in self._files[rank]))
            self._missing.remove(rank)
        if not self._missing:
            self._done([file for rank in sorted(self._files) for file in self._files[rank]])
            return True
        return self._give_up()

    def _give_up(self) -> bool:
        if time.monotonic() - self._begun > ARRIVAL:
            missing = ", ".join(map(str, self._missing[:20]))
            self._done(
                StageError(
                    f"{self._directory}: rank {missing} of {self._ranks.world_size} did not call save() within {ARRIVAL:.0f} s. "
                    "Every rank must call it: the random state of each is saved. On the first rank alone only "
                    "save_checkpoint(..., training_state=False) may be called"
                )
            )
            return True
        for rank in self._missing:
            silence = self._ranks.silence(rank)
            if silence is not None and silence > SILENCE:
                self._done(StageError(f"{self._directory}: rank {rank} has not been heard of for {silence:.0f} s"))
                return True
        return False

    def fail(self, error: CheckpointError) -> None:
        self._done(error)


class _Follow:
    """Another rank adds its part and listens to the first."""

    def __init__(
        self,
        ranks: Ranks,
        key: str,
        directory: str,
        of_every_rank: bool,
        render: Callable[[], Files],
        heard: Callable[[SaveState, CheckpointInfo | None, CheckpointError | None], None],
    ) -> None:
        self._ranks = ranks
        self._key = key
        self._directory = directory
        self._of_every_rank = of_every_rank
        self._render = render
        self._heard = heard
        self._added = False
        self._last = b""
        self._begun = time.monotonic()

    def poll(self) -> bool:
        if not self._added:
            self._added = True
            if self._of_every_rank:
                self._add()
        store = self._ranks.store
        name = f"{self._key}/said"
        if store.check([name]):
            said = bytes(store.get(name))
            if said != self._last:
                self._last = said
                state, info, error = _parse(said)
                self._heard(state, info, error)
                if state in _ENDS:
                    if self._of_every_rank:
                        store.add(f"{self._key}/seen", 1)
                    return True
        return self._give_up()

    def _add(self) -> None:
        try:
            files = [(name, base64.b64encode(data).decode()) for name, data in self._render()]
        except Exception as error:  # whatever it is, the others must know
            self._put({"error": f"{type(error).__name__}: {error}", "raised": True})
        else:
            self._put({"files": files})

    def _put(self, value: Any) -> None:
        _put(self._ranks.store, f"{self._key}/from/{self._ranks.rank}", json.dumps(value))

    def _give_up(self) -> bool:
        silence = self._ranks.silence(0)
        if silence is not None and silence > SILENCE:
            reason = f"rank 0, which writes, has not been heard of for {silence:.0f} s"
        elif not self._last and time.monotonic() - self._begun > PATIENCE:
            reason = f"rank 0, which writes, did not call save() within {PATIENCE:.0f} s; every rank must call it"
        else:
            return False
        self._put({"error": "it gave up waiting", "raised": False})
        self.fail(StageError(f"{self._directory}: {reason}"))
        return True

    def fail(self, error: CheckpointError) -> None:
        self._heard(SaveState.FAILED, None, error)


def _put(store: Any, name: str, text: str) -> None:
    """Store a text in pieces; when `name` is there, all of it is."""
    pieces = [text[start : start + _CHUNK] for start in range(0, len(text), _CHUNK)]
    for number, piece in enumerate(pieces):
        store.set(f"{name}/{number}", piece)
    store.set(name, str(len(pieces)))


def _get(store: Any, name: str) -> str:
    return "".join(store.get(f"{name}/{number}").decode() for number in range(int(store.get(name))))


def _take_back(store: Any, name: str) -> None:
    if store.check([name]):
        for number in range(int(store.get(name))):
            store.delete_key(f"{name}/{number}")
        store.delete_key(name)


def _said(state: SaveState, info: CheckpointInfo | None, error: CheckpointError | None) -> str:
    said: dict[str, Any] = {"state": state.value}
    if info is not None:
        said["info"] = {
            "path": str(info.path),
            "step": info.step,
            "total_bytes": info.total_bytes,
            "files": dict(info.files),
            "timings": asdict(info.timings),
        }
    if error is not None:
        kind = next(base.__name__ for base in type(error).__mro__ if hasattr(errors, base.__name__))
        said["error"] = [kind, str(error), isinstance(error, RaisedElsewhere)]
    return json.dumps(said)


def _parse(said: bytes) -> tuple[SaveState, CheckpointInfo | None, CheckpointError | None]:
    value = json.loads(said)
    info = error = None
    if "info" in value:
        body = value["info"]
        info = CheckpointInfo(
            Path(body["path"]),
            body["step"],
            body["total_bytes"],
            MappingProxyType(body["files"]),
            Timings(**body["timings"]),
        )
    if "error" in value:
        kind, message, raised = value["error"]
        error = RaisedElsewhere(message) if raised else getattr(errors, kind)(message)
    return SaveState(value["state"]), info, error


def merge(own: Sequence[tuple[str, bytes]], gathered: Files) -> Files:
    """The files of all ranks; of those that several wrote under one name, the first rank's."""
    merged = dict(own)
    for name, data in gathered:
        merged.setdefault(name, data)
    return list(merged.items())
