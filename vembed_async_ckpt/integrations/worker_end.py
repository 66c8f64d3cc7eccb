"""A DataLoader worker that a signal ends together with the training: what the training sees of it."""

from __future__ import annotations

import time

from .. import _signals
from ..checkpointer import AsyncCheckpointer

_ARRIVES = 0.5  # seconds in which the signal that ended the worker must reach this process too


def is_end_of_worker(error: BaseException) -> bool:
    """Return whether `error` was raised while a batch was fetched, because a worker of the DataLoader has ended.

    The fetch stands at the end of a step. What a dataset raises in a worker is another error.
    """
    kind = isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")
    broken = isinstance(error, EOFError | OSError) and not str(error).startswith("Caught ")  # the worker's socket
    return (kind or broken) and _is_of_a_fetch(error)


def _is_of_a_fetch(error: BaseException) -> bool:
    from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

    traceback = error.__traceback__
    while traceback is not None:
        frame = traceback.tb_frame
        if frame.f_code.co_name == "__next__" and isinstance(
            frame.f_locals.get("self"), _MultiProcessingDataLoaderIter
        ):
            return True
        traceback = traceback.tb_next
    return False


def exit_code_of(checkpointer: AsyncCheckpointer) -> int:
    """Return the checkpointer's exit code. Waits a moment for a signal that comes after the end of the worker."""
    deadline = time.monotonic() + _ARRIVES
    while not checkpointer.exit_code and time.monotonic() < deadline:
        time.sleep(_signals.SLICE / 5)
    return checkpointer.exit_code
