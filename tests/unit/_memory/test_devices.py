"""Copies from devices, on a double of streams and events: a wait that is missing shows in what arrives."""

from __future__ import annotations

import contextlib
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from vembed_async_ckpt._memory.devices import DeviceCopies

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

    def query(self) -> bool:
        """The device goes on by one thing, if it can: whoever asks again and again comes to an end."""
        self._double.advance(lambda: self.happened)
        return self.happened


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

    def Event(self, enable_timing: bool) -> Event:
        return Event(self)

    def device(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def module_of(self, device: torch.device) -> Double:
        return self

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self._thread.current = getattr(self._thread, "current", self.compute), stream
        yield
        self._thread.current = before

    def copy(self, destinations: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        for to, source in zip(destinations, sources, strict=True):
            self.current_stream(to.device).do(lambda to=to, source=source: to.copy_(source))  # type: ignore[misc]

    def run_until(self, over: Callable[[], bool]) -> None:
        while not self.advance(over):
            pass

    def advance(self, over: Callable[[], bool]) -> bool:
        """Have one stream do one thing, unless it is `over`."""
        with self._advancing:
            if over():
                return True
            order = self.chance.sample(self.streams, len(self.streams))
            assert any(stream.advance() for stream in order), "every stream waits for what never happens"
        return False

    def idle(self) -> bool:
        return not any(stream.told for stream in self.streams)


def train_and_copy(copies_of: Callable[..., DeviceCopies], seed: int) -> list[list[float]]:
    """What arrives of a weight and a buffer that are 1 at the call, 0 before and 2 afterwards, copied late and at once."""
    double = Double(seed)
    weight, buffer = torch.zeros(3), torch.zeros(2)
    places = [torch.full((3,), -1.0), torch.full((2,), -1.0)]
    for tensor in (weight, buffer):
        double.compute.do(lambda tensor=tensor: tensor.fill_(1))  # type: ignore[misc]
    copies = copies_of([DEVICE], double.module_of, double.copy)
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
    copies = DeviceCopies([DEVICE], double.module_of, double.copy)
    copies.issue([place], [weight])
    old = weight.data_ptr()
    weight.data = torch.full((3,), 2.0)
    assert {alias.data_ptr() for alias in copies._held} == {old}
    copies.wait()
    assert place.tolist() == [1.0] * 3
    assert copies._held == []
