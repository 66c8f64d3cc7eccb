"""When a checkpoint is durable is seen by a thread of its own, whatever the training does meanwhile."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from vembed_async_ckpt.bench.engine import Engine, Handle
from vembed_async_ckpt.bench.measures import finish
from vembed_async_ckpt.bench.measures.finish import Finish, save_alone
from vembed_async_ckpt.bench.measures.stall import save_beside, steps_beside
from vembed_async_ckpt.bench.options import MIB
from vembed_async_ckpt.bench.state import State, StateSpec


class Slow(Engine):
    """A save ends when it is told to; `ended` is set when somebody has seen its end."""

    def prepare(self) -> None:
        self.told = threading.Event()
        self.ended = threading.Event()
        self.synced: list[str] = []

    def save(self, number: int) -> Handle:
        os.makedirs(self.path(number))
        Path(self.path(number), "weights").write_bytes(b"x" * 100)
        return Handle(wait=self._wait)

    def _wait(self) -> None:
        assert self.told.wait(60)
        self.ended.set()


class Step:
    """A training of which a step waits until the end of the save has been seen."""

    own = True

    def __init__(self, engine: Slow) -> None:
        self.engine = engine

    def stretch(self) -> float:
        if os.path.exists(self.engine.directory) and os.listdir(self.engine.directory):
            self.engine.told.set()
            assert self.engine.ended.wait(60), "nobody waits for the save while the training goes on"
        return 0.0

    def step(self, barrier: Any) -> float:
        barrier()
        self.stretch()
        return 0.0


@pytest.fixture
def state() -> State:
    return StateSpec("cpu", "clip", "1/8", size=MIB, tensors=3).build()


def test_the_end_of_a_save_is_seen_during_forward_and_backward(tmp_path: Path, state: State):
    """Not at the end of the stretch of training: here the stretch cannot end before."""
    engine = Slow(os.fspath(tmp_path / "engine"), state)
    sample = save_beside(engine, 0, Step(engine))  # type: ignore[arg-type]
    assert 0 < sample["written"] <= sample["durable"]
    assert sample["bytes"] == 100
    assert os.listdir(engine.directory) == []


def test_the_end_of_a_save_is_seen_during_a_step(tmp_path: Path, state: State):
    """Steps go on until then."""
    engine = Slow(os.fspath(tmp_path / "engine"), state)
    _, steps, ended = steps_beside(engine, 0, Step(engine))  # type: ignore[arg-type]
    assert len(steps) >= 1
    assert 0 < ended["written"] <= ended["durable"]


def test_what_an_engine_leaves_unsynced_is_synced_in_the_time(
    tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch
):
    """And not for an engine that syncs."""
    synced: list[str] = []
    monkeypatch.setattr(finish, "sync_tree", synced.append)
    engine = Slow(os.fspath(tmp_path / "engine"), state)
    engine.told.set()
    assert save_alone(engine, 0)["bytes"] == 100
    assert synced == [engine.path(0)]
    monkeypatch.setattr(Slow, "syncs", True)
    save_alone(engine, 1)
    assert synced == [engine.path(0)]


def test_an_engine_that_fails_in_the_background_fails_the_visit(tmp_path: Path, state: State):
    """The thread swallows nothing."""

    def fail() -> None:
        raise OSError("the disk is on fire")

    ended = Finish(Slow(os.fspath(tmp_path / "engine"), state), Handle(wait=fail), 0, 0.0)
    with pytest.raises(OSError, match="on fire"):
        ended.result()
    assert ended.over()
