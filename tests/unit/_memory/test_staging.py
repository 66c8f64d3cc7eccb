"""What a save holds is the state at the call, whatever the training does next: optimizer by optimizer, net by net.

The late copy is held up on purpose: it starts when an optimizer waits for it, or when the test says so. A barrier that is
missing, or a tensor that is copied late and should not be, then always shows.
"""

from __future__ import annotations

import copy
import functools
import inspect
import random
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vembed_async_ckpt import AsyncCheckpointer, CheckpointerBusy, Event, PlanError, SaveState, StageError, load
from vembed_async_ckpt._disk.filesystem import LocalFilesystem
from vembed_async_ckpt._engine import leader as engine
from vembed_async_ckpt._engine import waves
from vembed_async_ckpt._memory import staging
from vembed_async_ckpt._memory.barrier import STEP_BARRIER
from vembed_async_ckpt._writer import server

STEP_BARRIER.install()  # as a checkpointer does: the optimizers of these tests step before theirs is made
BOUND = 20  # seconds that a wait may take before it is a failure


class LateCopies:
    """Late copies wait for `go`. `labels`: what was left to be copied late. `waits`: steps that came before the copy."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.labels: list[str] = []
        self.waits = 0


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch, small_is_late: None) -> Iterator[LateCopies]:
    state = LateCopies()
    real_copy, real_barrier, real_init = staging.copy_group, staging.Snapshot.barrier, staging.DeferredCopy.__init__

    def held_copy(destinations: Any, sources: Any) -> None:
        assert state.go.wait(BOUND), "nothing ever waited for the copy"
        real_copy(destinations, sources)

    def barrier(self: staging.Snapshot) -> None:
        state.waits += not self._copied.is_set()
        state.go.set()
        real_barrier(self)

    def init(self: staging.DeferredCopy, *arguments: Any, **options: Any) -> None:
        real_init(self, *arguments, **options)
        state.labels += self.names

    monkeypatch.setattr(staging, "copy_group", held_copy)
    monkeypatch.setattr(staging.Snapshot, "barrier", barrier)
    monkeypatch.setattr(staging.DeferredCopy, "__init__", init)
    yield state
    state.go.set()


def same(one: Any, other: Any) -> bool:
    """Equal in every bit, dtype and type."""
    if isinstance(one, torch.Tensor):
        return (
            isinstance(other, torch.Tensor)
            and (one.dtype, one.shape) == (other.dtype, other.shape)
            and torch.equal(one.detach().reshape(-1).view(torch.uint8), other.detach().reshape(-1).view(torch.uint8))
        )
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def frozen(*owners: Any) -> list[Any]:
    """Their state_dicts as they are now."""
    return [copy.deepcopy(owner.state_dict()) for owner in owners]


class Net(torch.nn.Module):
    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(11, 6, sparse=sparse)
        self.first = torch.nn.Linear(6, 8)
        self.norm = torch.nn.BatchNorm1d(8)
        self.last = torch.nn.Linear(8, 3)

    def forward(self) -> torch.Tensor:
        tokens = torch.randint(0, 11, (16,))
        return self.last(torch.tanh(self.norm(self.first(self.embedding(tokens))))).pow(2).mean()


def train(model: torch.nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    """One step of each."""

    def closure() -> torch.Tensor:
        model.zero_grad()
        loss = model()
        loss.backward()
        return loss

    for optimizer in optimizers:
        closure()
        optimizer.step(closure if isinstance(optimizer, torch.optim.LBFGS) else None)


def of_kind(name: str) -> Callable[..., torch.optim.Optimizer]:
    options = {"LBFGS": {"max_iter": 3}, "SGD": {"momentum": 0.9}, "Adam": {"amsgrad": True}}
    options["RMSprop"] = {"momentum": 0.5, "centered": True}

    def make(model: Net, **implementation: bool) -> torch.optim.Optimizer:
        parameters = list(model.parameters())
        if name == "SparseAdam":
            parameters = [model.embedding.weight]
        if name == "Muon":  # matrices only
            parameters = [parameter for parameter in parameters if parameter.ndim == 2]
        return getattr(torch.optim, name)(parameters, lr=0.05, **options.get(name, {}), **implementation)

    return make


NAMES = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
)
FUSED_ON_CPU = {"Adagrad", "Adam", "AdamW", "SGD"}
MATRIX = [(name, {}) for name in NAMES]
for _name in NAMES:
    _accepted = inspect.signature(getattr(torch.optim, _name)).parameters
    if "foreach" in _accepted:
        MATRIX += [(_name, {"foreach": True}), (_name, {"foreach": False})]
    if "fused" in _accepted and _name in FUSED_ON_CPU:
        MATRIX.append((_name, {"fused": True}))


def test_the_matrix_has_every_optimizer_of_torch():
    """Those that this test was written for are all there, and new ones come by themselves."""
    known = {
        "ASGD",
        "Adadelta",
        "Adafactor",
        "Adagrad",
        "Adam",
        "AdamW",
        "Adamax",
        "LBFGS",
        "NAdam",
        "RAdam",
        "RMSprop",
    }
    assert known | {"Rprop", "SGD", "SparseAdam"} <= set(NAMES)


@pytest.mark.parametrize("mode", ["overlap", "blocking"])
@pytest.mark.parametrize(
    ("name", "implementation"), MATRIX, ids=["-".join((n, *(f"{k}_{v}" for k, v in i.items()))) for n, i in MATRIX]
)
def test_steps_right_after_save_do_not_show_in_it(
    root: Path, late: LateCopies, name: str, implementation: dict[str, bool], mode: str
):
    """Two more steps at once after save(): model and optimizer come back as they were at the call, bit for bit."""
    torch.manual_seed(3)
    model = Net(sparse=name == "SparseAdam")
    optimizer = of_kind(name)(model, **implementation)
    train(model, optimizer)
    train(model, optimizer)
    expected = frozen(model, optimizer)
    with AsyncCheckpointer(root, staging=mode, writer="thread") as checkpointer:
        handle = checkpointer.save(1, model=model, optimizer=optimizer)
        train(model, optimizer)
        assert late.waits == (mode == "overlap"), "the first step is where the copy is waited for"
        late.go.set()
        train(model, optimizer)
        path = handle.result(BOUND).path
        assert handle.result().timings.stall > 0
        assert handle.state is SaveState.COMMITTED
    if mode == "overlap":
        assert any(label.startswith("model.safetensors: ") for label in late.labels)
        assert any(label.startswith("optimizer.bin: ") for label in late.labels)
        assert not any("running_" in label or "num_batches" in label for label in late.labels)
    else:
        assert late.labels == []
    assert not same(frozen(model, optimizer), expected), "the training went on"
    assert same(torch.load(path / "optimizer.bin", weights_only=True), expected[1])
    fresh = Net(sparse=name == "SparseAdam")
    fresh_optimizer = of_kind(name)(fresh, **implementation)
    load(path, model=fresh, optimizer=fresh_optimizer, verify="full")
    assert same(frozen(fresh, fresh_optimizer), expected)


@pytest.mark.parametrize("name", ["AdamW", "SGD", "LBFGS"])
def test_every_one_of_many_saves_is_the_state_at_its_call(root: Path, late: LateCopies, name: str):
    """Save, step, save, step with a kept plan: each checkpoint has its own state."""
    torch.manual_seed(4)
    model = Net()
    optimizer = of_kind(name)(model)
    expected = {}
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        for step in range(6):
            train(model, optimizer)
            expected[step] = frozen(model, optimizer)
            late.go.clear()
            checkpointer.save(step, model=model, optimizer=optimizer)
        late.go.set()
    for step, state in expected.items():
        fresh = Net()
        fresh_optimizer = of_kind(name)(fresh)
        load(root / f"checkpoint-{step}", model=fresh, optimizer=fresh_optimizer)
        assert same(frozen(fresh, fresh_optimizer), state), step


# -- what is copied before save() returns: everything that something else than a step of a seen optimizer changes


def seen(model: torch.nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    train(model, optimizer)
    return optimizer


class Scene:
    """Something that is saved, and `change`, which the barrier never sees."""

    model: Any
    optimizer: Any
    never_late: str  # part of the labels that must not be copied late

    def change(self) -> None:
        raise NotImplementedError


class BatchNorm(Scene):
    """Forward changes running statistics."""

    never_late = "norm.running"

    def __init__(self) -> None:
        self.model = Net()
        self.optimizer = seen(self.model)

    def change(self) -> None:
        self.model()


class AveragedModel(Scene):
    """An average of the weights that follows the model."""

    never_late = "ema/"

    def __init__(self) -> None:
        net = Net()
        self.optimizer = seen(net)
        average = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
        self.model = {"net": net, "ema": average}
        average.update_parameters(net)

    def change(self) -> None:
        with torch.no_grad():
            self.model["ema"].update_parameters(self.model["net"])
            self.model["ema"].module.first.weight.mul_(2)


class MaxNorm(Scene):
    """Embedding(max_norm) renormalizes its weight in forward, though an optimizer has it too."""

    never_late = "embedding.weight"

    def __init__(self) -> None:
        self.model = Net()
        self.model.embedding = torch.nn.Embedding(11, 6)
        self.optimizer = seen(self.model)
        with torch.no_grad():
            self.model.embedding.weight.mul_(100)
        self.model.embedding.max_norm = 1.0

    def change(self) -> None:
        for _ in range(5):
            self.model()


class Frozen(Scene):
    """Parameters that no optimizer has."""

    never_late = "first."

    def __init__(self) -> None:
        self.model = Net()
        self.model.first.requires_grad_(False)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad])
        train(self.model, self.optimizer)

    def change(self) -> None:
        self.model.first.weight.data.fill_(7)
        self.model.first.bias.numpy()[:] = 8


class MomentumEncoder(Scene):
    """A second model that follows the first one by lerp."""

    never_late = "key/"

    def __init__(self) -> None:
        query, key = Net(), Net()
        self.model = {"query": query, "key": key}
        self.optimizer = seen(query)

    def change(self) -> None:
        with torch.no_grad():
            for one, other in zip(self.model["key"].parameters(), self.model["query"].parameters(), strict=True):
                one.lerp_(other, 0.9)


class Lion:
    """An optimizer that is not torch's."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.parameters = parameters
        self.momenta = [torch.zeros_like(parameter) for parameter in parameters]

    def state_dict(self) -> dict[str, Any]:
        return {"state": dict(enumerate({"momentum": m} for m in self.momenta)), "param_groups": [{"lr": 0.1}]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for number, entry in state["state"].items():
            self.momenta[number].copy_(entry["momentum"])

    def step(self) -> None:
        with torch.no_grad():
            for parameter, momentum in zip(self.parameters, self.momenta, strict=True):
                momentum.add_(1.5)
                parameter.add_(momentum)


class NotTorchs(Scene):
    """Parameters and state of an optimizer that torch does not know, beside one that it does."""

    never_late = "optimizer_1.bin"

    def __init__(self) -> None:
        net, other = Net(), Net()
        self.model = {"net": net, "other": other}
        self.optimizer = {"adam": seen(net), "lion": Lion(list(other.parameters()))}
        self.optimizer["lion"].step()

    def change(self) -> None:
        self.optimizer["lion"].step()


class ReplacedStep(Scene):
    """`optimizer.step = ...` on the instance bypasses torch's hooks."""

    never_late = "other/"

    def __init__(self) -> None:
        net, other = Net(), Net()
        self.model = {"net": net, "other": other}
        replaced = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
        replaced.step = functools.partial(type(replaced).step.__wrapped__, replaced)
        self.optimizer = {"adam": seen(net), "sgd": replaced}
        train(other, replaced)

    def change(self) -> None:
        train(self.model["other"], self.optimizer["sgd"])


def wrapped_sgd(parameters: Any) -> torch.optim.Optimizer:
    """A subclass whose step has functools.wraps(SGD.step), which copies torch's mark that the hooks are in place."""
    torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])  # torch puts hooks and mark on SGD.step

    class Wrapped(torch.optim.SGD):
        @functools.wraps(torch.optim.SGD.step)
        def step(self, closure: Any = None) -> None:
            for parameter in self.param_groups[0]["params"]:
                parameter.data.add_(1.25)
                self.state[parameter]["seen"] = self.state[parameter].get("seen", torch.zeros(3)).data.add_(1)

    return Wrapped(parameters, lr=0.1)


class WrappedStep(ReplacedStep):
    """A subclass's step behind functools.wraps(SGD.step)."""

    def __init__(self) -> None:
        super().__init__()
        self.optimizer["sgd"] = wrapped_sgd(self.model["other"].parameters())
        self.optimizer["sgd"].step()


class Swapped(Scene):
    """An optimizer that was seen makes room for one of the same layout whose step nobody will ever see; another goes on."""

    never_late = "optimizer.bin"

    def __init__(self) -> None:
        self.model = {"swapped": Net(), "other": Net()}
        self.former = {
            name: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for name, model in self.model.items()
        }
        for name, model in self.model.items():
            train(model, self.former[name])
        unseen = torch.optim.SGD(self.model["swapped"].parameters(), lr=0.1, momentum=0.9)
        unseen.load_state_dict(copy.deepcopy(self.former["swapped"].state_dict()))
        unseen.step = functools.partial(torch.optim.SGD.step.__wrapped__, unseen)
        self.optimizer = {"swapped": unseen, "other": self.former["other"]}

    def before(self, checkpointer: AsyncCheckpointer, late: LateCopies) -> None:
        late.go.set()
        checkpointer.save(0, model=self.model, optimizer=self.former).result(BOUND)
        assert any("optimizer.bin" in label for label in late.labels)
        late.go.clear()
        late.labels.clear()

    def change(self) -> None:
        for entry in self.optimizer["swapped"].state.values():
            entry["momentum_buffer"].data.add_(1)


class SwappedParameters(Swapped):
    """As before; its step changes the parameters."""

    never_late = "swapped/"

    def change(self) -> None:
        for parameter in self.model["swapped"].parameters():
            parameter.data.add_(1)


class Lookahead:
    """Wraps an optimizer that is seen: after its step the weights go half of the way back, and nobody sees that."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    def step(self, closure: Any = None) -> None:
        self.look()
        self.optimizer.step(closure)

    def look(self) -> None:
        for slow, p in zip(self.slow, (p for group in self.param_groups for p in group["params"]), strict=True):
            slow.add_(p.data - slow, alpha=0.5)
            p.data.copy_(slow)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return {"fast": self.optimizer.state_dict(), "slow": self.slow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["fast"])
        self.slow = state["slow"]


class Wrapped(Scene):
    """A wrapper with tensors of its own, whose steps the barrier sees only in the middle; another optimizer beside it."""

    never_late = "wrapped/"

    def __init__(self) -> None:
        self.model = {"wrapped": Net(), "other": Net()}
        sgd = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in self.model.values()]
        self.optimizer = {"wrapped": Lookahead(sgd[0]), "other": sgd[1]}
        for name, model in self.model.items():
            train(model, self.optimizer[name])

    def change(self) -> None:
        self.optimizer["wrapped"].look()


class WrappedState(Wrapped):
    """As before; the state of the optimizer inside is part of what the wrapper gives."""

    never_late = "optimizer.bin"


SCENES = [
    BatchNorm, AveragedModel, MaxNorm, Frozen, MomentumEncoder, NotTorchs, ReplacedStep, WrappedStep, Swapped,
    SwappedParameters, Wrapped, WrappedState,
]  # fmt: skip


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_what_the_barrier_cannot_see_is_copied_before_save_returns(root: Path, late: LateCopies, scene: type[Scene]):
    """It may be changed right after save(), while the rest is still to be copied."""
    torch.manual_seed(5)
    this = scene()
    models = this.model if isinstance(this.model, dict) else {"": this.model}
    optimizers = this.optimizer if isinstance(this.optimizer, dict) else {"": this.optimizer}
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        if hasattr(this, "before"):
            this.before(checkpointer, late)
        expected = frozen(*models.values(), *optimizers.values())
        handle = checkpointer.save(1, model=this.model, optimizer=this.optimizer)
        assert late.labels, "something of it is copied late"
        this.change()
        assert not late.go.is_set(), "the barrier saw it"
        late.go.set()
        path = handle.result(BOUND).path
    assert not [label for label in late.labels if this.never_late in label]
    assert not same(frozen(*models.values(), *optimizers.values()), expected), "the scene changes something"
    load(path, model=this.model, optimizer=this.optimizer)
    assert same(frozen(*models.values(), *optimizers.values()), expected)


@pytest.mark.parametrize("stepped", [True, False])
def test_an_optimizer_that_never_stepped_earns_nothing(root: Path, late: LateCopies, stepped: bool):
    """Of two optimizers only the one whose step was seen has its tensors copied late."""
    torch.manual_seed(6)
    models = {"a": Net(), "b": Net()}
    optimizers = {name: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for name, model in models.items()}
    if stepped:
        train(models["a"], optimizers["a"])
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        expected = frozen(*models.values(), *optimizers.values())
        handle = checkpointer.save(1, model=models, optimizer=optimizers)
        train(models["b"], optimizers["b"])
        train(models["a"], optimizers["a"])
        path = handle.result(BOUND).path
    assert {label.partition("/")[0] for label in late.labels if "/" in label} == ({"a"} if stepped else set())
    load(path, model=models, optimizer=optimizers)
    assert same(frozen(*models.values(), *optimizers.values()), expected)


def test_a_grad_scaler_steps_through_the_barrier(root: Path, late: LateCopies):
    """scaler.step waits like optimizer.step; the scaler's own state is that of the call."""
    torch.manual_seed(7)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1)

    def scaled_step() -> None:
        optimizer.zero_grad()
        scaler.scale(model()).backward()
        scaler.step(optimizer)
        scaler.update()

    scaled_step()
    expected = frozen(model, optimizer, scaler)
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        handle = checkpointer.save(1, model=model, optimizer=optimizer, scaler=scaler)
        scaled_step()
        assert late.waits == 1
        path = handle.result(BOUND).path
    assert not same(frozen(scaler), expected[2:])
    load(path, model=model, optimizer=optimizer, scaler=scaler)
    assert same(frozen(model, optimizer, scaler), expected)


def numbers() -> tuple[float, float, float]:
    """One from each generator."""
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.mark.parametrize("mode", ["overlap", "blocking"])
def test_what_is_small_is_that_of_the_call(root: Path, late: LateCopies, mode: str):
    """RNG, scheduler, extra, config, metrics and param_groups: changed at once after save(), restored as they were."""
    model = Net()
    optimizer = seen(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    extra = {"list": [1, 2], "tensor": torch.arange(3), "array": np.arange(4.0), "bytes": bytearray(b"ab")}
    config, metrics = {"name": "first", "sizes": [1, 2]}, {"loss": 0.5}
    with AsyncCheckpointer(root, writer="thread", staging=mode) as checkpointer:
        before = frozen(optimizer, scheduler)
        handle = checkpointer.save(
            3, model=model, optimizer=optimizer, scheduler=scheduler, extra=extra, config=config, metrics=metrics
        )
        drawn = numbers()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "lr_scheduler.step() before optimizer.step()": that is the point
            scheduler.step()
            scheduler.step()
        optimizer.param_groups[0].update(weight_decay=9.0, betas=(0.1, 0.2))
        extra["list"].append(3)
        extra["tensor"].fill_(9)
        extra["array"][:] = 9
        extra["bytes"][:] = b"zz"
        config["sizes"].append(3)
        metrics["loss"] = 9.0
        late.go.set()
        path = handle.result(BOUND).path
    restored = load(path, model=model, optimizer=optimizer, scheduler=scheduler)
    assert same(frozen(optimizer, scheduler), before)
    assert numbers() == drawn
    assert restored.step == 3
    assert restored.extra["list"] == [1, 2]
    assert restored.extra["tensor"].tolist() == [0, 1, 2]
    assert restored.extra["array"].tolist() == [0, 1, 2, 3]
    assert restored.extra["bytes"] == b"ab"
    assert restored.config == {"name": "first", "sizes": [1, 2]}
    assert restored.metrics == {"loss": 0.5}


# -- the nets: changes that go around the barrier are noticed, and never become a checkpoint


def by_data(model: Net) -> None:
    model.last.weight.data.add_(1)


def by_numpy(model: Net) -> None:
    model.last.weight.detach().numpy()[...] = 0


def by_load_state_dict(model: Net) -> None:
    model.load_state_dict({name: tensor * 2 for name, tensor in model.state_dict().items()})


def in_the_middle(model: Net) -> None:
    with torch.no_grad():
        model.last.weight[0, 0] = 5


@pytest.mark.parametrize("edit", [by_data, by_numpy, by_load_state_dict, in_the_middle], ids=lambda edit: edit.__name__)
def test_an_edit_during_the_copy_fails_the_save_and_later_ones_are_blocking(
    root: Path, late: LateCopies, edit: Callable[[Net], None]
):
    """A StageError that names the tensor and the remedy; nothing is committed; the next save is blocking, and right."""
    torch.manual_seed(8)
    model = Net()
    optimizer = seen(model)
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        handle = checkpointer.save(1, model=model, optimizer=optimizer)
        edit(model)
        late.go.set()
        error = handle.exception(BOUND)
        assert isinstance(error, StageError)
        assert handle.state is SaveState.FAILED
        assert "model.safetensors: " in str(error)
        assert edit is by_load_state_dict or "last.weight" in str(error)
        assert 'staging="blocking"' in str(error)
        assert list(root.glob("checkpoint-*")) == []
        late.labels.clear()
        expected = frozen(model, optimizer)
        second = checkpointer.save(2, model=model, optimizer=optimizer)
        edit(model)
        train(model, optimizer)
        path = second.result(BOUND).path
        assert late.labels == []
        assert checkpointer.statistics()["overlap"] is False
        assert checkpointer.statistics()["failed"] == 1
    load(path, model=model, optimizer=optimizer)
    assert same(frozen(model, optimizer), expected)


def test_an_edit_after_wait_staged_is_free(root: Path):
    """From staged on everything may be changed by anything."""
    model = Net()
    optimizer = seen(model)
    expected = frozen(model, optimizer)
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        handle = checkpointer.save(1, model=model, optimizer=optimizer)
        handle.wait_staged(BOUND)
        by_data(model)
        path = handle.result(BOUND).path
    load(path, model=model, optimizer=optimizer)
    assert same(frozen(model, optimizer), expected)


def test_new_storage_and_a_freed_model_do_not_tear_the_copy(root: Path, late: LateCopies):
    """The copy holds the old memory: `p.data = new` and `del model` between call and copy change nothing."""
    model = Net()
    optimizer = seen(model)
    expected = frozen(model)
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        handle = checkpointer.save(1, model=model, optimizer=optimizer)
        for parameter in model.parameters():
            parameter.data = torch.full_like(parameter, 3.0)
        del model, optimizer, parameter
        late.go.set()
        path = handle.result(BOUND).path
    fresh = Net()
    load(path, model=fresh)
    assert same(frozen(fresh), expected)


@pytest.mark.parametrize("look", ["turned", "cut", "as bits", "elsewhere"])
def test_what_data_becomes_after_the_call_is_not_in_the_copy(
    root: Path, late: LateCopies, monkeypatch: pytest.MonkeyPatch, look: str
):
    """`p.data` gets the same memory with another look, or other memory, before anything is copied: the copy is of the call."""
    views: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "turned": lambda t: t.view(*reversed(t.shape)).t() if t.dim() == 2 else t,
        "cut": lambda t: t[:1],
        "as bits": lambda t: t.view(torch.int32),
        "elsewhere": lambda t: torch.zeros_like(t),
    }
    begin, moved = threading.Event(), staging.DeferredCopy.moved
    monkeypatch.setattr(staging.DeferredCopy, "moved", lambda late: (begin.wait(BOUND), moved(late))[1])
    model = Net()
    optimizer = seen(model)
    expected = frozen(model)
    late.go.set()
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        handle = checkpointer.save(1, model=model, optimizer=optimizer)
        for parameter in model.parameters():
            with torch.no_grad():
                parameter.requires_grad_(False).data = views[look](parameter.data)
        begin.set()
        path = handle.result(BOUND).path
    fresh = Net()
    load(path, model=fresh)
    assert same(frozen(fresh), expected)


def test_a_step_does_not_wait_for_a_copy_that_is_complete(root: Path, late: LateCopies):
    """Once staged, the barrier is open."""
    model = Net()
    optimizer = seen(model)
    late.go.set()
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        handle = checkpointer.save(1, model=model, optimizer=optimizer)
        handle.wait_staged(BOUND)
        train(model, optimizer)
    assert late.waits == 0


def test_the_barrier_s_wait_is_in_the_stall(root: Path, late: LateCopies, monkeypatch: pytest.MonkeyPatch):
    """`timings.stall` counts save() and what steps waited for the copy."""
    model = Net()
    optimizer = seen(model)
    measured = []
    real = staging.Snapshot.barrier

    def barrier(self: staging.Snapshot) -> None:
        before = self.waited
        real(self)
        measured.append(self.waited - before)

    monkeypatch.setattr(staging.Snapshot, "barrier", barrier)
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        handle = checkpointer.save(1, model=model, optimizer=optimizer)
        train(model, optimizer)
        timings = handle.result(BOUND).timings
    assert sum(measured) > 0
    assert timings.stall > sum(measured)
    assert timings.durable >= timings.write + timings.commit


# -- a writer that is held up


class HeldUp(LocalFilesystem):
    """A disk that takes nothing before `go`."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.writing = threading.Event()

    def write(self, fd: int, data: memoryview, offset: int) -> int:
        self.writing.set()
        assert self.go.wait(BOUND)
        return super().write(fd, data, offset)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[HeldUp]:
    filesystem = HeldUp()
    monkeypatch.setattr(engine, "Supervisor", functools.partial(engine.Supervisor, filesystem=filesystem))
    yield filesystem
    filesystem.go.set()


def test_when_busy_wait_waits_for_the_arena(root: Path, disk: HeldUp):
    """save() returns once the earlier save has ended; the wait is in its stall and an event says so."""
    events: list[Event] = []
    model = Net()
    with AsyncCheckpointer(root, writer="thread", sinks=[events.append]) as checkpointer:
        first = checkpointer.save(1, model=model)
        assert disk.writing.wait(BOUND)
        waited = threading.Event()
        real = checkpointer._engine._supervisor.check
        calls: list[None] = []

        def check() -> None:  # called once on the way, then 20 times a second by whoever waits for an arena
            calls.append(None)
            if len(calls) > 10:
                waited.set()
            real()

        checkpointer._engine._supervisor.check = check  # type: ignore[method-assign]
        handles = []
        thread = threading.Thread(target=lambda: handles.append(checkpointer.save(2, model=model)))
        thread.start()
        assert waited.wait(BOUND)
        assert handles == []
        assert not first.done()
        disk.go.set()
        thread.join(BOUND)
        assert handles[0].result(BOUND).timings.stall > 0.4
        assert first.done()
    backpressure = [event for event in events if event.stage == "backpressure"]
    assert [(event.phase, event.step) for event in backpressure] == [("started", 2), ("complete", 2)]
    assert backpressure[-1].seconds > 0.4


def test_when_busy_skip_says_so_on_the_handle(root: Path, disk: HeldUp):
    """The handle is skipped from the start, its result raises CheckpointerBusy, and nothing is raised later."""
    events: list[Event] = []
    model = Net()
    with AsyncCheckpointer(root, writer="thread", when_busy="skip", sinks=[events.append]) as checkpointer:
        first = checkpointer.save(1, model=model)
        skipped = checkpointer.save(2, model=model)
        assert skipped.done()
        assert skipped.state is SaveState.SKIPPED
        with pytest.raises(CheckpointerBusy, match="arenas"):
            skipped.result()
        assert isinstance(skipped.exception(), CheckpointerBusy)
        called = threading.Event()
        skipped.add_done_callback(lambda handle: called.set())
        assert called.wait(BOUND)
        disk.go.set()
        first.result(BOUND)
        checkpointer.save(3, model=model).result(BOUND)
        assert checkpointer.statistics()["skipped"] == 1
    assert sorted(path.name for path in root.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-3"]
    assert [(e.phase, e.step) for e in events if e.stage == "backpressure"] == [("failed", 2)]


def test_when_busy_error_raises_and_changes_nothing(root: Path, disk: HeldUp):
    """CheckpointerBusy from save() itself; the same call works once the arena is free."""
    model = Net()
    with AsyncCheckpointer(root, writer="thread", when_busy="error") as checkpointer:
        first = checkpointer.save(1, model=model)
        with pytest.raises(CheckpointerBusy, match="arenas"):
            checkpointer.save(2, model=model)
        assert checkpointer.statistics()["in_flight"] == 1
        disk.go.set()
        first.result(BOUND)
        checkpointer.save(2, model=model).result(BOUND)
        assert checkpointer.statistics()["failed"] == 0


def test_two_in_flight_and_the_third_is_refused(root: Path, disk: HeldUp):
    """max_in_flight=2: two saves are staged while the disk stands still, each with its own state."""
    torch.manual_seed(9)
    model = Net()
    optimizer = seen(model)
    expected = {}
    with AsyncCheckpointer(root, writer="thread", when_busy="error", max_in_flight=2) as checkpointer:
        handles = []
        for step in (1, 2):
            expected[step] = frozen(model, optimizer)
            handles.append(checkpointer.save(step, model=model, optimizer=optimizer))
            handles[-1].wait_staged(BOUND)
            train(model, optimizer)
        with pytest.raises(CheckpointerBusy):
            checkpointer.save(3, model=model, optimizer=optimizer)
        assert checkpointer.statistics()["arenas_busy"] == 2
        assert checkpointer.statistics()["bytes_pending"] > 0
        disk.go.set()
        for handle in handles:
            handle.result(BOUND)
        assert checkpointer.statistics()["bytes_pending"] == 0
    for step, state in expected.items():
        load(root / f"checkpoint-{step}", model=model, optimizer=optimizer)
        assert same(frozen(model, optimizer), state)


class Wide(torch.nn.Module):
    """20 MiB of weights: more than the smallest arena allowed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2048, 2560)
        self.register_buffer("odd", torch.arange(101, dtype=torch.uint8))

    def forward(self) -> torch.Tensor:
        return self.layer(torch.randn(2, 2048)).pow(2).mean()


WINDOW = 16 << 20


@pytest.mark.parametrize("writer", ["process", "thread"])
def test_a_state_larger_than_the_memory_allowed_passes_in_waves(root: Path, writer: str):
    """One warning with the numbers, then every save is right, and so is every CRC of an optimizer.bin of three windows."""
    torch.manual_seed(10)
    model = Wide()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    train(model, optimizer)
    with AsyncCheckpointer(root, writer=writer, max_host_bytes=WINDOW) as checkpointer:
        expected = {1: frozen(model, optimizer)}
        with pytest.warns(UserWarning, match=str(WINDOW)) as told:
            first = checkpointer.save(1, model=model, optimizer=optimizer, extra={"t": torch.arange(5)})
        assert len(told) == 1
        train(model, optimizer)
        expected[2] = frozen(model, optimizer)
        second = checkpointer.save(2, model=model, optimizer=optimizer, extra={"t": torch.arange(5)})
        train(model, optimizer)
        assert first.result(BOUND).total_bytes == second.result(BOUND).total_bytes > 3 * WINDOW
        assert checkpointer.statistics()["host_bytes"] <= WINDOW
    for step, state in expected.items():
        path = root / f"checkpoint-{step}"
        assert load(path, model=model, optimizer=optimizer).extra["t"].tolist() == [0, 1, 2, 3, 4]
        assert same(frozen(model, optimizer), state)
        with zipfile.ZipFile(path / "optimizer.bin") as archive:
            assert archive.testzip() is None


def test_two_in_flight_share_the_memory_allowed(root: Path, disk: HeldUp):
    """With room for one arena only, a second save waits for it as if one were allowed; it does not fail."""
    model = Net()
    with AsyncCheckpointer(
        root, writer="thread", max_in_flight=2, max_host_bytes=WINDOW, when_busy="error"
    ) as checkpointer:
        arena = checkpointer._engine._pool.acquire(WINDOW)
        with pytest.raises(CheckpointerBusy):
            checkpointer.save(1, model=model)
        checkpointer._engine._pool.release(arena)
        disk.go.set()
        checkpointer.save(1, model=model).result(BOUND)


@pytest.mark.timeout(60)
def test_a_part_is_filled_while_the_one_before_is_written(root: Path, monkeypatch: pytest.MonkeyPatch):
    """The first part is not written before the second has been filled."""
    filled, fill, write_range = threading.Semaphore(0), waves.Waves._fill, server.write_range
    written: list[int] = []

    def fill_and_say_so(self: waves.Waves, start: int, end: int) -> None:
        fill(self, start, end)
        filled.release()

    def write_later(writers: Any, memory: Any, start: int, end: int, *rest: Any) -> None:
        if not written:
            assert filled.acquire(timeout=20)
            assert filled.acquire(timeout=20)
        written.append(start)
        write_range(writers, memory, start, end, *rest)

    monkeypatch.setattr(waves.Waves, "_fill", fill_and_say_so)
    monkeypatch.setattr(server, "write_range", write_later)
    model = torch.nn.Linear(1, 6 << 20)
    with (
        pytest.warns(UserWarning, match="allowed"),
        AsyncCheckpointer(root, writer="thread", max_host_bytes=16 << 20) as checkpointer,
    ):
        path = checkpointer.save(1, model=model).result(60).path
    assert len(written) > 3
    expected = model.weight.detach().clone()
    model.weight.data.zero_()
    load(path, model=model)
    assert torch.equal(model.weight, expected)


def test_a_save_in_waves_that_is_interrupted_gives_its_arena_back(root: Path, monkeypatch: pytest.MonkeyPatch):
    """An interrupt between two waves ends that save and is raised once; the next save is not locked out."""
    model = Wide()
    real = waves.Waves._fill
    parts: list[int] = []

    def interrupted(self: waves.Waves, start: int, end: int) -> None:
        parts.append(start)
        if len(parts) == 2:
            raise KeyboardInterrupt
        real(self, start, end)

    monkeypatch.setattr(waves.Waves, "_fill", interrupted)
    with AsyncCheckpointer(root, writer="thread", max_host_bytes=WINDOW) as checkpointer:
        with pytest.warns(UserWarning, match="in parts"), pytest.raises(KeyboardInterrupt):
            checkpointer.save(1, model=model)
        assert checkpointer.save(2, model=model).result(BOUND).step == 2


# -- prewarm


def arenas(events: list[Event]) -> list[int]:
    return [event.bytes for event in events if event.stage == "arena"]


def test_prewarm_sizes_what_the_first_save_needs(root: Path):
    """Planned and allocated before: the first save makes no arena, and wait() returns once the pages are there."""
    events: list[Event] = []
    model = Wide()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    train(model, optimizer)
    with AsyncCheckpointer(root, sinks=[events.append]) as checkpointer:
        checkpointer.prewarm(model=model, optimizer=optimizer)
        checkpointer.wait(BOUND)
        assert not checkpointer._engine._supervisor.populating
        checkpointer.save(1, model=model, optimizer=optimizer, extra={"x": [1] * 1000}, metrics={"loss": 1.0}).result(
            BOUND
        )
    assert len(arenas(events)) == 1


def test_prewarm_before_the_first_step_completes_itself_after_it(root: Path):
    """AdamW has no state yet: the arena grows once it has, and the save makes no other."""
    events: list[Event] = []
    model = Wide()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    with AsyncCheckpointer(root, sinks=[events.append], writer="thread") as checkpointer:
        checkpointer.prewarm(model=model, optimizer=optimizer)
        small = checkpointer.statistics()["host_bytes"]
        train(model, optimizer)
        train(model, optimizer)
        grown = checkpointer.statistics()["host_bytes"]
        assert grown >= small + 40 * (1 << 20)
        checkpointer.save(1, model=model, optimizer=optimizer).result(BOUND)
        assert checkpointer.statistics()["host_bytes"] == grown
    assert len(arenas(events)) == 2


def test_prewarm_raises_what_save_would(root: Path):
    """A model that cannot be saved is known before the training starts."""
    with AsyncCheckpointer(root, writer="thread") as checkpointer, pytest.raises(PlanError, match="meta"):
        checkpointer.prewarm(model=torch.nn.Linear(2, 2, device="meta"))


def test_two_threads_may_save_at_once(root: Path):
    """Each call goes its whole way from request to staged copy; every checkpoint is that of its thread."""
    models = [Net(), Net()]
    for number, model in enumerate(models):
        for tensor in model.state_dict().values():
            tensor.fill_(number + 1)
    start = threading.Barrier(2)
    handles: list[Any] = []
    with AsyncCheckpointer(root, writer="thread", max_in_flight=2) as checkpointer:

        def work(number: int) -> None:
            start.wait(BOUND)
            for n in range(10):
                handles.append(checkpointer.save(10 * number + n, model=models[number]))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(BOUND)
    assert len(handles) == 20
    for handle in handles:
        fresh = Net()
        load(handle.result(BOUND).path, model=fresh)
        assert all((tensor == handle.step // 10 + 1).all() for tensor in fresh.state_dict().values())
