"""Host memory locked for CUDA devices (and AMD's, which torch calls the same): copies into it run by themselves, at full speed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from ..events import logger
from .captures import relax_captures
from .devices import in_use

_PORTABLE = 1  # driver_types.h, cudaHostRegisterPortable: pinned for every context of the process
_ALREADY_REGISTERED = 712  # driver_types.h, cudaErrorHostMemoryAlreadyRegistered


def can_pin() -> bool:
    """Whether the training's device is one for which memory can be pinned."""
    device = in_use()
    return device is not None and device.type == "cuda"


def pin(address: int, size: int) -> bool:
    """Lock host memory for the devices. Where that fails, copies are slower and hold up the thread that issues them: then this
    warns and returns False."""

    def register(cudart: Any) -> int:
        code = int(cudart.cudaHostRegister(address, size, _PORTABLE))
        if code == _ALREADY_REGISTERED:  # of an arena that lay here before: not these pages
            cudart.cudaHostUnregister(address)
            code = int(cudart.cudaHostRegister(address, size, _PORTABLE))
        return code

    codes = _on_a_thread(register)
    if codes == [0]:
        return True
    logger.warning(
        "%d bytes of host memory could not be pinned (CUDA says %s): copies from the device are slower", size, codes
    )
    return False


def unpin(address: int) -> None:
    """Undo `pin`."""
    _on_a_thread(lambda cudart: int(cudart.cudaHostUnregister(address)))


def _on_a_thread(call: Callable[[Any], int]) -> list[object]:
    """Make a call of the CUDA runtime on a thread of its own, where an error stays as CUDA's last one: on the caller's it would be
    blamed on the next kernel. Returns what the call returned or raised."""
    codes: list[object] = []

    def run() -> None:
        try:
            device = in_use()
            if device is not None:
                torch.cuda.set_device(device)  # a new thread's would be the first device, and get a context for nothing
                relax_captures(device)
            codes.append(call(torch.cuda.cudart()))  # type: ignore[no-untyped-call]
        except Exception as error:
            codes.append(error)

    thread = threading.Thread(target=run, name="vembed-ckpt-pin", daemon=True)
    thread.start()
    thread.join()
    return codes
