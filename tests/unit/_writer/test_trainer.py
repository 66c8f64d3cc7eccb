"""The writer notices the end of its trainer, with a pidfd and without."""

from __future__ import annotations

import os
import select
import subprocess
import sys

import pytest

from vembed_async_ckpt._writer.trainer import Trainer


def child() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-S", "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)


def test_the_poll_wakes_up_when_it_dies() -> None:
    process = child()
    trainer, poll = Trainer(process.pid), select.poll()
    assert trainer.register(poll) is None
    assert not trainer.is_dead()
    assert poll.poll(0) == []
    process.kill()
    assert poll.poll(20_000)
    assert trainer.is_dead()
    process.communicate()
    assert trainer.is_dead(), "the id may be in use again"


@pytest.mark.parametrize("error", [OSError(38, "not implemented"), AttributeError("pidfd_open")])
def test_without_a_pidfd_it_is_looked_at(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse(pid: int) -> int:
        raise error

    monkeypatch.setattr(os, "pidfd_open", refuse)
    process = child()
    trainer, poll = Trainer(process.pid), select.poll()
    patience = trainer.register(poll)
    assert patience is not None
    assert 0 < patience <= 1000
    assert not trainer.is_dead()
    process.communicate()
    assert trainer.is_dead()


def test_without_a_pidfd_another_parent_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose id is in use again: the number alone would say that it lives."""
    monkeypatch.delattr(os, "pidfd_open")
    trainer = Trainer(os.getpid())
    assert not trainer.is_dead()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert trainer.is_dead()


def test_one_that_is_dead_before_the_writer_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    process = child()
    process.communicate()
    assert Trainer(process.pid).is_dead()
