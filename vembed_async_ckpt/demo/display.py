"""What the demo shows while it trains: a live table on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Protocol

from rich.console import Console
from rich.filesize import decimal
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from vembed_async_ckpt import SaveHandle, SaveState

_RECENT = 4  # saves on screen
_REFRESHES = 4  # per second, from a thread of its own: an idle display costs the training about 1 %
_PLAIN_LINES = 10  # progress lines of a run that is not on a terminal


@dataclass(slots=True)
class Progress:
    """How far the training is; the training thread writes it, a display reads it."""

    step: int
    steps: int
    loss: float = float("nan")
    saves: list[SaveHandle] = field(default_factory=list)
    first: int = field(init=False)
    began: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.first = self.step

    def speed(self) -> float:
        """Steps per second of this session, saves included."""
        return (self.step - self.first) / (time.perf_counter() - self.began)


class Display(Protocol):
    """Shows a `Progress` until `close`; `update` tells it that a step was taken and never waits."""

    def update(self) -> None: ...
    def close(self) -> None: ...


def display(console: Console, progress: Progress) -> Display:
    """The display that suits the console."""
    return LiveDisplay(console, progress) if console.is_terminal else PlainDisplay(console, progress)


class LiveDisplay:
    """A training bar and a line for each recent save, drawn by rich's refresh thread."""

    def __init__(self, console: Console, progress: Progress) -> None:
        self._progress = progress
        self._live = Live(self, console=console, refresh_per_second=_REFRESHES)
        self._live.start()

    def update(self) -> None:
        """Nothing to do: the refresh thread reads the progress itself."""

    def close(self) -> None:
        self._live.stop()

    def __rich__(self) -> Table:
        progress = self._progress
        table = Table.grid(padding=(0, 2))
        table.add_row(
            "training",
            ProgressBar(total=progress.steps, completed=progress.step, width=20),
            f"step {progress.step}/{progress.steps}",
            f"loss {progress.loss:.3f}, {progress.speed():.1f} steps/s",
        )
        for handle in progress.saves[-_RECENT:]:
            written, total = handle.progress
            bar = ProgressBar(total=total or 1, completed=written, width=20)
            table.add_row(handle.path.name, bar, handle.state.name.lower(), _cost(handle))
        return table


class PlainDisplay:
    """A line every tenth of the training, and one for each save once it is committed."""

    def __init__(self, console: Console, progress: Progress) -> None:
        self._console = console
        self._progress = progress
        self._every = max(1, progress.steps // _PLAIN_LINES)
        self._told = 0

    def update(self) -> None:
        self._tell_saves()
        now = self._progress
        if now.step % self._every == 0 or now.step == now.steps:
            self._print(f"step {now.step}/{now.steps}  loss {now.loss:.3f}, {now.speed():.1f} steps/s")

    def close(self) -> None:
        self._tell_saves()

    def _tell_saves(self) -> None:
        saves = self._progress.saves
        while self._told < len(saves) and saves[self._told].done():
            handle = saves[self._told]
            self._print(f"{handle.path.name}  {handle.state.name.lower()}  {_cost(handle)}")
            self._told += 1

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, markup=False, highlight=False)


def _cost(handle: SaveHandle) -> str:
    # The exception of a failed save is not read here: the checkpointer shall still raise it in the training thread.
    if handle.state is not SaveState.COMMITTED:
        return ""
    info = handle.result()
    size, timings = decimal(info.total_bytes), info.timings
    return f"stall {timings.stall * 1e3:.1f} ms, {size} durable after {timings.durable:.2f} s"
