"""Fixtures for integrations: the checkpointers that these share behind the scenes are closed before the disk is looked at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from vembed_async_ckpt.integrations.vembed import close_shared


@pytest.fixture
def root(root: Path) -> Iterator[Path]:
    """As everywhere, with nothing open any more when it is checked."""
    yield root
    close_shared(60)
