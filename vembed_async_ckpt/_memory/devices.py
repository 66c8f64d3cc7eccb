"""Copies from accelerators to an arena, on side streams that are ordered by events.

There is no device-wide synchronization.

The copies of a save run after all work that the caller's streams had before the call, and before all work that they get
after `hold_back`. The CPU waits only in `wait`. This works for every type of device whose torch module (`torch.cuda`,
`torch.xpu`, ...) has streams and events. Tensors on other types of devices are copied while `save()` waits.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import filterfalse
from operator import attrgetter
from typing import Any

import torch

from ..errors import StageError
from .captures import relax_captures
from .host_copy import DEADLINE

CHUNK = 256  # copies per event; the queue of a driver holds about a thousand
ROWS_BUFFER = 32 << 20  # bytes of each of the two buffers through which rows pass
_POLL = 0.001  # seconds between two queries of an event
_NEEDED = ("Stream", "Event", "current_stream", "stream", "device")

_IS_CPU = attrgetter("is_cpu")
_usable: dict[str, bool] = {}  # by type of device


def is_on_device(tensor: torch.Tensor) -> bool:
    """Return whether the tensor is copied by its device."""
    return not tensor.is_cpu and _has_streams(tensor.device)


def any_on_device(tensors: Iterable[torch.Tensor]) -> bool:
    """Return whether at least one of the tensors is copied by its device."""
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
    """The copies of one save from all devices that hold its tensors.

    It keeps the source memory alive until `wait` returns.
    """

    def __init__(
        self,
        devices: Iterable[torch.device],
        module_of: Callable[[torch.device], Any],
        copy: Callable[[list[torch.Tensor], list[torch.Tensor]], None],
    ) -> None:
        """Record the state of `devices` at this point: the copies will run after it.

        `module_of`: returns a device's module, such as `torch.cuda`.
        `copy`: `copy_async`. Tests replace both.
        """
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
        """Return the copies for all devices among `tensors` that copy by themselves, or None if there are none."""
        devices = {tensor.device for tensor in filterfalse(_IS_CPU, tensors) if is_on_device(tensor)}
        if not devices:
            return None
        notice(tensors)
        return cls(devices, torch.get_device_module, copy_async)

    def issue(self, destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        """Start the copies. If it raises, `wait` still waits for the copies that were started.

        Returns at once, unless a destination is not contiguous: see `_copy_rows`.
        """
        by_device: dict[torch.device, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        in_rows: list[tuple[torch.Tensor, torch.Tensor]] = []
        for to, source in zip(destinations, sources, strict=True):
            if not to.is_contiguous():
                in_rows.append((to, source))
                continue
            places, aliases = by_device.setdefault(source.device, ([], []))
            places.append(to)
            # Hold an alias, so that `p.data = other` does not free memory that is being read.
            aliases.append(source.view(torch.uint8) if source.dtype is not to.dtype else source.detach())
        with torch.no_grad():
            for device, (places, aliases) in by_device.items():
                self._held += aliases
                with self._side(device) as side:
                    side.wait_event(self._begun[device])
                    for start in range(0, len(places), CHUNK):
                        self._issue_chunk(device, side, places[start : start + CHUNK], aliases[start : start + CHUNK])
            if in_rows:
                with _COPYING_ROWS:
                    self._copy_rows(in_rows)

    def _copy_rows(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Copy to destinations that are rows of larger tensors. Returns when every byte has arrived.

        A device copies asynchronously only between contiguous memory. So each part goes through one of two pinned
        buffers, and this thread moves the rows while the device fills the other one.
        """
        underway: deque[tuple[torch.Tensor, torch.Tensor, torch.device, Any]] = deque()
        parts = (part for to, source in pairs for part in _parts(to, source, ROWS_BUFFER))
        for number, (to, source) in enumerate(parts):
            if len(underway) == 2:
                self._move_rows(*underway.popleft())
            device = source.device
            buffer = _rows_buffer(device, number % 2, to.nbytes)[: to.nbytes].view(to.dtype).view(to.shape)
            with self._side(device) as side:
                side.wait_event(self._begun[device])
                contiguous = (source.view(to.dtype) if source.dtype is not to.dtype else source.detach()).contiguous()
                self._held.append(contiguous)
                self._issue_chunk(device, side, [buffer], [contiguous])
            underway.append((to, buffer, *self._done[-1]))
        while underway:
            self._move_rows(*underway.popleft())

    def _move_rows(self, to: torch.Tensor, buffer: torch.Tensor, device: torch.device, done: Any) -> None:
        self._wait_for(device, done)
        to.copy_(buffer)

    @contextlib.contextmanager
    def _side(self, device: torch.device) -> Iterator[Any]:
        """Context manager: make the side stream of `device` current, and the device itself too.

        Leaving a stream context makes the previous device current again. If that device had no context yet, this would
        create one.
        """
        module = self._modules[device]
        with module.device(device):
            side = _side_stream(module, device)
            with module.stream(side):
                yield side

    def _issue_chunk(
        self, device: torch.device, side: Any, places: list[torch.Tensor], aliases: list[torch.Tensor]
    ) -> None:
        # Resolve lazy conjugation and negation here. torch would do it in host memory, before an asynchronous copy has
        # arrived (pytorch#146286).
        resolved = [a.resolve_conj().resolve_neg() if a.is_conj() or a.is_neg() else a for a in aliases]
        self._held += resolved
        try:
            self._copy(places, resolved)
        finally:
            self._done.append((device, _mark(self._modules[device], side)))

    def hold_back(self) -> None:
        """Make later work on the current streams wait for the copies issued so far. The CPU does not wait."""
        for device, done in dict(self._done).items():  # a side stream runs in order, so its last event covers all
            module = self._modules[device]
            with module.device(device):
                stream = module.current_stream(device)
                before = _mark(module, stream, timed=True)
                stream.wait_event(done)
                self._holds[device].append((before, _mark(module, stream, timed=True)))

    def wait(self) -> None:
        """Return when every byte issued so far has arrived.

        Raises RuntimeError if the device failed. Raises `StageError` if a copy does not end within the deadline; its
        memory is then kept for ever (see `stuck`).
        """
        for device, done in self._done:
            self._wait_for(device, done)
        self._held.clear()

    def _wait_for(self, device: torch.device, done: Any) -> None:
        if not _happens(done, DEADLINE):
            _STUCK.append(self)
            raise StageError(
                f"{device} did not end a part of the copy within {DEADLINE:.0f} s; does a collective or a kernel hang?"
            )

    def relax_captures(self) -> None:
        """Call this on a thread of ours before it calls `wait`. See `captures.relax_captures`."""
        for device in self._modules:
            relax_captures(device)

    @property
    def stuck(self) -> bool:
        """Whether the device did not answer in time and may still write to the arena."""
        return any(copies is self for copies in _STUCK)

    def held(self) -> float:
        """Return for how many seconds the callers' streams were held back. Call it after `wait`.

        With several devices, it is the time of the one held longest.
        """
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
    """Return how long a stream was held, in seconds; 0 if the copies had ended before the stream reached this point."""
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


_ROWS: dict[tuple[torch.device, int], torch.Tensor] = {}
_COPYING_ROWS = threading.Lock()


def _rows_buffer(device: torch.device, number: int, size: int) -> torch.Tensor:
    """Return one of the two buffers for rows from `device`, pinned if the device is a CUDA device."""
    known = _ROWS.get((device, number))
    if known is None or known.numel() < size:
        known = torch.empty(max(size, ROWS_BUFFER), dtype=torch.uint8, pin_memory=device.type == "cuda")
        _ROWS[device, number] = known
    return known


def _parts(to: torch.Tensor, source: torch.Tensor, limit: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield a copy in parts of at most `limit` bytes, if one index of the largest dimension does not have more."""
    dim = max(range(to.ndim), key=to.shape.__getitem__)
    rows = max(1, to.shape[dim] * limit // to.nbytes)
    yield from zip(torch.split(to, rows, dim), torch.split(source, rows, dim), strict=True)


_device: torch.device | None = None  # a device on which tensors of the training were seen


def in_use() -> torch.device | None:
    """Return a device on which tensors of the training were seen, or None."""
    return _device


def notice(tensors: Iterable[torch.Tensor]) -> None:
    """Remember the device of the first tensor that is on one."""
    global _device
    _device = next((t.device for t in filterfalse(_IS_CPU, tensors) if is_on_device(t)), _device)
