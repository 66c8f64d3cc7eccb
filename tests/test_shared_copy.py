"""A step that comes while the state is still being copied takes over what is left of the copy."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vembed_async_ckpt import AsyncCheckpointer, SaveState, StageError, load
from vembed_async_ckpt._arena import host_copy, staging
from vembed_async_ckpt._arena.barrier import GATE
from vembed_async_ckpt._arena.staging import SharedCopy

GATE.install()  # as a checkpointer does: the optimizer steps before one is made
BOUND = 20  # seconds that a wait may take before it is a failure
GROUPS = 18


class Training:
    """Six weights with AdamW's moments: eighteen groups of 64 KiB."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        self.model = torch.nn.Sequential(*(torch.nn.Linear(128, 128, bias=False) for _ in range(6)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.step()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(4, 128)).pow(2).sum().backward()
        self.optimizer.step()

    def frozen(self) -> list[Any]:
        return [copy.deepcopy(self.model.state_dict()), copy.deepcopy(self.optimizer.state_dict())]

    def save(self, checkpointer: AsyncCheckpointer, step: int = 1) -> Any:
        return checkpointer.save(step, model=self.model, optimizer=self.optimizer)


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [tensor for item in value for tensor in tensors(item)]
    return [value] if isinstance(value, torch.Tensor) else []


def assert_saved(path: Path, expected: list[Any]) -> None:
    fresh = Training()
    load(path, model=fresh.model, optimizer=fresh.optimizer, verify="full")
    found, wanted = tensors(fresh.frozen()), tensors(expected)
    assert len(found) == len(wanted) > GROUPS
    assert all(map(torch.equal, found, wanted))


class Held:
    """The staging thread is in its first group until `go`. `taken`: how many tensors each helper took over."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        self.groups = 0
        self.taken: list[int] = []


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    state = Held()
    copy_group, copy_blocking = staging.copy_group, staging.copy_blocking

    def held_group(*group: Any) -> None:
        state.groups += 1
        state.begun.set()
        assert state.go.wait(BOUND)
        copy_group(*group)

    def noted(to: list[torch.Tensor], of: list[torch.Tensor]) -> None:
        state.taken.append(len(to))
        copy_blocking(to, of)
        state.go.set()

    monkeypatch.setattr(host_copy, "GROUP_BYTES", 64 << 10)
    monkeypatch.setattr(staging, "copy_group", held_group)
    monkeypatch.setattr(staging, "copy_blocking", noted)
    yield state
    state.go.set()


def test_a_step_that_must_wait_copies_what_is_left(root: Path, held: Held):
    """All groups but the one that was begun; the checkpoint is the state at the call."""
    training = Training()
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        expected = training.frozen()
        handle = training.save(checkpointer)
        assert held.begun.wait(BOUND)
        training.step()
        assert (held.groups, held.taken) == (1, [GROUPS - 1])
        assert_saved(handle.result(BOUND).path, expected)


def test_a_step_that_is_interrupted_while_it_copies_loses_nothing(
    root: Path, held: Held, monkeypatch: pytest.MonkeyPatch
):
    """Ctrl-C comes out of the step, which has changed nothing; the staging thread copies the rest."""

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    training = Training()
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        expected = training.frozen()
        handle = training.save(checkpointer)
        assert held.begun.wait(BOUND)
        with monkeypatch.context() as patch:
            patch.setattr(staging, "copy_blocking", interrupted)
            with pytest.raises(KeyboardInterrupt):
                training.step()
        held.go.set()
        assert_saved(handle.result(BOUND).path, expected)
        assert held.groups == GROUPS
        training.step()
        assert_saved(training.save(checkpointer, 2).result(BOUND).path, training.frozen())


def test_what_fails_while_a_step_copies_fails_the_save_alone(root: Path, held: Held, monkeypatch: pytest.MonkeyPatch):
    """The step goes on, the handle says what it was, and the next save is whole."""

    def fails(*_: Any) -> None:
        held.go.set()
        raise RuntimeError("no such memory")

    training = Training()
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        before = training.frozen()
        handle = training.save(checkpointer)
        assert held.begun.wait(BOUND)
        with monkeypatch.context() as patch:
            patch.setattr(staging, "copy_blocking", fails)
            training.step()
        error = handle.exception(BOUND)
        assert isinstance(error, StageError)
        assert "no such memory" in str(error)
        assert not torch.equal(tensors(before)[0], tensors(training.frozen())[0])
        assert_saved(training.save(checkpointer, 2).result(BOUND).path, training.frozen())


def test_nothing_is_staged_while_a_step_still_copies(root: Path, held: Held, monkeypatch: pytest.MonkeyPatch):
    """The staging thread has nothing left to copy and waits for who helps it."""
    training, copied = Training(), threading.Event()
    copying = staging.copy_blocking
    states: list[Any] = []

    def slow(*group: Any) -> None:
        held.go.set()
        assert handle._state is SaveState.STAGING
        assert not copied.wait(0.5)
        states.append(handle.state)
        copying(*group)

    is_complete = SharedCopy._is_complete

    def complete(self: SharedCopy) -> bool:
        over = is_complete(self)
        copied.set()
        return over

    monkeypatch.setattr(staging, "copy_blocking", slow)
    monkeypatch.setattr(SharedCopy, "_is_complete", complete)
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        expected = training.frozen()
        handle = training.save(checkpointer)
        assert held.begun.wait(BOUND)
        training.step()
        assert states == [SaveState.STAGING]
        assert_saved(handle.result(BOUND).path, expected)


def test_a_failing_copy_waits_for_who_helps(held: Held, monkeypatch: pytest.MonkeyPatch):
    """Nobody writes into the arena when `run` has raised: it may be another save's by then."""
    of = [torch.ones(64 << 10 >> 2) for _ in range(3)]
    to = [torch.zeros_like(tensor) for tensor in of]
    shared = SharedCopy(to, of)
    helping, copying = threading.Event(), staging.copy_blocking

    def fails(*_: Any) -> None:
        held.begun.set()
        assert helping.wait(BOUND)
        raise RuntimeError("a bad group")

    def slow(*group: Any) -> None:
        helping.set()
        running.join(0.5)
        assert running.is_alive(), "run() raised while another thread was copying"
        copying(*group)

    def run() -> None:
        with pytest.raises(RuntimeError, match="a bad group"):
            shared.run()

    monkeypatch.setattr(staging, "copy_group", fails)
    monkeypatch.setattr(staging, "copy_blocking", slow)
    running = threading.Thread(target=run)
    running.start()
    assert held.begun.wait(BOUND)
    shared.help()
    running.join(BOUND)
    assert not running.is_alive()
    assert [tensor.sum().item() for tensor in to] == [0, 64 << 10 >> 2, 64 << 10 >> 2]


def test_groups_hold_every_byte_once(monkeypatch: pytest.MonkeyPatch):
    """Large tensors are divided, small ones gathered; what is not contiguous stays whole."""
    monkeypatch.setattr(host_copy, "GROUP_BYTES", 1000)
    of = [torch.rand(7, 100), torch.rand(30), torch.rand(20, 50).t(), torch.rand(40), torch.rand(0), torch.rand(251)]
    to = [torch.zeros(source.shape) for source in of]
    made = list(host_copy.groups(to, of))
    assert sum(part.nbytes for group in made for part in group[0]) == sum(source.nbytes for source in of)
    assert all(sum(part.nbytes for part in group[0][:-1]) < 1000 for group in made)
    for group in made:
        host_copy.copy_group(*group)
    assert all(map(torch.equal, to, of))
