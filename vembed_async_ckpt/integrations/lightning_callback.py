"""A callback of Lightning's Trainer that saves when a policy says so, and stops the training for a signal.

    callback = VembedCheckpoint("checkpoints", policy=every(minutes=15), stop_on=[signal.SIGTERM])
    Trainer(plugins=[VembedCheckpointIO()], callbacks=[callback]).fit(module, data, ckpt_path=callback.newest())

It belongs to `lightning.pytorch` or to `pytorch_lightning`, whichever is imported.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from .._disk.catalog import latest
from .._engine.stop import Drain
from ..checkpointer import AsyncCheckpointer
from ..errors import PlanError
from ..policies import SavePolicy
from . import lightning_host as host
from .lightning import VembedCheckpointIO
from .worker_end import exit_code_of

__all__ = ["VembedCheckpoint"]


def _base() -> Any:
    names = [name for name in host.PYTORCH if name in sys.modules] or ["lightning.pytorch"]
    return importlib.import_module(names[0]).Callback


class VembedCheckpoint(_base()):  # type: ignore[misc]
    """Saves the training to `{dirpath}/step={global_step}.ckpt` in the background. Needs the plugin `VembedCheckpointIO`.

    - `policy`: when to save, asked after each optimizer step (see `vembed_async_ckpt.policies`; no `on_best`, which
      `ModelCheckpoint` does). All ranks save at the same step.
    - `stop_on`, `drain`, `grace`: as in `AsyncCheckpointer.stop_on`. After the step that all ranks agree on, the
      training is saved and `fit` raises Lightning's SIGTERMException, a SystemExit with the code 128 + signal: the
      process ends with that code. A worker of the DataLoader that the same signal killed ends the training in the same
      way, unless there are several ranks.

    The handlers are set after Lightning's own, so that its requeueing on Slurm still works; its handler of SIGTERM,
    which ends each rank at a step of its own, is left out.

    Raises TypeError or ValueError for what makes no sense, some of it when the training begins.
    """

    saves_in_background = True  # see `lightning_host.is_waited_for`

    def __init__(
        self,
        dirpath: str | os.PathLike[str],
        *,
        policy: SavePolicy | None = None,
        stop_on: Sequence[int] = (),
        drain: Drain = "committed",
        grace: float = 30.0,
    ) -> None:
        if policy is None and not stop_on:
            raise ValueError("VembedCheckpoint has neither policy= nor stop_on=, so it would never save")
        if policy is not None and not isinstance(policy, SavePolicy):
            raise TypeError(f"policy is {policy!r}; use those of vembed_async_ckpt.policies, combined with |, or None")
        if policy is not None and any(part.asks_for_metrics for part in policy.parts()):
            raise ValueError(f"policy {policy!r}: the best is saved by ModelCheckpoint(monitor=...)")
        self.dirpath = os.path.realpath(os.fspath(dirpath))
        self._policy = policy
        self._signals = tuple(stop_on)
        self._stop_options: dict[str, Any] = {"drain": drain, "grace": grace}
        self._checkpointer: AsyncCheckpointer | None = None
        self._asked: int | None = None  # the step that was asked about last
        self.exit_code = 0  # 128 + the signal for which the training ended

    def newest(self) -> str | None:
        """Return the newest complete checkpoint in `dirpath`, as `latest` finds it, for `fit(ckpt_path=...)`."""
        found = latest(self.dirpath)
        return None if found is None else os.fspath(found)

    # -- what Lightning calls

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        plugin = host.plugin_of(trainer, VembedCheckpointIO)
        if plugin is None:
            raise PlanError("VembedCheckpoint needs the plugin: Trainer(plugins=[VembedCheckpointIO()])")
        self._asked, self.exit_code = trainer.global_step, 0
        self._checkpointer = plugin.checkpointer_with(self.dirpath, self._policy)
        if self._signals:
            if signal.SIGTERM in self._signals:
                host.take_sigterm_from(trainer)
            self._checkpointer.stop_on(*self._signals, **self._stop_options)
            host.catch_worker_errors(trainer, lambda: self._worker_ended(trainer))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        step = trainer.global_step
        if self._checkpointer is None or step == self._asked:
            return  # gradients are still being accumulated
        self._asked = step
        if self._signals and self._checkpointer.should_stop(step):
            self._end(trainer)
        elif self._policy is not None and self._checkpointer.should_save(step):
            self._save(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self.exit_code and isinstance(exception, SystemExit):
            exception.code = self.exit_code

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        host.release_worker_errors(trainer)
        self._checkpointer = None

    # -- saving

    def _save(self, trainer: Any) -> None:
        trainer.save_checkpoint(os.path.join(self.dirpath, f"step={trainer.global_step}.ckpt"))

    def _end(self, trainer: Any) -> None:
        """Save for the last time. Lightning leaves its loops at the end of this step."""
        assert self._checkpointer is not None
        self.exit_code = self._checkpointer.exit_code
        self._save(trainer)
        host.end_training(trainer, self._signals)

    def _worker_ended(self, trainer: Any) -> int:
        """A worker of the DataLoader has ended. If a signal to stop was the reason, save, and return the exit code."""
        checkpointer = self._checkpointer
        if checkpointer is None or trainer.world_size > 1:  # other ranks go on to the step that they agreed on
            return 0
        if exit_code_of(checkpointer):
            self._end(trainer)
        return self.exit_code
