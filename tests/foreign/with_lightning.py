"""A pytest plugin: every Trainer that is given no CheckpointIO saves with ours. Our checkpoints are directories, so `torch.load` of
one, which many of the tests call, is `read_checkpoint` here, and `os.path.isfile` of one is true. Nothing else is hidden from them:
tests that count the calls of `torch.save` fail, and those that save to another machine or save what is no data."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import CheckpointIO

from vembed_async_ckpt.integrations.lightning import VembedCheckpointIO, read_checkpoint
from vembed_async_ckpt.integrations.shared import close_shared

WAITED = os.environ["FOREIGN_SAVING"] == "waited"


class Waited(VembedCheckpointIO):
    """Durable when the call returns, whoever calls."""

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super().save_checkpoint(*args, **kwargs)
        self.teardown()


initialize = Trainer.__init__


def initialize_with_ours(self: Trainer, *args: Any, **kwargs: Any) -> None:
    plugins = kwargs.get("plugins")
    given = list(plugins) if isinstance(plugins, list | tuple) else [] if plugins is None else [plugins]
    if not any(isinstance(plugin, CheckpointIO) for plugin in given):
        kwargs["plugins"] = [*given, (Waited if WAITED else VembedCheckpointIO)()]
    initialize(self, *args, **kwargs)


Trainer.__init__ = initialize_with_ours
load = torch.load


def load_or_read(file: Any, *args: Any, **kwargs: Any) -> Any:
    return (
        read_checkpoint(file)
        if isinstance(file, str | os.PathLike) and os.path.isdir(file)
        else load(file, *args, **kwargs)
    )


torch.load = load_or_read
isfile = os.path.isfile


def is_file_or_checkpoint(path: Any) -> bool:
    """Asked by a test, and by nobody else."""
    asks = sys._getframe(1).f_globals.get("__name__", "")
    return isfile(path) or ("test_" in asks and isfile(os.path.join(path, "vembed_manifest.json")))


os.path.isfile = is_file_or_checkpoint


@pytest.fixture(autouse=True)
def drained() -> Iterator[None]:
    yield
    close_shared(60)
