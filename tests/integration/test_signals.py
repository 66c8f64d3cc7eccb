"""Signal handlers that save, wait, close or leave, wherever they interrupt the training thread."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import vembed_async_ckpt
from vembed_async_ckpt import (
    AsyncCheckpointer,
    CheckpointerClosed,
    Event,
    SaveHandle,
    StageError,
    StallMeter,
    _signals,
    load,
)
from vembed_async_ckpt._disk.filesystem import LocalFilesystem
from vembed_async_ckpt.testing import use_filesystem

BOUND = 20.0
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "faults" / "signals.py"
PACKAGE = str(Path(vembed_async_ckpt.__file__).parent)


class Held(LocalFilesystem):
    """A disk that writes when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.writing = threading.Event()

    def write(self, fd: int, data: Any, offset: int) -> int:
        self.writing.set()
        assert self.go.wait(BOUND)
        return super().write(fd, data, offset)


@contextmanager
def handling(handler: Callable[[], object], signum: int = signal.SIGUSR1) -> Iterator[None]:
    before = signal.signal(signum, lambda number, frame: handler())
    try:
        yield
    finally:
        signal.signal(signum, before)


class Waiting:
    """A checkpointer whose only arena holds a save that is not written yet. The next `save()` waits for it, and gets a signal."""

    def __init__(self, root: Path, **options: Any) -> None:
        self.disk = Held()
        self.model = torch.nn.Linear(8, 8)
        with use_filesystem(self.disk):
            self.checkpointer = AsyncCheckpointer(root, writer="thread", sinks=[self._interrupt], **options)
        self.first = self.checkpointer.save(1, model=self.model)
        assert self.disk.writing.wait(BOUND)

    def _interrupt(self, event: Event) -> None:
        if (event.stage, event.phase, event.step) == ("backpressure", "started", 2):
            os.kill(os.getpid(), signal.SIGUSR1)

    def save(self) -> SaveHandle:
        return self.checkpointer.save(2, model=self.model)


def saved(root: Path) -> list[int]:
    return sorted(int(path.name.rpartition("-")[2]) for path in root.glob("checkpoint-*"))


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_a_handler_saves_while_save_waits_for_an_arena(root: Path, on_error: Any) -> None:
    """Its save is made first, then the interrupted one: both are right."""
    waiting = Waiting(root, on_error=on_error)
    handles: list[SaveHandle] = []

    def handler() -> None:
        waiting.disk.go.set()
        handles.append(waiting.checkpointer.save(100, model=waiting.model))
        assert handles[0].result(BOUND).step == 100

    with handling(handler):
        assert waiting.save().result(BOUND).step == 2
    assert len(handles) == 1
    waiting.checkpointer.close(BOUND)
    assert saved(root) == [1, 2, 100]


def test_a_handler_waits_while_save_waits_for_an_arena(root: Path) -> None:
    """`wait()` does not wait for the save that it interrupts: that goes on afterwards."""
    waiting = Waiting(root)

    def handler() -> None:
        waiting.disk.go.set()
        waiting.checkpointer.wait(BOUND)
        assert waiting.first.done()

    with handling(handler):
        assert waiting.save().result(BOUND).step == 2
    waiting.checkpointer.close(BOUND)


def test_a_handler_closes_while_save_waits_for_an_arena(root: Path) -> None:
    """What was in flight is durable when `close()` returns; the interrupted save says that it is closed."""
    waiting = Waiting(root)

    def handler() -> None:
        waiting.disk.go.set()
        begun = time.monotonic()
        waiting.checkpointer.close(BOUND)
        assert time.monotonic() - begun < BOUND / 2
        assert saved(root) == [1]

    with handling(handler), pytest.raises(CheckpointerClosed):
        waiting.save()
    assert saved(root) == [1]


@pytest.mark.parametrize("on_error", ["raise", "warn"])
@pytest.mark.parametrize(
    "error", [SystemExit(0), KeyboardInterrupt(), TimeoutError("late"), OSError("x"), StageError("other")]
)
def test_what_a_handler_raises_is_raised(root: Path, error: BaseException, on_error: Any) -> None:
    """Not taken for a failure of the save, nor swallowed; the interrupted save is gone, and the next one works."""
    waiting = Waiting(root, on_error=on_error)

    def handler() -> None:
        raise error

    with handling(handler), pytest.raises(type(error)) as raised:
        waiting.save()
    assert raised.value is error
    waiting.disk.go.set()
    assert waiting.checkpointer.save(3, model=waiting.model).result(BOUND).step == 3
    waiting.checkpointer.close(BOUND)
    assert saved(root) == [1, 3]


@pytest.mark.parametrize("what", ["wait", "close", "result"])
def test_a_handler_leaves_while_the_training_waits(root: Path, what: str) -> None:
    """`sys.exit()` out of `wait()`, `close()` and `result()`: no lock stays behind, and closing again finishes what is left."""
    waiting = Waiting(root)
    call = {"wait": waiting.checkpointer.wait, "close": waiting.checkpointer.close, "result": waiting.first.result}[
        what
    ]

    def handler() -> None:
        waiting.disk.go.set()
        sys.exit(3)

    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1))
    with handling(handler):
        timer.start()
        with pytest.raises(SystemExit):
            call(BOUND)
    timer.join()
    waiting.checkpointer.close(BOUND)
    assert saved(root) == [1]


class At:
    """Raises a signal at the n-th bytecode of ours within a call of `save()`."""

    def __init__(self, bytecode: int) -> None:
        self.left = bytecode

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "call" and not self._is_of_the_call(frame):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            self.left -= 1
            if self.left == 0:
                signal.raise_signal(signal.SIGUSR1)
        return self

    def _is_of_the_call(self, frame: FrameType) -> bool:
        if not frame.f_code.co_filename.startswith(PACKAGE) or "_signals" in frame.f_code.co_filename:
            return False
        caller: FrameType | None = frame
        while caller is not None and caller.f_code is not AsyncCheckpointer.save.__code__:
            caller = caller.f_back
        return caller is not None


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # a finalizer swallows it, outside of our calls
@pytest.mark.parametrize("what", ["save", "leave"])
def test_at_any_bytecode_of_a_save(root: Path, what: str) -> None:
    """Every 31st bytecode of a call of `save()`: a handler's save is right and so is the interrupted one; one that raises leaves
    a checkpointer that saves and closes."""
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    signals = reached = 0
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        checkpointer.save(1, model=model, optimizer=optimizer).result(BOUND)
        handles: list[SaveHandle] = []

        def handler() -> None:
            nonlocal signals
            signals += 1
            if what == "leave":
                sys.exit(3)
            handles.append(checkpointer.save(1_000_000 + signals, model=model, optimizer=optimizer))

        with handling(handler):
            for number in range(2, 1000):
                at = At(31 * number)
                sys.settrace(at)
                try:
                    handles.append(checkpointer.save(number, model=model, optimizer=optimizer))
                except SystemExit:
                    pass
                finally:
                    sys.settrace(None)
                for handle in handles:
                    assert handle.result(BOUND).files
                handles.clear()
                if at.left > 0:
                    break  # the call has no more bytecodes
                reached += 1
            checkpointer.wait(BOUND)
        assert signals == reached
        assert reached > 150
        assert checkpointer.save(5_000_000, model=model).result(BOUND).files
        assert checkpointer.statistics()["arenas_busy"] == 0


class InPlace(torch.optim.Optimizer):
    """An optimizer that is interrupted between the barrier and its change, which no version counter shows."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})
        self.interrupted = False

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self.interrupted:
            signal.raise_signal(signal.SIGUSR1)
        for parameter in self.param_groups[0]["params"]:
            parameter.data.numpy()[:-1] += 1.0


def test_a_handler_saves_in_the_middle_of_a_step(root: Path, small_is_late: None) -> None:
    """The step goes on after the handler: nothing of that save is copied later."""
    model = torch.nn.Linear(64, 64)
    optimizer = InPlace(model.parameters())
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        optimizer.step()
        checkpointer.save(1, model=model, optimizer=optimizer).result(BOUND)
        release = threading.Event()
        checkpointer._engine._staging_thread.submit(lambda: release.wait(BOUND))  # type: ignore[union-attr]
        handles: list[SaveHandle] = []
        optimizer.interrupted = True
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with handling(lambda: handles.append(checkpointer.save(2, model=model, optimizer=optimizer))):
            optimizer.step()
        release.set()
        path = handles[0].result(BOUND).path
        twin = torch.nn.Linear(64, 64)
        load(path, model=twin)
        assert all(torch.equal(value, before[name]) for name, value in twin.state_dict().items())
        assert not torch.equal(model.weight, before["weight"])


def test_the_meter_makes_nobody_wait(root: Path) -> None:
    """A training thread that is interrupted inside of it may close a checkpointer, whose events then come later."""
    meter = StallMeter()
    with meter.step():
        pass
    checkpointer = AsyncCheckpointer(root, writer="thread", sinks=[meter])
    checkpointer.save(1, model=torch.nn.Linear(2, 2)).result(BOUND)
    with meter._lock:
        begun = time.monotonic()
        checkpointer.close(BOUND)
        assert time.monotonic() - begun < BOUND / 2
    assert meter.report().saves == 1


def test_handlers_are_put_back(root: Path) -> None:
    """Held back, delivered in their order, then all is as it was: also where a handler changed its own."""
    came: list[str] = []

    def usr1(number: int, frame: FrameType | None) -> None:
        came.append("usr1")
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)

    def usr2(number: int, frame: FrameType | None) -> None:
        came.append("usr2")

    before = signal.signal(signal.SIGUSR1, usr1), signal.signal(signal.SIGUSR2, usr2)
    try:
        with _signals.held():
            signal.raise_signal(signal.SIGUSR1)
            with _signals.held():
                pass
            assert came == []
            _signals.deliver()
            assert came == ["usr1"]
            signal.raise_signal(signal.SIGUSR1)
            assert came == ["usr1"]
        assert came == ["usr1", "usr1"]
        assert signal.getsignal(signal.SIGUSR1) is usr1
        assert signal.getsignal(signal.SIGUSR2) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before[0])
        signal.signal(signal.SIGUSR2, before[1])


@pytest.mark.parametrize(
    ("options", "inside"), [([], 20), (["--staging", "blocking"], 20), (["--host", "accelerate"], 20)]
)
def test_random_moments_of_a_training(tmp_path: Path, options: list[str], inside: int) -> None:
    """The script that is run with hundreds of signals, with fifty, and more until twenty were inside a save."""
    command = [sys.executable, str(SCRIPT), str(tmp_path / "root"), "50", "--inside", str(inside), *options]
    child = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert child.returncode == 0, child.stderr
    result = json.loads(child.stdout.splitlines()[-1])
    assert result["signals"] >= 50
    assert result["inside_save"] >= inside
    assert result["wrong"] == []
    assert result["refused"] == {}
