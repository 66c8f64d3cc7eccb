"""A safe stop: takes the signals that ask for it, and tells the training thread after which step to leave.

A signal reaches this process in two ways. Python's handler runs in the main thread, between two bytecodes, so it waits
for a long call into C. The wakeup descriptor (`signal.set_wakeup_fd`) gets the signal's number at once; a thread reads
it. Both lead to the same request. A second signal of either way ends the process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any, Literal, get_args

from .. import _signals
from ..errors import warn
from ..events import logger
from . import patience
from .agreement import STOP, Agreement
from .gate import Gate

Drain = Literal["committed", "staged"]
_AGAIN = 1.0  # a signal that comes sooner after the first belongs to it: launchers forward what their group gets too
_HANDLED = 128  # added to the number of a signal by the handler, so that the thread can tell it from the kernel's byte
_END = 0  # tells the thread to end

_INSTALLED: list[Stop] = []  # stops that have handlers, the oldest first; the main thread alone touches it


class Stop:
    """The stop of one checkpointer. The constructor sets the handlers; the caller must be the main thread."""

    def __init__(
        self,
        signals: Iterable[int],
        drain: Drain,
        grace: float,
        agreement: Agreement | None,
        newest: Callable[[], Path | None],
    ) -> None:
        """`newest` returns the newest durable checkpoint of this run. Raises TypeError or ValueError."""
        self.signals = _checked(signals)
        if drain not in get_args(Drain):
            raise ValueError(f"drain is {drain!r}; use 'committed' or 'staged'")
        if isinstance(grace, bool) or not isinstance(grace, int | float) or not 0 < grace < float("inf"):
            raise ValueError(f"grace is {grace!r}; use the seconds from the signal until the process must have ended")
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("stop_on() was called outside of the main thread; only the main thread can handle signals")
        self.drain = drain
        self.gate = Gate() if agreement is None else agreement.gates[STOP]
        self._grace = float(grace)
        self._agreement = agreement
        self._newest = newest
        self._process = os.getpid()
        self._signum = 0  # of the first signal that this process itself got
        self._since: float | None = None  # time.monotonic() of the request, as far as this rank knows it
        self._over = False
        self._before: dict[int, Any] = {}
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(self._read, True)
        self._other_fd = -1  # somebody else's wakeup descriptor, which gets every byte too
        if drain == "staged":
            _warn_of_lost_writers()
        self._thread = threading.Thread(target=self._listen, name="vembed-ckpt-signals", daemon=True)
        self._install()
        self._thread.start()

    @property
    def asked(self) -> bool:
        """Whether this process or, as far as this rank knows, another rank was asked to stop."""
        return bool(self.signum)

    @property
    def signum(self) -> int:
        """The signal for which the training stops, 0 for none."""
        agreed = 0 if self._agreement is None else self._agreement.signum
        return self._signum or agreed

    def left(self) -> float:
        """Return how many seconds of the grace time are left."""
        if self._since is None:
            self._since = time.monotonic()  # another rank was asked: its signal came a moment ago
        return self._since + self._grace - time.monotonic()

    def reached(self, step: int) -> bool:
        """Return whether to stop after `step`. Called when the gate is closed; waits for the agreement."""
        if not self.gate.wait(min(patience.AGREE + 5.0, max(self.left() / 2, 0.0))):
            logger.warning("step %d: the ranks did not agree in time; this one stops here", step)
            self.gate.decide_here()
        return self.gate.reached(step)

    def close(self) -> None:
        """Give the signals back, unless the process was asked to stop.

        In that case it is about to end. Until then a second signal must not end it with another exit code.
        """
        if not self.asked:
            self._remove()

    def forget(self) -> None:
        """In a forked child: give the signals back."""
        self._remove()

    # -- handlers

    def _install(self) -> None:
        for earlier in [stop for stop in reversed(_INSTALLED) if stop._over or stop.asked]:
            earlier._remove()  # its checkpointer is closed
        _INSTALLED.append(self)
        try:
            for signum in self.signals:
                self._before[signum] = signal.signal(signum, self._handle)
        except (OSError, ValueError):
            self._remove()
            raise
        self._other_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)

    def _remove(self) -> None:
        self._over = True
        if threading.current_thread() is not threading.main_thread():
            return  # the handlers and the thread stay, and do nothing of their own any more
        sparing = signal.getsignal(signal.SIGCHLD)
        if type(sparing) is _Sparing:
            signal.signal(signal.SIGCHLD, sparing.before)
        for signum, before in self._before.items():
            if signal.getsignal(signum) == self._handle:  # else somebody else has put theirs over it
                # None: set by something that is not Python, and cannot be put back by it
                signal.signal(signum, signal.SIG_DFL if before is None else before)
        present = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(self._other_fd if present == self._write else present, warn_on_full_buffer=False)
        with contextlib.suppress(ValueError):
            _INSTALLED.remove(self)
        if os.getpid() == self._process:
            self._tell(_END)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() == self._process and not self._over:
            if self._agreement is None:
                self._ask(signum)
            self._tell(signum + _HANDLED)
            _spare_the_step()
        self._as_before(signum, frame)

    def _as_before(self, signum: int, frame: FrameType | None) -> None:
        """Do what the signal did before. What ends the process, does so only where it is not ours to stop."""
        ours = os.getpid() == self._process and not self._over
        before = self._before.get(signum)
        if callable(before):
            if not ours or before is not signal.default_int_handler:  # which raises KeyboardInterrupt
                before(signum, frame)
        elif not ours and before != signal.SIG_IGN:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    def _tell(self, byte: int) -> None:
        with contextlib.suppress(BlockingIOError):  # the pipe is full of signals
            os.write(self._write, bytes([byte]))

    # -- on the thread

    def _listen(self) -> None:
        first: dict[bool, float] = {}  # when the first signal came, by way: the handler, or the wakeup descriptor
        while True:
            for byte in os.read(self._read, 4096):
                if byte == _END:
                    return
                handled = byte > _HANDLED
                signum = byte - _HANDLED if handled else byte
                if not handled and self._other_fd >= 0:
                    with contextlib.suppress(OSError):
                        os.write(self._other_fd, bytes([byte]))
                if self._over or signum not in self.signals:
                    continue
                if handled not in first:
                    first[handled] = time.monotonic()
                    self._ask(signum)
                elif time.monotonic() - first[handled] >= _AGAIN:
                    self._leave(signum)

    def _ask(self, signum: int) -> None:
        if self._signum:
            return
        self._since = self._since or time.monotonic()
        self._signum = signum
        if self._agreement is None:
            self.gate.decide_here()
        else:
            self._agreement.ask(STOP, signum)

    def _leave(self, signum: int) -> None:
        """End the process at once, and say what is durable."""
        newest = self._newest()
        durable = (
            "no checkpoint of this run is durable" if newest is None else f"the newest durable checkpoint is {newest}"
        )
        text = f"vembed_async_ckpt: a second {_name(signum)}: leaving at once; {durable}\n"
        with contextlib.suppress(OSError):
            os.write(2, text.encode(errors="replace"))
        os._exit(128 + self.signum)


def _checked(signals: Iterable[int]) -> tuple[int, ...]:
    found = tuple(signals)
    if not found:
        raise ValueError("stop_on() was called without a signal; use stop_on(signal.SIGTERM)")
    checked = []
    for number in found:
        if isinstance(number, bool) or not isinstance(number, int) or number not in signal.valid_signals():
            raise ValueError(f"stop_on(): {number!r} is no signal; use signal.SIGTERM, signal.SIGUSR1")
        if number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD):
            raise ValueError(f"stop_on(): {_name(number)} cannot ask for a stop; use signal.SIGTERM")
        checked.append(int(number))
    return tuple(dict.fromkeys(checked))


def _name(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"signal {signum}"  # a real-time signal


def _warn_of_lost_writers() -> None:
    """Warn where the writer process ends together with the trainer."""
    for found, why in (
        ("SLURM_JOB_ID" in os.environ, "SLURM_JOB_ID is set, and Slurm ends all processes of a job step"),
        ("KUBERNETES_SERVICE_HOST" in os.environ, "KUBERNETES_SERVICE_HOST is set, and a pod ends as a whole"),
        (os.getpid() == 1, "this is process 1, and its pid namespace ends with it"),
    ):
        if found:
            warn(f"drain is 'staged', but {why}: a staged checkpoint would be lost. Use drain='committed'")
            return


def _spare_the_step() -> None:
    """Let a DataLoader worker that the same signal killed not break the step under way.

    torch notices the end of a worker by SIGCHLD and raises RuntimeError wherever the main thread is. Once a stop was
    asked for, this is raised only where the training waits for the next batch.
    """
    _signals.wrap_handler(signal.SIGCHLD, _Sparing)


class _Sparing:
    """A handler of SIGCHLD that lets RuntimeError pass only inside an iterator of a DataLoader."""

    def __init__(self, before: Callable[[int, FrameType | None], Any]) -> None:
        self.before = before

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        try:
            self.before(signum, frame)
        except RuntimeError as error:
            if _fetches(frame):
                raise
            logger.info("asked to stop, so the step goes on: %s", error)


def _fetches(frame: FrameType | None) -> bool:
    from torch.utils.data.dataloader import _BaseDataLoaderIter

    while frame is not None:
        if frame.f_code.co_name == "__next__" and isinstance(frame.f_locals.get("self"), _BaseDataLoaderIter):
            return True
        frame = frame.f_back
    return False


def _forget_in_child() -> None:
    for stop in list(reversed(_INSTALLED)):
        stop.forget()


os.register_at_fork(after_in_child=_forget_in_child)
