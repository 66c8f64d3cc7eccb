"""Every exception this package raises on purpose. A message says what happened, where, and what to do next."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings


class CheckpointError(Exception):
    """Base of all errors of this package."""


class PlanError(CheckpointError):
    """The request cannot be saved as it stands (name clash, unsupported value, no storage). Raised by the call itself,
    before anything on disk is touched."""


class StageError(CheckpointError):
    """A consistent copy of the state could not be taken; nothing of it was written under a final name."""


class WriteError(CheckpointError):
    """The files could not be written, or the writer was lost. The previous checkpoint is untouched."""


class CommitError(CheckpointError):
    """The files were written but could not be published durably. After a doubtful commit nothing is deleted."""


class CorruptCheckpoint(CheckpointError):
    """A checkpoint on disk is incomplete or its content differs from its manifest; the message names file and reason."""


class CheckpointerBusy(CheckpointError):
    """No arena is free (`when_busy`), or another process holds the lock of the root."""


class CheckpointerClosed(CheckpointError):
    """`save()` after `close()`, or in a forked child of the process that owns the checkpointer."""


_BETWEEN = (os.path.dirname(__file__) + os.sep, os.sep.join(("torch", "_dynamo", "")), contextlib.__file__)


def warn(message: str) -> None:
    """Warn of something at the line of the program that called into this package."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and any(part in frame.f_code.co_filename for part in _BETWEEN):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
