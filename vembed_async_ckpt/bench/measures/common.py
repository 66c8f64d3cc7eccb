"""What the measures share: the setting of a visit, a quiet machine, and rounds in random order."""

from __future__ import annotations

import gc
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..machine import Others
from ..options import Options
from ..state import State, StateSpec
from ..training import Training

Sample = dict[str, Any]
TIGHT = 18.0  # seconds per visit, below which the time asked for may be too short for a round


@dataclass(frozen=True)
class Setting:
    """What every visit is given. `batch`: with it the training takes `options.stretch` seconds for forward and backward."""

    options: Options
    spec: StateSpec
    batch: int


class Bench(Protocol):
    """The run, as a measure sees it."""

    options: Options
    setting: Setting
    engines: Sequence[str]

    def visit(self, function: Callable[..., Any], engine: str, *arguments: Any, note: str = "") -> Sample:
        """`function(say, setting, engine, directory, *arguments)` in a new process, and the memory it took; a failure is a
        sample with an `error`."""
        ...

    def left(self) -> float:
        """Seconds of the time that was asked for."""
        ...

    def begin_round(self, number: int, visits: int) -> None:
        """Round `number` of so many visits begins."""
        ...

    def leave_out(self, thing: Any) -> None:
        """No time is left for a visit to it."""
        ...


def rounds(bench: Bench, things: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """(round, thing), every thing once a round, in random order.

    `options.rounds` of them; else as many as fit into the time that was asked for, and at least one. A first round that
    may not fit takes things as they are listed, and leaves out those for which there is no time.
    """
    options = bench.options
    order = list(things)
    tight = bench.left() < TIGHT * len(order)
    number = 0
    needed = 0.0
    while (number < options.rounds) if options.rounds else (number == 0 or needed < bench.left()):
        if not (number == 0 and tight):
            random.shuffle(order)
        bench.begin_round(number, len(order))
        begun = time.monotonic()
        longest = 0.0
        for thing in tuple(order):
            if not options.rounds and number == 0 and 0 < longest > bench.left():
                bench.leave_out(thing)
                order.remove(thing)
                continue
            started = time.monotonic()
            yield number, thing
            longest = max(longest, time.monotonic() - started)
        needed = 1.05 * (time.monotonic() - begun)
        number += 1


def settle(patience: float, state: State | None = None) -> None:
    """Every value of `state` has changed since the save before, nothing of what came before is left to be collected (every
    save was synced and removed), and other people's processes are quiet, if they are within `patience` seconds."""
    if state is not None:
        state.drift()
    gc.collect()
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        others = Others()
        time.sleep(0.2)
        if others.share() < 0.1:
            return


def cpus() -> int:
    return len(os.sched_getaffinity(0))


def small_steps(state: State, setting: Setting) -> Training:
    """A training of steps of tens of milliseconds, in which a disturbance shows; the user's own model as it is."""
    width = setting.options.width // 4
    training = state.training(setting.batch, width)
    return training if training.own else Training(width, 4, 8, state.device)


def steady(options: Options, training: Training, between: Callable[[], object]) -> list[float]:
    """Seconds of each step, for `quiet` seconds and at least `least` steps, after a few that do not count."""
    for _ in range(min(3, options.least)):
        training.step(between)
    steps: list[float] = []
    begun = time.perf_counter()
    while len(steps) < options.least or time.perf_counter() - begun < options.quiet:
        steps.append(training.step(between))
    return steps


def between_steps(state: State, training: Training) -> Callable[[], object]:
    """What belongs between backward and the optimizer's step beside the engine's barrier: the step of the optimizer that owns
    the state, where it is not the training's own."""
    return (lambda: None) if training.own else state.step


def with_threads(count: int) -> None:
    torch.set_num_threads(count)
