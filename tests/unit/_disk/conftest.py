"""Roots for tests of the disk layer."""

from __future__ import annotations

from pathlib import Path

import pytest

from vembed_async_ckpt._format import names


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with its work directory, as it is while somebody saves there."""
    path = tmp_path / "checkpoints"
    (path / names.WORK).mkdir(parents=True)
    return path
