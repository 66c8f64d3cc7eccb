"""Saves on a `PowerCutFilesystem`, and every kind of disk that may be found when the power fails before one of their calls."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vembed_async_ckpt.testing import Change, Choose, Fate, PowerCutFilesystem, at_random, kept, lost, names_only

from . import checks
from .inprocess import Writer, next_start

SEEDS = 6


@dataclass(frozen=True)
class Story:
    """Saves as (n, step), one after another; `foreign` files appear before the last one."""

    keep: int
    saves: list[tuple[int, int]]
    foreign: dict[str, bytes] = field(default_factory=dict)

    def tell(self, fs: PowerCutFilesystem) -> int:
        """Save until the end or until the power fails; returns the number of the last save that was acknowledged."""
        acknowledged = 0
        with Writer(fs.root, fs) as writer:
            for n, step in self.saves:
                if n == self.saves[-1][0] and not fs.off:
                    for name, data in self.foreign.items():
                        path = Path(fs.root, name)
                        path.parent.mkdir(exist_ok=True)
                        path.write_bytes(data)
                outcome = writer.save(n, step, self.keep)
                if outcome.acknowledged:
                    acknowledged = n
                if fs.off:
                    break
                assert outcome.acknowledged, outcome
                assert not outcome.errors + outcome.warnings
        return acknowledged


def choices(unsynced: list[Change]) -> Iterator[tuple[str, Choose]]:
    """Ways in which a disk may have kept the changes, each with a name."""
    yield "all lost", lost
    if not unsynced:
        return
    yield "all kept", kept
    yield "names only", names_only
    for change in unsynced:
        for fate in fates(change):
            yield f"only {change} {fate}", except_for(change, fate, "lost" if fate == "kept" else "kept")
    if len(unsynced) > 2:
        yield from ((f"at random {seed}", at_random(seed)) for seed in range(SEEDS))


def fates(change: Change) -> list[Fate]:
    more: dict[str, list[Fate]] = {"write": ["torn", "zero"], "rename": ["half"]}
    return ["lost", "kept", *more.get(change.call, [])]


def except_for(one: Change, fate: Fate, others: Fate) -> Choose:
    return lambda change: fate if change == one else others


def crash_states(
    story: Story,
    disk: type[PowerCutFilesystem],
    directory: Path,
    choices: Callable[[list[Change]], Iterable[tuple[str, Choose]]] = choices,
    numbers: Iterable[int] | None = None,
) -> Iterator[tuple[str, list[str]]]:
    """Every state, and what is wrong with it: for a power cut at any call, or at those of these `numbers`."""
    for k in numbers or itertools.count(1):
        root = directory / f"{k}"
        root.mkdir()
        fs = disk(root)
        fs.after(k)
        acknowledged = story.tell(fs)
        for name, choose in choices(fs.unsynced):
            image = str(fs.image(directory / "image", choose))
            yield f"call {k}, {name}", problems(image, story, acknowledged)
            shutil.rmtree(image)
        shutil.rmtree(root)
        if not fs.off:
            return


def problems(root: str, story: Story, acknowledged: int) -> list[str]:
    found = list(checks.after_fault(root, acknowledged))
    if any("brings it back" in problem for problem in found):
        found = []  # without exchange there is such a moment; that it is said, and that it passes, is what can be asked
    found += [f"after the next start: {problem}" for problem in next_start(root, story.keep)]
    if acknowledged >= story.saves[0][0]:
        for name, data in story.foreign.items():
            path = Path(root, name)
            if not path.exists() or path.read_bytes() != data:
                found.append(f"{name}: lost or altered")
    return found
