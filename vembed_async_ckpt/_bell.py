"""A descriptor that one thread makes readable to wake another.

It is a pipe, which every kernel and sandbox supports.
"""

from __future__ import annotations

import os


class Bell:
    """`fd` is readable from `ring()` until `clear()`."""

    def __init__(self) -> None:
        self.fd, self._other = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def ring(self) -> None:
        """Make `fd` readable."""
        try:
            os.write(self._other, b"\0")
        except BlockingIOError:
            pass  # the pipe is full, so it is readable

    def clear(self) -> None:
        """Make `fd` unreadable until the next `ring()`."""
        try:
            while len(os.read(self.fd, 4096)) == 4096:
                pass
        except BlockingIOError:
            pass  # nobody has rung

    def close(self) -> None:
        """Close both ends. Do not call `ring()` afterwards."""
        os.close(self.fd)
        os.close(self._other)
