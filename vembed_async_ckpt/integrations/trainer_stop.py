"""How a training by transformers' Trainer stops for a signal."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from .. import _signals
from .._engine.session import EXIT_DEADLINE
from ..checkpointer import AsyncCheckpointer

_ARRIVES = 0.5  # seconds in which the signal that killed a DataLoader worker must reach this process too


class TrainerStop:
    """The stop of one `train()`. `reached`: the training leaves its loops, after a last save."""

    def __init__(self, checkpointer: AsyncCheckpointer, signals: Sequence[int], options: Mapping[str, Any]) -> None:
        checkpointer.stop_on(*signals, **options)
        self._checkpointer = checkpointer
        self._saved: int | None = None  # the step of the last save
        self.reached = False

    def ask(self, step: int) -> bool:
        """Return whether the training ends after `step`."""
        self.reached = self.reached or self._checkpointer.should_stop(step)
        return self.reached

    def must_save(self, step: int) -> bool:
        """Return True once for `step`: Trainer looks again at the end of the epoch, and saves once only."""
        saved, self._saved = self._saved, step
        return saved != step

    def takes(self, error: RuntimeError, world_size: int) -> bool:
        """Return whether `error`, raised where Trainer fetched a batch, is the end of a worker by a signal to stop.

        Several ranks cannot end there, as the others go on to the step that they agreed on.
        """
        if world_size > 1 or not str(error).startswith("DataLoader worker"):
            return False
        deadline = time.monotonic() + _ARRIVES
        while not self._checkpointer.exit_code and time.monotonic() < deadline:
            time.sleep(_signals.SLICE / 5)
        self.reached = self.reached or bool(self._checkpointer.exit_code)
        return self.reached

    def drain(self) -> None:
        """Wait for the saves in flight, for as long as `close()` would."""
        with _signals.held():
            self._checkpointer._session.drain(EXIT_DEADLINE)


def refuse_another_stop(signals: Sequence[int], arguments: Any) -> None:
    """Raise ValueError if Trainer's own just-in-time checkpoint is on too."""
    if signals and getattr(arguments, "enable_jit_checkpoint", False):
        raise ValueError(
            "enable_jit_checkpoint and async_checkpoint_stop_on both answer a signal; leave enable_jit_checkpoint out: it "
            "waits 3 s and loses the step after its save"
        )
