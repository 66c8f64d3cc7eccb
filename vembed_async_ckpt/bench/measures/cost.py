"""What one save costs, in a visit of some ten seconds: how long training stops and slows down, until when, and loading it back."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator
from dataclasses import replace

from ..engine import create
from ..machine import Disk, Others, sync_tree
from ..options import DISK
from ..visits import Say
from .common import Bench, Sample, Setting, between_steps, rounds, settle, small_steps, steady
from .finish import save_alone
from .restore import load_back
from .stall import lost_to_the_disk, save_beside, steps_beside


def measure(bench: Bench) -> Iterator[Sample]:
    """A visit to every engine each round, and one to the raw disk."""
    for number, engine in rounds(bench, [*bench.engines, DISK]):
        yield {"round": number, **bench.visit(visit_disk if engine == DISK else visit, engine)}


def visit(say: Say, setting: Setting, name: str, directory: str) -> Sample:
    """Saves beside training, the first one apart; saves beside small steps; saves alone; then the last one is loaded back.

    The state changes before each save. The wait for a quiet machine comes once, at the beginning.
    """
    options, state = setting.options, setting.spec.build()
    small = small_steps(state, setting)
    between = between_steps(state, small)
    engine = create(name, os.path.join(directory, "engine"), state)
    training = state.training(setting.batch, options.width)
    settle(options.patience)
    others = Others()
    state.step()
    beside = []
    for number in range(1 + options.saves):
        settle(0.0, state)
        beside.append(save_beside(engine, number, training))
    steps = []
    for number in range(len(beside), len(beside) + options.saves):
        settle(0.0, state)
        before = steady(options, small, between)
        call, during, ended = steps_beside(engine, number, small)
        lost = call + sum(during) - len(during) * statistics.median(before)
        steps.append({"lost": lost, "call": call, "quiet": before, "beside": during, **ended})
    alone: list[Sample] = []
    for number in range(len(beside) + len(steps), len(beside) + 2 * len(steps)):
        if alone:
            engine.remove(number - 1)
        settle(0.0, state)
        alone.append(save_alone(engine, number))
    sync_tree(engine.path(number))
    loaded = load_back(engine, number)
    engine.remove(number)
    engine.close()
    return {
        "bytes": state.nbytes,
        "first": beside[0],
        "saves": beside[1:],
        "steps": steps,
        "alone": alone,
        "loads": [loaded],
        "others": others.share(),
    }


def visit_disk(say: Say, setting: Setting, name: str, directory: str) -> Sample:
    """The raw disk with as many bytes: written, read back, and what steps lose beside a write. No engine can do better."""
    options, state = setting.options, setting.spec.build()
    small = small_steps(state, setting)
    between = between_steps(state, small)
    disk = Disk(directory, state.nbytes)
    settle(options.patience)
    others = Others()
    disk.write()
    quick = replace(options, patience=0.0)
    return {
        "bytes": state.nbytes,
        "direct": disk.direct,
        "writes": [disk.write() for _ in range(options.saves)],
        "reads": [_written_and_read(disk)],
        "floor": [lost_to_the_disk(disk, quick, small, between) for _ in range(options.saves)],
        "others": others.share(),
    }


def _written_and_read(disk: Disk) -> float:
    disk.write(keep=True)
    try:
        return disk.read()
    finally:
        disk.remove()
