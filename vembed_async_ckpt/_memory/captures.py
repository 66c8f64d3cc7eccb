"""CUDA graphs that the training records: detect the recording, and keep calls of other threads from invalidating it."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable
from typing import Any

import torch

_RELAXED = 2  # driver_types.h, cudaStreamCaptureModeRelaxed


def is_capturing() -> bool:
    """Return whether the current stream records a graph. What runs now will be replayed later without its hooks."""
    for module in (torch.cuda, torch.xpu):
        capturing = getattr(module, "is_current_stream_capturing", None)
        if capturing is not None and module.is_initialized() and capturing():
            return True
    return False


_relaxed = threading.local()


def relax_captures(device: torch.device) -> None:
    """Set this thread's capture mode to "relaxed", once.

    Its CUDA calls then do not disturb graphs that other threads record. In torch's default mode they would invalidate
    such a graph.
    """
    if device.type != "cuda" or getattr(_relaxed, "done", False):
        return
    _relaxed.done = True
    exchange = _exchange_capture_mode()
    if exchange is not None:
        with torch.cuda.device(device):
            exchange(ctypes.byref(ctypes.c_int(_RELAXED)))


def _exchange_capture_mode() -> Callable[[Any], int] | None:
    """Return `cudaThreadExchangeStreamCaptureMode` of the runtime that torch has loaded, or HIP's.

    torch itself does not offer it.
    """
    with contextlib.suppress(OSError, AttributeError), open("/proc/self/maps") as maps:
        for path in {fields[5].rstrip() for fields in (line.split(maxsplit=5) for line in maps) if len(fields) == 6}:
            name = path.rpartition("/")[2]
            if name.startswith("libcudart"):
                return ctypes.CDLL(path).cudaThreadExchangeStreamCaptureMode
            if name.startswith("libamdhip64"):
                return ctypes.CDLL(path).hipThreadExchangeStreamCaptureMode
    return None
