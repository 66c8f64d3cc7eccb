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
from ..state import State, StateSpec, Training

Sample = dict[str, Any]


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

    def expect(self, visits: int) -> None:
        """So many visits are to come in this measure."""
        ...


def rounds(bench: Bench, things: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """(round, thing), every thing once a round, in random order."""
    order = list(things)
    bench.expect(bench.options.rounds * len(order))
    for number in range(bench.options.rounds):
        random.shuffle(order)
        for thing in order:
            yield number, thing


def settle(patience: float) -> None:
    """Nothing of what came before is left to be collected (every save was synced and removed), and other people's processes
    are quiet, if they are within `patience` seconds."""
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
