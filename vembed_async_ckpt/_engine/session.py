"""A session: everything that lives while this process saves to a root, and how it ends.

It has the engine with its writer, threads and memory.

A session has no reference to the `AsyncCheckpointer` that the user holds. So that object can be dropped: then its
session ends by itself when its saves have finished. A process has one session per root at a time.
"""

from __future__ import annotations

import _thread
import atexit
import contextlib
import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from .. import _signals
from ..errors import CheckpointerClosed, warn
from ..events import Reporter, logger
from ..handle import SaveHandle
from ..policies import SavePolicy
from . import patience
from .agreement import Agreement
from .follower import Follower
from .leader import Leader
from .ledger import Ledger
from .options import Options
from .progress import ProgressLine
from .ranks import Ranks
from .steps import StepClock
from .stop import Drain, Stop
from .when import Decider

EXIT_DEADLINE = 600.0  # seconds that pending saves get at interpreter exit

_OPEN: set[Session] = set()
# They are kept until the process ends: a thread that freed their tensors while the interpreter ends would abort it.
_LEFT_BEHIND: list[Session] = []
_LOST: list[str] = []  # failures of saves that could not be reported to anybody


class _Enough(Exception):
    """The process is to stop and waits no longer for commits."""


class Session:
    """This process saves to one root."""

    def __init__(self, options: Options) -> None:
        """Begin the session. An earlier session of the same root in this process is ended first.

        That gives a warning, unless the earlier session's checkpointer was dropped.
        """
        self.options = options
        self.closed = ""  # why no more saves are accepted; empty while they are
        self.ended = False  # closed, and everything is given back
        self.dropped = False  # nobody has the checkpointer any more
        self.stop: Stop | None = None  # once `stop_on` was called
        self._agreement: Agreement | None = None
        self._closer = 0  # id of the thread that closes the session, else 0
        # ends a session whose process leaves while the writer finishes what is staged
        self._closing = threading.Thread(target=self._end_left_behind, name="vembed-ckpt-closing", daemon=True)
        self._pid = os.getpid()
        with _signals.held():
            self._take_over()
            self._begin(options.policy)

    def _take_over(self) -> None:
        for earlier in open_sessions():
            if earlier.options.root == self.options.root:
                earlier.give_way()

    def give_way(self) -> None:
        """Close, because a new checkpointer is made for the same root. A failure of a save is logged."""
        if not self.dropped and self not in _LEFT_BEHIND:
            self.closed = self.closed or "closed, because a later one was made for the same directory"
            warn(
                f"{self.options.root}: this process has a checkpointer for this directory, which was not closed. It is closed now, "
                "its saves are finished"
            )
        try:
            self.close(EXIT_DEADLINE)
            if self in _LEFT_BEHIND:
                self._may_close(time.monotonic() + EXIT_DEADLINE)  # waits until its thread has ended the session
        except Exception as error:
            logger.error(
                "%s: a checkpointer that was not closed: %s: %s", self.options.root, type(error).__name__, error
            )

    def _begin(self, policy: SavePolicy | None) -> None:
        self.reporter = Reporter(self.options.sinks)
        self.ledger = Ledger(self.options.on_error)
        self._ranks = ranks = Ranks.of_this_process(self.options.root)
        parts = (self.ledger, self.reporter, self.refuse_if_closed)
        self.engine: Leader | Follower
        self.decider: Decider | None = None
        self.clock: StepClock | None = None
        self.progress = ProgressLine() if self.options.progress else None
        try:
            if ranks is None or ranks.rank == 0:
                self.engine = Leader(self.options, ranks, *parts)
            else:
                self.engine = Follower(self.options, ranks, *parts)
        except BaseException:
            self.reporter.close(1.0)
            if ranks is not None:
                ranks.close(1.0)
            raise
        try:
            if policy is not None:
                agreement = self._agree() if any(part.decided != "everywhere" for part in policy.parts()) else None
                self.decider = Decider(policy, self.options.root, self.reporter, agreement)
        except BaseException:
            self._end(time.monotonic() + 10.0)
            raise
        if self.reporter.wants_steps:
            self.clock = StepClock(self.reporter)
            if self.decider is not None:
                self.decider.time_steps_with(self.clock)
        _OPEN.add(self)

    def refuse_if_closed(self) -> None:
        """Raise `CheckpointerClosed` if no more saves are accepted."""
        if self.closed:
            raise CheckpointerClosed(f"{self.options.root}: the checkpointer is {self.closed}; make a new one")

    def wait(self, timeout: float | None) -> None:
        """See `AsyncCheckpointer.wait`."""
        with _signals.held():
            self.engine.refuse_inside_save("wait()")
            self.ledger.wait(timeout, lambda: self.engine.prewarming, self.engine.check)

    def in_flight(self) -> list[SaveHandle]:
        """Return the saves that have not ended yet."""
        with _signals.held():
            return self.ledger.in_flight()

    def refuse_to_delete(self) -> None:
        """Raise `CommitError` if this process does not hold the root's lock: then it may delete nothing there."""
        self.engine.refuse_to_delete()

    # -- stopping

    def stop_on(self, signals: Sequence[int], drain: Drain, grace: float) -> None:
        """See `AsyncCheckpointer.stop_on`."""
        self.refuse_if_closed()
        if self.stop is not None:
            raise ValueError("stop_on() was called before; name all signals in one call")
        if drain == "staged" and self.options.writer == "thread":
            raise ValueError("drain is 'staged', which needs a writer process; writer='thread' ends with the trainer")
        self.stop = Stop(signals, drain, grace, self._agree(), lambda: self.ledger.newest)

    def wait_before_last_save(self) -> None:
        """Wait for an arena, whatever `when_busy` says: the save of a training that stops must not be skipped."""
        if self.stop is None or not self.stop.asked or self.options.when_busy == "wait":
            return
        with contextlib.suppress(TimeoutError):
            self.ledger.wait(max(self.stop.left(), 0.0), lambda: False, self.engine.check)

    def _agree(self) -> Agreement | None:
        if self._agreement is None and self._ranks is not None:
            self._agreement = Agreement.of_this_process(self.options.root, self._ranks.rank, self._ranks.world_size)
        return self._agreement

    # -- the end

    def close(self, timeout: float) -> None:
        """See `AsyncCheckpointer.close`."""
        with _signals.held():
            self.engine.refuse_inside_save("close()")
            deadline = time.monotonic() + timeout
            if self not in _LEFT_BEHIND and self._may_close(deadline):
                self._close(timeout, deadline)

    def _may_close(self, deadline: float) -> bool:
        """Return whether this thread must close the session.

        False if the session has ended. While another thread closes it, wait for that. A signal handler that interrupted
        `close()` in its own thread does the closing itself. Raises TimeoutError at `deadline`.
        """
        while True:
            with self.ledger.changing():
                if self.ended:
                    return False
                if self._closer in (0, threading.get_ident()):
                    self._closer = threading.get_ident()
                    self.closed = self.closed or "closed"
                    return True
            if time.monotonic() >= deadline:
                raise TimeoutError(f"{self.options.root}: another thread has not closed the checkpointer in time")
            time.sleep(_signals.SLICE)
            _signals.deliver()

    def _close(self, timeout: float, deadline: float) -> None:
        try:
            try:
                if not self.drain(timeout):
                    self._leave_behind()
                    self.ledger.raise_unread()
                    return
            finally:
                if self not in _LEFT_BEHIND:
                    if self.stop is not None and self.stop.asked:
                        deadline = min(deadline, time.monotonic() + max(self.stop.left(), 0.0))
                    ended = self._end(deadline)
                    self.ended = True
        finally:
            if self not in _LEFT_BEHIND:
                self._closer = 0
        if not ended:
            raise TimeoutError(
                f"{self.options.root}: the writer has not ended after {timeout} s; it finishes on its own"
            )
        self.ledger.raise_unread()

    def drain(self, timeout: float) -> bool:
        """Wait for the saves in flight. Return False if a stop leaves them to the writer, as they are staged.

        Raises TimeoutError after `timeout` seconds, or if the grace time of a stop is over and a save is not staged.
        """
        stop = self.stop
        try:
            self._refuse_to_wait_longer()
            self.ledger.wait(timeout, lambda: self.engine.prewarming, self._refuse_to_wait_longer)
            return True
        except _Enough:
            pass
        assert stop is not None
        staged = []
        for handle in self.ledger.in_flight():
            if handle._interrupted():
                continue  # a signal handler closes inside `save()`: it cannot end before the handler returns
            try:
                handle.wait_staged(max(stop.left(), 0.0))
            except TimeoutError as error:
                raise TimeoutError(
                    f"{handle.path}: the grace time is over and the state is not staged, so this checkpoint is lost"
                ) from error
            staged.append(str(handle.path))
        if staged and self.options.writer == "thread":
            raise TimeoutError(
                f"the grace time is over and {', '.join(staged)} is not on disk; the writer is a thread of this process, so it "
                "is lost. Use writer='process' or a longer grace time"
            )
        if staged and stop.drain == "committed":
            logger.warning(
                "the grace time is over: %s is staged and not yet on disk. The writer process %s finishes it, if the "
                "platform spares that process",
                *(", ".join(staged), self.engine.statistics()["writer_pid"]),
            )
        return False

    def _refuse_to_wait_longer(self) -> None:
        """Raise `_Enough` if a stop allows no further wait for the commit."""
        self.engine.check()
        stop = self.stop
        if stop is not None and stop.asked and (stop.drain == "staged" or stop.left() <= 0):
            raise _Enough

    def _leave_behind(self) -> None:
        """Let the process leave at once. A thread ends the session if the process goes on instead."""
        _LEFT_BEHIND.append(self)
        self._leave_together(max(self.stop.left(), 1.0) if self.stop is not None else 1.0)
        with contextlib.suppress(RuntimeError):  # the interpreter ends: no thread can be started any more
            self._closing.start()

    def park(self) -> None:
        """Let the threads of a session that was left behind do nothing any more: the interpreter ends."""
        if not self.engine.park() and self._closing.is_alive():
            self._closing.join(1.0)
        self.reporter.close(1.0)

    def _leave_together(self, timeout: float) -> None:
        """End the agreement with the other ranks. After a stop, wait until they leave too."""
        if self._agreement is None:
            return
        stopped = self.stop is not None and self.stop.asked
        # Another rank waits for the first one's commit, which may take long.
        if self._agreement.rank == 0 or not stopped:
            timeout = min(timeout, patience.AGREE)
        self._agreement.close(timeout, together=stopped)

    def _end_left_behind(self) -> None:
        self._closer = threading.get_ident()
        try:
            self._end(time.monotonic() + EXIT_DEADLINE)
        finally:
            self.ended = True
            self._closer = 0

    def _end(self, deadline: float) -> bool:
        if self.stop is not None:
            self.stop.close()
        if self.decider is not None:
            self.decider.close()
        if self.progress is not None:
            self.progress.close()
        ended = self.engine.close(deadline)
        self._leave_together(max(deadline - time.monotonic(), 0.1))
        if self.clock is not None:
            self.clock.close()
        self.reporter.close(max(deadline - time.monotonic(), 0.1))
        _OPEN.discard(self)
        return ended

    def drop(self) -> None:
        """Close in the background, because the checkpointer was garbage collected.

        The garbage collector may call this at any point in any thread, so it takes no lock.
        """
        if self.ended or self._pid != os.getpid():
            return
        self.dropped = True
        with contextlib.suppress(RuntimeError):  # no thread can be started any more: the session is closed at exit
            _thread.start_new_thread(self._begin_to_close, ())

    def _begin_to_close(self) -> None:
        # A bare thread stays in `threading.enumerate()` for ever, once it has asked for its name.
        closing = threading.Thread(target=self._close_dropped, name="vembed-ckpt-closing", daemon=True)
        with contextlib.suppress(RuntimeError):
            closing.start()

    def _close_dropped(self) -> None:
        try:
            self.close(EXIT_DEADLINE)
        except Exception as error:
            _LOST.append(f"{type(error).__name__}: {error}")
            logger.error("a checkpointer that nobody has any more: %s", _LOST[-1])

    def forget(self) -> None:
        """Called in a forked child: the writer, the lock and the memory belong to the parent."""
        self.closed = "that of the parent process"
        self.ended = True
        self.engine.forget()


def open_sessions() -> list[Session]:
    """Return the sessions of this process that have not ended."""
    return [session for session in list(_OPEN) if not session.ended]


class _Unclean:
    """Wraps a standard stream so that the interpreter exits with code 120.

    The interpreter flushes the standard streams last, after all exit handlers. If that flush fails, Python itself exits
    with 120 (see `sys.exit`). Here only that last flush fails.
    """

    closed = False

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def flush(self) -> None:
        if self._stream is not None and not getattr(self._stream, "closed", False):
            self._stream.flush()
        if sys.is_finalizing():
            raise OSError("checkpoints were lost at exit")


@atexit.register
def _drain_at_exit() -> None:
    """At exit, close every session that is still open, each within `EXIT_DEADLINE`.

    Failures are printed, and the exit code becomes 120, whatever it would have been. Nothing else can report them then,
    and a script that checks the exit code must not go on as if everything had been saved.
    """
    interrupt: BaseException | None = None
    for session in _LEFT_BEHIND:
        session.park()
    for session in open_sessions():
        if session in _LEFT_BEHIND:
            continue  # the writer finishes it
        try:
            session.close(EXIT_DEADLINE)
        except BaseException as error:  # go on, so that every root is closed
            interrupt = interrupt or (None if isinstance(error, Exception) else error)
            _LOST.append(f"{type(error).__name__}: {error}")
    for lost in _LOST:
        # nobody can read the text, but the exit code still reports the failure
        with contextlib.suppress(OSError, ValueError):
            if sys.stderr is not None:
                print(f"vembed_async_ckpt: at exit: {lost}", file=sys.stderr)
        if not isinstance(sys.stderr, _Unclean):
            sys.stderr = _Unclean(sys.stderr)
    if interrupt is not None:
        raise interrupt


def _forget_in_child() -> None:
    for session in list(_OPEN):
        session.forget()
    _OPEN.clear()
    _LEFT_BEHIND.clear()
    _LOST.clear()


os.register_at_fork(after_in_child=_forget_in_child)
