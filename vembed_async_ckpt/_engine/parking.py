"""Stops a thread of ours for good, at the end of the interpreter."""

from __future__ import annotations

import threading
from typing import NoReturn

from ..errors import CheckpointError

_PATIENCE = 1.0  # seconds until the thread has come to it


class Parked:
    """A call for a thread, or a task of the ranks' thread, from which it never returns. The thread must be a daemon."""

    def __init__(self) -> None:
        self._there = threading.Event()

    def wait(self) -> None:
        """Wait until the thread is parked."""
        self._there.wait(_PATIENCE)

    def poll(self) -> NoReturn:
        self._there.set()
        while True:
            threading.Event().wait()

    def fail(self, error: CheckpointError) -> None:
        self._there.set()  # the thread has ended
