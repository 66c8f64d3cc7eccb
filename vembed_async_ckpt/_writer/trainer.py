"""The trainer, as its writer process sees it: whether it still lives."""

from __future__ import annotations

import os
import select

_POLL = 500  # milliseconds between two looks, where the kernel cannot say when a process ends


class Trainer:
    """The process that started this one. A forked child of it may keep the socket open: its end must be known otherwise."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._parent = os.getppid()
        self._pidfd: int | None = None
        try:
            self._pidfd = os.pidfd_open(pid)
        except (OSError, AttributeError):
            pass  # dead already; or a kernel before 5.3, gVisor, an older seccomp profile: then its children get another parent

    def register(self, poll: select.poll) -> int | None:
        """Have `poll` wake up at its death. Returns after how many milliseconds it must look all the same, None for never."""
        if self._pidfd is None:
            return _POLL
        poll.register(self._pidfd, select.POLLIN)
        return None

    def is_dead(self) -> bool:
        """Whether it has ended."""
        if self._pidfd is not None:
            return bool(select.select([self._pidfd], [], [], 0)[0])
        if os.getppid() != self._parent:
            return True
        try:
            os.kill(self._pid, 0)
        except ProcessLookupError:
            return True
        return False
