"""The writer's side of the shipper: starts it when there is something to ship, hears its reports, and replaces it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

from .._disk import notes
from .._shared.packages import folders

_LONGEST_PAUSE = 60.0  # seconds between the end of a shipper and the start of the next one
_PATIENCE = 5.0  # seconds that a shipper with nothing to do gets to end
_STDERR = 2000  # characters of a dead shipper's log that are reported
_BOOTSTRAP = (
    "import sys; sys.path += sys.argv[4:]; from vembed_async_ckpt._ship.__main__ import main; main(sys.argv[1:4])"
)


class Shippers:
    """Keeps a shipper running while there are notes. Thread-safe."""

    def __init__(self, root: str, report: Callable[[dict[str, Any]], None]) -> None:
        """`report` is called with each report of a shipper, on a thread of this object."""
        self._root = root
        self._report = report
        self._changed = threading.Condition()
        # guarded by _changed:
        self._thread: threading.Thread | None = None
        self._control = -1  # the pipe to the shipper
        self._waiting = 0  # checkpoints that it said are not shipped yet
        self._closing = False

    def wake(self) -> None:
        """Say that there may be something to ship."""
        with self._changed:
            if self._closing:
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="vembed-ckpt-shipper", daemon=True)
                self._thread.start()
            elif self._control >= 0:
                with contextlib.suppress(OSError):  # it has just ended; the next one looks by itself
                    os.write(self._control, b"\n")
            self._waiting += 1
            self._changed.notify_all()

    def close(self) -> None:
        """Leave the shipper alone: it ends when everything is shipped.

        If nothing waits, return when it has removed its lock file, or after some seconds.
        """
        with self._changed:
            self._closing = True
            if self._control >= 0:
                os.close(self._control)
                self._control = -1
            self._changed.notify_all()
            thread, idle = self._thread, not self._waiting
        if thread is not None and idle:
            thread.join(_PATIENCE)
        self._report = lambda report: None  # nobody listens any more, and the writer's memory is not held for it

    def _run(self) -> None:
        deaths = 0
        while True:
            ended = self._one_shipper()
            with self._changed:
                if self._closing:
                    return
                deaths += 1
                self._report({"event": "after_commit", "phase": "failed", "save_id": "", "step": None, "detail": ended})
                status = {"save_ids": list(notes.waiting(self._root)), "failures": deaths, "first": False}
                self._report({"event": "unshipped", **status})
                self._changed.wait_for(lambda: self._closing, min(2.0 ** (deaths - 1), _LONGEST_PAUSE))
                if self._closing:
                    return

    def _one_shipper(self) -> str:
        """Start a shipper and pass on its reports until it has ended. Returns how it ended."""
        log = os.memfd_create("vembed_async_ckpt_shipper_log", os.MFD_CLOEXEC)
        theirs, control = os.pipe2(os.O_CLOEXEC)
        reports, report = os.pipe2(os.O_CLOEXEC)
        try:
            process = self._start(theirs, report, log)
        except OSError as error:
            os.close(control)
            os.close(reports)
            os.close(log)
            return f"no shipper could be started: {error}"
        finally:
            os.close(theirs)
            os.close(report)
        with self._changed:
            if self._closing:
                os.close(control)
            else:
                self._control = control
        with os.fdopen(reports, "rb") as lines:
            for line in lines:
                self._hear(line)
        with self._changed:
            if self._control >= 0:
                os.close(self._control)
                self._control = -1
        code = process.wait()
        text = os.pread(log, 1 << 16, 0).decode(errors="replace").strip()
        os.close(log)
        return f"the shipper {process.pid} ended with {code}" + (f": {text[-_STDERR:]}" if text else "")

    def _hear(self, line: bytes) -> None:
        try:
            report = json.loads(line)
        except ValueError:
            return  # cut short by its death
        if report["event"] == "unshipped":
            with self._changed:
                self._waiting = len(report["save_ids"])
        self._report(report)

    def _start(self, control: int, report: int, log: int) -> subprocess.Popen[bytes]:
        packages = folders("vembed_async_ckpt", "xxhash", "obstore", "huggingface_hub")
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _BOOTSTRAP, self._root, str(control), str(report), *packages],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            cwd="/",
            pass_fds=(control, report),
            start_new_session=True,
        )


def are_waiting(root: str) -> bool:
    """Return whether an earlier run left something to be shipped."""
    with contextlib.suppress(OSError):
        return bool(notes.waiting(root))
    return False
