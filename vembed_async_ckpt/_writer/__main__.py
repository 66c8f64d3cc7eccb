"""The writer process: `python -I -S -c BOOTSTRAP ROOT TRAINER_PID SOCKET_FD LOCK_FD`, started by the supervisor.

It has its own session, so Ctrl-C and signals to the trainer's process group do not reach it. It never uses the
trainer's standard streams.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys

from .._disk.filesystem import LocalFilesystem
from .._disk.lock import RootLock
from .server import serve
from .trainer import Trainer

# with this it gets a tenth of a training thread's share where they compete for a core; writing waits for the disk
# anyway
NICENESS = 10


def main(arguments: list[str]) -> None:
    """Serve until the trainer is gone and every accepted job has ended."""
    root, trainer_pid, socket_fd, lock_fd = arguments[0], *map(int, arguments[1:4])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Schedulers send these signals to every process first. This process ends when the trainer has ended.
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):  # a sandbox may refuse it; the process works without it
        os.nice(NICENESS)
    sock = socket.socket(fileno=socket_fd)
    serve(sock, RootLock(root, lock_fd), LocalFilesystem(), Trainer(trainer_pid))


if __name__ == "__main__":
    main(sys.argv[1:])
