"""Copies from CUDA devices to an arena: issued on streams of their own, ordered by events, with no device-wide synchronization.

A save's copies come after all that the caller's streams were told before the call, and before all that they are told after
`hold_back`. The CPU waits in `wait` only.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any

import torch

from ..events import logger

_PORTABLE = 1  # driver_types.h, cudaHostRegisterPortable: pinned for every context of the process
_ALREADY_REGISTERED = 712  # driver_types.h, cudaErrorHostMemoryAlreadyRegistered


def is_on_device(tensor: torch.Tensor) -> bool:
    """Whether it is copied by its device."""
    return tensor.is_cuda


def any_on_device(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether some of many are."""
    return torch.cuda.is_initialized() and True in map(attrgetter("is_cuda"), tensors)  # type: ignore[no-untyped-call]


def copy_async(destinations: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Issue copies to host memory on the current stream of the sources' device."""
    torch._foreach_copy_(destinations, sources, non_blocking=True)


class DeviceCopies:
    """The copies of one save from the devices its tensors are on. Keeps the memory they read alive until `wait` returns."""

    def __init__(self, devices: Iterable[torch.device], cuda: Any, copy: Callable[[Any, Any], None]) -> None:
        """From here on the state of `devices` is that of the call. `cuda` is torch.cuda and `copy` is `copy_async`, or the tests'
        double of both."""
        self._cuda = cuda
        self._copy = copy
        self._begun = {device: self._mark(cuda.current_stream(device)) for device in devices}
        self._done: list[tuple[torch.device, Any]] = []
        self._held: list[torch.Tensor] = []

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor]) -> DeviceCopies | None:
        """For all CUDA devices among `tensors`; None if they are all in host memory."""
        if not any_on_device(tensors):
            return None
        notice(tensors)
        return cls({tensor.device for tensor in tensors if is_on_device(tensor)}, torch.cuda, copy_async)

    def issue(self, destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        """Start copying; returns at once."""
        by_device: dict[torch.device, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        with torch.no_grad():
            for to, source in zip(destinations, sources, strict=True):
                places, aliases = by_device.setdefault(source.device, ([], []))
                places.append(to)
                # An alias: `p.data = other` must not free what is being read.
                aliases.append(source.view(torch.uint8) if source.dtype is not to.dtype else source.detach())
            for device, (places, aliases) in by_device.items():
                self._held += aliases
                side = _side_stream(self._cuda, device)
                with self._cuda.stream(side):
                    side.wait_event(self._begun[device])
                    self._copy(places, aliases)
                    self._done.append((device, self._mark(side)))

    def hold_back(self) -> None:
        """What the current streams are told from now on happens after the copies issued so far. The CPU does not wait."""
        for device, done in self._done:
            self._cuda.current_stream(device).wait_event(done)

    def wait(self) -> None:
        """Return when every byte issued so far has arrived. Raises RuntimeError if the device failed."""
        for _, done in self._done:
            done.synchronize()
        self._held.clear()

    def _mark(self, stream: Any) -> Any:
        event = self._cuda.Event(blocking=True)  # whoever waits for it sleeps
        event.record(stream)
        return event


_SIDE_STREAMS: weakref.WeakKeyDictionary[Any, dict[torch.device, Any]] = weakref.WeakKeyDictionary()


def _side_stream(cuda: Any, device: torch.device) -> Any:
    streams = _SIDE_STREAMS.setdefault(cuda, {})
    if device not in streams:
        streams[device] = cuda.Stream(device)
    return streams[device]


def is_capturing() -> bool:
    """Whether the current stream records a CUDA graph: what runs now runs again later, without its hooks."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


_device: int | None = None  # of the training thread, once it was seen to use one


def in_use() -> bool:
    """Whether a training on a CUDA device was seen."""
    return _device is not None


def notice(tensors: Iterable[torch.Tensor]) -> None:
    """Remember the training thread's device, if any of the tensors is on one."""
    global _device
    if any_on_device(tensors):
        _device = torch.cuda.current_device()


def pin(address: int, size: int) -> bool:
    """Lock host memory for the devices: copies into it run by themselves, at full speed. Where that cannot be, copies are
    slower and hold up the thread that issues them: then this warns and returns False."""
    codes: list[int] = []

    def register() -> None:
        if _device is not None:
            torch.cuda.set_device(_device)  # a new thread's would be the first device, and get a context for nothing
        cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        code = int(cudart.cudaHostRegister(address, size, _PORTABLE))
        if code == _ALREADY_REGISTERED:  # of an arena that lay here before: not these pages
            cudart.cudaHostUnregister(address)
            code = int(cudart.cudaHostRegister(address, size, _PORTABLE))
        codes.append(code)

    # On a thread of its own: an error would stay there as CUDA's last one, and be blamed on the next kernel.
    thread = threading.Thread(target=register, name="vembed-ckpt-pin", daemon=True)
    thread.start()
    thread.join()
    if codes == [0]:
        return True
    logger.warning(
        "%d bytes of host memory could not be pinned (CUDA errors %s): copies from the device are slower", size, codes
    )
    return False


def unpin(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
