"""State goes to the parameter, the optimizer and the scheduler that it was saved of, or is refused before anything is changed."""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.optim import lr_scheduler as schedulers

from vembed_async_ckpt import AsyncCheckpointer, CheckpointError, load, save_checkpoint

BOUND = 30
AdamW = torch.optim.AdamW


def net(seed: int = 0, width: int = 8) -> torch.nn.Sequential:
    """Layers of one shape: nothing but a name tells them apart."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(*[torch.nn.Linear(width, width) for _ in range(3)])


def train(model: Any, optimizer: Any, steps: range = range(3), scheduler: Any = None) -> None:
    for step in steps:
        model(torch.randn(4, 8, generator=torch.Generator().manual_seed(step))).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()


def save(root: Path, **objects: Any) -> Path:
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        return checkpointer.save(1, **objects).result(BOUND).path


def decayed(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Weights with decay, biases without."""
    return [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0, "lr": 0.003},
    ]


REORDERED: dict[str, Callable[[torch.nn.Module], Any]] = {
    "reversed": lambda model: list(model.parameters())[::-1],
    "reversed, with names": lambda model: list(model.named_parameters())[::-1],
    "biases first": lambda model: sorted(model.parameters(), key=torch.Tensor.dim),
    "the same": lambda model: model.parameters(),
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("order", REORDERED)
def test_state_follows_the_names_of_the_parameters(root: Path, order: str, fused: bool):
    """With the model passed to both, any order goes on as the uninterrupted run does."""
    model = net()
    optimizer = AdamW(model.parameters(), lr=0.01, fused=fused)
    train(model, optimizer)
    path = save(root, model=model, optimizer=optimizer)
    resumed = net(1)
    other = AdamW(REORDERED[order](resumed), lr=0.5, fused=fused)
    train(resumed, other, range(20, 22))
    load(path, model=resumed, optimizer=other)
    for ours, theirs in zip(model.parameters(), resumed.parameters(), strict=True):
        assert all(torch.equal(optimizer.state[ours][key], value) for key, value in other.state[theirs].items())
    train(model, optimizer, range(3, 7))
    train(resumed, other, range(3, 7))
    assert all(map(torch.equal, model.state_dict().values(), resumed.state_dict().values()))
    assert other.param_groups[0]["lr"] == 0.01


def test_names_of_the_optimizer_itself_do_without_the_model(root: Path):
    """An optimizer made from named_parameters() tells its names, at both ends; those that it has here stay."""
    model = net()
    optimizer = AdamW(model.named_parameters(), lr=0.01)
    train(model, optimizer)
    path = save(root, optimizer=optimizer)
    fresh = net()
    other = AdamW(list(fresh.named_parameters())[::-1], lr=0.01)
    load(path, optimizer=other)
    for ours, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(optimizer.state[ours]["exp_avg"], other.state[theirs]["exp_avg"])
    assert other.state_dict()["param_groups"][0]["param_names"] == [name for name, _ in fresh.named_parameters()][::-1]


@pytest.mark.parametrize("wrapped", [True, False], ids=["compiled now", "compiled then"])
@pytest.mark.parametrize("named", [True, False])
def test_wrappers_that_come_or_go_change_no_name(root: Path, named: bool, wrapped: bool):
    """torch.compile of one layer, at one end only, with names from the models or from the optimizer."""

    def made(seed: int, is_wrapped: bool, order: int) -> tuple[torch.nn.Sequential, Any]:
        model = net(seed)
        if is_wrapped:
            model[1] = torch.compile(model[1], backend="eager")
        parameters = list(model.named_parameters() if named else model.parameters())[::order]
        return model, AdamW(parameters, lr=0.01)

    model, optimizer = made(0, not wrapped, 1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    path = save(root, model=model, optimizer=optimizer)
    resumed, other = made(1, wrapped, -1)
    load(path, optimizer=other) if named else load(path, model=resumed, optimizer=other)
    for ours, theirs in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(optimizer.state[ours]["exp_avg"], other.state[theirs]["exp_avg"])


def test_several_models_keep_their_parameters_apart(root: Path):
    """One optimizer of two models that call their parameters the same."""
    models = {"query": net(0), "document": net(1)}
    optimizer = AdamW([*models["query"].parameters(), *models["document"].parameters()], lr=0.01)
    for model in models.values():
        train(model, optimizer)
    path = save(root, model=models, optimizer=optimizer)
    fresh = {"query": net(2), "document": net(3)}
    other = AdamW([*fresh["document"].parameters(), *fresh["query"].parameters()], lr=0.01)
    load(path, model=fresh, optimizer=other)
    for name, model in models.items():
        for ours, theirs in zip(model.parameters(), fresh[name].parameters(), strict=True):
            assert torch.equal(optimizer.state[ours]["exp_avg"], other.state[theirs]["exp_avg"])


def test_tied_parameters_go_by_any_of_their_names(root: Path):
    """A parameter has two names, and the other of them comes first here."""

    class Tied(torch.nn.Module):
        def __init__(self, first: str, second: str) -> None:
            super().__init__()
            setattr(self, first, torch.nn.Linear(8, 8, bias=False))
            setattr(self, second, torch.nn.Linear(8, 8, bias=False))
            getattr(self, second).weight = getattr(self, first).weight
            self.free = torch.nn.Linear(8, 8, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.free(self.head(self.body(x)))

    model, fresh = Tied("body", "head"), Tied("head", "body")
    optimizer = AdamW(model.parameters())
    train(model, optimizer)
    path = save(root, model=model, optimizer=optimizer)
    other = AdamW([fresh.free.weight, fresh.head.weight])
    load(path, model=fresh, optimizer=other)
    assert torch.equal(optimizer.state[model.body.weight]["exp_avg"], other.state[fresh.body.weight]["exp_avg"])


def test_groups_split_anew_keep_what_each_parameter_had(root: Path):
    """One group becomes two, two become three, with the schedulers' rates; every parameter goes on with its own numbers."""
    model = net()
    optimizer = AdamW(decayed(model), lr=0.01)
    scheduler = schedulers.ExponentialLR(optimizer, 0.9)
    train(model, optimizer, scheduler=scheduler)
    path = save(root, model=model, optimizer=optimizer, scheduler=scheduler)
    resumed = net(1)
    parts = [
        [resumed[0].weight],
        [resumed[2].bias, resumed[0].bias, resumed[1].bias],
        [resumed[2].weight, resumed[1].weight],
    ]
    other = AdamW([{"params": part} for part in parts], lr=0.5)
    rates = schedulers.ExponentialLR(other, 0.9)
    load(path, model=resumed, optimizer=other, scheduler=rates)
    assert [group["weight_decay"] for group in other.param_groups] == [0.1, 0.0, 0.1]
    assert rates.base_lrs == [0.01, 0.003, 0.01]
    assert rates.get_last_lr() == [scheduler.get_last_lr()[group] for group in (0, 1, 0)]
    train(model, optimizer, range(3, 7), scheduler)
    train(resumed, other, range(3, 7), rates)
    assert all(map(torch.equal, model.state_dict().values(), resumed.state_dict().values()))


def prepared(root: Path, seed: int, order: int) -> tuple[Accelerator, Any, Any]:
    accelerator = Accelerator(cpu=True)
    model = net(seed)
    return (accelerator, *accelerator.prepare(model, AdamW(list(model.parameters())[::order], lr=0.01)))


def test_what_an_accelerator_has_prepared_is_matched_too(root: Path):
    """save_checkpoint and load(accelerator=), with another order of the parameters."""
    accelerator, model, optimizer = prepared(root, 0, 1)
    train(model, optimizer)
    path = save_checkpoint(root / "epoch-1", model, accelerator).result(BOUND).path
    accelerator, fresh, other = prepared(root, 1, -1)
    load(path, accelerator=accelerator)
    for ours, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(optimizer.state[ours]["exp_avg"], other.state[theirs]["exp_avg"])


def grouped(model: torch.nn.Module) -> Any:
    return AdamW(list(model.parameters()), lr=0.01)


MISFITS: dict[str, tuple[Callable[[torch.nn.Module], Any], str]] = {
    "one is not stepped here": (
        lambda model: AdamW(list(model.parameters())[1:]),
        r"optimizer has other parameters than were saved \(saved, but not here: 0\.weight\)",
    ),
    "one was not stepped then": (
        lambda model: AdamW([*model.parameters(), torch.nn.Parameter(torch.ones(2))]),
        r"parameter groups of \[7\] parameters, saved were \[2, 4\]",
    ),
    "merged": (
        grouped,
        r"group 0 of the optimizer has parameters of the saved groups 0, 1, which differ in lr \(0\.5, 0\.01\)",
    ),
    "SGD": (
        lambda model: torch.optim.SGD(model.parameters(), momentum=0.9),
        r"saved from a torch\.optim\.adamw\.AdamW and cannot go into a torch\.optim\.sgd\.SGD \(only saved: .*betas",
    ),
    "RAdam": (lambda model: torch.optim.RAdam(model.parameters()), r"AdamW and cannot go into a .*RAdam"),
    "RMSprop": (lambda model: torch.optim.RMSprop(model.parameters()), r"AdamW and cannot go into a .*RMSprop"),
    "NAdam": (lambda model: torch.optim.NAdam(model.parameters()), r"AdamW and cannot go into a .*NAdam"),
    "Adafactor": (lambda model: torch.optim.Adafactor(model.parameters()), r"AdamW and cannot go into a .*Adafactor"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_an_optimizer_that_does_not_fit_is_refused(root: Path, misfit: str):
    """Both sides are named, and neither the model nor the optimizer is changed."""
    make, message = MISFITS[misfit]
    model = net()
    parameters = list(model.parameters())
    optimizer = AdamW([{"params": parameters[:2], "lr": 0.5}, {"params": parameters[2:]}], lr=0.01)
    train(model, optimizer)
    path = save(root, model=model, optimizer=optimizer)
    fresh = net(1)
    other = make(fresh)
    train(fresh, other)
    before = copy.deepcopy((fresh.state_dict(), other.state_dict()))
    with pytest.raises(CheckpointError, match=message):
        load(path, model=fresh, optimizer=other)
    assert all(map(torch.equal, fresh.state_dict().values(), before[0].values()))
    for number, entry in other.state_dict()["state"].items():
        assert all(
            torch.equal(value, before[1]["state"][number][key]) for key, value in entry.items() if value is not None
        )


def test_without_names_order_decides_and_shapes_are_compared(root: Path):
    """The optimizer alone: the parameters are told by their places."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 8))
    optimizer = AdamW(model.parameters())
    train(model, optimizer)
    path = save(root, optimizer=optimizer)
    with pytest.raises(CheckpointError, match=r"parameter 0 has shape \(8,\), saved was parameter 0 of \(4, 8\)"):
        load(path, optimizer=AdamW(list(model.parameters())[::-1]))
    load(path, optimizer=AdamW(model.parameters()))


def test_one_class_under_two_names_takes_its_state(root: Path):
    """Adam and AdamW have the same hyper-parameters; a subclass has those of its base; flags of one class differ freely."""

    class Mine(AdamW):
        pass

    model = net()
    optimizer = AdamW(model.parameters(), lr=0.01, fused=True)
    train(model, optimizer)
    path = save(root, model=model, optimizer=optimizer)
    for kind, options in ((torch.optim.Adam, {}), (Mine, {}), (AdamW, {"foreach": True}), (AdamW, {"amsgrad": True})):
        other = kind(model.parameters(), **options)
        load(path, model=model, optimizer=other)
        assert torch.equal(other.state[model[0].weight]["exp_avg"], optimizer.state[model[0].weight]["exp_avg"])


class Momentum(torch.optim.Optimizer):
    """An optimizer of a user's own."""

    slots = ("m",)

    def __init__(self, parameters: Any, lr: float = 0.1, beta: float = 0.9) -> None:
        torch.optim.Optimizer.__init__(self, parameters, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {name: parameter.grad.clone() for name in self.slots}


class Variance(torch.optim.Optimizer):
    """Another one, which has hyper-parameters of the same names and other state."""

    slots = ("m", "v")
    __init__ = Momentum.__init__
    step = Momentum.step


class Nesterov(Momentum):
    """A subclass, with the state of its base."""


def test_classes_of_one_set_of_hyper_parameters_do_not_take_each_other_s_state(root: Path):
    """Equal names of hyper-parameters say nothing of the state; a class and its subclass take each other's."""
    model = net()
    optimizer = Momentum(model.parameters())
    train(model, optimizer)
    path = save(root / "base", model=model, optimizer=optimizer)
    with pytest.raises(CheckpointError, match=r"saved from a .*Momentum and cannot go into a .*Variance"):
        load(path, model=model, optimizer=Variance(model.parameters()))
    derived = Nesterov(model.parameters())
    load(path, model=model, optimizer=derived)
    train(model, derived)
    base = Momentum(model.parameters())
    load(save(root / "derived", model=model, optimizer=derived), model=model, optimizer=base)
    assert torch.equal(base.state[model[0].weight]["m"], derived.state[model[0].weight]["m"])


def test_a_renamed_class_takes_its_state_under_its_old_name(root: Path, monkeypatch: pytest.MonkeyPatch):
    """The error says how. While the old class is there, it is another one."""
    module, model = sys.modules[Momentum.__module__], net()
    optimizer = Momentum(model.parameters())
    train(model, optimizer)
    path = save(root, model=model, optimizer=optimizer)
    renamed = type("Slope", (torch.optim.Optimizer,), {k: v for k, v in vars(Momentum).items() if k != "__dict__"})
    fresh = net(1)
    with pytest.raises(CheckpointError) as other:
        load(path, model=fresh, optimizer=renamed(fresh.parameters()))
    assert "was renamed" not in str(other.value)
    assert 'exclude="optimizer"' in str(other.value)
    monkeypatch.delattr(module, "Momentum")
    with pytest.raises(CheckpointError, match=f"let {module.__name__} have its old name too: Momentum = Slope"):
        load(path, model=fresh, optimizer=renamed(fresh.parameters()))
    monkeypatch.setattr(module, "Momentum", renamed, raising=False)
    again = renamed(fresh.parameters())
    load(path, model=fresh, optimizer=again)
    for one, other_one in zip(optimizer.state.values(), again.state.values(), strict=True):
        assert torch.equal(one["m"], other_one["m"])


def test_what_keeps_all_parameters_together_is_not_rearranged(root: Path):
    """LBFGS has one vector of all of them, in their order."""
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters())

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 8)).pow(2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    path = save(root, model=model, optimizer=optimizer)
    load(path, model=net(1), optimizer=torch.optim.LBFGS(net(1).parameters()))
    fresh = net(1)
    with pytest.raises(CheckpointError, match="LBFGS keeps of all of them together cannot be rearranged"):
        load(path, model=fresh, optimizer=torch.optim.LBFGS(list(fresh.parameters())[::-1]))


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: schedulers.StepLR(o, 2),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 4]),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.9),
    "LinearLR": lambda o: schedulers.LinearLR(o),
    "ConstantLR": lambda o: schedulers.ConstantLR(o),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 5),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o),
    "linear, cosine": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o), schedulers.CosineAnnealingLR(o, 5)], milestones=[2]
    ),
    "constant, cosine": lambda o: schedulers.SequentialLR(
        o, [schedulers.StepLR(o, 1), schedulers.CosineAnnealingLR(o, 5)], milestones=[2]
    ),
    "linear, exponential": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o), schedulers.ExponentialLR(o, 0.9)], milestones=[2]
    ),
    "linear, steps": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o), schedulers.StepLR(o, 2)], milestones=[2]
    ),
    "chained exponential": lambda o: schedulers.ChainedScheduler([schedulers.ExponentialLR(o, 0.9)]),
    "chained steps": lambda o: schedulers.ChainedScheduler([schedulers.StepLR(o, 2)]),
    "chained factors": lambda o: schedulers.ChainedScheduler([schedulers.MultiplicativeLR(o, lambda step: 0.9)]),
    "chained lambdas": lambda o: schedulers.ChainedScheduler([schedulers.LambdaLR(o, lambda step: 0.9**step)]),
    "three": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o), schedulers.LinearLR(o), schedulers.CosineAnnealingLR(o, 5)], milestones=[2, 4]
    ),
}


@pytest.mark.parametrize("saved", SCHEDULERS)
def test_a_scheduler_goes_into_its_own_kind_only(root: Path, saved: str):
    """Whatever it is: into every other one it is refused, naming both, and that one is as before."""
    optimizer = torch.optim.SGD(net().parameters(), lr=0.1)
    path = save(root, scheduler=SCHEDULERS[saved](optimizer))
    for name, make in SCHEDULERS.items():
        scheduler = make(torch.optim.SGD(net().parameters(), lr=0.1))
        if name == saved:
            load(path, scheduler=scheduler)
            continue
        before = copy.deepcopy(scheduler.state_dict())
        with pytest.raises(CheckpointError, match="scheduler"):
            load(path, scheduler=scheduler)
        assert str(scheduler.state_dict()) == str(before)


def test_a_scheduler_of_other_groups_is_refused(root: Path):
    """Its rates belong to parameter groups; here there is one less."""
    model = net()
    path = save(root, scheduler=schedulers.StepLR(AdamW(decayed(model)), 2))
    with pytest.raises(CheckpointError, match="scheduler was saved with 2 parameter groups, here it has 1"):
        load(path, scheduler=schedulers.StepLR(AdamW(model.parameters()), 2))


def test_a_scaler_that_was_disabled_is_refused(root: Path):
    """It had no state; an enabled one would raise in the middle of the restore."""
    model = net()
    path = save(root, model=model, scaler=torch.amp.GradScaler("cpu", enabled=False))
    fresh = net(1)
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(CheckpointError, match="scaler was disabled when it was saved"):
        load(path, model=fresh, scaler=torch.amp.GradScaler("cpu"))
    assert all(map(torch.equal, fresh.state_dict().values(), before.values()))
    load(path, model=fresh, scaler=torch.amp.GradScaler("cpu", enabled=False))


def test_a_scheduler_is_no_scaler(root: Path):
    """Of another kind altogether."""
    state_dict = schedulers.StepLR(AdamW(net().parameters()), 2).state_dict
    path = save(root, scaler=types.SimpleNamespace(state_dict=state_dict))
    with pytest.raises(CheckpointError, match=r"scaler was saved from another kind .*only saved: _get_lr_called"):
        load(path, scaler=torch.amp.GradScaler("cpu"))
