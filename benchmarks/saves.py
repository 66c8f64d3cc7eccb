"""What a save costs: the training loop first, then disk, memory and the steps beside it. `README.md` says how it is measured.

python benchmarks/saves.py --dir /a/real/disk
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import logging
import multiprocessing
import os
import random
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from engines import ENGINES, Engine, Ours, State
from machine import Ceilings, Others, facts, peak_resident, proportional_memory, reset_peaks, sync_tree
from report import claims, show

# Here and not in main(): the processes that peers spawn import this file again.
logging.disable(logging.INFO)
warnings.filterwarnings("ignore", module="torch.*")

Sample = dict[str, float]
WARM_UP = 2  # rounds before those that count
STRETCH = 0.4  # seconds of forward and backward between a save and the next optimizer step
THREADS = (1, 2)  # of torch, for the steps beside a save
MANY_STEPS = 300  # steps beside a save after which an engine has been watched for long enough


class Training:
    """A transformer that keeps the processor busy the way training does. Its weights are not what is saved."""

    def __init__(self, width: int, layers: int, batch: int) -> None:
        layer = torch.nn.TransformerEncoderLayer(width, width // 64, 4 * width, batch_first=True)
        self.model = torch.nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4)
        self.input = torch.rand(batch, 64, width)

    @classmethod
    def lasting(cls, seconds: float) -> Training:
        """One whose `stretch` takes about that long on this machine."""
        trial = cls(512, 6, 4)
        trial.stretch()
        return cls(512, 6, max(1, round(4 * seconds / min(trial.stretch() for _ in range(3)))))

    def stretch(self) -> float:
        """Forward and backward; returns the seconds."""
        begun = time.perf_counter()
        self.optimizer.zero_grad()
        self.model(self.input).pow(2).mean().backward()
        return time.perf_counter() - begun

    def step(self, barrier: Callable[[], object] = lambda: None) -> float:
        begun = time.perf_counter()
        self.stretch()
        barrier()
        self.optimizer.step()
        return time.perf_counter() - begun


# -- claims 1 to 3: all engines in one process, in rounds


def compare(options: argparse.Namespace, directory: str) -> dict[str, list[Sample]]:
    """Every engine, and what the machine can do at best, once per round in random order."""
    state = State(options.state, options.megabytes)
    settle(options.patience)
    training = Training.lasting(STRETCH)
    engines = {name: ENGINES[name](os.path.join(directory, name), state) for name in options.engines}
    ceilings = Ceilings(directory, state.tensors())
    tasks: dict[str, Callable[[int], Sample]] = {
        "copy ceiling": lambda _: {"foreach": ceilings.foreach_copy(), "memcpy": ceilings.memcpy()},
        "write ceiling": lambda _: {"write": ceilings.write()},
    }
    for name, engine in engines.items():
        tasks[name] = lambda n, engine=engine: save_beside_training(engine, n, training)  # type: ignore[misc]
        if isinstance(engine, Ours):
            tasks[f"{name}, alone"] = lambda n, engine=engine: save_alone(engine, n)  # type: ignore[misc]
    samples: dict[str, list[Sample]] = defaultdict(list)
    for number in range(WARM_UP + options.rounds):
        order = list(tasks)
        random.shuffle(order)
        for name in order:
            settle(options.patience)
            others = Others()
            sample = tasks[name](number * len(order) + order.index(name))
            if number >= WARM_UP:
                samples[name].append({"round": number - WARM_UP, **sample, "others": others.share()})
        print(f"\rround {number + 1} of {WARM_UP + options.rounds}", end="", flush=True)
    print()
    for engine in engines.values():
        engine.close()
    return samples


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


def save_beside_training(engine: Engine, number: int, training: Training) -> Sample:
    """As in a training loop: save, forward and backward, optimizer step; then wait for the checkpoint.

    `save` and `step` are what the loop is blocked for: no step changes anything here, so that `step` is the wait before it.
    """
    begun = time.perf_counter()
    handle = engine.save(number)
    saved = time.perf_counter()
    work = training.stretch()
    worked = time.perf_counter()
    handle.barrier()
    engine.state.optimizer.step()
    stepped = time.perf_counter()
    info = handle.wait()
    written = time.perf_counter()
    if engine.syncs != "all" and os.path.exists(engine.path(number)):
        sync_tree(engine.path(number))
    durable = time.perf_counter()
    engine.remove(number)
    return {
        "save": saved - begun,
        "step": stepped - worked,
        "blocked": saved - begun + stepped - worked,
        "work": work,
        "written": written - begun,
        "durable": durable - begun,
    } | _prefixed(info)


def save_alone(engine: Engine, number: int) -> Sample:
    """A save with nothing beside it, to be held against what copy and disk can do."""
    begun = time.perf_counter()
    handle = engine.save(number)
    saved = time.perf_counter()
    info = handle.wait()
    engine.remove(number)
    return {"save": saved - begun} | _prefixed(info)


def _prefixed(info: Any) -> Sample:
    if info is None:
        return {}
    return {f"our_{name}": value for name, value in asdict(info.timings).items()} | {"bytes": info.total_bytes}


# -- claims 4 and 5: each engine by itself in a process of its own


def watch(name: str, options: argparse.Namespace, directory: str) -> dict[str, Any]:
    """Run `alone` in a new process and look at the memory of it and its children while it says so."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=alone, args=(theirs, name, options, directory))
    process.start()
    theirs.close()
    peaks: dict[str, int] = defaultdict(int)
    phase: str | None = None
    try:
        while True:
            if ours.poll(0.01 if phase else 1200):
                message = ours.recv()
                if isinstance(message, dict):
                    return {"engine": name, **message, "proportional": dict(peaks)}
                phase = message
            elif phase is None:
                raise TimeoutError(f"{name} has not been heard of for twenty minutes")
            if phase:
                peaks[phase] = max(peaks[phase], proportional_memory(process.pid or 0))
    finally:
        process.join(60)
        if process.is_alive():
            process.kill()


def alone(connection: Any, name: str, options: argparse.Namespace, directory: str) -> None:
    """In a process of its own: memory while saving, then steps beside a save and steps without one, by turns."""
    torch.set_num_threads(1)
    state = State(options.state, options.megabytes)
    training = Training(128, 4, 8)
    bare = {threads: steady_steps(training, threads, 40) for threads in THREADS}
    pid = os.getpid()
    resident = {}

    reset_peaks(pid)
    connection.send("training")
    steady_steps(training, 2, 20)
    connection.send(None)
    resident["training"] = peak_resident(pid)

    reset_peaks(pid)
    connection.send("saving")
    engine = ENGINES[name](os.path.join(directory, f"{name}-alone"), state)
    number = 0
    while number < 3:
        steps_beside(engine, number, training)
        number += 1
    connection.send(None)
    resident["saving"] = peak_resident(pid)

    steps = []
    for threads in THREADS:
        quiet: list[float] = []
        beside: list[float] = []
        rounds = 0
        while rounds < options.rounds and (rounds < 5 or len(beside) < MANY_STEPS):
            settle(options.patience)
            quiet += steady_steps(training, threads, 20)
            beside += steps_beside(engine, number, training)
            number += 1
            rounds += 1
        steps.append({"threads": threads, "bare": bare[threads], "quiet": quiet, "beside": beside})
    engine.close()
    connection.send({"bytes": state.nbytes, "steps": steps, "resident": resident})
    connection.close()


def steady_steps(training: Training, threads: int, count: int) -> list[float]:
    """Seconds of `count` steps with so many torch threads, after a few that do not count."""
    torch.set_num_threads(threads)
    return [training.step() for _ in range(5 + count)][5:]


def steps_beside(engine: Engine, number: int, training: Training) -> list[float]:
    """Seconds of each step begun between the return of `save()` and the end of the save; the first holds the barrier."""
    handle = engine.save(number)
    steps = []
    while not handle.done():
        steps.append(training.step(handle.barrier))
    handle.wait()
    engine.remove(number)
    return steps


def write(result: dict[str, Any], out: str) -> None:
    """Everything measured so far, so that a run that is ended early is not lost."""
    result["claims"] = claims(result)
    with open(out, "w") as file:
        json.dump(result, file, indent=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--megabytes", type=int, default=1024, help="size of the state, in 300 tensors")
    parser.add_argument("--state", choices=("weights", "adamw"), default="weights")
    parser.add_argument("--dir", default=".", help="where to write; a folder of its own is made there and removed")
    parser.add_argument("--engines", default=",".join(ENGINES), help="comma-separated; default: all")
    parser.add_argument(
        "--patience", type=float, default=5.0, help="seconds to wait for a quiet machine before each save"
    )
    parser.add_argument("--out", help="result file; default: results/saves-<date>.json beside this script")
    options = parser.parse_args()
    options.engines = options.engines.split(",")
    if unknown := set(options.engines) - set(ENGINES):
        parser.error(f"no such engine: {', '.join(sorted(unknown))}; there are {', '.join(ENGINES)}")
    out = options.out or os.path.join(
        os.path.dirname(os.path.abspath(__file__)), "results", f"saves-{datetime.date.today()}.json"
    )
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="saves-", dir=options.dir) as directory:
        result: dict[str, Any] = {"machine": facts(directory), "options": vars(options) | {"dir": None, "out": None}}
        result |= {"rounds": compare(options, directory), "alone": []}
        write(result, out)
        for name in options.engines:
            if name not in ("none", "safetensors"):  # nothing runs beside training there
                print(f"{name} by itself")
                result["alone"].append(watch(name, options, directory))
                write(result, out)
    show(result)
    print(f"all samples: {out}")


if __name__ == "__main__":
    main()
