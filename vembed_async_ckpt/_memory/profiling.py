"""Shows the work of the training thread for a save as ranges in torch's profiler."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.autograd import profiler

_NOTHING = nullcontext()


def recorded(name: str) -> AbstractContextManager[Any]:
    """Return the profiler range `vembed_async_ckpt.{name}` while a profiler runs, else an empty context.

    A range costs several microseconds.
    """
    if profiler._is_profiler_enabled:
        return profiler.record_function(f"vembed_async_ckpt.{name}")
    return _NOTHING
