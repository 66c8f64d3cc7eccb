"""Train, save, kill nothing: what comes back equals what was, and training goes on as if it had never stopped."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from vembed_async_ckpt import AsyncCheckpointer, KeepLast, SaveState, latest, load


def make() -> tuple[torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(16, 32), torch.nn.BatchNorm1d(32), torch.nn.Dropout(0.3), torch.nn.Linear(32, 4)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)


def train(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler
) -> None:
    optimizer.zero_grad()
    model(torch.randn(8, 16)).pow(2).mean().backward()
    optimizer.step()
    scheduler.step()


@pytest.mark.parametrize("writer", ["process", "thread"])
@pytest.mark.usefixtures("small_is_late")
@pytest.mark.parametrize("staging", ["overlap", "blocking"])
def test_a_resumed_run_equals_an_uninterrupted_one(root: Path, writer: str, staging: str) -> None:
    """Model, optimizer, scheduler and RNG come back exactly: six more steps give the same bits."""
    state = make()
    with AsyncCheckpointer(root, writer=writer, staging=staging) as checkpointer:
        for step in range(12):
            train(*state)
            if step == 5:
                handle = checkpointer.save(
                    step, model=state[0], optimizer=state[1], scheduler=state[2], extra={"epoch": 1}
                )
    assert handle.state is SaveState.COMMITTED

    resumed = make()
    found = latest(root)
    assert found == root / "checkpoint-5"
    restored = load(found, model=resumed[0], optimizer=resumed[1], scheduler=resumed[2])
    assert (restored.step, restored.extra) == (5, {"epoch": 1})
    for _ in range(6):
        train(*resumed)
    expected = state[0].state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in resumed[0].state_dict().items())


def test_retention_keeps_the_newest(root: Path) -> None:
    """KeepLast(2) after five saves: the last two are there, whole."""
    model, optimizer, scheduler = make()
    with AsyncCheckpointer(root, retention=KeepLast(2)) as checkpointer:
        for step in range(5):
            train(model, optimizer, scheduler)
            checkpointer.save(step, model=model, optimizer=optimizer)
    assert sorted(path.name for path in root.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def test_the_writer_gives_way_to_the_training(root: Path) -> None:
    """Every thread of its process, also those that it started later, has a lower priority than the training's."""
    with AsyncCheckpointer(root) as checkpointer:
        checkpointer.save(1, model=torch.nn.Linear(2, 2)).result(60)
        writer = checkpointer.statistics()["writer_pid"]
        threads = [int(thread) for thread in os.listdir(f"/proc/{writer}/task")]
        priorities = [os.getpriority(os.PRIO_PROCESS, thread) for thread in threads]
    assert len(threads) > 1
    assert min(priorities) > os.getpriority(os.PRIO_PROCESS, 0)
