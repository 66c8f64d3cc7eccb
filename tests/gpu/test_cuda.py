"""On a real CUDA device: what was copied beside the training is the state at the call. Run with `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vembed_async_ckpt import AsyncCheckpointer, load
from vembed_async_ckpt._memory.barrier import STEP_BARRIER
from vembed_async_ckpt._memory.devices import DeviceCopies

pytestmark = pytest.mark.gpu


def trained(
    steps: int, make_optimizer: Callable[[Any], torch.optim.Optimizer]
) -> tuple[torch.nn.Module, torch.optim.Optimizer, Callable[[], None]]:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(512, 512) for _ in range(20)]
    model = torch.nn.Sequential(*layers, torch.nn.BatchNorm1d(512)).cuda()
    optimizer = make_optimizer(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(64, 512, device="cuda")).pow(2).mean().backward()
        optimizer.step()

    for _ in range(steps):
        step()
    return model, optimizer, step


@pytest.fixture(autouse=True)
def hooked() -> None:
    """The hook is there before anything is trained: without it no optimizer is seen, and nothing is copied late."""
    STEP_BARRIER.install()


def backlog() -> None:
    """Work for 60 ms: what comes next on the stream finds the copies issued, and not arrived."""
    torch.cuda._sleep(100_000_000)


def adamw(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.1, **options)


@pytest.mark.parametrize("staging", ["overlap", "blocking"])
@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"capturable": True}])
@pytest.mark.parametrize("own_stream", [False, True])
def test_saves_beside_a_training(root: Path, staging: Any, options: dict[str, bool], own_stream: bool) -> None:
    """Saved at every step, with the next step at once: each checkpoint restores bit for bit what was there at its call."""
    stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
    with torch.cuda.stream(stream), AsyncCheckpointer(root, staging=staging) as checkpointer:
        model, optimizer, step = trained(2, lambda parameters: adamw(parameters, **options))
        for number in range(1, 8):
            expected = {key: value.clone() for key, value in model.state_dict().items()}
            moments = [state["exp_avg"].clone() for state in optimizer.state.values()]
            backlog()
            handle = checkpointer.save(number, model=model, optimizer=optimizer)
            step()
            step()
            handle.result(60)
            restored, restored_optimizer, _ = trained(1, lambda parameters: adamw(parameters, **options))
            load(handle.path, model=restored, optimizer=restored_optimizer)
            for key, value in restored.state_dict().items():
                assert torch.equal(value, expected[key]), key
            for moment, state in zip(moments, restored_optimizer.state.values(), strict=True):
                assert torch.equal(moment, state["exp_avg"])
        assert checkpointer.statistics()["overlap"] is (staging == "overlap")


@pytest.mark.parametrize("left_out", ["hold_back", "wait"])
def test_a_wait_that_is_left_out_shows(root: Path, monkeypatch: pytest.MonkeyPatch, left_out: str) -> None:
    """The tests above are worth believing: with a backlog on the device, copies without this wait are not the state at the call."""
    model, optimizer, step = trained(2, adamw)
    monkeypatch.setattr(DeviceCopies, left_out, lambda self: None)
    with AsyncCheckpointer(root) as checkpointer:
        expected = {key: value.clone() for key, value in model.state_dict().items()}
        backlog()
        handle = checkpointer.save(1, model=model, optimizer=optimizer)
        if left_out == "hold_back":
            with torch.cuda.stream(torch.cuda.Stream()):
                step()
        handle.result(60)
        torch.cuda.synchronize()
    restored, _, _ = trained(0, adamw)
    load(handle.path, model=restored)
    assert not all(torch.equal(value, expected[key]) for key, value in restored.state_dict().items())


def test_a_replayed_step_is_not_overlapped(root: Path) -> None:
    """A step inside a CUDA graph runs without its hook: its tensors are copied before the caller's stream goes on."""
    model, optimizer, _ = trained(3, lambda parameters: adamw(parameters, capturable=True))
    assert optimizer in STEP_BARRIER.optimizers()
    graph = torch.cuda.CUDAGraph()
    inputs = torch.randn(64, 512, device="cuda")
    optimizer.zero_grad(set_to_none=False)
    with torch.cuda.graph(graph):
        model(inputs).pow(2).mean().backward()
        optimizer.step()
    assert optimizer not in STEP_BARRIER.optimizers()
    with AsyncCheckpointer(root) as checkpointer:
        for number in range(1, 6):
            expected = {key: value.clone() for key, value in model.state_dict().items()}
            backlog()
            handle = checkpointer.save(number, model=model, optimizer=optimizer)
            graph.replay()
            handle.result(60)
            restored, _, _ = trained(0, adamw)
            load(handle.path, model=restored)
            assert all(torch.equal(value, expected[key]) for key, value in restored.state_dict().items())


def test_mixed_devices_and_the_generators(root: Path) -> None:
    """A model half in host memory, and the CUDA generator: all of it comes back."""
    model = torch.nn.ModuleDict({"device": torch.nn.Linear(256, 256).cuda(), "host": torch.nn.Linear(256, 256)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with AsyncCheckpointer(root) as checkpointer:
        handle = checkpointer.save(1, model=model, optimizer=optimizer, extra={"ema": torch.arange(9.0, device="cuda")})
        drawn = torch.rand(3, device="cuda")
        expected = {key: value.clone() for key, value in model.state_dict().items()}
        optimizer.step()
        handle.result(60)
    restored = load(handle.path, model=model, optimizer=optimizer)
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.rand(3, device="cuda"), drawn)
    assert restored.extra["ema"].tolist() == list(range(9))
