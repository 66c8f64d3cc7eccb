"""Real trainings, run in children of a nursery that has imported torch.

Every weight is a count of the optimizer steps made so far, so a torn or stale snapshot is seen by its numbers.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import queue
import resource
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

import anyio._backends._asyncio  # noqa: F401  (so that no child has to)
import torch

import vembed_async_ckpt._engine.session as engine
from vembed_async_ckpt import (
    AsyncCheckpointer,
    CheckpointerBusy,
    CheckpointError,
    Event,
    KeepLast,
    SaveHandle,
    SaveState,
    latest,
    load,
)
from vembed_async_ckpt.shipping import upload

if TYPE_CHECKING:
    from .nursery import Talk

_FLOATS = 1 << 19  # per tensor
_SHIPPED_FLOATS = 1 << 20  # together more than one part of an upload
_CLONE_NEWNS, _MS_REC, _MS_PRIVATE = 0x20000, 0x4000, 1 << 18  # linux/sched.h, linux/mount.h


class Counting(torch.nn.Module):
    """Three tensors and a buffer that all say how many steps were made."""

    def __init__(self, floats: int = _FLOATS) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList([torch.zeros(floats) for _ in range(3)])
        self.register_buffer("steps", torch.zeros(floats))

    def forward(self) -> torch.Tensor:
        return -torch.stack([weight.sum() for weight in self.weights]).sum()

    def count(self) -> int:
        """How many steps; asserts that every number agrees."""
        values = torch.cat([*self.weights, self.steps]).unique()
        assert values.numel() == 1, f"torn: {values}"
        return int(values.item())


class Training:
    """A model, its optimizer, and a checkpointer that says which writers it starts."""

    def __init__(self, talk: Talk, root: str, floats: int = _FLOATS, **options: Any) -> None:
        logging.getLogger("vembed_async_ckpt").addHandler(talk.log_handler())
        torch.set_num_threads(1)
        self._talk = talk
        self.model = Counting(floats)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        options = {"retention": KeepLast(2), "sinks": [self._heard], **options}
        self.checkpointer = AsyncCheckpointer(root, **options)

    def _heard(self, event: Event) -> None:
        if event.stage == "writer" and event.detail.startswith("pid "):
            self._talk.say(f"WRITER {event.detail.removeprefix('pid ')}")
        elif event.stage == "backpressure":
            self._talk.say(f"BACKPRESSURE {event.phase}")
        elif event.stage == "save":
            self._talk.say(f"SAVE {event.step} {event.phase}")

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model().backward()
        self.optimizer.step()
        self.model.steps += 1

    def save(self, step: int | None = None) -> SaveHandle:
        """The number of steps made is counted, unless it is given."""
        step = self.model.count() if step is None else step
        return self.checkpointer.save(step, model=self.model, optimizer=self.optimizer)


def train(talk: Talk, root: str, every: int = 3) -> None:
    """Train until told to stop, saving every few steps; STAGED and COMMITTED are said as soon as they are true."""
    training = Training(talk, root)
    stopped = threading.Event()
    threading.Thread(target=lambda: (talk.listen(), stopped.set()), daemon=True).start()
    handles: queue.SimpleQueue[SaveHandle | None] = queue.SimpleQueue()

    def report() -> None:
        while (handle := handles.get()) is not None:
            handle.wait_staged(100)
            talk.say(f"STAGED {handle.step}")
            talk.say(f"COMMITTED {handle.result(100).step}")

    reporter = threading.Thread(target=report, daemon=True)
    reporter.start()
    while not stopped.is_set():
        for _ in range(every):
            training.step()
        handles.put(training.save())
    training.checkpointer.close()
    handles.put(None)
    reporter.join(100)
    talk.say("CLOSED")
    os._exit(0)  # how interpreters end is another test's subject, and takes torch most of a second


def resume(talk: Talk, root: str) -> None:
    """Start anew: go on from the newest checkpoint, save once, close."""
    training = Training(talk, root)
    found = latest(root)
    if found is not None:
        restored = load(found, model=training.model, optimizer=training.optimizer, verify="full")
        assert training.model.count() == restored.step, (training.model.count(), restored.step)
    talk.say(f"FOUND {training.model.count()}")
    training.step()
    training.save().result(100)
    training.checkpointer.close()
    talk.say("CLOSED")
    os._exit(0)


def ship(talk: Talk, root: str, url: str, environment: dict[str, str]) -> None:
    """Go on from the newest checkpoint, save after every step and upload all of it, until told to stop."""
    os.environ.update(environment)
    stopped = threading.Event()
    training = Training(talk, root, _SHIPPED_FLOATS, retention=KeepLast(1), after_commit=[upload(url)])
    if (found := latest(root)) is not None:
        load(found, model=training.model, optimizer=training.optimizer)
    threading.Thread(target=lambda: (talk.listen(), stopped.set()), daemon=True).start()
    talk.say("READY")
    while not stopped.is_set():
        training.step()
        talk.say(f"COMMITTED {training.save().result(100).step}")
        stopped.wait(0.6)  # about as long as its upload takes
    training.checkpointer.close()
    talk.say("CLOSED")
    os._exit(0)


def refused(talk: Talk, root: str) -> None:
    """A second trainer on one root."""
    try:
        Training(talk, root)
    except CheckpointerBusy as error:
        talk.say(f"BUSY {error}")


def obey(
    talk: Talk,
    root: str,
    tracer: str | None = None,
    options: dict[str, Any] | None = None,
    exit_deadline: float | None = None,
    shared_memory: str = "",
) -> None:
    """Do what the test says, one word at a time, and answer each; with `tracer`, writers run under it until `untraced`.

    `options` are the checkpointer's, `exit_deadline` replaces its own, `shared_memory` is the size of /dev/shm.
    """
    if shared_memory:
        _shrink_shared_memory(shared_memory)
    if exit_deadline is not None:
        engine.EXIT_DEADLINE = exit_deadline
    interpreter = sys.executable
    sys.executable = tracer or interpreter
    training = Training(talk, root, **(options or {}))
    handles: list[SaveHandle] = []
    while word := talk.listen():
        answer = "done"
        try:
            if word == "save":
                training.step()
                handles.append(training.save())
            elif word == "save until accepted":
                while training.save().state is SaveState.SKIPPED:
                    training.checkpointer.wait(100)
            elif word == "staged":
                handles[-1].wait_staged(100)
            elif word == "result":
                answer = f"committed {handles[-1].result(100).step}"
            elif word == "impatient":
                handles[-1].result(0.2)
            elif word == "no python":
                sys.executable = os.path.join(root, "nothing")
            elif word == "untraced":
                sys.executable = interpreter
            elif word == "close in the end":
                break
            elif word.startswith("close"):
                training.checkpointer.close(float(word.removeprefix("close") or 100))
            elif word == "load data":
                _load_data(training, handles)
            elif word == "save without memory":
                training.step()
                step = training.model.count()
                resource.setrlimit(resource.RLIMIT_AS, (_address_space(), resource.RLIM_INFINITY))
                try:
                    handles.append(training.save(step))
                finally:
                    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            elif word == "save at exit":
                atexit.register(training.save)
                atexit.register(training.step)  # the last one registered comes first
            elif word.startswith("fork"):
                answer = f"forked {_fork(word)}"
            elif word.startswith("end"):
                break
        except (CheckpointError, TimeoutError) as error:
            answer = f"{type(error).__name__}: {error}"
        talk.say(f"ANSWER {answer}")
    _end(word, training)


def _shrink_shared_memory(size: str) -> None:
    """A /dev/shm of that size, for this process and its children only."""
    libc = ctypes.CDLL(None, use_errno=True)
    for call, *arguments in (
        (libc.unshare, _CLONE_NEWNS),
        (libc.mount, b"none", b"/", None, _MS_REC | _MS_PRIVATE, None),
        (libc.mount, b"none", b"/dev/shm", b"tmpfs", 0, f"size={size}".encode()),
    ):
        if call(*arguments):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _address_space() -> int:
    """Bytes mapped now, and some: with this as limit, there is no room for an arena."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize() + 2 * _FLOATS


def _load_data(training: Training, handles: list[SaveHandle]) -> None:
    """Epochs with forked workers, and a save while they live; twice."""
    numbers = torch.utils.data.TensorDataset(torch.arange(32))
    for _ in range(2):
        for n, _ in enumerate(torch.utils.data.DataLoader(numbers, batch_size=4, num_workers=2)):
            training.step()
            if n == 3:
                handles.append(training.save())
    assert all(handle.result(100) for handle in handles)


def _fork(word: str) -> int:
    """A child as a DataLoader makes it, that ends at once or stays; or one made behind Python's back, with all descriptors."""
    pid = ctypes.CDLL(None).fork() if word == "fork raw" else os.fork()
    if pid == 0:
        if word == "fork exit":
            sys.exit(0)  # with everything that the interpreter does at its end
        while True:
            signal.pause()
    if word == "fork exit":
        os.waitpid(pid, 0)
    return pid


def _end(word: str, training: Training) -> None:
    if word == "close in the end":
        training.checkpointer.close()
    if word == "end os._exit":
        os._exit(7)
    if word == "end sys.exit":
        sys.exit(7)
    if word == "end exception":
        raise RuntimeError("the training itself broke")
    if word == "end exception in with":
        with training.checkpointer:
            raise RuntimeError("the training itself broke")
