"""How the cost grows: blocked time by size of the state and by number of tensors, whole training time by save interval."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..engine import create
from ..machine import Others, sync_tree
from ..options import MIB
from ..visits import Say
from .common import Bench, Sample, Setting, between_steps, rounds, settle, small_steps, steady
from .stall import blocked

TELLING = ("ours", "ours-blocking", "original", "dcp", "dcp-overlap", "torch_checkpointing")  # when all engines are run


def measure(bench: Bench) -> Iterator[Sample]:
    """A visit for every engine, size and number of tensors each round, and one for all the intervals of an engine.

    A model of the user's own has one size: only intervals are measured.
    """
    options, spec = bench.options, bench.setting.spec
    engines = [name for name in bench.engines if len(bench.engines) <= len(TELLING) or name in TELLING]
    points: list[tuple[str, int]] = [("interval", 0)]
    if spec.model is None:
        points += [("size", size) for size in options.sizes] + [("tensors", count) for count in options.tensor_counts]
    for number, (engine, (kind, value)) in rounds(bench, [(e, p) for e in engines for p in points]):
        if kind == "interval":
            found = bench.visit(visit_intervals, engine, note="save intervals")
        else:
            given = replace(replace(spec, size=spec.size or 256 * MIB), **{kind: value})
            found = bench.visit(visit_blocked, engine, given, note=f"{kind} {value:,}")
        yield {"round": number, "kind": kind, "value": value, **found}


def visit_blocked(say: Say, setting: Setting, name: str, directory: str, spec: Any) -> Sample:
    """Saves of another state beside the same training."""
    state = spec.build()
    engine = create(name, directory, state)
    saves = blocked(engine, setting, state.training(setting.batch, setting.options.width))
    engine.close()
    return {"bytes": state.nbytes, "tensors": len(state.distinct()), "blocked": saves}


def visit_intervals(say: Say, setting: Setting, name: str, directory: str) -> Sample:
    """The same training with a save every so many steps, the intervals in random order, each after steps without one."""
    options, state = setting.options, setting.spec.build()
    training = small_steps(state, setting)
    between = between_steps(state, training)
    engine = create(name, directory, state)
    state.step()
    runs = []
    number = 0
    steady(options, training, between)
    for interval in [1, *random.sample(options.intervals, len(options.intervals))]:
        settle(options.patience)
        others = Others()
        quiet = steady(options, training, between)
        warming = number == 0
        steps = 2 if warming else options.interval_steps
        run = train(engine, training, interval, steps, number, options.limit)
        number += run["saves"]
        if not warming:
            runs.append({"interval": interval, "quiet": quiet, **run, "others": others.share()})
    engine.close()
    return {"bytes": state.nbytes, "runs": runs}


def train(engine: Any, training: Any, interval: int, steps: int, number: int, limit: float) -> Sample:
    """`steps` training steps with a save at the first and every `interval` after it; a save waits for the one before.

    `seconds`: of the training loop, without the removal of old checkpoints, without what makes the state change before
    each save, and without the wait for the last. After `limit`
    seconds it ends with the interval that it is in: `steps` says how many were made.
    """
    between = between_steps(engine.state, training)
    handle = None
    saves = 0
    removing = 0.0
    begun = time.perf_counter()

    def retire() -> None:
        nonlocal removing
        if handle is not None:
            handle.wait()
        uncounted = time.perf_counter()
        if handle is not None:
            if not engine.syncs:
                sync_tree(engine.path(number + saves - 1))  # else the disk would still be at it during the next
            engine.remove(number + saves - 1)
        if not training.own:
            engine.state.drift()
        removing += time.perf_counter() - uncounted

    done = 0
    for step in range(steps):
        if step % interval == 0:
            if time.perf_counter() - begun - removing > limit:
                break
            retire()
            handle = engine.save(number + saves)
            saves += 1
        waiting = handle.barrier if handle is not None else (lambda: None)
        training.step(lambda waiting=waiting: (waiting(), between()))
        done += 1
    seconds = time.perf_counter() - begun - removing
    retire()
    return {"steps": done, "saves": saves, "seconds": seconds}
