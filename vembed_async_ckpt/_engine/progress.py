"""Shows the progress of saves in the last line of a terminal, without disturbing other output."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

from rich.filesize import decimal

from ..handle import SaveHandle

_LOOK = 0.1  # seconds between looks at a save under way
_LINE = threading.Lock()  # held by the ProgressLine that uses the last line


class ProgressLine:
    """Shows bytes, rate and time left of the saves passed to `show`, if standard error is a terminal.

    While a save is written, the terminal scrolls in all lines but the last. So the training's bars and prints stay
    where they would be, and this line is not among them. When no save is under way, the last line is part of the
    scrolling again.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        # guarded by _changed:
        self._handles: list[SaveHandle] = []
        self._thread: threading.Thread | None = None
        self._over = False

    def show(self, handle: SaveHandle) -> None:
        """Show this save until it has ended."""
        if not _is_terminal(sys.stderr):
            return
        with self._changed:
            self._handles.append(handle)
            self._changed.notify()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="vembed-ckpt-progress", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Stop showing saves."""
        with self._changed:
            self._over = True
            self._changed.notify()
            thread = self._thread
        if thread is not None:
            thread.join(5.0)

    def _run(self) -> None:
        while self._wait():
            if _LINE.acquire(blocking=False):  # else another checkpointer shows its saves
                try:
                    self._show_while_busy(_LastLine(sys.stderr.fileno()))
                except (OSError, ValueError):
                    pass  # no longer a terminal
                finally:
                    _LINE.release()

    def _wait(self) -> bool:
        """Wait for something to show. Return True when there is, False if the line was closed."""
        with self._changed:
            while not self._over and not self._newest():
                self._changed.wait(_LOOK if self._handles else None)
            return not self._over

    def _newest(self) -> SaveHandle | None:
        """Return the oldest save that is being written, or None. Forgets the saves that have ended."""
        self._handles = [handle for handle in self._handles if not handle.done()]
        return next((handle for handle in self._handles if handle.progress[1]), None)

    def _show_while_busy(self, line: _LastLine) -> None:
        shown, begun = None, 0.0
        try:
            while True:
                with self._changed:
                    handle = None if self._over else self._newest()
                if handle is None:
                    return
                if handle is not shown:
                    shown, begun = handle, time.monotonic()
                line.write(_describe(handle.path.name, *handle.progress, time.monotonic() - begun))
                with self._changed:
                    if not self._over:
                        self._changed.wait(_LOOK)
        finally:
            line.give_back()


class _LastLine:
    """The last line of a terminal. Uses the escape sequences that package managers use for it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._rows = 0  # rows of the terminal when the line was taken; 0 before

    def write(self, text: str) -> None:
        columns, rows = os.get_terminal_size(self._fd)
        if rows < 3 or columns < 20:
            return
        out = ""
        if rows != self._rows:
            # Move one line down, which scrolls if this is the last line, and up again. From now on all lines but the
            # last scroll.
            out = f"\033D\033[1A\0337\033[1;{rows - 1}r\0338"
            self._rows = rows
        self._send(f"{out}\0337\033[{rows};1H\033[2K{text[: columns - 1]}\0338")

    def give_back(self) -> None:
        if self._rows:
            self._send(f"\0337\033[r\033[{self._rows};1H\033[2K\0338")
            self._rows = 0

    def _send(self, text: str) -> None:
        """Write in one call, so that no other output comes in between."""
        sys.stderr.flush()
        os.write(self._fd, text.encode())


def _describe(name: str, written: int, total: int, seconds: float) -> str:
    share = written / total
    filled = round(20 * share)
    text = f"{name}  {'█' * filled}{'░' * (20 - filled)} {share:4.0%}  {decimal(written)} of {decimal(total)}"
    if written and seconds > 0:
        rate = written / seconds
        text += f"  {decimal(int(rate))}/s  {(total - written) / rate:.0f} s left"
    return text


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty()) and os.environ.get("TERM", "dumb") != "dumb"
    except (AttributeError, ValueError):  # no stream, or a closed one
        return False
