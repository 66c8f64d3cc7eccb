"""A training that saves as fast as it can until it is killed or told to stop. Runs in children of a nursery with torch loaded.

Every number in a checkpoint says what it must be: weights, buffer and optimizer state hold the steps made, `tag` the serial number
of the save. What it says over its line, in order: WRITER, FOUND, then SAVE before each call, STAGED, COMMITTED or FAILED.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import queue
import random
import threading
import time
import warnings
from typing import Any

import anyio._backends._asyncio  # noqa: F401  (so that no child has to)
import torch

from vembed_async_ckpt import AsyncCheckpointer, Event, KeepBest, KeepEvery, KeepLast, SaveHandle, latest, load
from vembed_async_ckpt._disk.filesystem import LocalFilesystem
from vembed_async_ckpt.testing import use_filesystem

FLOATS = 1 << 16  # per tensor: 1.8 MB in all


class Counting(torch.nn.Module):
    """Tensors that all say how many steps were made, and one that says which save it is."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList([torch.zeros(FLOATS) for _ in range(3)])
        self.register_buffer("steps", torch.zeros(FLOATS))
        self.register_buffer("tag", torch.zeros(64))

    def count(self) -> int:
        values = [tensor.aminmax() for tensor in (*self.weights.parameters(), self.steps)]
        found = {number.item() for pair in values for number in pair}
        assert len(found) == 1, f"torn: {found}"
        return int(found.pop())


class Adding(torch.optim.Optimizer):
    """Adds one to every weight; its state counts too."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.add_(1)
            self.state[parameter].setdefault("seen", parameter.clone().sub_(1)).add_(1)


class Buffered(LocalFilesystem):
    """A file system without O_DIRECT: what is not synced is in the page cache only."""

    def create(self, path: str, *, direct: bool) -> int:
        if direct:
            raise OSError(errno.EINVAL, "no O_DIRECT here", path)
        return super().create(path, direct=False)


Adding(Counting().parameters())  # the first optimizer of a process imports what takes a second


def rule(kinds: list[list[Any]]) -> Any:
    """The policy that `[["last", 2], ["best", 1]]` stands for."""
    made = [{"last": KeepLast, "every": KeepEvery}[k](n) if k != "best" else KeepBest("loss", n=n) for k, n in kinds]
    policy = made[0]
    for other in made[1:]:
        policy = policy | other
    return policy


def train(
    talk: Any,
    root: str,
    seed: str,
    first: int,
    saves: int,
    keep: list[list[Any]],
    resume: bool,
    again: float,
    writer: str = "process",
    buffered: bool = False,
    staging: str = "overlap",
    in_flight: int = 1,
) -> None:
    """Save `saves` times at most, with the serial numbers from `first` on; `again` is the chance that a step is saved once more."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    logging.getLogger("vembed_async_ckpt").addHandler(talk.log_handler())
    chance = random.Random(seed)
    model = Counting()
    optimizer = Adding(model.parameters())

    def heard(event: Event) -> None:
        if event.stage == "writer" and event.detail.startswith("pid "):
            talk.say(f"WRITER {event.detail.removeprefix('pid ')}")

    options: dict[str, Any] = {"writer": writer, "staging": staging, "max_in_flight": in_flight, "sinks": [heard]}
    with use_filesystem(Buffered()) if buffered else contextlib.nullcontext():
        checkpointer = AsyncCheckpointer(root, retention=rule(keep), **options)
    if resume:
        optimizer.step()  # there is a state to load into
        model.steps += 1
        found = latest(root)
        if found is not None:
            restored = load(found, model=model, optimizer=optimizer, verify="full")
            seen = torch.cat([state["seen"] for state in optimizer.state.values()]).unique()
            count = model.count()
            assert seen.tolist() == [count], f"optimizer {seen}, model {count}"
            talk.say(f"FOUND {restored.extra['serial']} {count}")
        else:
            talk.say("FOUND none")
    elif chance.random() < 0.5:
        with torch.no_grad():  # a run that begins anew, perhaps with numbers that are there already
            begin = float(chance.randrange(40))
            for tensor in (*model.weights, model.steps):
                tensor.fill_(begin)

    stopped = threading.Event()
    threading.Thread(target=lambda: (talk.listen(), stopped.set()), daemon=True).start()
    handles: queue.SimpleQueue[tuple[int, SaveHandle] | None] = queue.SimpleQueue()

    def report() -> None:
        while (item := handles.get()) is not None:
            serial, handle = item
            try:
                handle.wait_staged(100)
                talk.say(f"STAGED {serial}")
                handle.result(100)
                talk.say(f"COMMITTED {serial}")
            except Exception as error:
                talk.say(f"FAILED {serial} {type(error).__name__}: {error}")

    reporter = threading.Thread(target=report, daemon=True)
    reporter.start()
    step = None
    for serial in range(first, first + saves):
        if stopped.is_set():
            break
        for _ in range(chance.randrange(1, 3)):
            optimizer.step()
            model.steps += 1
        model.tag.fill_(serial)
        count = model.count()
        step = step if step is not None and chance.random() < again else count
        loss = chance.random()
        talk.say(f"SAVE {serial} {step} {count} {loss!r}")
        extra = {"serial": serial, "tag": model.tag.clone()}
        handle = checkpointer.save(step, model=model, optimizer=optimizer, extra=extra, metrics={"loss": loss})
        handles.put((serial, handle))
        time.sleep(chance.choice((0, 0, 0.002, 0.02)))
    handles.put(None)
    stopped.wait(100)
    checkpointer.close(100)
    reporter.join(100)
    talk.say("CLOSED")
    os._exit(0)  # how interpreters end is another test's subject
