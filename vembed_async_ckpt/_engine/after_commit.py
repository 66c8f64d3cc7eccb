"""What happens to a checkpoint after its commit, as the trainer sees it.

Functions are called here, on a thread of their own. Shipments are done by the shipper process; here their reports
become events, and `drain` waits for them.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from .. import _signals
from .._disk.reader import hold
from .._format import names
from ..events import Event, Reporter, logger
from ..handle import CheckpointInfo
from ..shipping import Shipment

AfterCommit = Callable[[CheckpointInfo], object] | Shipment

_TRIES = 3  # of a function that raises
_PAUSE = 1.0  # seconds before its second try; doubled before each further one
_QUIET = 10.0  # seconds after which `drain` says what it waits for
_HOPELESS = 3  # failures in a row after which `drain` does not wait for a shipment


class AfterCommits:
    """Runs `after_commit` for the checkpoints of one checkpointer. Nothing that happens here fails a save."""

    def __init__(self, entries: Sequence[AfterCommit], reporter: Reporter) -> None:
        self._entries = tuple(entries)
        self._reporter = reporter
        self._changed = threading.Condition()
        # guarded by _changed:
        self._unshipped: dict[str, set[int]] = {}  # by save id: the numbers of the shipments that are not done
        self._done: set[tuple[str, int]] = set()  # (save id, number) of shipments of saves that are not known yet
        self._refused: set[tuple[str, int]] = set()  # (save id, number) of shipments that will never be done
        self._waiting: set[str] = set()  # the saves, of earlier runs too, that the shipper said are not shipped
        self._failures = 0  # in a row, of the shipper's most promising target
        self._in_calls = 0  # checkpoints whose functions have not all been called
        self._closing = False
        self._held: dict[str, int] = {}  # by save id: the locks that keep checkpoints until their functions were called
        self._calls: queue.SimpleQueue[tuple[str, CheckpointInfo] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    @property
    def shipments(self) -> list[dict[str, Any]]:
        """The shipments, as the job states them."""
        return [entry.spec() for entry in self._entries if isinstance(entry, Shipment)]

    # -- on the supervisor's thread

    def committed(self, save_id: str, info: CheckpointInfo) -> None:
        """A checkpoint was committed."""
        with self._changed:
            # A shipper that was just looking may have shipped it before this process heard of the commit.
            left = {n for n in range(len(self.shipments)) if (save_id, n) not in self._done}
            self._done = {done for done in self._done if done[0] != save_id}
            if left:
                self._unshipped[save_id] = left
            if len(self.shipments) == len(self._entries):
                return
            self._in_calls += 1
            if (lock := hold(os.fspath(info.path))) is not None:
                self._held[save_id] = lock
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="vembed-ckpt-after-commit", daemon=True)
                self._thread.start()
        self._calls.put((save_id, info))

    def heard(self, report: dict[str, Any]) -> None:
        """A report of the writer about shipping."""
        if report["event"] == "unshipped":
            self._heard_status(report)
            return
        save_id, index = report["save_id"], report.get("index", -1)
        with self._changed:
            left = self._unshipped.get(save_id, set())
            if report.get("over"):
                self._refused |= {(save_id, number) for number in left}
                left.clear()
            if report["phase"] == "complete":
                if not left:
                    self._done.add((save_id, index))
                left.discard(index)
            if not left:
                self._unshipped.pop(save_id, None)
            self._changed.notify_all()
        figures = report.get("seconds", 0.0), report.get("bytes", 0)
        self._emit(report["phase"], save_id, report["step"], report["detail"], *figures)

    def _heard_status(self, report: dict[str, Any]) -> None:
        lost = []
        with self._changed:
            self._waiting, self._failures = set(report["save_ids"]), report["failures"]
            if report["first"]:  # the reports of the shipper before this one may be lost
                lost = [save_id for save_id in self._unshipped if save_id not in self._waiting]
                for save_id in lost:
                    del self._unshipped[save_id]
            self._changed.notify_all()
        for save_id in lost:
            self._emit("complete", save_id, None, "was shipped while nobody reported it")

    # -- on the thread that closes

    def drain(self, deadline: float) -> str:
        """Wait until everything is shipped and every function was called, or until that cannot be expected.

        Returns at `deadline` (time.monotonic()), and as soon as every shipment that is left has failed several times.
        Returns one line about what is left, or an empty text.
        """
        announce = time.monotonic() + _QUIET
        while not self._is_done() and time.monotonic() < deadline:
            with self._changed:
                self._changed.wait(_signals.SLICE)
            _signals.deliver()
            if time.monotonic() > announce:
                announce = math.inf
                logger.warning("waiting until what is to be done after the commits is done: %s", self._left())
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._calls.put(None)
        return self._left()

    def _left(self) -> str:
        with self._changed:
            shipping, calls = len(self._waiting | self._unshipped.keys()), self._in_calls
        left = []
        if shipping:
            left.append(
                f"{shipping} checkpoints are not shipped yet; a process goes on while this machine lets it, and the next run "
                "that saves there ships the rest"
            )
        if calls:
            left.append(f"the functions in after_commit were not called for {calls} checkpoints")
        return "; ".join(left)

    def _is_done(self) -> bool:
        with self._changed:
            shipped = not self._unshipped and not self._waiting
            return (shipped and not self._in_calls) or (not shipped and self._failures >= _HOPELESS)

    def forget(self) -> None:
        """In a forked child: close the locks, which belong to the parent."""
        for lock in self._held.values():
            os.close(lock)

    # -- on the thread of the functions

    def _run(self) -> None:
        while (item := self._calls.get()) is not None:
            self._call_all(*item)
            with self._changed:
                self._in_calls -= 1
                if (lock := self._held.pop(item[0], None)) is not None:
                    os.close(lock)
                self._changed.notify_all()

    def _call_all(self, save_id: str, info: CheckpointInfo) -> None:
        number = 0  # of the shipments before the entry
        for entry in self._entries:
            if isinstance(entry, Shipment):
                number += 1
                continue
            if not self._is_shipped(save_id, number):
                self._emit(
                    "failed", save_id, info.step, f"{_name(entry)} was not called: what is before it was not done"
                )
            elif not self._call(entry, save_id, info):
                return

    def _is_shipped(self, save_id: str, number: int) -> bool:
        """Wait until the first `number` shipments of a checkpoint are done. False if that will not happen."""
        before = set(range(number))
        with self._changed:
            while not self._closing and before & self._unshipped.get(save_id, set()):
                self._changed.wait()
            undone = before & self._unshipped.get(save_id, set())
            return not undone and not any((save_id, n) in self._refused for n in before)

    def _call(self, function: Callable[[CheckpointInfo], object], save_id: str, info: CheckpointInfo) -> bool:
        """Call a function, again if it raises. Returns False if the checkpoint is gone."""
        name = _name(function)
        for attempt in range(1, _TRIES + 1):
            began = time.perf_counter()
            if not os.path.lexists(os.path.join(info.path, names.MANIFEST)):
                self._emit("failed", save_id, info.step, f"{name} was not called: {info.path} is gone already")
                return False
            try:
                function(info)
            except Exception as error:
                again = f", next try in {_PAUSE * 2 ** (attempt - 1):.0f} s" if attempt < _TRIES else ""
                said = f"{name}: {type(error).__name__}: {error}; failed {attempt} times{again}"
                self._emit("failed", save_id, info.step, said, time.perf_counter() - began)
            else:
                self._emit("complete", save_id, info.step, name, time.perf_counter() - began)
                return True
            if attempt < _TRIES:
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, _PAUSE * 2 ** (attempt - 1))
        return True

    def _emit(
        self, phase: Any, save_id: str, step: int | None, detail: str, seconds: float = 0.0, size: int = 0
    ) -> None:
        self._reporter.emit(Event("after_commit", phase, save_id, step, size, seconds, detail))


def check(entries: Any) -> tuple[AfterCommit, ...]:
    """Return `after_commit` as a tuple. Raises TypeError if it is not a list of functions and shipments."""
    remedy = "use a list of functions that take a CheckpointInfo, of upload(url) and of push_to_hub(repo_id)"
    with contextlib.suppress(TypeError):
        found = tuple(entries)
        if not isinstance(entries, str) and all(isinstance(e, Shipment) or callable(e) for e in found):
            return found
    raise TypeError(f"after_commit is {entries!r}; {remedy}")


def _name(function: Any) -> str:
    return str(getattr(function, "__qualname__", None) or repr(function))
