"""Work done in processes of their own: each visit to an engine begins with a process that no other engine has touched.

A thread of one engine that opened an OpenMP team slows every later step of its process; a process of its own keeps that from
the others, lets memory be watched, and lets go of everything when it ends.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from .options import Refused

SILENCE = 1800.0  # seconds after which a visit that says nothing is given up
Say = Callable[[str | None], None]


class Failed(RuntimeError):
    """A visit ended with an error; the message has what it printed."""


class Visits:
    """`call` runs a function of this package in a new process; `log` is a file for what engines print."""

    def __init__(self, log: str) -> None:
        self._log = log
        self._context = multiprocessing.get_context("forkserver")
        # Imported once, where no thread is started: a visit begins in a fraction of a second.
        self._context.set_forkserver_preload(["vembed_async_ckpt.bench.session", "transformers.modeling_utils"])

    def call(self, function: Callable[..., Any], *arguments: Any) -> tuple[Any, dict[str, int]]:
        """(what `function(say, *arguments)` returns, bytes of memory of its process tree at the peak of each phase).

        A phase lasts from one `say(name)` to the next. Raises `Failed` or `Refused`; no process is left in any case.
        """
        from .machine import proportional_memory

        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs, self._log, function, arguments))
        process.start()
        theirs.close()
        peaks: dict[str, int] = defaultdict(int)
        phase: str | None = None
        heard = time.monotonic()
        try:
            while True:
                if ours.poll(0.01 if phase else 1.0):
                    kind, value = ours.recv()
                    heard = time.monotonic()
                    if kind == "result":
                        process.join(60)
                        return value, dict(peaks)
                    if kind == "refused":
                        raise Refused(value)
                    if kind == "error":
                        raise Failed(value)
                    phase = value
                if phase:
                    peaks[phase] = max(peaks[phase], proportional_memory(process.pid or 0))
                if time.monotonic() - heard > SILENCE:
                    raise Failed(f"nothing has been heard of it for {SILENCE / 60:.0f} minutes")
        except EOFError:
            process.join(10)
            raise Failed(f"its process ended with {process.exitcode}\n{self._printed()}") from None
        finally:
            ours.close()
            _end(process)

    def _printed(self) -> str:
        try:
            with open(self._log, errors="replace") as file:
                return "".join(file.readlines()[-15:])
        except FileNotFoundError:
            return ""


def _end(process: Any) -> None:
    """Kill the process, if it still runs, and all that it started; wait until they are gone."""
    from .machine import process_tree

    tree = list(process_tree(process.pid))
    if process.is_alive():
        for pid in tree:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
    process.join(10)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(os.path.exists(f"/proc/{pid}") for pid in tree if pid != process.pid):
        time.sleep(0.01)
    process.close()


def _without_paths(printed: str) -> str:
    """A traceback with nothing of where this machine keeps its files: results are published."""
    return re.sub(r'File "[^"]*?([^/"]+/)?([^/"]+)"', r'File "\1\2"', printed)


def _work(connection: Connection, log: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    sys.stdout.flush()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    try:
        result = function(lambda phase: connection.send(("phase", phase)), *arguments)
    except Refused as error:
        connection.send(("refused", str(error)))
    except BaseException:
        connection.send(("error", _without_paths(traceback.format_exc())))
    else:
        connection.send(("result", result))
    connection.close()
