"""Fixtures every test may use. `root` ends with the check that matters: what is visible is whole, nothing is left over."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vembed_async_ckpt import verify
from vembed_async_ckpt._format import names

from .buckets import Bucket, bucket


def leftovers(root: Path) -> list[str]:
    """Entries of the work directory that no finished run leaves behind."""
    work = Path(names.work_directory(str(root)))
    if not work.exists():
        return []
    return sorted(entry.name for entry in work.iterdir() if entry.name != names.LOCK)


def check_root(root: Path) -> list[int | None]:
    """Verify every visible checkpoint by content; returns their steps, oldest first."""
    from vembed_async_ckpt._disk.catalog import scan

    entries = scan(os.fspath(root))
    for entry in entries:
        assert entry.manifest is not None, f"broken checkpoint visible: {entry.error}"
        verify(entry.path)
    return [entry.manifest.step for entry in entries if entry.manifest]


@pytest.fixture
def small_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of a few bytes may be copied late, as large ones are: so tests of late copies do with small models."""
    from vembed_async_ckpt._memory import host_copy

    monkeypatch.setattr(host_copy, "SMALL_BYTES", 7)  # one less than a late tensor must have


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """An empty directory for checkpoints; at the end every visible one is whole and nothing of ours is left over."""
    directory = tmp_path / "checkpoints"
    yield directory
    if directory.exists():
        check_root(directory)
        assert leftovers(directory) == []


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    """moto's server with one bucket, the same for the whole session: every test uses a prefix of its own."""
    with bucket("moto", tmp_path_factory) as found:
        yield found
