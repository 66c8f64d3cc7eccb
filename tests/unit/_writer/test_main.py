"""The writer process: what it takes over from its trainer, and which signals it leaves to it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from vembed_async_ckpt._disk.lock import RootLock
from vembed_async_ckpt._writer import __main__ as process

from ..by_hand import pair


def test_it_serves_until_the_trainer_hangs_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ignored: list[int] = []
    monkeypatch.setattr(
        signal, "signal", lambda number, handler: ignored.append(number) if handler is signal.SIG_IGN else None
    )

    def refuse(niceness: int) -> None:
        raise PermissionError(1, "a sandbox")

    monkeypatch.setattr(os, "nice", refuse)
    lock = RootLock.acquire(str(tmp_path))
    ours, theirs = pair()
    ours.close()
    process.main([str(tmp_path), str(os.getpid()), str(theirs.detach()), str(os.dup(lock.fd))])
    assert ignored == [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    assert not (tmp_path / "_vembed_async_ckpt").exists(), "who ends last removes the lock file"
    lock.close()
