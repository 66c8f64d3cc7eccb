"""A tensor that stands in several places of a state is one tensor after `load` too, and for who reads `optimizer.bin`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vembed_async_ckpt import AsyncCheckpointer, load

BOUND = 30


class Counting(torch.optim.Optimizer):
    """All parameters count in one tensor, and each has a slot under two names."""

    def __init__(self, parameters: Any, lr: float = 0.01) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for parameter in parameters:
            if not self.state[parameter]:
                count = self.state[parameters[0]].get("count", torch.zeros(()))
                slot = torch.zeros_like(parameter)
                self.state[parameter] = {"count": count, "slot": slot, "again": slot}
            state = self.state[parameter]
            state["count"] += 1
            state["slot"] += parameter.grad / state["count"]
            parameter -= self.param_groups[0]["lr"] * state["again"]


def net(seed: int = 0) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 2, 3))
    return net.to(memory_format=torch.channels_last)


def train(model: Any, optimizer: Any, steps: range = range(3)) -> None:
    for step in steps:
        model(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step))).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def counts(state: dict[Any, Any]) -> int:
    return len({id(entry["count"]) for entry in state.values()})


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
def test_state_of_several_parameters_goes_on_as_one_tensor(root: Path, stepped: bool, backwards: bool):
    """The resumed run is the uninterrupted one; with copies each parameter would count for itself."""
    model = net()
    optimizer = Counting(model.parameters())
    train(model, optimizer)
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        path = checkpointer.save(1, model=model, optimizer=optimizer).result(BOUND).path
    resumed = net(1)
    parameters = list(resumed.parameters())
    other = Counting(parameters[::-1] if backwards else parameters)
    if stepped:
        train(resumed, other)
    load(path, model=resumed, optimizer=other)
    assert counts(other.state) == 1
    assert all(entry["slot"] is entry["again"] for entry in other.state.values())
    assert counts(torch.load(path / "optimizer.bin", weights_only=True)["state"]) == 1
    if not backwards:  # the order of the parameters is that in which they count
        train(model, optimizer, range(3, 6))
        train(resumed, other, range(3, 6))
        assert all(map(torch.equal, model.state_dict().values(), resumed.state_dict().values()))


def test_state_that_is_shared_later_is_stored_once(root: Path):
    """Saves before were of tensors of their own, and their number, names and looks are the same."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer)
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        for step in range(2):
            checkpointer.save(step, model=model, optimizer=optimizer).result(BOUND)
        entries = list(optimizer.state.values())
        for entry in entries:
            entry["step"] = entries[0]["step"]
        path = checkpointer.save(2, model=model, optimizer=optimizer).result(BOUND).path
    saved = torch.load(path / "optimizer.bin", weights_only=True)["state"]
    assert len({entry["step"].data_ptr() for entry in saved.values()}) == 1


def test_a_rate_that_groups_share_stays_one_tensor(root: Path):
    """A scheduler that multiplies it in each group does so twice, before and after."""

    def make(model: Any) -> tuple[Any, Any]:
        groups = [{"params": part.parameters()} for part in model]
        optimizer = torch.optim.AdamW(groups, lr=torch.tensor(0.01), foreach=False)
        return optimizer, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)

    model = net()
    optimizer, scheduler = make(model)
    train(model, optimizer)
    scheduler.step(1.0)
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        path = checkpointer.save(1, model=model, optimizer=optimizer, scheduler=scheduler).result(BOUND).path
    resumed = net(1)
    other, following = make(resumed)
    load(path, model=resumed, optimizer=other, scheduler=following)
    for each in (scheduler, following):
        each.step(2.0)
    assert optimizer.param_groups[1]["lr"].item() == other.param_groups[1]["lr"].item() != 0.01
    assert other.param_groups[0]["lr"] is other.param_groups[1]["lr"]


def test_extra_is_as_shared_as_it_was(root: Path):
    """One tensor in two places is stored once, whatever its strides; equal ones stay apart."""
    one, transposed, equal = torch.arange(3.0), torch.randn(3, 4).t(), torch.arange(3.0)
    extra = {"a": one, "b": [one, {"c": transposed}], "d": (transposed, equal)}
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        path = checkpointer.save(1, model=net(), extra=extra).result(BOUND).path
    back = load(path).extra
    assert back["a"] is back["b"][0]
    assert back["b"][1]["c"] is back["d"][0]
    assert back["d"][1] is not back["a"]
    assert torch.equal(back["d"][0], transposed)
    assert back["d"][0].stride() == transposed.stride()
    assert torch.equal(back["a"], one)
    assert torch.equal(back["d"][1], equal)
