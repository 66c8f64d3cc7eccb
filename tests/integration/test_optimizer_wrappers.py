"""Optimizers that wrap others, or lay out their state in a way of their own: what state_dict() gives is saved, and given back."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_optimizer
import schedulefree
import torch
from accelerate import Accelerator

from vembed_async_ckpt import AsyncCheckpointer, CheckpointError, PlanError, load, save_checkpoint
from vembed_async_ckpt.integrations.accelerate import save_state

BOUND = 30


def net(seed: int = 0) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))


def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


class Noam:
    """A learning rate by its own count of steps, as tutorials have it. It has no parameter groups."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.count = 0

    def step(self) -> None:
        self.count += 1
        for group in self.optimizer.param_groups:
            group["lr"] = 0.01 * min(self.count**-0.5, self.count * 4**-1.5)
        self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        self.optimizer.load_state_dict(state["optimizer"])


class Averaged(torch.optim.Optimizer):
    """One of torch's by class, whose state_dict has other keys: nested dicts, tensors beside the state, no groups at the top."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        super().__init__(inner.param_groups, dict(inner.defaults))
        self.averages = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    def step(self, closure: Any = None) -> None:
        self.inner.step()
        for average, p in zip(self.averages, (p for group in self.param_groups for p in group["params"]), strict=True):
            average.lerp_(p.detach(), 0.1)
            p.data.lerp_(average, 0.5)

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner.state_dict(), "averages": {"all": self.averages}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state["inner"])
        self.param_groups = self.inner.param_groups
        self.averages = [average.clone() for average in state["averages"]["all"]]


class Beside(Averaged):
    """What it adds stands beside torch's own keys."""

    def state_dict(self) -> dict[str, Any]:
        return {**self.inner.state_dict(), "averages": dict(enumerate(self.averages))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.averages = [average.clone() for average in state["averages"].values()]
        self.inner.load_state_dict({key: state[key] for key in ("state", "param_groups")})


class Uninitialized(Averaged):
    """Never calls super().__init__, as many wrappers of their time."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        self.param_groups = inner.param_groups
        self.state = inner.state
        self.averages = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    def step(self, closure: Any = None) -> None:
        Averaged.step.__wrapped__(self)  # the one that torch has not hooked

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad()


class Listed(Averaged):
    """Its state_dict is a list."""

    def state_dict(self) -> Any:
        return [self.inner.state_dict(), self.averages]

    def load_state_dict(self, state: Any) -> None:
        self.inner.load_state_dict(state[0])
        self.averages = [average.clone() for average in state[1]]


WRAPPERS: dict[str, Callable[[torch.nn.Module], Any]] = {
    "Lookahead": lambda model: pytorch_optimizer.Lookahead(adamw(model), k=5, alpha=0.5),
    "OrthoGrad": lambda model: pytorch_optimizer.OrthoGrad(adamw(model)),
    "ScheduleFreeWrapper": lambda model: schedulefree.ScheduleFreeWrapper(
        torch.optim.SGD(model.parameters(), lr=1e-2), momentum=0.9
    ),
    "Noam": lambda model: Noam(adamw(model)),
    "Averaged": lambda model: Averaged(adamw(model)),
    "Beside": lambda model: Beside(adamw(model)),
    "Uninitialized": lambda model: Uninitialized(adamw(model)),
    "Listed": lambda model: Listed(adamw(model)),
    "two deep": lambda model: Noam(Averaged(adamw(model))),  # type: ignore[arg-type]
}


def made(name: str, model: torch.nn.Module) -> Any:
    optimizer = WRAPPERS[name](model)
    if hasattr(optimizer, "train"):
        optimizer.train()  # schedulefree does not save in which mode it is
    return optimizer


def train(model: torch.nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        model(torch.randn(4, 8, generator=torch.Generator().manual_seed(step))).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_equal(one: torch.nn.Module, other: torch.nn.Module) -> None:
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize("staging", ["overlap", "blocking"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_goes_on_where_it_was(root: Path, name: str, staging: Any):
    """In the midst of its own period, with our load and from the file that torch.load reads."""
    model = net()
    optimizer = made(name, model)
    with AsyncCheckpointer(root, staging=staging) as checkpointer:
        train(model, optimizer, range(7))
        checkpointer.save(0, model=model, optimizer=optimizer)
        train(model, optimizer, range(7, 8))
        path = checkpointer.save(1, model=model, optimizer=optimizer).result(BOUND).path
    weights = copy.deepcopy(model.state_dict())
    train(model, optimizer, range(8, 14))
    resumed = net(1)
    other = made(name, resumed)
    load(path, model=resumed, optimizer=other)
    train(resumed, other, range(8, 14))
    assert_equal(model, resumed)
    stock = net(1)
    other = made(name, stock)
    stock.load_state_dict(weights)
    other.load_state_dict(torch.load(path / "optimizer.bin", weights_only=False))
    train(stock, other, range(8, 14))
    assert_equal(model, stock)


def accelerated(seed: int) -> tuple[Accelerator, torch.nn.Module, Any]:
    accelerator = Accelerator(cpu=True)
    model = net(seed)
    return (accelerator, *accelerator.prepare(model, WRAPPERS["Lookahead"](model)))


@pytest.mark.parametrize("how", ["save_checkpoint", "save_state"])
def test_a_wrapper_inside_accelerates_own_goes_on(root: Path, how: str):
    """accelerate's wrapper adds nothing and is taken off; the one inside is saved as it is."""
    accelerator, model, optimizer = accelerated(0)
    train(model, optimizer, range(7))
    if how == "save_checkpoint":
        path = save_checkpoint(root / "epoch-1", model, accelerator).result(BOUND).path
    else:
        path = save_state(accelerator, root / "epoch-1").result(BOUND).path
    assert set(torch.load(path / "optimizer.bin")) == {"base_optimizer", "lookahead_state"}
    train(model, optimizer, range(8, 14))
    accelerator, resumed, other = accelerated(1)
    load(path, accelerator=accelerator)
    train(resumed, other, range(8, 14))
    assert_equal(model, resumed)


def test_other_parameters_in_a_layout_of_its_own_are_refused(root: Path):
    """The names at both ends say that the order is another; such a state cannot be rearranged, and nothing is changed."""
    model = net()
    optimizer = Averaged(adamw(model))
    train(model, optimizer, range(3))
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        path = checkpointer.save(1, model=model, optimizer=optimizer).result(BOUND).path
    fresh = net(1)
    before = copy.deepcopy(fresh.state_dict())
    reverse = torch.optim.AdamW(list(fresh.parameters())[::-1], lr=1e-2)
    with pytest.raises(CheckpointError, match=r"parameters in another order .*Averaged cannot be rearranged"):
        load(path, model=fresh, optimizer=Averaged(reverse))
    with pytest.raises(
        CheckpointError, match=r"saved from a .*Averaged and cannot go into a torch\.optim\.adamw\.AdamW"
    ):
        load(path, model=fresh, optimizer=adamw(fresh))
    assert all(map(torch.equal, fresh.state_dict().values(), before.values()))


def test_a_state_dict_that_fails_is_a_bad_request(root: Path):
    """Said with the class and the reason, in the caller's stack."""

    class Broken(Uninitialized):
        state_dict = torch.optim.Optimizer.state_dict  # needs what super().__init__ makes

    with (
        AsyncCheckpointer(root, writer="thread") as checkpointer,
        pytest.raises(PlanError, match=r"optimizer: state_dict\(\) of a .*Broken failed: AttributeError"),
    ):
        checkpointer.save(1, optimizer=Broken(adamw(net())))


class Warmup:
    """A scheduler that wraps another in `.scheduler`, and counts by itself."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.count = 0

    def step(self) -> None:
        self.count += 1
        self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "inner": self.scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        self.scheduler.load_state_dict(state["inner"])


class Scaler:
    """A scaler that wraps another in `.scaler`."""

    def __init__(self, scale: float) -> None:
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        self.skipped = 0

    def state_dict(self) -> dict[str, Any]:
        return {"scaler": self.scaler.state_dict(), "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scaler.load_state_dict(state["scaler"])
        self.skipped = state["skipped"]


class Dataloader:
    """A dataloader that wraps another in `.dataloader`."""

    def __init__(self, dataloader: Any = None) -> None:
        self.dataloader = dataloader
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def test_wrappers_of_schedulers_scalers_and_dataloaders_go_on(root: Path):
    """What they keep beside what they wrap is saved too."""

    def new() -> tuple[Warmup, Scaler, Dataloader]:
        scheduler = torch.optim.lr_scheduler.ExponentialLR(adamw(net()), 0.9)
        return Warmup(scheduler), Scaler(4.0), Dataloader(Dataloader())

    scheduler, scaler, dataloader = new()
    scheduler.scheduler.optimizer.step()
    scheduler.step()
    scaler.skipped, dataloader.position = 3, 5
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        path = checkpointer.save(1, scheduler=scheduler, scaler=scaler, dataloader=dataloader).result(BOUND).path
    other_scheduler, other_scaler, other_dataloader = new()
    load(path, scheduler=other_scheduler, scaler=other_scaler, dataloader=other_dataloader)
    assert other_scheduler.state_dict() == scheduler.state_dict()
    assert other_scheduler.count == 1
    assert math.isclose(other_scheduler.scheduler.get_last_lr()[0], 9e-3)
    assert other_scaler.state_dict() == scaler.state_dict()
    assert other_dataloader.position == 5
