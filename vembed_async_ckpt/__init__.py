"""Asynchronous checkpoints for PyTorch: the training step pays milliseconds, what is visible is whole.

    training thread:   host objects -> request -> plan -> arena (staging)                  save() returns a SaveHandle
    background:        writer: write -> commit -> retention -> shipping                    events all along

The folders, in the order in which a save passes through them: `_capture` makes the request, `_format` plans the files, `_memory`
copies the tensors, `_engine` drives the save, `_writer` is the process that writes, with what `_shared` connects it by, and `_disk`
publishes. `_ship` sends committed checkpoints elsewhere, and reads them from there. `_restore` is the way back.
`tests/unit/test_layers.py` has the order of imports.

Names are resolved when they are first used: looking at checkpoints (`latest`, `verify`, the command line) loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpointer import AsyncCheckpointer
    from .errors import (
        CheckpointerBusy,
        CheckpointerClosed,
        CheckpointError,
        CommitError,
        CorruptCheckpoint,
        PlanError,
        StageError,
        WriteError,
    )
    from .events import Event
    from .handle import CheckpointInfo, SaveHandle, SaveState, Timings
    from .integrations.vembed import save_checkpoint
    from .listing import CheckpointEntry, best, checkpoints, delete, latest, verify
    from .loading import Restored, load
    from .retention import KeepBest, KeepEvery, KeepLast
    from .stall import StallMeter, StallReport

__all__ = [
    # saving
    "save_checkpoint",
    "AsyncCheckpointer",
    "SaveHandle",
    "SaveState",
    "CheckpointInfo",
    "Timings",
    "Event",
    # what to keep
    "KeepLast",
    "KeepEvery",
    "KeepBest",
    # reading
    "latest",
    "load",
    "verify",
    "Restored",
    # looking at a root
    "CheckpointEntry",
    "checkpoints",
    "best",
    "delete",
    # measuring
    "StallMeter",
    "StallReport",
    # errors
    "CheckpointError",
    "PlanError",
    "StageError",
    "WriteError",
    "CommitError",
    "CorruptCheckpoint",
    "CheckpointerBusy",
    "CheckpointerClosed",
]

_HOMES = {
    ".checkpointer": ("AsyncCheckpointer",),
    ".handle": ("SaveHandle", "SaveState", "CheckpointInfo", "Timings"),
    ".retention": ("KeepLast", "KeepEvery", "KeepBest"),
    ".errors": (
        "CheckpointError", "PlanError", "StageError", "WriteError", "CommitError", "CorruptCheckpoint",
        "CheckpointerBusy", "CheckpointerClosed",
    ),
    ".events": ("Event",),
    ".listing": ("CheckpointEntry", "checkpoints", "best", "delete", "latest", "verify"),
    ".loading": ("load", "Restored"),
    ".stall": ("StallMeter", "StallReport"),
    ".integrations.vembed": ("save_checkpoint",),
}  # fmt: skip
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
