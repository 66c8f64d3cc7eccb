"""Pins host memory for CUDA devices (and AMD devices, which torch also calls CUDA).

Copies into pinned memory run asynchronously at full speed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from ..events import logger
from .captures import relax_captures
from .devices import in_use

_PORTABLE = 1  # driver_types.h, cudaHostRegisterPortable: pinned for all contexts of the process
_ALREADY_REGISTERED = 712  # driver_types.h, cudaErrorHostMemoryAlreadyRegistered
_pinned: dict[int, int] = {}  # what is pinned now: bytes, by address


def can_pin() -> bool:
    """Return whether memory can be pinned for the device of the training."""
    device = in_use()
    return device is not None and device.type == "cuda"


def pin(address: int, size: int) -> bool:
    """Pin host memory for the devices.

    If that fails, this warns and returns False. Copies are then slower, and each holds up the thread that issues it.
    """

    def register(cudart: Any) -> int:
        code = int(cudart.cudaHostRegister(address, size, _PORTABLE))
        if code == _ALREADY_REGISTERED and not _overlaps_pinned(address, size):
            # left from an earlier arena at this address: other pages
            cudart.cudaHostUnregister(address)
            code = int(cudart.cudaHostRegister(address, size, _PORTABLE))
        return code

    codes = _on_a_thread(register)
    if codes == [0]:
        _pinned[address] = size
        return True
    logger.warning(
        "%d bytes of host memory could not be pinned (CUDA says %s): copies from the device are slower", size, codes
    )
    return False


def unpin(address: int) -> None:
    """Undo `pin`."""
    _pinned.pop(address, None)
    _on_a_thread(lambda cudart: int(cudart.cudaHostUnregister(address)))


def _overlaps_pinned(address: int, size: int) -> bool:
    """Return whether a part of this memory is in use as pinned memory, so that it must not be unpinned."""
    return any(at < address + size and address < at + length for at, length in list(_pinned.items()))


def _on_a_thread(call: Callable[[Any], int]) -> list[object]:
    """Make a CUDA runtime call on a thread of its own. Returns what the call returned or raised.

    CUDA keeps the last error of each thread. On the caller's thread, a later kernel launch would be blamed for it.
    """
    codes: list[object] = []

    def run() -> None:
        try:
            device = in_use()
            if device is not None:
                # A new thread would use the first device and create a needless context on it.
                torch.cuda.set_device(device)
                relax_captures(device)
            codes.append(call(torch.cuda.cudart()))  # type: ignore[no-untyped-call]
        except Exception as error:
            codes.append(error)

    thread = threading.Thread(target=run, name="vembed-ckpt-pin", daemon=True)
    thread.start()
    thread.join()
    return codes
