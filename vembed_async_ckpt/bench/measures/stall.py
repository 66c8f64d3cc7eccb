"""What a save takes from the training loop, and what it does to the steps beside it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from ..engine import Engine, create
from ..machine import CopyCeiling, Disk, NewBytes, Others
from ..options import Options
from ..training import Training
from ..visits import Say
from .common import Bench, Sample, Setting, between_steps, cpus, rounds, settle, small_steps, steady, with_threads
from .finish import Finish


def measure(bench: Bench) -> Iterator[Sample]:
    """A visit to every engine each round."""
    for number, engine in rounds(bench, bench.engines):
        yield {"round": number, **bench.visit(visit, engine)}


def visit(say: Say, setting: Setting, name: str, directory: str) -> Sample:
    """Steps before the engine exists; saves beside training; steps with the engine idle and beside a save, by turns, with one
    torch thread and with all; at last, when the engine has let go of its memory, steps without it, steps beside a raw
    write of as many bytes, and the copy ceiling."""
    options, state = setting.options, setting.spec.build()
    small = small_steps(state, setting)
    threads = sorted({1, cpus()})
    between = between_steps(state, small)
    bare: dict[int, list[float]] = {}
    for count in threads:
        with_threads(count)
        bare[count] = steady(options, small, between)
    with_threads(cpus())
    engine = create(name, directory, state)
    saves = blocked(engine, setting, state.training(setting.batch, options.width))
    steps: list[Sample] = []
    number = len(saves) + options.warm_up
    for count in threads:
        with_threads(count)
        quiet: list[float] = []
        beside: list[float] = []
        lost: list[float] = []
        for _ in range(options.saves):
            settle(options.patience, state)
            before = steady(options, small, between)
            call, during, _ = steps_beside(engine, number, small)
            quiet += before
            beside += during
            lost.append(call + sum(during) - len(during) * statistics.median(before))
            number += 1
        steps.append({"threads": count, "bare": bare[count], "quiet": quiet, "beside": beside, "lost": lost})
    engine.close()
    disk = Disk(directory, state.nbytes)
    for part in steps:
        with_threads(part["threads"])
        part["bare"] += steady(options, small, between)
        part["floor"] = [lost_to_the_disk(disk, options, small, between) for _ in range(options.saves)]
    with_threads(cpus())
    copy = CopyCeiling(state.distinct())
    return {"bytes": state.nbytes, "blocked": saves, "steps": steps, "copy": [copy.seconds() for _ in range(4)][1:]}


def blocked(engine: Engine, setting: Setting, training: Training) -> list[Sample]:
    """Saves beside training, after some that do not count; each after a stretch of training without one."""
    samples = []
    engine.state.step()
    for number in range(setting.options.warm_up + setting.options.saves):
        settle(setting.options.patience, engine.state)
        others = Others()
        sample = save_beside(engine, number, training)
        if number >= setting.options.warm_up:
            samples.append({**sample, "others": others.share()})
    return samples


def save_beside(engine: Engine, number: int, training: Training) -> Sample:
    """As in a training loop: save, forward and backward, optimizer step. The checkpoint is removed when it is durable.

    `save` and `step` are what the loop is blocked for: no step changes anything here, so that `step` is the wait before it.
    """
    alone = training.stretch()
    new = NewBytes(engine.directory)
    begun = time.perf_counter()
    handle = engine.save(number)
    saved = time.perf_counter()
    finish = Finish(engine, handle, number, begun)
    work = training.stretch()
    worked = time.perf_counter()
    handle.barrier()
    engine.state.step()
    stepped = time.perf_counter()
    ended = finish.result()
    size = new.count()
    engine.remove(number)
    return {
        "save": saved - begun,
        "step": stepped - worked,
        "blocked": saved - begun + stepped - worked,
        "work": work,
        "work_alone": alone,
        "bytes": size,
        **ended,
    }


def steps_beside(engine: Engine, number: int, training: Training) -> tuple[float, list[float], Sample]:
    """Seconds that `save()` took, of each step begun between its return and the moment when the checkpoint is durable, and
    what a thread saw of the end. The first step holds the barrier."""
    between = between_steps(engine.state, training)
    begun = time.perf_counter()
    handle = engine.save(number)
    call = time.perf_counter() - begun
    finish = Finish(engine, handle, number, begun)

    def barrier() -> None:
        handle.barrier()
        between()

    steps = steps_until(finish.over, training, barrier)
    ended = finish.result()
    engine.remove(number)
    return call, steps, ended


def steps_until(over: Callable[[], bool], training: Training, between: Callable[[], object]) -> list[float]:
    steps = []
    while not over():
        steps.append(training.step(between))
    return steps


def steps_during(work: Callable[[], object], training: Training, between: Callable[[], object]) -> list[float]:
    """Seconds of each step begun while a thread does `work`."""
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(work)
        steps = steps_until(done.done, training, between)
        done.result()
    return steps


def lost_to_the_disk(disk: Disk, options: Options, training: Training, between: Callable[[], object]) -> float:
    """Seconds that steps beside a raw write take longer than those before it: what no engine can do without."""
    settle(options.patience)
    before = steady(options, training, between)
    during = steps_during(disk.write, training, between)
    return sum(during) - len(during) * statistics.median(before)
