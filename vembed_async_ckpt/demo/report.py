"""What a session of the demo measured, the synchronous save it is compared with, and the tables that say so."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from vembed_async_ckpt import CheckpointInfo

from .training import Trainer


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one training step, and whether a save was in flight when it began."""

    seconds: float
    beside_save: bool


@dataclass(frozen=True, slots=True)
class SynchronousSave:
    """Seconds of the same save made by the training thread: until `save_pretrained` and `torch.save` were through
    (bytes in the page cache), and until everything was synced to disk as well."""

    written: float
    durable: float


@dataclass(frozen=True, slots=True)
class DemoReport:
    """What one session did; `saves` (in order) and the measurements are empty if there was nothing left to train."""

    out: Path
    checkpoint: Path
    step: int
    saves: tuple[CheckpointInfo, ...] = ()
    step_times: tuple[StepTime, ...] = ()
    synchronous: tuple[SynchronousSave, ...] = ()


def measure_synchronous_saves(trainer: Trainer, tokenizer: Any, out: Path) -> tuple[SynchronousSave, ...]:
    """Save what a checkpoint holds three times the stock way, on the file system of `out`; nothing of it remains."""
    return tuple(_save_synchronously(trainer, tokenizer, out) for _ in range(3))


def _save_synchronously(trainer: Trainer, tokenizer: Any, out: Path) -> SynchronousSave:
    with tempfile.TemporaryDirectory(dir=out, prefix="synchronous-") as name:
        folder = Path(name)
        began = time.perf_counter()
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        torch.save(trainer.optimizer.state_dict(), folder / "optimizer.bin")
        torch.save(trainer.scheduler.state_dict(), folder / "scheduler.bin")
        written = time.perf_counter()
        for path in (*folder.iterdir(), folder):
            _sync(path)
        return SynchronousSave(written - began, time.perf_counter() - began)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def print_report(console: Console, report: DemoReport) -> None:
    """The table of saves, what they cost beside the synchronous way, and the commands to look at the result."""
    console.print()
    console.print(_table_of_saves(report))
    console.print("stall: all the time taken from the training thread, waiting and barrier included")
    console.print()
    console.print(_comparison(report))
    console.print("\nLook at the result:")
    for command in _commands(report):
        console.print(f"  {command}", soft_wrap=True, markup=False, highlight=False)


def _table_of_saves(report: DemoReport) -> Table:
    table = Table(title="Every save of this session, the first one cold", title_justify="left")
    for header in ("step", "stall", "durable after", "bytes", "written at"):
        table.add_column(header, justify="right")
    for info in report.saves:
        timings = info.timings
        table.add_row(
            str(info.step),
            _milliseconds(timings.stall),
            f"{timings.durable:.2f} s",
            decimal(info.total_bytes),
            f"{info.total_bytes / timings.write / 1e9:.2f} GB/s",
        )
    return table


def _comparison(report: DemoReport) -> Table:
    stall = median(info.timings.stall for info in report.saves[1:] or report.saves)
    written = median(save.written for save in report.synchronous)
    durable = median(save.durable for save in report.synchronous)
    alone = _median(step.seconds for step in report.step_times if not step.beside_save)
    beside = _median(step.seconds for step in report.step_times if step.beside_save)
    table = Table(title="What it costs the training thread", title_justify="left")
    table.add_column("")
    table.add_column("median", justify="right")
    table.add_column("ratio", justify="right")
    table.add_row("save in the background, durable: stall", _milliseconds(stall), "")
    table.add_row("same save, synchronous, page cache", _milliseconds(written), f"{written / stall:.0f}x")
    table.add_row("same save, synchronous, fsync: durable", _milliseconds(durable), f"{durable / stall:.0f}x")
    table.add_section()
    table.add_row("a training step, no save in flight", _milliseconds(alone), "")
    table.add_row("a training step, a save in flight", _milliseconds(beside), _ratio(alone, beside))
    table.add_row("slower steps, in all, for one save", _milliseconds(_slowing(report, alone, beside)), "")
    return table


def _slowing(report: DemoReport, alone: float | None, beside: float | None) -> float | None:
    """Seconds that the steps beside one save took longer, if they did: what it costs where no core is spare."""
    if alone is None or beside is None or beside <= alone:
        return None
    return (beside - alone) * sum(step.beside_save for step in report.step_times) / len(report.saves)


def _commands(report: DemoReport) -> list[str]:
    out = quote(str(report.out))
    opened = f"from transformers import AutoModel; AutoModel.from_pretrained({str(report.checkpoint)!r})"
    return [f"vembed-ckpt ls {out}", f"vembed-ckpt verify {out}", f'python -c "{opened}"']


def _median(values: Iterable[float]) -> float | None:
    known = list(values)
    return median(known) if known else None


def _milliseconds(seconds: float | None) -> str:
    return "none" if seconds is None else f"{seconds * 1e3:,.1f} ms"


def _ratio(before: float | None, after: float | None) -> str:
    return "" if before is None or after is None else f"{after / before:.2f}x"
