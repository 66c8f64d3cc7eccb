"""Keeps signal handlers from running while a call of this package is in the middle of a change.

Python runs a signal handler in the main thread, between any two bytecodes. So it may run while that thread holds a
lock, or has changed only one of two things that belong together. A handler that saves, waits or closes then would wait
for itself. A handler that raises (`sys.exit`, Ctrl-C) would leave the lock held for ever. Therefore a call holds
signals back with `held()`. It lets them in with `deliver()` where it waits and nothing is half done. In threads other
than the main thread, both do nothing.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` wraps every call in enums, which takes ten times as long
import os
import threading
import time
from collections.abc import Callable
from contextlib import ContextDecorator
from types import FrameType, TracebackType
from typing import Any

SLICE = 0.05  # while a call waits, it looks for held-back signals every so many seconds

_NUMBERS = sorted(_signal.valid_signals())
_main = threading.main_thread().ident

# The main thread alone touches all of these.
_depth = 0  # number of nested calls that hold signals back
_pending: list[tuple[_StandIn, int, FrameType | None]] = []  # signals that arrived meanwhile
_stand_ins: dict[int, _StandIn] = {}  # by signal
_raised: BaseException | None = None  # the last exception that a handler raised in `deliver()`


class held(ContextDecorator):
    """Hold signals back until the end of the block or of the decorated function, or until `deliver()`.

    Handlers that are due run at the end.
    """

    def __init__(self) -> None:
        self._active = False

    def _recreate_cm(self) -> held:
        return held()

    def __enter__(self) -> None:
        global _depth
        if threading.get_ident() != _main:
            return
        if not _depth:
            _stand_in()
        _depth += 1  # from here on no handler runs
        self._active = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        global _depth, _raised
        if not self._active:
            return
        if _depth > 1:
            _depth -= 1
            return
        _raised = None
        _depth = 0  # from here on handlers run
        try:
            if _pending:
                _run_handlers()
        finally:
            _stand_down()


def deliver() -> None:
    """Run the handlers of the signals that were held back.

    Raises what they raise. Afterwards signals are held back again.

    Call this only where no lock is held and nothing is half done. A handler may call everything that the main thread
    may.
    """
    global _depth, _raised
    if not _pending or threading.get_ident() != _main:
        return
    depth, _depth = _depth, 0
    try:
        _run_handlers()
    except BaseException as error:
        _raised = error
        raise
    finally:
        _depth = depth
        _stand_in()  # a call that the handler made has put the handlers back


def wrap_handler(signum: int, wrapper: Callable[[Any], Any]) -> None:
    """Replace the Python handler of a signal by `wrapper(handler)`, for signals that are held back now too.

    Does nothing if the signal has no Python handler, or one of the type `wrapper`. Only the main thread may call it.
    """
    present = _signal.getsignal(signum)
    handler = present.handler if type(present) is _StandIn else present
    if not callable(handler) or type(handler) is wrapper:
        return
    if type(present) is _StandIn:
        present.handler = wrapper(handler)
    else:
        _signal.signal(signum, wrapper(handler))


def join(thread: threading.Thread, timeout: float) -> None:
    """Wait for `thread`, as `thread.join(timeout)` does. Signals that are held back are delivered meanwhile."""
    deadline = time.monotonic() + timeout
    while thread.is_alive() and (left := deadline - time.monotonic()) > 0:
        thread.join(min(left, SLICE))
        deliver()


def from_handler(error: BaseException) -> bool:
    """Return whether a handler raised `error` in `deliver()`. Then it is not a failure of the interrupted call."""
    return error is _raised


class _StandIn:
    """Takes the place of a signal handler and compares equal to it.

    Code that asks for the handler meanwhile gets this object. It may keep it and call it later.
    """

    def __init__(self, handler: Any) -> None:
        self.handler = handler

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if _depth:
            _pending.append((self, signum, frame))
        else:
            self.handler(signum, frame)

    def __eq__(self, other: object) -> bool:
        return other is self or bool(other == self.handler)

    def __hash__(self) -> int:
        return hash(self.handler)


# not a Python handler, the default or ignored, replaced already
_NO_HANDLERS = (type(None), int, _StandIn)


def _stand_in() -> None:
    """Replace every handler that is a Python function by a stand-in."""
    for signum, handler in zip(_NUMBERS, map(_signal.getsignal, _NUMBERS), strict=True):
        if type(handler) in _NO_HANDLERS:
            continue
        known = _stand_ins.get(signum)
        if known is None or known.handler is not handler:
            known = _stand_ins[signum] = _StandIn(handler)
        try:
            _signal.signal(signum, known)
        except ValueError:  # not the main interpreter: no handler runs here
            return


def _stand_down() -> None:
    """Put the handlers back.

    A signal may interrupt this. Then the other stand-ins stay in place and pass signals on.
    """
    for signum in list(_stand_ins):
        if type(known := _signal.getsignal(signum)) is _StandIn:
            _signal.signal(signum, known.handler)


def _run_handlers() -> None:
    try:
        while _pending:
            stand_in, signum, frame = _pending.pop(0)
            stand_in.handler(signum, frame)
    except BaseException:
        rest = _pending[:]
        _pending.clear()
        for _, signum, _ in rest:
            _signal.raise_signal(signum)  # these handlers run after this exception, as they would have anyway
        raise


def _forget() -> None:
    """In a forked child: drop the signals that were held back in the parent."""
    global _depth, _main
    _depth, _main = 0, threading.main_thread().ident
    _pending.clear()


os.register_at_fork(after_in_child=_forget)
