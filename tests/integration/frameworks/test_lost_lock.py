"""Somebody removed the lock file and another job took the directory: what deletes old checkpoints here leaves that job's alone."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from transformers import Trainer, TrainerCallback

from vembed_async_ckpt.integrations.lightning import VembedCheckpointIO
from vembed_async_ckpt.integrations.transformers import AsyncCheckpointMixin

from ..test_lock import another_job, steps, without_lock
from .test_transformers import Tokens, arguments, llama


class Async(AsyncCheckpointMixin, Trainer):
    async_checkpoint_options = MappingProxyType({"on_error": "warn"})


class TakesTheRoot(TrainerCallback):
    """After the first save another job takes the root, saves, and may end."""

    def __init__(self, root: Path, ends: bool) -> None:
        self.root, self.ends = root, ends
        self.trainer: Any = None
        self.other: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step != 3:
            return
        self.trainer.wait_for_checkpoints()
        self.trainer._async_run.rotation.join()
        without_lock(self.root)
        self.other = another_job(self.root, 50, 51)
        self.other.__enter__()
        if self.ends:
            self.leave()

    def leave(self) -> None:
        self.other.__exit__(None, None, None)


@pytest.mark.parametrize("ends", [False, True])
def test_trainers_rotation_deletes_nothing_of_another_job(root: Path, ends: bool) -> None:
    callback = TakesTheRoot(root, ends)
    trainer = Async(
        model=llama(), args=arguments(root, save_total_limit=1), train_dataset=Tokens(), callbacks=[callback]
    )
    callback.trainer = trainer
    trainer.train()
    if not ends:
        callback.leave()
    assert steps(root) == [2, 50, 51]


def test_lightning_deletes_nothing_without_the_lock(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One that can be deleted with the lock stays without it, and a warning says so."""
    io = VembedCheckpointIO()
    for name in "abc":
        io.save_checkpoint({"global_step": 1}, root / f"{name}.ckpt")
        io.load_checkpoint(root / f"{name}.ckpt")
    io.remove_checkpoint(root / "a.ckpt")
    assert not (root / "a.ckpt").exists()
    without_lock(root)
    with another_job(root):
        io.remove_checkpoint(root / "b.ckpt")
        assert (root / "b.ckpt").exists()
        assert "b.ckpt stays: its lock file is gone" in caplog.text
        io.teardown()
