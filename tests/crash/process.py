"""A trainer without torch and its writer process, that go on from fault to fault."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from . import checks
from .nursery import Child, Nursery

# What was left of the fault before is swept without complaint; the reporter logs what the supervisor has logged.
_SAYS_SOMETHING = re.compile(r"ACK|ERR|LOG (?!writer failed)(?!.*: finished deleting)")


class Process:
    """A trainer with a writer process that goes on from fault to fault; checkpoint N is that of save N, and only one is kept."""

    def __init__(self, child: Child, root: str) -> None:
        self.child = child
        self.root = root
        started = child.expect("EVENT writer started")
        self.writer = int(started.removeprefix("pid ")) if started != "thread" else child.pid
        self.n = 0

    def good_save(self) -> None:
        """Make the next save, which works as ever."""
        assert self.save() == [f"ACK {self.n}"], self.child

    def save(self) -> list[str]:
        """Make the next save; returns what was said about it, in order."""
        self.n += 1
        begun = len(self.child.messages)
        self.child.tell(f"save {self.n} {self.n}")
        self.child.expect(f"ENDED {self.n}")
        if f"ACK {self.n}" in self.child.messages[begun:]:
            self.child.expect("TIDIED")
        return [m for m in self.child.messages[begun:] if _SAYS_SOMETHING.match(m)]

    def newest(self, said: list[str]) -> int:
        """What must be there after a save that said this."""
        return self.n if said[0].startswith("ACK") else self.n - 1

    def close(self) -> None:
        """End it; all the time it had one writer."""
        self.child.tell("close")
        assert self.child.expect("CLOSED") == "True"
        assert len([m for m in self.child.messages if m.startswith("EVENT writer started")]) == 1


def said_wrongly(said: list[str], root: str, *reasons: str) -> list[str]:
    """What is wrong with what a failing save said: one error, or none and perhaps one warning; with path and one of `reasons`."""
    found = []
    if len(said) > 2 or (len(said) == 2 and not said[0].startswith("ACK")):
        found.append(f"said more than once: {said}")
    for line in said:
        if not line.startswith("ACK") and (root not in line or not any(reason in line for reason in reasons)):
            found.append(f"does not say what and where: {line}")
    return found


def unexpected(root: str) -> list[str]:
    """Leftovers, but for foreign files, which are kept when their checkpoint goes."""
    return [f"left over: {entry}" for entry in checks.leftovers(root) if not entry.startswith("kept-")]


@contextmanager
def process(victims: Nursery, root: str, **options: Any) -> Iterator[Process]:
    """A trainer with a writer on `root`, closed at the end; `options` as `victims.obey` has them."""
    with victims.child("obey", root=root, **options) as child:
        running = Process(child, root)
        yield running
        running.close()
