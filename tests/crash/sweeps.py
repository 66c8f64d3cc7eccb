"""A sweep: one traced run that says where a fault can strike, then one run for each of these points."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .faults import Call, Point, attached, kill_options, parse_trace, points, trace_options, tracer_script
from .nursery import Child, Nursery


@dataclass(frozen=True)
class Scenario:
    """What the victims of a sweep do, beginning with the root as it is after `before` (saves as (n, step)).

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


def scenarios(keep: int) -> dict[str, Any]:
    """Two saves, of which at least one lets an older checkpoint go."""
    return {1: {"saves": [(1, 1), (2, 2)]}, 3: {"saves": [(3, 3), (4, 4)], "before": [(1, 1), (2, 2)]}}[keep]


class Sweep:
    """Runs the victims of one scenario, each on a fresh `root` made like the first."""

    def __init__(self, nursery: Nursery, scenario: Scenario, root: str, scratch: Path) -> None:
        self._nursery = nursery
        self._scenario = scenario
        self._scratch = scratch
        self._template = str(scratch / "template")
        self.root = os.path.realpath(root)
        if scenario.before:
            arguments = {"writer": "thread", "keep": 99, "saves": scenario.before}
            with nursery.child("save", root=self._template, **arguments) as child:
                assert child.wait() == 0, child
        for name, data in scenario.foreign.items():
            path = Path(self._template) / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)

    def lay_out(self) -> None:
        """The root as it was before the first save."""
        shutil.rmtree(self.root, ignore_errors=True)
        if os.path.exists(self._template):
            shutil.copytree(self._template, self.root)

    def trace(self) -> list[Call]:
        """The calls of a run in which nothing goes wrong."""
        log = self._scratch / "trace"
        self.lay_out()
        with self._victim(trace_options(str(log))) as child:
            assert child.wait() == 0, child
            assert child.last("ACK") == self._scenario.saves[-1][0]
        return parse_trace(log.read_text())

    def killed_at_each(self, prepare: Callable[[], None]) -> Iterator[tuple[Point, Child]]:
        """For every point, a victim that was killed there and has ended; the root lies as it left it."""
        for point in points(self.trace(), self.root):
            prepare()
            with self._victim(kill_options(point)) as child:
                status = child.wait()
                if self._scenario.killed == "trainer":
                    assert status == -9, f"{point} never came: {child}"
                else:
                    # Alone killed, the writer is replaced and the trainer goes on; both, there is nobody to go on, except
                    # where the trainer wanted nothing more of the writer.
                    assert status == 0 or self._scenario.killed == "both", child
                    died = any("killed by signal 9" in message for message in child.messages)
                    assert died or status == -9, f"{point} never came: {child}"
                yield point, child

    @contextmanager
    def _victim(self, options: list[str]) -> Iterator[Child]:
        scenario = self._scenario
        arguments = {"root": self.root, "writer": scenario.writer, "keep": scenario.keep, "saves": scenario.saves}
        arguments["direct"] = scenario.direct
        if scenario.killed == "trainer":
            with self._nursery.child("save", **arguments, wait=True) as child, attached(child, options):
                yield child
        else:
            script = tracer_script(self._scratch, options)
            with self._nursery.child("save", **arguments, tracer=script, dies_too=scenario.killed == "both") as child:
                yield child
