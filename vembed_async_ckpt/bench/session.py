"""One run: measure by measure, write what there is after each visit, and leave nothing else behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from . import results, summary
from .catalog import choose, listed, title_of
from .checks import folders, room_for
from .engine import kind_of
from .machine import facts
from .measures import cost, durable, memory, restore, scaling, stall
from .measures.common import Sample, Setting
from .models import pretrained
from .options import Options, Refused, default_engines
from .progress import Line
from .state import StateSpec, lasting
from .visits import Failed, Say, Visits

MEASURE: dict[str, Callable[[Any], Iterator[Sample]]] = {
    "cost": cost.measure,
    "stall": stall.measure,
    "durable": durable.measure,
    "memory": memory.measure,
    "scaling": scaling.measure,
    "restore": restore.measure,
}


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM. `file` holds what was measured until then, after `visits` visits; None if nothing was."""

    def __init__(self, file: Path | None, visits: int) -> None:
        self.file = file
        self.visits = visits


def run(
    options: Options,
    directory: Path,
    out: Path,
    console: Console | None = None,
    *,
    begun: float | None = None,
    missing: Sequence[str] = (),
) -> tuple[dict[str, Any], Path]:
    """Measure; returns the result and the JSON file that holds it. Checkpoints go to a new folder in `directory`, removed
    at the end. `begun`: when the time that was asked for began to run, by `time.monotonic`. `missing`: engines that are
    not installed.

    Raises `Refused` before anything is written that stays. An engine that fails is in the result with its error, and the others
    go on. After Ctrl-C or SIGTERM raises `Interrupted`.
    """
    console = console or Console(stderr=True)
    engines, absent = choose(options.engines, default_engines(options.budget))
    begun = time.monotonic() if begun is None else begun
    file = None
    visits = 0
    try:
        with folders(options, directory, out), _terminated_as_interrupted(), _folder(directory) as folder:
            bench = Session(options, engines, folder, console, begun)
            result: dict[str, Any] = {
                "format": results.FORMAT,
                "complete": False,
                "machine": facts(folder),
                "options": asdict(options),
                "state": bench.prepare(lambda size: room_for(options, directory, size)),
                "engines": {name: bench.described(name) for name in [*engines, *absent, *missing]},
                "left_out": bench.left_out,
                "measures": {},
                "summary": {},
            }
            for measure in options.measures:
                started = time.monotonic()
                samples: list[Sample] = []
                with bench.measuring(measure, samples):
                    for sample in MEASURE[measure](bench):
                        samples.append(sample)
                        visits += 1
                        file = file or results.new_file(out)
                        result["measures"][measure] = {
                            "seconds": round(time.monotonic() - started, 1),
                            "samples": samples,
                        }
                        results.write(file, result)
            result["summary"] = summary.of(result)
            result["complete"] = True
            assert file is not None  # there is at least one visit
            results.write(file, result)
    except KeyboardInterrupt:
        if file is not None:
            result["summary"] = summary.of(result)
            results.write(file, result)
        raise Interrupted(file, visits) from None
    return result, file


class Session:
    """What a measure sees of the run."""

    def __init__(self, options: Options, engines: Sequence[str], folder: str, console: Console, begun: float) -> None:
        self.options = options
        self.engines = engines
        self.left_out: list[str] = []
        self._folder = folder
        self._console = console
        self._begun = begun
        self._visits = Visits(os.path.join(folder, "engines.log"))
        self._number = 0
        self._line: Line | None = None
        self._own: dict[str, str] = {}

    def prepare(self, check: Callable[[int], None]) -> dict[str, Any]:
        """Describe the state, after `check(bytes)` of a model whose size was not known, and fit the training to the machine."""
        spec = StateSpec.of(self.options)
        if spec.model is not None:
            check(self._visits.call(size_of_model, spec.model)[0])
        for name in self.engines:
            if ":" in name:
                self._own[name] = self._visits.call(lacks_of, name)[0]
        state, _ = self._visits.call(describe, spec, self.options)
        self.setting = Setting(self.options, spec, state["batch"])
        if spec.model is not None and not state["trained"]:
            self._console.print(
                "[yellow]note:[/] no input was found that this model takes; another one trains beside its saves"
            )
        return dict(state)

    def described(self, name: str) -> dict[str, Any]:
        """The catalog's entry, for the result; of an engine of one's own with what its class says."""
        entry = listed(name)
        return (
            asdict(entry) | {"installed": entry.installed} | ({"lacks": self._own[name]} if name in self._own else {})
        )

    @contextlib.contextmanager
    def measuring(self, measure: str, samples: Sequence[Sample]) -> Iterator[None]:
        """Show how far it is while this lasts. `samples` grows meanwhile."""
        with Line(self._console, measure, samples, self.left) as self._line:
            yield
        self._line = None

    def left(self) -> float:
        budget = self.options.budget
        return float("inf") if budget is None else budget - (time.monotonic() - self._begun)

    def begin_round(self, number: int, visits: int) -> None:
        assert self._line is not None
        self._line.begin_round(number, visits)

    def leave_out(self, thing: Any) -> None:
        self.left_out.append(str(thing))
        self._console.print(f"no time is left for {title_of(str(thing))}; a longer --budget has some", highlight=False)

    def visit(self, function: Callable[..., Any], engine: str, *arguments: Any, note: str = "") -> Sample:
        assert self._line is not None
        self._line.begin_visit(engine, note)
        directory = os.path.join(self._folder, f"visit-{self._number}")
        self._number += 1
        os.mkdir(directory)
        begun = time.monotonic()
        try:
            found, peaks = self._visits.call(function, self.setting, engine, directory, *arguments)
            took = {"seconds": round(time.monotonic() - begun, 1)}
            return {"engine": engine, **found, **took, **({"proportional": peaks} if peaks else {})}
        except (Failed, Refused) as error:  # one that cannot be imported has failed as well
            self._console.print(f"[red]{engine} failed:[/] {str(error).strip().splitlines()[-1]}", highlight=False)
            return {"engine": engine, "error": str(error)}
        finally:
            self._line.end_visit()
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
        "model": type(state.model).__name__ if spec.model else spec.workload if spec.size is None else "synthetic",
        "batch": batch,
        "trained": state.training(batch, options.width).own,
    }


def size_of_model(say: Say, name: str) -> int:
    """Bytes of weights and AdamW's moments, from its config alone."""
    return sum(parameter.numel() for parameter in pretrained(name, empty=True).parameters()) * 4 * 3


def lacks_of(say: Say, name: str) -> str:
    """What the class of an engine of one's own says that it leaves out. Raises `Refused` if it is no engine."""
    return kind_of(name).lacks


# -- before and after


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
