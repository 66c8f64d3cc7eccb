"""Ships the checkpoints that the notes name: oldest first, one after the other for each target."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .._disk import notes
from .._disk.filesystem import LocalFilesystem
from .._disk.lock import RootLock
from .._disk.notes import Note
from .._format import names
from ..errors import CheckpointError, CorruptCheckpoint
from ..shipping import Push, Upload, described
from .checkpoint import Damaged, Gone, LocalCheckpoint
from .stores import said

LONGEST_PAUSE = 300.0  # seconds between two tries
_ORPHAN_TRIES = 8  # consecutive failures of a target after which a shipper that nobody watches leaves the rest
_POLL = 0.2  # seconds between two looks whether the previous shipper has ended


class _GiveWay(Exception):
    """Another shipper wants to go on from here."""


@dataclass
class _Failing:
    """A target that failed: how often in a row, and when it is tried again (time.monotonic())."""

    count: int = 0
    retry_at: float = 0.0


class _Watcher:
    """The writer that started this process: it sends a line when there is something to do, and gets the reports."""

    def __init__(self, control: int, report: int) -> None:
        self._control, self._report = control, report
        os.set_blocking(control, False)
        self.gone = False
        self.asked = False  # something was said since this was last set to False

    def look(self, timeout: float | None = 0.0) -> None:
        """Wait until something is said, or for `timeout` seconds. Afterwards `gone` says whether the writer ended."""
        if self.gone:
            time.sleep(timeout or 0.0)
            return
        if select.select([self._control], [], [], timeout)[0]:
            with contextlib.suppress(BlockingIOError):
                self.asked = True
                self.gone = not os.read(self._control, 4096)

    def tell(self, **report: Any) -> None:
        if not self.gone:
            with contextlib.suppress(OSError):  # the end of the control pipe tells that nobody listens
                os.write(self._report, json.dumps(report).encode() + b"\n")


class Shipper:
    """Ships for one root until the writer is gone and nothing can be done any more."""

    def __init__(self, root: str, control: int, report: int) -> None:
        self._root = root
        self._fs = LocalFilesystem()
        self._watcher = _Watcher(control, report)
        self._failing: dict[str, _Failing] = {}  # by target
        self._reported: set[str] = set()
        self._told: dict[str, Any] = {}
        self._unwatched = False  # it went on after the writer had ended

    def run(self) -> None:
        """Wait for the previous shipper of the root, then ship."""
        with self._alone() as alone:
            if alone:
                with contextlib.suppress(_GiveWay):
                    self._work()
                self._tidy()

    def _work(self) -> None:
        while True:
            found = self._next()
            if found is not None:
                self._unwatched |= self._watcher.gone
                self._ship(*found)
            elif not self._watcher.gone:
                self._watcher.look(self._pause())
            elif self._worth_waiting():
                self._unwatched = True
                self._between()
                self._watcher.look(min(self._pause() or 0.0, 1.0))
            else:
                return

    # -- one shipper at a time

    @contextlib.contextmanager
    def _alone(self) -> Iterator[bool]:
        """Hold the lock of the shippers. Yields False if the writer ended before this shipper had its turn."""
        successor = names.shipping_successor(self._root)
        fd = self._locked()
        try:
            if fd is None:
                with contextlib.suppress(FileNotFoundError):
                    os.close(os.open(successor, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666))
            while fd is None:
                self._watcher.look(_POLL)
                if self._watcher.gone:
                    break
                fd = self._locked()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(successor)
            yield fd is not None
        finally:
            if fd is not None:
                os.close(fd)

    def _locked(self) -> int | None:
        """Return the descriptor of the locked file, or None if another shipper holds it."""
        path = names.shipping_lock(self._root)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            return None  # the directory of the notes is not there: it is removed when it is empty
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd)):
                return fd
        except OSError:
            pass
        os.close(fd)
        return None

    def _tidy(self) -> None:
        """Remove the lock file and what else is empty, if nothing is left to be shipped."""
        with contextlib.suppress(OSError):
            if notes.waiting(self._root):
                return
            os.unlink(names.shipping_lock(self._root))
            os.rmdir(names.shipping_directory(self._root))
        if self._unwatched:
            with contextlib.suppress(OSError, CheckpointError):  # else a trainer has the root, and clears it at its end
                RootLock.acquire(self._root, 0.0, create=False).release()

    # -- what to do next

    def _ready(self) -> list[Note]:
        """Return the notes of published checkpoints, oldest first."""
        problems: list[str] = []
        found = [note for note in notes.readable(self._root, problems) if notes.is_published(self._root, note)]
        for problem in set(problems) - self._reported:
            self._reported.add(problem)
            self._watcher.tell(event="after_commit", phase="failed", save_id="", step=None, detail=problem)
        return found

    def _next(self) -> tuple[Note, int] | None:
        """Return the checkpoint and the number of the target to ship it to, or None if none may be tried now."""
        now = time.monotonic()
        ready = self._ready()
        self._tell_status(ready)
        for note in ready:
            for index, target in enumerate(note.targets):
                failing = self._failing.get(_key(target.spec))
                if not target.done and (failing is None or failing.retry_at <= now):
                    return note, index
        return None

    def _pending(self, ready: list[Note]) -> set[str]:
        return {_key(target.spec) for note in ready for target in note.targets if not target.done}

    def _tell_status(self, ready: list[Note]) -> None:
        """Tell which checkpoints wait, and how often in a row the least unlucky of their targets has failed."""
        counts = [self._failing.get(key, _Failing()).count for key in self._pending(ready)]
        status = {"save_ids": [note.save_id for note in ready], "failures": min(counts, default=0)}
        if status != self._told or self._watcher.asked:
            self._watcher.tell(event="unshipped", first=not self._told, **status)
            self._watcher.asked = False
            self._told = status

    def _pause(self) -> float | None:
        """Return the seconds until a target is tried again, or None if none waits."""
        times = [self._failing[key].retry_at for key in self._pending(self._ready()) if key in self._failing]
        return max(min(times) - time.monotonic(), 0.0) if times else None

    def _worth_waiting(self) -> bool:
        """Return whether any target with something to ship has not failed too often."""
        return any(self._failing.get(key, _Failing()).count < _ORPHAN_TRIES for key in self._pending(self._ready()))

    def _between(self) -> None:
        """Called between parts. Raises `_GiveWay` if this shipper is watched by nobody and another one waits."""
        self._watcher.look()
        if self._watcher.gone and os.path.lexists(names.shipping_successor(self._root)):
            raise _GiveWay

    # -- shipping

    def _ship(self, note: Note, index: int) -> None:
        target = note.targets[index]
        began = time.monotonic()
        key = _key(target.spec)
        where = described(target.spec)

        def tell(phase: str, detail: str, size: int = 0, *, over: bool = False) -> None:
            self._watcher.tell(
                event="after_commit",
                phase=phase,
                save_id=note.save_id,
                step=note.step,
                index=index,
                bytes=size,
                seconds=time.monotonic() - began if phase != "started" else 0.0,
                detail=detail,
                over=over,
            )

        self._between()
        progress = _Progress(self._fs, self._root, note, index)
        tell("started", f"{note.name} to {where}")
        try:
            if not target.begun:
                progress.update(begun=True)
            with LocalCheckpoint(os.path.join(self._root, note.name), note.save_id) as local:
                size = self._send(local, target, progress)
            progress.update(done=True)
        except _GiveWay:
            raise
        except Gone as error:
            # The writer removes the note, because only it can tell that the checkpoint does not come back.
            tell("failed", f"{note.name} to {where}: {error}", over=True)
            self._back_off(key)
        except Damaged as error:
            notes.remove(self._fs, self._root, note.save_id)
            tell("failed", f"{note.name} to {where}: {error}; it is not shipped", over=True)
        except Exception as error:
            count, pause = self._back_off(key)
            if count & (count - 1) == 0:  # the first, second, fourth, eighth ... failure in a row
                tell(
                    "failed", f"{note.name} to {where}: {said(error)}; failed {count} times, next try in {pause:.0f} s"
                )
        else:
            self._failing.pop(key, None)
            tell("complete", f"{note.name} to {where}", size)

    def _send(self, local: LocalCheckpoint, target: notes.Target, progress: _Progress) -> int:
        """Ship to one target. Returns the bytes that were sent."""
        spec = dict(target.spec)
        kind = spec.pop("kind")
        if kind == Push.kind:
            from .hub import Pushing

            return Pushing(local, **spec, again=target.begun, between=self._between).run()
        if kind != Upload.kind:
            raise CorruptCheckpoint(f"this version ships nothing of the kind {kind!r}")
        from .uploading import Uploading

        remote = names.remote_checkpoint(os.path.basename(local.path), local.manifest.save_id)
        Uploading(spec["url"], local, remote, target.sent, progress.sent, self._between).run()
        return progress.bytes

    def _back_off(self, key: str) -> tuple[int, float]:
        """Note a failure. Returns how many came in a row, and the seconds until the next try."""
        failing = self._failing.setdefault(key, _Failing())
        failing.count += 1
        pause = min(2.0 ** (failing.count - 1), LONGEST_PAUSE)
        failing.retry_at = time.monotonic() + pause
        return failing.count, pause


class _Progress:
    """Keeps a note up to date while its checkpoint is shipped to one target."""

    def __init__(self, fs: LocalFilesystem, root: str, note: Note, index: int) -> None:
        self._fs, self._root, self._note, self._index = fs, root, note, index
        self.bytes = 0

    def update(self, **changes: Any) -> None:
        """Change the target in the note. A note whose targets all have the checkpoint is removed."""
        if not notes.exists(self._root, self._note.save_id):
            raise Gone(f"{self._note.name}: was given up")
        self._note = self._note.with_target(self._index, **changes)
        if all(target.done for target in self._note.targets):
            notes.remove(self._fs, self._root, self._note.save_id)
        else:
            notes.put(self._fs, self._root, self._note)

    def sent(self, name: str, e_tag: str, size: int) -> None:
        """One object is finished."""
        self.bytes += size
        self.update(sent={**self._note.targets[self._index].sent, name: e_tag})


def _key(spec: Any) -> str:
    """Return a text that is the same for the same target."""
    return json.dumps(dict(spec), sort_keys=True)
