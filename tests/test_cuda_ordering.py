"""Copies from CUDA devices, on a double of streams and events: a wait that is missing shows in the checkpoint."""

from __future__ import annotations

import contextlib
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vembed_async_ckpt import AsyncCheckpointer, StageError, load
from vembed_async_ckpt._arena import cuda as devices
from vembed_async_ckpt._arena.arena import Arena
from vembed_async_ckpt._arena.barrier import GATE
from vembed_async_ckpt._arena.cuda import DeviceCopies

DEVICE = torch.device("cpu")


class Event:
    def __init__(self, double: Double) -> None:
        self._double = double
        self.happened = False

    def record(self, stream: Stream) -> None:
        self.happened = False
        stream.do(lambda: setattr(self, "happened", True))

    def synchronize(self) -> None:
        self._double.run_until(lambda: self.happened)


class Stream:
    """What it was told and has not done yet, in order. An entry is a call, or an event to wait for."""

    def __init__(self) -> None:
        self.told: deque[Callable[[], None] | Event] = deque()

    def do(self, call: Callable[[], None]) -> None:
        self.told.append(call)

    def wait_event(self, event: Event) -> None:
        self.told.append(event)

    def advance(self) -> bool:
        """Do one thing, if there is one that may be done."""
        if not self.told:
            return False
        first = self.told[0]
        if isinstance(first, Event):
            if not first.happened:
                return False
            self.told.popleft()
        else:
            self.told.popleft()
            first()
        return True


class Double:
    """Stands for torch.cuda: streams go on in an order drawn by lot, whichever thread waits; what they do is done whole before
    anybody sees what comes after it. The current stream is each thread's own."""

    def __init__(self, seed: int = 0) -> None:
        self.chance = random.Random(seed)
        self.compute = Stream()
        self.streams = [self.compute]
        self._thread = threading.local()
        self._advancing = threading.Lock()

    def current_stream(self, device: torch.device) -> Stream:
        return getattr(self._thread, "current", self.compute)

    def current_device(self) -> int:
        return 0

    def Stream(self, device: torch.device) -> Stream:
        self.streams.append(Stream())
        return self.streams[-1]

    def Event(self, blocking: bool) -> Event:
        return Event(self)

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self._thread.current = getattr(self._thread, "current", self.compute), stream
        yield
        self._thread.current = before

    def copy(self, destinations: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        for to, source in zip(destinations, sources, strict=True):
            self.current_stream(to.device).do(lambda to=to, source=source: to.copy_(source))  # type: ignore[misc]

    def run_until(self, over: Callable[[], bool]) -> None:
        while True:
            with self._advancing:
                if over():
                    return
                order = self.chance.sample(self.streams, len(self.streams))
                assert any(stream.advance() for stream in order), "every stream waits for what never happens"

    def idle(self) -> bool:
        return not any(stream.told for stream in self.streams)


def train_and_copy(copies_of: Callable[..., DeviceCopies], seed: int) -> list[list[float]]:
    """What arrives of a weight and a buffer that are 1 at the call, 0 before and 2 afterwards, copied late and at once."""
    double = Double(seed)
    weight, buffer = torch.zeros(3), torch.zeros(2)
    places = [torch.full((3,), -1.0), torch.full((2,), -1.0)]
    for tensor in (weight, buffer):
        double.compute.do(lambda tensor=tensor: tensor.fill_(1))  # type: ignore[misc]
    copies = copies_of([DEVICE], double, double.copy)
    copies.issue(places[1:], [buffer])  # at once
    copies.hold_back()
    double.compute.do(lambda: buffer.fill_(2))
    copies.issue(places[:1], [weight])  # late
    copies.hold_back()  # the barrier
    double.compute.do(lambda: weight.fill_(2))
    copies.wait()
    arrived = [place.tolist() for place in places]
    double.run_until(double.idle)
    return arrived


AS_IT_WAS = [[1.0, 1.0, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize("seed", range(50))
def test_what_arrives_is_the_state_at_the_call(seed: int) -> None:
    """Whatever order the streams take."""
    assert train_and_copy(DeviceCopies, seed) == AS_IT_WAS


class NoHoldBack(DeviceCopies):
    def hold_back(self) -> None:
        pass


class NoWait(DeviceCopies):
    def wait(self) -> None:
        pass


class NoMark(DeviceCopies):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        for event in self._begun.values():
            event.happened = True


@pytest.mark.parametrize("broken", [NoHoldBack, NoWait, NoMark])
def test_a_missing_wait_shows(broken: type[DeviceCopies]) -> None:
    """The double is worth believing: without any one of the waits some order of the streams gives another state."""
    assert any(train_and_copy(broken, seed) != AS_IT_WAS for seed in range(50))


def test_memory_is_held_until_it_was_read() -> None:
    """`p.data = other` right after the call frees nothing that is still to be copied."""
    double = Double()
    weight = torch.nn.Parameter(torch.ones(3))
    place = torch.zeros(3)
    copies = DeviceCopies([DEVICE], double, double.copy)
    copies.issue([place], [weight])
    old = weight.data_ptr()
    weight.data = torch.full((3,), 2.0)
    assert [alias.data_ptr() for alias in copies._held] == [old]
    copies.wait()
    assert place.tolist() == [1.0] * 3
    assert copies._held == []


class Lazy(Double):
    """The compute stream is the CPU itself: it has done what it was told, and waits when it is told to. The others do nothing
    before somebody waits for them."""

    def __init__(self) -> None:
        super().__init__()
        self.compute.do = lambda call: call()  # type: ignore[method-assign]
        self.compute.wait_event = lambda event: event.synchronize()  # type: ignore[method-assign]


@pytest.fixture
def lazy_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lazy]:
    """Every tensor of more than a few numbers is on a device that copies as late as it may."""
    double = Lazy()
    monkeypatch.setattr(devices, "is_on_device", lambda tensor: tensor.numel() > 8)
    monkeypatch.setattr(devices, "any_on_device", lambda tensors: any(map(devices.is_on_device, tensors)))
    for module in ("vembed_async_ckpt._engine.saving", "vembed_async_ckpt._arena.barrier"):
        monkeypatch.setattr(f"{module}.is_on_device", devices.is_on_device)
    monkeypatch.setattr(devices, "copy_async", double.copy)
    monkeypatch.setattr(torch, "cuda", TorchCuda(double))
    monkeypatch.setattr(devices, "_device", None)
    monkeypatch.setattr(devices, "pin", lambda address, size: True)
    monkeypatch.setattr(devices, "unpin", lambda address: None)
    yield double
    assert double.idle(), "nothing was left behind on a stream"


class TorchCuda:
    """torch.cuda, but for streams and events."""

    def __init__(self, double: Double) -> None:
        self._double, self._real = double, torch.cuda

    def __getattr__(self, name: str) -> Any:
        return getattr(self._double if hasattr(self._double, name) else self._real, name)


def trained(steps: int) -> tuple[torch.nn.Module, torch.optim.Optimizer, Callable[[], None]]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(4, 16)).pow(2).mean().backward()
        optimizer.step()

    for _ in range(steps):
        step()
    return model, optimizer, step


@pytest.mark.parametrize("staging", ["overlap", "blocking"])
def test_saves_of_a_training_on_a_lazy_device(lazy_device: Lazy, root: Path, staging: Any) -> None:
    """Weights, BatchNorm statistics and moments are those of the call, though training went on at once and the device copies
    only when somebody waits."""
    model, optimizer, step = trained(2)
    expected: dict[int, dict[str, torch.Tensor]] = {}
    with AsyncCheckpointer(root, staging=staging, writer="thread") as checkpointer:
        for number in range(1, 6):
            expected[number] = {key: value.clone() for key, value in model.state_dict().items()}
            moments = [state["exp_avg"].clone() for state in optimizer.state.values()]
            handle = checkpointer.save(
                number, model=model, optimizer=optimizer, extra={"ema": torch.arange(100.0) * number}
            )
            step()
            handle.result(60)
            restored, restored_optimizer, _ = trained(1)
            found = load(handle.path, model=restored, optimizer=restored_optimizer)
            for key, value in restored.state_dict().items():
                assert torch.equal(value, expected[number][key]), key
            for moment, state in zip(moments, restored_optimizer.state.values(), strict=True):
                assert torch.equal(moment, state["exp_avg"])
            assert torch.equal(found.extra["ema"], torch.arange(100.0) * number)
        assert checkpointer.statistics()["overlap"] is (staging == "overlap")
    assert GATE.pending == ()


@pytest.mark.parametrize("held_back", [True, False])
def test_a_step_that_comes_before_the_copies_arrive(
    lazy_device: Lazy, root: Path, monkeypatch: pytest.MonkeyPatch, held_back: bool
) -> None:
    """It is held back behind them; without `hold_back` its weights would get into the checkpoint."""
    stepped, wait = threading.Event(), DeviceCopies.wait

    def wait_after_the_step(self: DeviceCopies) -> None:
        assert stepped.wait(20)
        wait(self)

    monkeypatch.setattr(DeviceCopies, "wait", wait_after_the_step)
    if not held_back:
        monkeypatch.setattr(DeviceCopies, "hold_back", lambda self: None)
    model, optimizer, step = trained(2)
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        handle = checkpointer.save(1, model=model, optimizer=optimizer)
        step()
        stepped.set()
        handle.result(60)
    restored, _, _ = trained(0)
    load(handle.path, model=restored)
    same = all(torch.equal(value, expected[key]) for key, value in restored.state_dict().items())
    assert same is held_back


def test_a_change_past_the_barrier_fails_the_save(
    lazy_device: Lazy, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight that is changed by hand while its copy is under way: the version counter tells."""
    changed, wait = threading.Event(), DeviceCopies.wait

    def wait_after_the_change(self: DeviceCopies) -> None:
        assert changed.wait(20)
        wait(self)

    monkeypatch.setattr(DeviceCopies, "wait", wait_after_the_change)
    model, optimizer, _ = trained(2)
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        handle = checkpointer.save(1, model=model, optimizer=optimizer)
        with torch.no_grad():
            model[0].weight.add_(1)  # type: ignore[index]
        changed.set()
        assert isinstance(handle.exception(60), StageError)
        assert checkpointer.statistics()["overlap"] is False


def test_an_optimizer_inside_a_cuda_graph_earns_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its step is repeated without the hook, so nothing of it is ever copied late."""
    _, optimizer, step = trained(1)
    assert optimizer in GATE.optimizers()
    monkeypatch.setattr("vembed_async_ckpt._arena.barrier.is_capturing", lambda: True)
    step()
    assert optimizer not in GATE.optimizers()


def test_a_closed_arena_is_not_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prewarming may still be at work on an arena that was given up: pinned then, it would stay so when its pages are gone."""
    calls: list[str] = []
    monkeypatch.setattr(devices, "pin", lambda address, size: calls.append("pin") or True)
    monkeypatch.setattr(devices, "unpin", lambda address: calls.append("unpin"))
    arena = Arena(1, 1 << 20)
    arena.pin()
    arena.pin()
    arena.close()
    arena.pin()
    assert calls == ["pin", "unpin"]
