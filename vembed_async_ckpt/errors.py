"""Every exception this package raises on purpose. A message says what happened, where, and what to do next."""

from __future__ import annotations


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
