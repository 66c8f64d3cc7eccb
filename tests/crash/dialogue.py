"""How a test talks to a real trainer (`trainers.obey`)."""

from __future__ import annotations

from pathlib import Path

from .checks import leftovers
from .faults import tracer_script
from .nursery import Child, Nursery


def delayed(directory: Path, call: str, seconds: float) -> str:
    inject = f"{call}:delay_enter={int(seconds * 1e6)}"
    return tracer_script(directory, ["-f", "-o", "/dev/null", "-e", f"trace={call}", "-e", f"inject={inject}"])


def ask(child: Child, word: str) -> str:
    child.tell(word)
    return child.expect("ANSWER")


def staged(child: Child) -> int:
    """Have one save staged; returns the pid of the writer."""
    writer = int(child.expect("WRITER"))
    assert ask(child, "save") == "done"
    assert ask(child, "staged") == "done"
    return writer


def assert_resumable(trainers: Nursery, root: Path, step: int) -> list[str]:
    """The next start finds `step`, saves, and leaves nothing over; returns what it said."""
    with trainers.child("resume", root=str(root)) as child:
        assert child.wait() == 0, child
        assert child.last("FOUND") == step, child
    assert leftovers(str(root)) == []
    return child.messages
