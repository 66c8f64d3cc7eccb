"""The training waits while its state is still being copied: more threads take part in the copy."""

from __future__ import annotations

import _thread
import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vembed_async_ckpt import AsyncCheckpointer, StageError, load
from vembed_async_ckpt._memory import host_copy, staging
from vembed_async_ckpt._memory.barrier import STEP_BARRIER
from vembed_async_ckpt._memory.staging import SharedCopy

STEP_BARRIER.install()  # as a checkpointer does: the optimizer steps before one is made
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
    """The staging thread is in its first group until `go`, and how many it begins. `helped`: groups that others have copied."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        self.groups = 0
        self.helped: list[int] = []


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    state = Held()
    copy_group, copy_alone = staging.copy_group, staging.copy_alone

    def held_group(*group: Any) -> None:
        state.groups += 1
        state.begun.set()
        assert state.go.wait(BOUND)
        copy_group(*group)

    def noted(*group: Any) -> None:
        copy_alone(*group)
        state.helped.append(threading.get_ident())
        if len(state.helped) == GROUPS - 1:
            state.go.set()

    monkeypatch.setattr(host_copy, "GROUP_BYTES", 64 << 10)
    monkeypatch.setattr(staging, "copy_group", held_group)
    monkeypatch.setattr(staging, "copy_alone", noted)
    yield state
    state.go.set()


def test_a_step_that_must_wait_has_the_rest_copied(root: Path, held: Held):
    """By threads that are gone afterwards, all groups but the one that was begun; the checkpoint is the state at the call."""
    training = Training()
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        expected = training.frozen()
        handle = training.save(checkpointer)
        assert held.begun.wait(BOUND)
        training.step()
        assert held.groups == 1
        assert len(held.helped) == GROUPS - 1
        assert threading.get_ident() not in held.helped
        assert_saved(handle.result(BOUND).path, expected)
        assert "vembed-ckpt-copy" not in {thread.name for thread in threading.enumerate()}


WAITS: dict[str, Callable[[AsyncCheckpointer, Any], Any]] = {
    "wait_staged": lambda checkpointer, handle: handle.wait_staged(BOUND),
    "result": lambda checkpointer, handle: handle.result(BOUND),
    "exception": lambda checkpointer, handle: handle.exception(BOUND),
    "wait": lambda checkpointer, handle: checkpointer.wait(BOUND),
    "close": lambda checkpointer, handle: checkpointer.close(BOUND),
}


@pytest.mark.parametrize("how", WAITS)
def test_whoever_saved_and_waits_has_the_rest_copied(root: Path, held: Held, monkeypatch: pytest.MonkeyPatch, how: str):
    """Nothing trains meanwhile. To ask without waiting is not to wait."""
    hurried, hurry = [], staging.Snapshot.copy_with_more_threads

    def noted(snapshot: staging.Snapshot) -> None:
        hurried.append(snapshot)
        hurry(snapshot)

    monkeypatch.setattr(staging.Snapshot, "copy_with_more_threads", noted)
    training = Training()
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        handle = training.save(checkpointer)
        assert held.begun.wait(BOUND)
        for look in (handle.result, checkpointer.wait):
            with pytest.raises(TimeoutError):
                look(0)
        assert not hurried
        WAITS[how](checkpointer, handle)
        assert (held.groups, len(held.helped)) == (1, GROUPS - 1)
        assert_saved(handle.result(BOUND).path, training.frozen())


def test_other_threads_that_wait_leave_the_cores_to_the_training(root: Path, held: Held):
    """Such as one that reports what was saved."""
    training = Training()
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        handle = training.save(checkpointer)
        assert held.begun.wait(BOUND)
        waiting = threading.Thread(target=handle.wait_staged, args=(BOUND,))
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
        held.go.set()
        waiting.join(BOUND)
        assert not waiting.is_alive()
        assert (held.groups, held.helped) == (GROUPS, [])
        assert_saved(handle.result(BOUND).path, training.frozen())


def test_a_copy_that_has_not_begun_begins_with_all(root: Path, held: Held, monkeypatch: pytest.MonkeyPatch):
    """The step came first."""
    hurried, moved, hurry = threading.Event(), staging.DeferredCopy.moved, staging.Snapshot.copy_with_more_threads

    def late_start(late: staging.DeferredCopy) -> str | None:
        assert hurried.wait(BOUND)
        return moved(late)

    def noted(snapshot: staging.Snapshot) -> None:
        hurry(snapshot)
        hurried.set()

    monkeypatch.setattr(staging.DeferredCopy, "moved", late_start)
    monkeypatch.setattr(staging.Snapshot, "copy_with_more_threads", noted)
    training = Training()
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        expected = training.frozen()
        handle = training.save(checkpointer)
        training.step()
        assert len(held.helped) >= GROUPS - 1
        assert_saved(handle.result(BOUND).path, expected)


def test_a_step_that_is_interrupted_while_it_waits_loses_nothing(
    root: Path, held: Held, monkeypatch: pytest.MonkeyPatch
):
    """Ctrl-C comes out of the step, which has changed nothing, and the copy goes on."""
    interrupted, copy_alone = threading.Event(), staging.copy_alone

    def interrupts(*group: Any) -> None:
        if not interrupted.is_set():
            interrupted.set()
            _thread.interrupt_main()
        copy_alone(*group)

    training = Training()
    monkeypatch.setattr(staging, "copy_alone", interrupts)
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        expected = training.frozen()
        handle = training.save(checkpointer)
        assert held.begun.wait(BOUND)
        with pytest.raises(KeyboardInterrupt):
            training.step()
        assert all(map(torch.equal, tensors(training.frozen()), tensors(expected)))
        assert_saved(handle.result(BOUND).path, expected)
        training.step()
        assert_saved(training.save(checkpointer, 2).result(BOUND).path, training.frozen())


def test_a_process_that_may_have_no_more_threads_waits(root: Path, held: Held, monkeypatch: pytest.MonkeyPatch):
    """For the staging thread alone."""
    training, start = Training(), threading.Thread.start
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        expected = training.frozen()
        handle = training.save(checkpointer)
        assert held.begun.wait(BOUND)

        def refused(thread: threading.Thread) -> None:
            if thread.name != "vembed-ckpt-copy":
                start(thread)
                return
            held.go.set()
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refused)
            training.step()
        assert (held.groups, held.helped) == (GROUPS, [])
        assert_saved(handle.result(BOUND).path, expected)


def test_what_fails_while_others_copy_fails_the_save_alone(root: Path, held: Held, monkeypatch: pytest.MonkeyPatch):
    """The step goes on, the handle says what it was and holds nothing, and the next save is whole."""
    made: list[weakref.ref[SharedCopy]] = []

    class Noted(SharedCopy):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(weakref.ref(self))

    def fails(*_: Any) -> None:
        held.go.set()
        raise RuntimeError("no such memory")

    training = Training()
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        before = training.frozen()
        with monkeypatch.context() as patch:
            patch.setattr(staging, "SharedCopy", Noted)
            patch.setattr(staging, "copy_alone", fails)
            gc.disable()
            try:
                handle = training.save(checkpointer)
                assert held.begun.wait(BOUND)
                training.step()
                error = handle.exception(BOUND)
                assert [ref() for ref in made] == [None]
            finally:
                gc.enable()
        assert isinstance(error, StageError)
        assert "no such memory" in str(error)
        assert not torch.equal(tensors(before)[0], tensors(training.frozen())[0])
        assert_saved(training.save(checkpointer, 2).result(BOUND).path, training.frozen())


def test_memory_that_is_freed_under_the_copy_is_named(root: Path, held: Held):
    """As soon as its turn comes, before it is read; later saves copy before they return."""
    training = Training()
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        handle = training.save(checkpointer)
        assert held.begun.wait(BOUND)
        training.model[5].weight.untyped_storage().resize_(0)
        held.go.set()
        error = handle.exception(BOUND)
        assert isinstance(error, staging.TornSnapshot)
        assert "5.weight" in str(error)
        assert not checkpointer.statistics()["overlap"]


@pytest.mark.parametrize("fails", [False, True])
def test_the_copy_is_over_only_when_nobody_copies(held: Held, monkeypatch: pytest.MonkeyPatch, fails: bool):
    """`run` waits for who helps, also when its own copy has failed: the arena may be another save's afterwards."""
    of = [torch.ones(64 << 10 >> 2) for _ in range(2)]
    to = [torch.zeros_like(tensor) for tensor in of]
    shared = SharedCopy(
        [host_copy.Group([one], [other], slice(0, 1)) for one, other in zip(to, of, strict=True)], lambda _: None
    )
    copying, copy_group, copy_alone = threading.Event(), host_copy.copy_group, host_copy.copy_alone

    def first(*group: Any) -> None:
        held.begun.set()
        assert copying.wait(BOUND)
        if fails:
            raise RuntimeError("a bad group")
        copy_group(*group)

    def slow(*group: Any) -> None:
        copying.set()
        assert held.go.wait(BOUND)
        copy_alone(*group)

    failures: list[BaseException] = []

    def run() -> None:
        try:
            shared.run()
        except RuntimeError as error:
            failures.append(error)

    monkeypatch.setattr(staging, "copy_group", first)
    monkeypatch.setattr(staging, "copy_alone", slow)
    running = threading.Thread(target=run)
    running.start()
    assert held.begun.wait(BOUND)
    shared.help(2)
    running.join(0.5)
    assert running.is_alive(), "run() was over while another thread was copying"
    held.go.set()
    running.join(BOUND)
    assert not running.is_alive()
    assert len(failures) == fails
    assert torch.equal(to[1], of[1])
    assert torch.equal(to[0], of[0]) != fails


def test_groups_hold_every_byte_once(monkeypatch: pytest.MonkeyPatch):
    """Large tensors are divided, small ones gathered; what is not contiguous stays whole."""
    monkeypatch.setattr(host_copy, "GROUP_BYTES", 1000)
    of = [torch.rand(7, 100), torch.rand(30), torch.rand(20, 50).t(), torch.rand(40), torch.rand(0), torch.rand(251)]
    to = [torch.zeros(source.shape) for source in of]
    made = list(host_copy.Groups(to).of(of))
    assert sum(part.nbytes for group in made for part in group.to) == sum(source.nbytes for source in of)
    assert all(sum(part.nbytes for part in group.to[:-1]) < 1000 for group in made)
    for group in made:
        host_copy.copy_group(group.to, group.of)
    assert all(map(torch.equal, to, of))
