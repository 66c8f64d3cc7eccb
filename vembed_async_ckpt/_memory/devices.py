"""Copies from accelerators to an arena: issued on streams of their own, ordered by events, with no device-wide synchronization.

A save's copies come after all that the caller's streams were told before the call, and before all that they are told after
`hold_back`. The CPU waits in `wait` only. Every type of device takes this way whose module (`torch.cuda`, `torch.xpu`, ...) has
streams and events; tensors of other types are copied while `save()` waits.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import filterfalse
from operator import attrgetter
from typing import Any

import torch

from ..errors import StageError
from .captures import relax_captures
from .host_copy import DEADLINE

CHUNK = 256  # copies with one event; a driver's queue holds about a thousand
_POLL = 0.001  # seconds between two looks at an event
_NEEDED = ("Stream", "Event", "current_stream", "stream", "device")

_IS_CPU = attrgetter("is_cpu")
_usable: dict[str, bool] = {}  # by type of device


def is_on_device(tensor: torch.Tensor) -> bool:
    """Whether it is copied by its device."""
    return not tensor.is_cpu and _has_streams(tensor.device)


def any_on_device(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether one of them is copied by its device."""
    return any(map(is_on_device, filterfalse(_IS_CPU, tensors)))


def _has_streams(device: torch.device) -> bool:
    if (usable := _usable.get(device.type)) is None:
        usable = _usable[device.type] = _try_streams(device)
    return usable


def _try_streams(device: torch.device) -> bool:
    module = getattr(torch, device.type, None)
    if any(getattr(module, name, None) is None for name in _NEEDED):
        return False
    try:
        with module.device(device):  # type: ignore[union-attr]
            stream, event = module.Stream(device), module.Event(enable_timing=True)  # type: ignore[union-attr]
            event.record(stream)
            stream.wait_event(event)
    except (RuntimeError, NotImplementedError, TypeError):
        return False
    return True


def copy_async(destinations: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Issue copies to host memory on the current stream of the sources' device."""
    torch._foreach_copy_(destinations, sources, non_blocking=True)


class DeviceCopies:
    """The copies of one save from the devices its tensors are on. Keeps the memory they read alive until `wait` returns."""

    def __init__(
        self,
        devices: Iterable[torch.device],
        module_of: Callable[[torch.device], Any],
        copy: Callable[[list[torch.Tensor], list[torch.Tensor]], None],
    ) -> None:
        """From here on the state of `devices` is that of the call. `module_of` gives a device's module, as `torch.cuda`, and `copy`
        is `copy_async`, or the tests' doubles of both."""
        self._modules = {device: module_of(device) for device in devices}
        self._copy = copy
        self._begun = {}
        self._done: list[tuple[torch.device, Any]] = []
        self._holds: dict[torch.device, list[tuple[Any, Any]]] = {device: [] for device in self._modules}
        self._held: list[torch.Tensor] = []
        for device, module in self._modules.items():
            with module.device(device):
                self._begun[device] = _mark(module, module.current_stream(device))

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor]) -> DeviceCopies | None:
        """For all devices among `tensors` that copy by themselves; None if there is none."""
        devices = {tensor.device for tensor in filterfalse(_IS_CPU, tensors) if is_on_device(tensor)}
        if not devices:
            return None
        notice(tensors)
        return cls(devices, torch.get_device_module, copy_async)

    def issue(self, destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        """Start copying; returns at once. If it raises, `wait` still waits for what was started."""
        by_device: dict[torch.device, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for to, source in zip(destinations, sources, strict=True):
            places, aliases = by_device.setdefault(source.device, ([], []))
            places.append(to)
            # An alias: `p.data = other` must not free what is being read.
            aliases.append(source.view(torch.uint8) if source.dtype is not to.dtype else source.detach())
        with torch.no_grad():
            for device, (places, aliases) in by_device.items():
                self._held += aliases
                with self._side(device) as side:
                    side.wait_event(self._begun[device])
                    for start in range(0, len(places), CHUNK):
                        self._issue_chunk(device, side, places[start : start + CHUNK], aliases[start : start + CHUNK])

    @contextlib.contextmanager
    def _side(self, device: torch.device) -> Iterator[Any]:
        """The side stream of `device` is the current one. With the device current too: leaving the stream makes the device that
        was current before current again, which would give it a context if it had none."""
        module = self._modules[device]
        with module.device(device):
            side = _side_stream(module, device)
            with module.stream(side):
                yield side

    def _issue_chunk(
        self, device: torch.device, side: Any, places: list[torch.Tensor], aliases: list[torch.Tensor]
    ) -> None:
        # torch conjugates and negates in host memory, before an asynchronous copy has arrived (pytorch#146286).
        resolved = [a.resolve_conj().resolve_neg() if a.is_conj() or a.is_neg() else a for a in aliases]
        self._held += resolved
        try:
            self._copy(places, resolved)
        finally:
            self._done.append((device, _mark(self._modules[device], side)))

    def hold_back(self) -> None:
        """What the current streams are told from now on happens after the copies issued so far. The CPU does not wait."""
        for device, done in dict(self._done).items():  # a side stream is in order: its last event stands for all
            module = self._modules[device]
            with module.device(device):
                stream = module.current_stream(device)
                before = _mark(module, stream, timed=True)
                stream.wait_event(done)
                self._holds[device].append((before, _mark(module, stream, timed=True)))

    def wait(self) -> None:
        """Return when every byte issued so far has arrived. Raises RuntimeError if the device failed, and `StageError` if it does
        not get on: then the memory is kept for ever (see `stuck`)."""
        for device, done in self._done:
            if not _happens(done, DEADLINE):
                _STUCK.append(self)
                raise StageError(
                    f"{device} did not end a part of the copy within {DEADLINE:.0f} s; does a collective or a kernel hang?"
                )
        self._held.clear()

    def relax_captures(self) -> None:
        """To be called on a thread of ours before it calls `wait`."""
        for device in self._modules:
            relax_captures(device)

    @property
    def stuck(self) -> bool:
        """Whether the device may still write to the arena, as it did not answer in time."""
        return any(copies is self for copies in _STUCK)

    def held(self) -> float:
        """Seconds for which the callers' streams were held back, after `wait`: of several devices, the one held longest."""
        return max((sum(map(_seconds, holds)) for holds in self._holds.values()), default=0.0)


_STUCK: list[DeviceCopies] = []


def _mark(module: Any, stream: Any, *, timed: bool = False) -> Any:
    event = module.Event(enable_timing=timed)
    event.record(stream)
    return event


def _happens(event: Any, timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    while not event.query():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL)
    return True


def _seconds(hold: tuple[Any, Any]) -> float:
    """How long a stream was held; nothing if the copies had ended before it got there."""
    before, after = hold
    if not before.query() or not _happens(after, 1.0):
        return 0.0
    return float(before.elapsed_time(after)) / 1e3


_SIDE_STREAMS: weakref.WeakKeyDictionary[Any, dict[torch.device, Any]] = weakref.WeakKeyDictionary()
_side_streams_made = threading.Lock()


def _side_stream(module: Any, device: torch.device) -> Any:
    with _side_streams_made:
        streams = _SIDE_STREAMS.setdefault(module, {})
        if device not in streams:
            streams[device] = module.Stream(device)
        return streams[device]


_device: torch.device | None = None  # that the training was seen to use


def in_use() -> torch.device | None:
    """A device that was seen to hold tensors of a training."""
    return _device


def notice(tensors: Iterable[torch.Tensor]) -> None:
    """Remember the device of the first of the tensors that is on one."""
    global _device
    _device = next((t.device for t in filterfalse(_IS_CPU, tensors) if is_on_device(t)), _device)
