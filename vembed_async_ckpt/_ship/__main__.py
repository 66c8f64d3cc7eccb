"""The shipper process: `python -I -S -c BOOTSTRAP ROOT CONTROL_FD REPORT_FD`, started by the writer.

It has its own session and ignores the signals that end a job, as the writer does. It goes on when writer and trainer
have ended, until everything is shipped or it has failed often enough; the next run ships the rest. It never holds the
root's lock, so it does not keep a new run waiting.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys

from .shipper import Shipper

_NICENESS = 10


def main(arguments: list[str]) -> None:
    """Ship until nobody wants anything more from this process."""
    root, control, report = arguments[0], int(arguments[1]), int(arguments[2])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.nice(_NICENESS)
    Shipper(root, control, report).run()


if __name__ == "__main__":
    main(sys.argv[1:])
