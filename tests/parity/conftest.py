"""One checkpointer for all tests of a module: what it learned of one model must not reach the next."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from vembed_async_ckpt import AsyncCheckpointer, KeepLast

from ..conftest import check_root, leftovers
from .checks import BOUND, change


@dataclass
class Saver:
    """Saves under ever new steps."""

    checkpointer: AsyncCheckpointer
    steps: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def save(self, model: Any, **further: Any) -> Path:
        """The committed checkpoint of a model whose live weights changed right after the call."""
        handle = self.checkpointer.save(next(self.steps), model=model, **further)
        change(model)
        return handle.result(BOUND).path


def _saver(root: Path, **options: Any) -> Iterator[Saver]:
    with AsyncCheckpointer(root, writer="thread", retention=KeepLast(2), **options) as checkpointer:
        yield Saver(checkpointer)
    check_root(root)
    assert leftovers(root) == []


@pytest.fixture(scope="module")
def saver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saver]:
    """With the options that save_pretrained has by default."""
    yield from _saver(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def sharding_saver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saver]:
    """With shards of 10 kB."""
    yield from _saver(tmp_path_factory.mktemp("checkpoints"), max_shard_size="10KB")


@pytest.fixture(scope="module")
def plain_saver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saver]:
    """Without the original format."""
    yield from _saver(tmp_path_factory.mktemp("checkpoints"), save_original_format=False)
