"""One run: check that it can be done, measure by measure, write what there is after each, and leave nothing else behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .._arena.arena import available_memory
from . import summary
from .catalog import ENGINES, choose
from .machine import facts, file_system
from .measures import durable, memory, restore, scaling, stall
from .measures.common import Sample, Setting
from .options import DEFAULT_ENGINES, MIB, Options, Refused
from .state import StateSpec, lasting, pretrained
from .visits import Failed, Say, Visits

FORMAT = 1  # of the result file
MEASURE: dict[str, Callable[[Any], list[Sample]]] = {
    "stall": stall.measure,
    "durable": durable.measure,
    "memory": memory.measure,
    "scaling": scaling.measure,
    "restore": restore.measure,
}
# How often a visit holds the state in memory: itself, what an engine stages (DCP's process two), the raw ceiling's source.
COPIES = {"stall": 3.5, "durable": 4.0, "memory": 3.5, "scaling": 3.5, "restore": 4.0}
ON_DISK = 2.2  # how often it is on disk: a checkpoint and what is read or written beside it
BASE = 1 << 30  # torch, the training beside, and room for the rest of the machine


def run(options: Options, directory: Path, out: Path, console: Console | None = None) -> tuple[dict[str, Any], Path]:
    """Measure; returns the result and the JSON file that holds it. Checkpoints go to a new folder in `directory`, removed at the
    end.

    Raises `Refused` before anything is written that stays. An engine that fails is in the result with its error, and the others
    go on. After Ctrl-C or SIGTERM the file holds what was measured until then.
    """
    console = console or Console(stderr=True)
    engines, missing = choose(options.engines, DEFAULT_ENGINES)
    if not directory.is_dir():
        raise Refused(f"--dir {directory} is no directory")
    room_for(options, directory, None if options.model else options.size)
    with _terminated_as_interrupted(), _folder(directory) as folder:
        bench = Session(options, engines, folder, console)
        state = bench.prepare(lambda size: room_for(options, directory, size))
        result: dict[str, Any] = {
            "format": FORMAT,
            "complete": False,
            "machine": facts(folder),
            "options": asdict(options),
            "state": state,
            "engines": {
                name: asdict(ENGINES[name]) | {"installed": ENGINES[name].installed} for name in engines + missing
            },
            "measures": {},
            "summary": {},
        }
        file = _result_file(out)
        try:
            for measure in options.measures:
                begun = time.monotonic()
                with bench.measuring(measure):
                    samples = MEASURE[measure](bench)
                result["measures"][measure] = {"seconds": round(time.monotonic() - begun, 1), "samples": samples}
                result["summary"] = summary.of(result)
                result["complete"] = list(result["measures"]) == list(options.measures)
                _write(file, result)
        finally:
            if not result["measures"]:
                file.unlink()
    return result, file


class Session:
    """What a measure sees of the run."""

    def __init__(self, options: Options, engines: Sequence[str], folder: str, console: Console) -> None:
        self.options = options
        self.engines = engines
        self._folder = folder
        self._console = console
        self._visits = Visits(os.path.join(folder, "engines.log"))
        self._number = 0
        self._progress: Progress | None = None

    def prepare(self, check: Callable[[int], None]) -> dict[str, Any]:
        """Describe the state, after `check(bytes)` of a model whose size was not known, and fit the training to the machine."""
        spec = StateSpec.of(self.options)
        if spec.device != "cpu":
            self._visits.call(check_device, spec.device)
        if spec.model is not None:
            check(self._visits.call(size_of_model, spec.model)[0])
        state, _ = self._visits.call(describe, spec, self.options)
        self.setting = Setting(self.options, spec, state["batch"])
        if spec.model is not None and not state["trained"]:
            self._console.print(
                "[yellow]note:[/] no input was found that this model takes; another one trains beside its saves"
            )
        return dict(state)

    @contextlib.contextmanager
    def measuring(self, measure: str) -> Iterator[None]:
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, console=self._console, transient=True) as self._progress:
            self._task = self._progress.add_task(measure)
            self._measure = measure
            yield
        self._progress = None

    def expect(self, visits: int) -> None:
        assert self._progress is not None
        self._progress.update(self._task, total=visits)

    def visit(self, function: Callable[..., Any], engine: str, *arguments: Any, note: str = "") -> Sample:
        assert self._progress is not None
        self._progress.update(self._task, description=f"{self._measure}: {engine}{', ' * bool(note)}{note}")
        directory = os.path.join(self._folder, f"visit-{self._number}")
        self._number += 1
        os.mkdir(directory)
        try:
            found, peaks = self._visits.call(function, self.setting, engine, directory, *arguments)
            return {"engine": engine, **found, **({"proportional": peaks} if peaks else {})}
        except Failed as error:
            self._console.print(f"[red]{engine} failed:[/] {str(error).strip().splitlines()[-1]}", highlight=False)
            return {"engine": engine, "error": str(error)}
        finally:
            self._progress.advance(self._task)
            shutil.rmtree(directory, ignore_errors=True)


# -- in visits


def describe(say: Say, spec: StateSpec, options: Options) -> dict[str, Any]:
    """Sizes of the state, and the batch with which training lasts."""
    state = spec.build()
    batch = lasting(state, options.stretch, options.width)
    return {
        "bytes": state.nbytes,
        "tensors": len(state.distinct()),
        "parameters": sum(parameter.numel() for parameter in state.model.parameters()),
        "model": type(state.model).__name__ if spec.model else "synthetic",
        "batch": batch,
        "trained": state.training(batch, options.width).own,
    }


def size_of_model(say: Say, name: str) -> int:
    """Bytes of weights and AdamW's moments, from its config alone."""
    return sum(parameter.numel() for parameter in pretrained(name, empty=True).parameters()) * 4 * 3


def check_device(say: Say, device: str) -> None:
    """Raises `Refused` if torch has no such device."""
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise Refused(f"--device {device}: {str(error).splitlines()[0]}") from error


# -- before and after


def room_for(options: Options, directory: Path, size: int | None) -> None:
    """Raises `Refused`, with the numbers, if disk or memory is too small for a state of `size` bytes; None is not known yet."""
    sizes = [(name, size or 0) for name in options.measures]
    if "scaling" in options.measures and options.model is None:
        sizes.append(("scaling", max(options.sizes)))
    disk = int(ON_DISK * max(found for _, found in sizes)) + 64 * MIB
    free = shutil.disk_usage(directory).free
    if disk > free:
        raise Refused(f"{directory} has {decimal(free)} left; {decimal(disk)} are needed. Use --dir or --size")
    room = int(max(COPIES[name] * found for name, found in sizes)) + BASE // 2
    available = available_memory()
    if room > available:
        raise Refused(
            f"{decimal(available)} of memory are available; engines need up to {decimal(room)} for a state of "
            f"{decimal(max(found for _, found in sizes))}. Use a smaller --size"
            + (", or leave `scaling` out" if "scaling" in options.measures else "")
        )


def on_memory(directory: Path) -> bool:
    """Whether `directory` is no disk at all."""
    return file_system(os.fspath(directory))[0] in ("tmpfs", "ramfs")


@contextlib.contextmanager
def _folder(directory: Path) -> Iterator[str]:
    """A new folder in `directory`, which is removed whatever happens; the visits have ended by then."""
    folder = tempfile.mkdtemp(prefix="vembed-bench-", dir=directory)
    try:
        yield folder
    finally:
        for _ in range(50):
            shutil.rmtree(folder, ignore_errors=True)
            if not os.path.exists(folder):
                break
            time.sleep(0.1)


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM is a Ctrl-C while this lasts, so that it too leaves nothing behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _result_file(out: Path) -> Path:
    """A name that nobody has, in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    stem = f"bench-{datetime.now():%Y-%m-%d-%H%M%S}"
    number = 0
    while True:
        path = out / (f"{stem}-{number}.json" if number else f"{stem}.json")
        try:
            path.open("x").close()
            return path
        except FileExistsError:
            number += 1


def _write(path: Path, result: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(partial, path)
