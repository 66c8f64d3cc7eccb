"""How a training by transformers' Trainer stops for a signal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .. import _signals
from .._engine.session import EXIT_DEADLINE
from ..checkpointer import AsyncCheckpointer
from .worker_end import exit_code_of, is_end_of_worker


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

    def takes(self, error: Exception, world_size: int) -> bool:
        """Return whether `error`, raised where Trainer fetched a batch, is the end of a worker by a signal to stop.

        Several ranks cannot end there, as the others go on to the step that they agreed on.
        """
        if world_size > 1 or not is_end_of_worker(error):
            return False
        self.reached = self.reached or bool(exit_code_of(self._checkpointer))
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
