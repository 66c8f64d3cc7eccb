"""Optimizers with `train()` and `eval()` of their own, such as schedule-free ones: `eval(); save(); train()` saves what `eval()`
gave, though the copy of the optimizer's state is still under way when `train()` changes the weights."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_optimizer
import schedulefree
import torch
from accelerate import Accelerator

from vembed_async_ckpt import AsyncCheckpointer, StageError, load, save_checkpoint
from vembed_async_ckpt._memory import staging
from vembed_async_ckpt._memory.barrier import STEP_BARRIER
from vembed_async_ckpt.integrations.vembed import close_shared

from ..parity.checks import differing, state

STEP_BARRIER.install()  # as a checkpointer does: the optimizers of these tests step before theirs is made
BOUND = 30

OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "AdamW": lambda parameters: schedulefree.AdamWScheduleFree(parameters, lr=0.01, warmup_steps=2),
    "SGD": lambda parameters: schedulefree.SGDScheduleFree(parameters, lr=0.01),
    "RAdam": lambda parameters: schedulefree.RAdamScheduleFree(parameters, lr=0.01),
    "AdamW of pytorch_optimizer": lambda parameters: pytorch_optimizer.ScheduleFreeAdamW(parameters, lr=0.01),
    "around another": lambda parameters: schedulefree.ScheduleFreeWrapper(torch.optim.SGD(parameters, lr=0.01)),
}


@pytest.fixture
def going(monkeypatch: pytest.MonkeyPatch, small_is_late: None) -> Iterator[threading.Event]:
    """What is copied after `save()` has returned waits for this event."""
    go, copy = threading.Event(), staging.copy_group

    def held(destinations: Any, sources: Any) -> None:
        assert go.wait(BOUND)
        copy(destinations, sources)

    monkeypatch.setattr(staging, "copy_group", held)
    yield go
    go.set()


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))


def step(model: Any, optimizer: Any) -> None:
    model(torch.ones(2, 8)).pow(2).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_save_between_eval_and_train(root: Path, going: threading.Event, name: str):
    """The checkpoint has the weights of `eval()`, and the run that goes on from it is the same to the last bit."""
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    optimizer.train()
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        for number in (1, 2):
            for _ in range(8):  # in the first ones train() has nothing to change yet
                step(model, optimizer)
            optimizer.eval()
            expected = state(model)
            going.clear()
            handle = checkpointer.save(number, model=model, optimizer=optimizer)
            optimizer.train()
            changed = differing(state(model), expected)
            going.set()
            assert changed, "train() changes the weights"
            path = handle.result(BOUND).path
    fresh = net()
    again = OPTIMIZERS[name](fresh.parameters())
    load(path, model=fresh, optimizer=again)
    assert differing(state(fresh), expected) == []
    again.train()
    if name == "around another":
        return  # it does not save in which mode it is
    for _ in range(2):
        step(model, optimizer)
        step(fresh, again)
    assert differing(state(fresh), state(model)) == []


def test_through_accelerate(root: Path, going: threading.Event):
    """The wrapper that accelerate puts around the optimizer has `train()` and `eval()` for every one; what counts is inside."""
    accelerator = Accelerator(cpu=True)
    plain = net()
    model, optimizer = accelerator.prepare(plain, OPTIMIZERS["AdamW"](plain.parameters()))
    optimizer.train()
    for number in (1, 2):
        step(model, optimizer)
        optimizer.eval()
        expected = state(model)
        going.clear()
        handle = save_checkpoint(root / f"step-{number}", model, accelerator)
        optimizer.train()
        going.set()
        path = handle.result(BOUND).path
    fresh = net()
    load(path, model=fresh)
    assert differing(state(fresh), expected) == []
    close_shared()


def test_other_optimizers_still_overlap_through_accelerate(root: Path, going: threading.Event):
    """AdamW's weights may be copied late: a write to them between save() and the step fails the save, naming what helps."""
    accelerator = Accelerator(cpu=True)
    plain = net()
    model, optimizer = accelerator.prepare(plain, torch.optim.AdamW(plain.parameters()))
    step(model, optimizer)
    handle = save_checkpoint(root / "step-1", model, accelerator)
    with torch.no_grad():
        for parameter in model.parameters():  # as an EMA swapped in for an evaluation
            parameter.mul_(0.5)
    going.set()
    with pytest.raises(StageError, match=r'staging="blocking", or wait for handle.wait_staged\(\)'):
        handle.result(BOUND)
    close_shared()
