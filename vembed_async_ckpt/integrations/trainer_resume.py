"""Resumes transformers' Trainer where stock Trainer cannot read our directories.

That is so with FSDP, whose checkpoints look different when Trainer writes them, and for what a training with FSDP saved.
"""

from __future__ import annotations

import os
from typing import Any

from transformers import Trainer

from .. import loading
from .._disk import manifests
from .._format import names

_OPTIMIZERS = (names.divided_optimizer(0), names.optimizer(0), names.TRAINER_OPTIMIZER)


class ResumingTrainer(Trainer):  # type: ignore[misc]
    """Loads model, optimizer and scheduler together, in the place of the first of them. Trainer loads the rest."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled and _files_of(resume_from_checkpoint):
            _load(self, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        files = _files_of(checkpoint)
        if not files or not (self.is_fsdp_enabled or names.divided_optimizer(0) in files):
            super()._load_optimizer_and_scheduler(checkpoint)
        elif not self.is_fsdp_enabled:
            _load(self, checkpoint)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled and _files_of(self.state.best_model_checkpoint):
            loading.load(self.state.best_model_checkpoint, model=self.model_wrapped)
        else:
            super()._load_best_model()


def _files_of(directory: str | None) -> set[str]:
    """Return the names of the files of a checkpoint of ours; none if the directory is not ours."""
    if directory is None or not os.path.lexists(os.path.join(directory, names.MANIFEST)):
        return set()
    return set(manifests.read(os.path.realpath(directory)).files)


def _load(trainer: Any, directory: Any) -> None:
    """Restore the model, and optimizer and scheduler if they were saved. Trainer restores the random states later."""
    model = trainer.model_wrapped if trainer.is_fsdp_enabled else trainer.model
    if _files_of(directory).isdisjoint(_OPTIMIZERS):
        loading.load(directory, model=model)
    else:
        loading.load(directory, model=model, optimizer=trainer.optimizer, scheduler=trainer.lr_scheduler, exclude="rng")
