"""The trainer, as its writer process sees it: whether it is still alive."""

from __future__ import annotations

import os
import select

_POLL = 500  # milliseconds between two looks, where the kernel cannot report the end of a process


class Trainer:
    """The process that started this one.

    A forked child of the trainer may keep the socket open. So the end of the socket is not enough to notice its death.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._parent = os.getppid()
        self._pidfd: int | None = None
        try:
            self._pidfd = os.pidfd_open(pid)
        except (OSError, AttributeError):
            # The trainer is dead already, or there is no pidfd: a kernel before 5.3, gVisor, an older seccomp profile.
            # Without a pidfd, its death is noticed because this process gets another parent.
            pass

    def register(self, poll: select.poll) -> int | None:
        """Make `poll` wake up when the trainer dies.

        Returns the milliseconds after which the caller must look by itself, or None if it never must.
        """
        if self._pidfd is None:
            return _POLL
        poll.register(self._pidfd, select.POLLIN)
        return None

    def is_dead(self) -> bool:
        """Return whether the trainer has ended."""
        if self._pidfd is not None:
            return bool(select.select([self._pidfd], [], [], 0)[0])
        if os.getppid() != self._parent:
            return True
        try:
            os.kill(self._pid, 0)
        except ProcessLookupError:
            return True
        return False
