"""A sweep: one traced run that says where a fault can strike, then one run for each of these points."""

from __future__ import annotations

import os
import queue
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .conftest import Tally
from .faults import Call, Disk, Point, attached, kill_options, parse_trace, points, trace_options, tracer_script
from .nursery import Child, Nursery

AT_ONCE = 3  # victims: they wait for disks and for each other more than they compute


@dataclass(frozen=True)
class Scenario:
    """What a victim does, beginning with the root as it is after `before` (saves as (n, step)) and with `foreign` files.

    `killed`: "trainer" with a writer in a thread, "writer" (a process; the trainer goes on), or "both".
    """

    killed: str
    keep: int
    saves: list[tuple[int, int]]
    before: list[tuple[int, int]] = field(default_factory=list)
    foreign: dict[str, bytes] = field(default_factory=dict)
    direct: bool = True

    @property
    def writer(self) -> str:
        return "thread" if self.killed == "trainer" else "process"


# By how many are kept: saves of which the last lets an older checkpoint go.
PRUNING: dict[int, dict[str, Any]] = {
    1: {"saves": [(1, 1), (2, 2)]},
    3: {"saves": [(4, 4)], "before": [(1, 1), (2, 2), (3, 3)]},
}


class Bench:
    """A place for one victim at a time: `root` is where it saves, on `disk` if there is one whose power is cut."""

    def __init__(self, directory: Path, disk: Disk | None = None) -> None:
        directory.mkdir(exist_ok=True)
        self.directory = Path(os.path.realpath(directory))
        self.disk = disk
        self.root = os.path.join(disk.path if disk else self.directory, "root")


Judge = Callable[[Child, Bench], list[str]]


class Sweep:
    """All victims of one scenario, each on a root laid out like the first one's."""

    def __init__(self, nursery: Nursery, scenario: Scenario, benches: Sequence[Bench]) -> None:
        self._nursery = nursery
        self._scenario = scenario
        self._benches: queue.SimpleQueue[Bench] = queue.SimpleQueue()
        for bench in benches:
            self._benches.put(bench)
        self._template = str(benches[0].directory / "template")
        if scenario.before:
            arguments = {"writer": "thread", "keep": 99, "saves": scenario.before}
            with nursery.child("save", root=self._template, **arguments) as child:
                assert child.wait() == 0, child
        for name, data in scenario.foreign.items():
            path = Path(self._template) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def trace(self) -> tuple[list[Call], str]:
        """The calls of a run in which nothing goes wrong, and its root."""
        bench = self._benches.get()
        self._lay_out(bench)
        log = bench.directory / "trace"
        with self._victim(bench, trace_options(str(log))) as child:
            assert child.wait() == 0, child
            assert child.last("ACK") == self._scenario.saves[-1][0]
        self._benches.put(bench)
        return parse_trace(log.read_text()), bench.root

    def run(self, tally: Tally, judge: Judge) -> None:
        """For every point, have a victim killed there, and let `judge` say what is wrong afterwards."""

        def strike(point: Point) -> list[str]:
            bench = self._benches.get()
            try:
                self._lay_out(bench)
                with self._victim(bench, kill_options(point, bench.root)) as child:
                    self._assert_killed(point, child)
                    return judge(child, bench)
            finally:
                self._benches.put(bench)

        found = points(*self.trace())
        with ThreadPoolExecutor(self._benches.qsize()) as pool:
            for point, problems in zip(found, pool.map(strike, found), strict=True):
                tally.fault(point, problems)

    def _lay_out(self, bench: Bench) -> None:
        shutil.rmtree(bench.root, ignore_errors=True)
        if os.path.exists(self._template):
            shutil.copytree(self._template, bench.root)
        if bench.disk:
            bench.disk.sync()

    def _assert_killed(self, point: Point, child: Child) -> None:
        status = child.wait()
        if self._scenario.killed == "trainer":
            assert status == -9, f"{point} never came: {child}"
        else:
            # Alone killed, the writer is replaced and the trainer goes on; both, there is nobody to go on, except where the
            # trainer wanted nothing more of the writer.
            assert status == 0 or self._scenario.killed == "both", child
            died = any("killed by signal 9" in message for message in child.messages)
            assert died or status == -9, f"{point} never came: {child}"

    @contextmanager
    def _victim(self, bench: Bench, options: list[str]) -> Iterator[Child]:
        scenario = self._scenario
        arguments = {"root": bench.root, "writer": scenario.writer, "keep": scenario.keep, "saves": scenario.saves}
        arguments["direct"] = scenario.direct
        if scenario.killed == "trainer":
            with self._nursery.child("save", **arguments, wait=True) as child, attached(child, options):
                yield child
        else:
            script = tracer_script(bench.directory, options)
            with self._nursery.child("save", **arguments, tracer=script, dies_too=scenario.killed == "both") as child:
                yield child
