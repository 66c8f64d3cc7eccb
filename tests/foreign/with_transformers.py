"""A pytest plugin: every Trainer of the tests saves with ours."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import transformers

from vembed_async_ckpt.integrations.shared import close_shared
from vembed_async_ckpt.integrations.transformers import AsyncCheckpointMixin

WAITED = os.environ["FOREIGN_SAVING"] == "waited"


class Ours(AsyncCheckpointMixin):
    """Takes the place of `transformers.Trainer`."""

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        if WAITED:
            self.wait_for_checkpoints()


Ours.__name__ = Ours.__qualname__ = "Trainer"
transformers.Trainer = Ours
transformers.trainer.Trainer = Ours


@pytest.fixture(autouse=True)
def drained() -> Iterator[None]:
    yield
    close_shared(60)
