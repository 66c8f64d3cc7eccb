"""The guard against torn snapshots: whatever changes the state while it is still being copied, and what becomes of the save.

Every optimizer of torch is held at the barrier. For all other changes there is a table; its column `fact` is what was found, not
what was hoped for. The late copy is held up on purpose, so that a change always comes before it or in its middle.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import itertools
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import safetensors.torch
import torch
from torch.optim import optimizer as torch_hooks
from torch.optim.sgd import sgd as functional_sgd
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vembed_async_ckpt import AsyncCheckpointer, SaveHandle, StageError, load
from vembed_async_ckpt._memory import staging
from vembed_async_ckpt._memory.barrier import STEP_BARRIER, CopyPlan, OverlapPolicy

STEP_BARRIER.install()  # as a checkpointer does: the optimizers of these tests step before theirs is made
BOUND = 20  # seconds that a wait may take before it is a failure

Tensors = dict[str, torch.Tensor]


class LateCopy:
    """The late copy stops for `go`, before its first byte or, with `midway`, in the middle of every tensor.

    `labels`: what is copied late. `waits`: optimizers that came to the barrier before the copy was complete.
    """

    def __init__(self) -> None:
        self.go = threading.Event()
        self.stopped = threading.Event()
        self.midway = False
        self.labels: list[str] = []
        self.waits = 0


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch, small_is_late: None) -> Iterator[LateCopy]:
    state = LateCopy()
    real_copy, real_barrier, real_divide = staging.copy_group, staging.Snapshot.barrier, OverlapPolicy.divide

    def held_copy(destinations: Any, sources: Any) -> None:
        middles = [tensor.numel() // 2 if state.midway else 0 for tensor in destinations]

        def part(which: Callable[[int], slice]) -> list[list[torch.Tensor]]:  # late are contiguous tensors only
            pairs = (zip(tensors, middles, strict=True) for tensors in (destinations, sources))
            return [[tensor.view(-1)[which(middle)] for tensor, middle in pair] for pair in pairs]

        if state.midway:
            real_copy(*part(lambda middle: slice(middle)))
        state.stopped.set()
        assert state.go.wait(BOUND), "nothing ever waited for the copy"
        # Not before: these views would keep the old memory, whoever else lets go of it.
        real_copy(*part(lambda middle: slice(middle, None)))

    def barrier(self: staging.Snapshot) -> None:
        state.waits += not self._copied.is_set()
        state.go.set()
        real_barrier(self)

    def divide(*arguments: Any) -> CopyPlan:
        division = real_divide(*arguments)
        state.labels += division.names
        return division

    monkeypatch.setattr(staging, "copy_group", held_copy)
    monkeypatch.setattr(staging.Snapshot, "barrier", barrier)
    monkeypatch.setattr(OverlapPolicy, "divide", divide)
    yield state
    state.go.set()


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(one: Any, other: Any) -> bool:
    """Equal in every bit, dtype and type."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return (one.dtype, one.shape, bits(one)) == (other.dtype, other.shape, bits(other))
    if isinstance(one, Mapping):
        return isinstance(other, Mapping) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


class Net(torch.nn.Module):
    """Every tensor has more than 32 bytes in its middle half: what the nets look at is only a part of it."""

    def __init__(self, sparse: bool = False, max_norm: float | None = None) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(11, 8, sparse=sparse, max_norm=max_norm)
        self.first = torch.nn.Linear(8, 32, bias=False)  # before a norm, a bias has no gradient
        self.norm = torch.nn.BatchNorm1d(32)
        self.last = torch.nn.Linear(32, 32)

    def forward(self) -> torch.Tensor:
        tokens = torch.randint(0, 11, (16,))
        return self.last(torch.tanh(self.norm(self.first(self.embedding(tokens))))).pow(2).mean()


def train(model: torch.nn.Module, *optimizers: Any) -> None:
    """One step of each."""

    def closure() -> torch.Tensor:
        model.zero_grad()
        loss = model()
        loss.backward()
        return loss

    for optimizer in optimizers:
        closure()
        optimizer.step(closure) if isinstance(optimizer, torch.optim.LBFGS) else optimizer.step()


def test_a_step_that_raised_is_over(root: Path, late: LateCopy) -> None:
    """In the middle of a step nothing is copied late; after one that ended in an exception everything is again."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, lr=0.1)
    train(model, optimizer)
    seen: list[bool] = []

    def closure() -> float:
        seen.append(STEP_BARRIER.is_stepping())
        raise MemoryError("out of memory")

    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        with pytest.raises(MemoryError):
            optimizer.step(closure)
        handle = checkpointer.save(1, model=model, optimizer=optimizer)
        assert late.stopped.wait(BOUND)
        late.go.set()
        handle.result(BOUND)
    assert seen == [True]


# -- every optimizer of torch, in every implementation that runs here

OPTIMIZERS = {
    name: kind
    for name, kind in sorted(vars(torch.optim).items())
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
}
IMPLEMENTATIONS = ("foreach", "fused", "capturable", "differentiable")
OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9},
    "Adam": {"amsgrad": True},
    "RMSprop": {"momentum": 0.5, "centered": True},
    "LBFGS": {"max_iter": 3, "history_size": 3},
}


def make(name: str, model: Net, **implementation: bool) -> torch.optim.Optimizer:
    kind = OPTIMIZERS[name]
    parameters = list(model.parameters())
    if name == "SparseAdam":
        parameters = [model.embedding.weight]
    if name == "Muon":
        parameters = [parameter for parameter in parameters if parameter.ndim == 2]
    return kind(parameters, **OPTIONS.get(name, {}), **implementation)


def variants() -> Iterator[tuple[str, dict[str, bool]]]:
    """Each optimizer as it comes, and with each switch of its implementation that works on this machine."""
    for name, kind in OPTIMIZERS.items():
        yield name, {}
        switches = [switch for switch in IMPLEMENTATIONS if switch in inspect.signature(kind).parameters]
        for switch, value in itertools.product(switches, (True, False)):
            if not value and switch != "foreach":
                continue  # as it comes
            model = Net(sparse=name == "SparseAdam")
            with contextlib.suppress(RuntimeError, AssertionError, ValueError):  # not on this device
                train(model, make(name, model, **{switch: value}))
                yield name, {switch: value}


VARIANTS = list(variants())


def test_the_variants_are_those_that_torch_has():
    """Every class is there, and every implementation that torch 2.7 and later have on a CPU."""
    assert {name for name, _ in VARIANTS} == set(OPTIMIZERS)
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
    assert known | {"Rprop", "SGD", "SparseAdam"} <= {*OPTIMIZERS}
    there = {(name, *switch) for name, switches in VARIANTS for switch in switches.items()}
    assert {(name, "fused", True) for name in ("Adagrad", "Adam", "AdamW", "SGD")} <= there
    for name, kind in OPTIMIZERS.items():
        if "foreach" in inspect.signature(kind).parameters:
            assert {(name, "foreach", True), (name, "foreach", False)} <= there


def stored_optimizer(path: Path, file: str = "optimizer.bin") -> Any:
    return torch.load(path / file, weights_only=True)


@pytest.mark.parametrize("midway", [False, True], ids=["held", "midway"])
@pytest.mark.parametrize(
    ("name", "implementation"), VARIANTS, ids=["-".join((n, *(f"{k}_{v}" for k, v in i.items()))) for n, i in VARIANTS]
)
def test_an_optimizer_of_torch_is_held_at_the_barrier(
    root: Path, late: LateCopy, name: str, implementation: dict[str, bool], midway: bool
):
    """A step at once after save(): the checkpoint holds weights and optimizer as they were before it, bit for bit."""
    torch.manual_seed(3)
    model = Net(sparse=name == "SparseAdam")
    optimizer = make(name, model, **implementation)
    train(model, optimizer)
    train(model, optimizer)
    late.midway = midway
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        handle = checkpointer.save(1, model=model, optimizer=optimizer)
        assert late.stopped.wait(BOUND)
        train(model, optimizer)
        assert late.waits == 1
        path = handle.result(BOUND).path
    moved = {id(parameter) for parameter in optimizer.param_groups[0]["params"]}
    names = [name for name, parameter in model.named_parameters() if id(parameter) in moved]
    assert not any(same(weights[name], model.get_parameter(name)) for name in names), (
        "the step changes every weight it has"
    )
    assert {f"model.safetensors: {name}" for name in names} <= set(late.labels)
    assert not same(state, optimizer.state_dict())
    assert same(safetensors.torch.load_file(path / "model.safetensors"), dict(weights))
    assert same(stored_optimizer(path), state)


# -- everything else that may happen before the copy is complete

HELD = "held at the barrier"
COPIED = "copied before return"
KEPT = "the old memory is kept"
CAUGHT = "caught (StageError)"
OUTSIDE = "outside: documented"
NOTHING = "changes nothing that is saved"

BOUNDARY = "a write through `.data`, numpy or another process that leaves a tensor's last 8 bytes unchanged"


def rates(file: str, state: Mapping[str, Any]) -> Tensors:
    groups = enumerate(state["param_groups"])
    return {f"{file}: group.{n}.lr": torch.as_tensor(group["lr"]).clone() for n, group in groups if "lr" in group}


class Scene:
    """A training whose state is mostly copied late: a model and an AdamW that was seen. Rows add to it and change it."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        self.net = Net()
        self.adam = torch.optim.AdamW(self.net.parameters(), lr=0.05)
        self.models: dict[str, torch.nn.Module] = {"net": self.net}
        self.optimizers: dict[str, Any] = {"adam": self.adam}
        self.further: dict[str, Any] = {}  # arguments of save()
        train(self.net, self.adam)

    def live(self) -> Tensors:
        """Every tensor by the name that errors give it, as it is now."""
        found = {
            f"{name}/model.safetensors: {key}": tensor.detach().clone()
            for name, model in self.models.items()
            for key, tensor in model.state_dict().items()
        }
        for file, optimizer in zip(self.files(), self.optimizers.values(), strict=True):
            for index, entry in optimizer.state_dict()["state"].items():
                found |= {
                    f"{file}: {index}.{key}": value.detach().clone()
                    for key, value in entry.items()
                    if isinstance(value, torch.Tensor)
                }
            found |= rates(file, optimizer.state_dict())
        return found

    def files(self) -> list[str]:
        return ["optimizer.bin", *(f"optimizer_{n}.bin" for n in range(1, len(self.optimizers)))]

    def stored(self, path: Path) -> Tensors:
        """What a checkpoint has of it."""
        found = {
            f"{name}/model.safetensors: {key}": tensor
            for name in self.models
            for key, tensor in safetensors.torch.load_file(path / name / "model.safetensors").items()
        }
        for file in self.files():
            state = stored_optimizer(path, file)
            found |= rates(file, state)
            for index, entry in state["state"].items():
                found |= {f"{file}: {index}.{k}": v for k, v in entry.items() if isinstance(v, torch.Tensor)}
        return found

    def save(self, checkpointer: AsyncCheckpointer) -> SaveHandle:
        return checkpointer.save(1, model=self.models, optimizer=self.optimizers, **self.further)

    @property
    def weight(self) -> torch.nn.Parameter:
        return self.net.last.weight

    @property
    def moment(self) -> torch.Tensor:
        """A tensor of the optimizer."""
        return self.adam.state[self.weight]["exp_avg"]


Change = Callable[[], Any]
Row = Callable[[Scene], Change]
TABLE: dict[str, tuple[str, Row]] = {}


def row(fact: str) -> Callable[[Row], Row]:
    """A line of the table: a function that prepares the scene and returns the change."""

    def enter(prepare: Row) -> Row:
        TABLE[prepare.__name__] = fact, prepare
        return prepare

    return enter


def found(scene: Scene, handle: SaveHandle, before: Tensors, after: Tensors, late: LateCopy) -> str:
    """What became of a save during which the state went from `before` to `after`."""
    changed = {label for label in before if label not in after or not same(before[label], after[label])}
    error = handle.exception(BOUND)
    if error is not None:
        assert isinstance(error, StageError)
        assert any(repr(label) in str(error) for label in changed), f"names a tensor that did not change: {error}"
        return CAUGHT
    if not same(scene.stored(handle.path), before):
        return OUTSIDE
    if late.waits:
        return HELD
    if not changed:
        return NOTHING
    return KEPT if changed & set(late.labels) else COPIED


# In place, from outside of any optimizer.


@row(CAUGHT)
def p_add(scene: Scene) -> Change:
    return torch.no_grad()(lambda: scene.weight.add_(1))


@row(CAUGHT)
def p_add_in_the_middle(scene: Scene) -> Change:
    return torch.no_grad()(lambda: scene.weight[9, 9].add_(1))


@row(CAUGHT)
def state_add(scene: Scene) -> Change:
    return lambda: scene.moment.mul_(0.5)


@row(CAUGHT)
def p_data_add(scene: Scene) -> Change:
    return lambda: scene.weight.data.add_(1)


@row(OUTSIDE)
def p_data_add_in_the_middle(scene: Scene) -> Change:
    return lambda: scene.weight.data[9, 9].add_(1)


@row(OUTSIDE)
def p_data_clamp_that_spares_the_end(scene: Scene) -> Change:
    with torch.no_grad():
        scene.weight.view(-1)[-8:] = 0.0
    return lambda: scene.weight.data.clamp_(-1e-3, 1e-3)


@row(CAUGHT)
def by_detach(scene: Scene) -> Change:
    return lambda: scene.weight.detach()[9, 9].zero_()


@row(CAUGHT)
def copy_through_numpy(scene: Scene) -> Change:
    ours = torch.from_numpy(scene.weight.detach().numpy())
    return lambda: ours.copy_(torch.ones(32, 32))


@row(OUTSIDE)
def numpy_in_the_middle(scene: Scene) -> Change:
    view = scene.weight.detach().numpy()
    return lambda: view.__setitem__((9, 9), 7.0)


@row(CAUGHT)
def foreach_add(scene: Scene) -> Change:
    return torch.no_grad()(lambda: torch._foreach_add_(list(scene.net.parameters()), 1.0))


@row(CAUGHT)
def nn_init(scene: Scene) -> Change:
    return lambda: torch.nn.init.orthogonal_(scene.weight)


@row(CAUGHT)
def in_inference_mode(scene: Scene) -> Change:
    return torch.inference_mode()(lambda: scene.weight[9, 9].add_(1))


@row(CAUGHT)
def functional_optimizer(scene: Scene) -> Change:
    weights = [parameter.detach() for parameter in scene.net.parameters()]
    gradients = [torch.ones_like(weight) for weight in weights]
    sgd = functools.partial(functional_sgd, weights, gradients, [None] * len(weights), foreach=False)
    return lambda: sgd(weight_decay=0, momentum=0, lr=0.1, dampening=0, nesterov=False, maximize=False)


@row(CAUGHT)
def functional_optimizer_fused(scene: Scene) -> Change:
    weights = [parameter.detach() for parameter in scene.net.parameters()]
    gradients = [torch.ones_like(weight) for weight in weights]
    sgd = functools.partial(functional_sgd, weights, gradients, [None] * len(weights), fused=True)
    return lambda: sgd(weight_decay=0, momentum=0, lr=0.1, dampening=0, nesterov=False, maximize=False)


@row(CAUGHT)
def functional_embedding_max_norm(scene: Scene) -> Change:
    scene.net.embedding.weight.data.mul_(100)
    return lambda: torch.nn.functional.embedding(torch.arange(11), scene.net.embedding.weight, max_norm=1.0)


@row(CAUGHT)
def model_load_state_dict(scene: Scene) -> Change:
    return lambda: scene.net.load_state_dict(Net().state_dict())


@row(CAUGHT)
def averages_copied_into_the_model(scene: Scene) -> Change:
    def swap() -> None:
        for parameter in scene.net.parameters():
            parameter.data.copy_(torch.full_like(parameter, 0.25))

    return swap


@row(CAUGHT)
def sharpness_aware_ascent(scene: Scene) -> Change:
    """SAM: weights go up the gradient by hand, before the optimizer's step."""

    @torch.no_grad()
    def ascend_and_step() -> None:
        for parameter in scene.net.parameters():
            parameter.add_(parameter.grad, alpha=0.1)
        scene.adam.step()

    return ascend_and_step


@row(CAUGHT)
def a_hook_before_ours(scene: Scene) -> Change:
    def hook(optimizer: Any, args: Any, kwargs: Any) -> None:
        with torch.no_grad():
            scene.weight.add_(1)

    def step() -> None:
        handle = torch_hooks.register_optimizer_step_pre_hook(hook)
        torch_hooks._global_optimizer_pre_hooks.move_to_end(handle.id, last=False)
        try:
            scene.adam.step()
        finally:
            handle.remove()

    return step


@row(CAUGHT)
def weights_normalized_in_forward(scene: Scene) -> Change:
    class Normalized(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                self.weight.copy_(torch.nn.functional.normalize(self.weight))
            return super().forward(x)

    scene.models["net"].last.__class__ = Normalized
    return lambda: scene.net()


@row(CAUGHT)
def evaluation_of_a_schedule_free_optimizer(scene: Scene) -> Change:
    """`optimizer.eval()` moves the weights to their average."""

    def evaluate() -> None:
        with torch.no_grad():
            for parameter in scene.net.parameters():
                parameter.lerp_(scene.adam.state[parameter]["exp_avg"], 0.5)

    return evaluate


# New memory: what is copied is the old.


@row(KEPT)
def p_data_is_new(scene: Scene) -> Change:
    return lambda: setattr(scene.weight, "data", torch.ones(32, 32))


@row(KEPT)
def parameter_is_new(scene: Scene) -> Change:
    return lambda: setattr(scene.net.last, "weight", torch.nn.Parameter(torch.ones(32, 32)))


@row(KEPT)
def model_load_state_dict_assign(scene: Scene) -> Change:
    return lambda: scene.net.load_state_dict(Net().state_dict(), assign=True)


@row(KEPT)
def optimizer_load_state_dict(scene: Scene) -> Change:
    other = Net()
    adam = torch.optim.AdamW(other.parameters(), lr=0.5)
    train(other, adam)
    return lambda: scene.adam.load_state_dict(adam.state_dict())


@row(KEPT)
def optimizer_state_is_cleared(scene: Scene) -> Change:
    return lambda: scene.adam.state.clear()


@row(KEPT)
def model_to_dtype(scene: Scene) -> Change:
    return lambda: scene.net.to(torch.bfloat16)


@row(KEPT)
def pointers_swapped_with_averages(scene: Scene) -> Change:
    def swap() -> None:
        for parameter in scene.net.parameters():
            parameter.data = torch.full_like(parameter, 0.25)

    return swap


@row(CAUGHT)
def swap_tensors(scene: Scene) -> Change:
    """The old memory would be there, but the versions are told by what is now in its place: a save too few, never a wrong one."""
    return lambda: torch.utils.swap_tensors(scene.moment, torch.ones(32, 32))


@row(KEPT)
def vector_to_parameters(scene: Scene) -> Change:
    parameters = list(scene.net.parameters())
    vector = torch.nn.utils.parameters_to_vector(parameters).detach() + 1
    return lambda: torch.nn.utils.vector_to_parameters(vector, parameters)


@row(CAUGHT)
def converted_by_swapping(scene: Scene) -> Change:
    def convert() -> None:
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            scene.net.to(torch.float64)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)

    return convert


@row(NOTHING)
def share_memory(scene: Scene) -> Change:
    return lambda: scene.net.share_memory()


# What only looks like the weights: averages, statistics, norms.


@row(COPIED)
def averaged_model(scene: Scene) -> Change:
    average = AveragedModel(scene.net, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(scene.net)
    scene.models["ema"] = average

    def update() -> None:
        average.update_parameters(scene.net)
        average.module.last.weight.data.mul_(2)

    return update


@row(COPIED)
def hand_written_average(scene: Scene) -> Change:
    average = copy.deepcopy(scene.net)
    scene.models["ema"] = average

    def update() -> None:
        for mean, parameter in zip(average.parameters(), scene.net.parameters(), strict=True):
            mean.data.mul_(0.5).add_(parameter.data + 1, alpha=0.5)

    return update


@row(COPIED)
def batch_norm_forward(scene: Scene) -> Change:
    return lambda: scene.net()


@row(COPIED)
def embedding_max_norm(scene: Scene) -> Change:
    scene.net.embedding.max_norm = 1.0
    scene.net.embedding.weight.data.mul_(100)
    return lambda: scene.net.embedding(torch.arange(11))


@row(COPIED)
def embedding_bag_max_norm(scene: Scene) -> Change:
    scene.net.bag = torch.nn.EmbeddingBag(11, 8, max_norm=1.0)
    scene.net.bag.weight.data.mul_(100)
    scene.adam.add_param_group({"params": [scene.net.bag.weight]})
    scene.net.bag.weight.grad = torch.ones_like(scene.net.bag.weight)
    scene.adam.step()
    scene.net.bag.weight.data.mul_(100)
    return lambda: scene.net.bag(torch.arange(11).view(1, -1))


@row(COPIED)
def learning_rate_as_a_tensor(scene: Scene) -> Change:
    scene.adam.param_groups[0]["lr"] = torch.tensor(0.05)
    return lambda: scene.adam.param_groups[0]["lr"].fill_(7.0)


@row(COPIED)
def frozen_parameter(scene: Scene) -> Change:
    scene.net.first.requires_grad_(False)
    scene.adam = torch.optim.AdamW([p for p in scene.net.parameters() if p.requires_grad])
    scene.optimizers["adam"] = scene.adam
    train(scene.net, scene.adam)
    return lambda: scene.net.first.weight.data[3, 3].add_(1)


# Optimizers that are not as torch made them, and what is around them.


class Foreign:
    """Not torch's."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.parameters = list(model.parameters())
        self.momenta = [torch.zeros_like(parameter) for parameter in self.parameters]

    def state_dict(self) -> dict[str, Any]:
        return {"state": dict(enumerate({"momentum": m} for m in self.momenta)), "param_groups": []}

    def step(self) -> None:
        for parameter, momentum in zip(self.parameters, self.momenta, strict=True):
            parameter.data.add_(momentum.data.add_(1.5))


def second(scene: Scene, optimizer: Callable[[Net], Any], *, stepped: bool = True) -> Any:
    """A model of its own, for an optimizer that is in no way joined to the first."""
    model = Net()
    scene.models["second"] = model
    scene.optimizers["second"] = made = optimizer(model)
    if stepped:
        train(model, made)
    return made


@row(COPIED)
def foreign_optimizer(scene: Scene) -> Change:
    return second(scene, Foreign).step


@row(COPIED)
def foreign_optimizer_beside_torch_s_on_the_same_weights(scene: Scene) -> Change:
    foreign = Foreign(scene.net)
    scene.optimizers["foreign"] = foreign
    foreign.step()
    return foreign.step


class OwnStep(torch.optim.Optimizer):
    """Overrides step and never calls super()."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.data.add_(1.25)
            self.state[parameter].setdefault("seen", torch.zeros(30)).data.add_(1)


class OwnSGD(torch.optim.SGD):
    """Overrides step of an optimizer of torch, and never calls super()."""

    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.data.add_(1.25)
            self.state[parameter].setdefault("seen", torch.zeros(30)).data.add_(1)


class Unhooked(torch.optim.SGD):
    """Its step bears the mark of torch's hooks, so that torch does not put them there."""

    @functools.wraps(OPTIMIZERS["SGD"].step)
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.data.add_(1.25)


@row(HELD)
def subclass_with_its_own_step(scene: Scene) -> Change:
    return second(scene, lambda model: OwnStep(model.parameters())).step


@row(HELD)
def subclass_of_sgd_with_its_own_step(scene: Scene) -> Change:
    return second(scene, lambda model: OwnSGD(model.parameters())).step


@row(COPIED)
def step_that_only_bears_the_mark_of_the_hooks(scene: Scene) -> Change:
    return second(scene, lambda model: Unhooked(model.parameters())).step


@row(COPIED)
def step_replaced_on_the_instance(scene: Scene) -> Change:
    def replaced(model: Net) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        optimizer.step = functools.partial(type(optimizer).step.__wrapped__, optimizer)
        return optimizer

    return second(scene, replaced).step


@row(CAUGHT)
def step_replaced_after_it_was_seen(scene: Scene) -> Change:
    scene.adam.step = functools.partial(type(scene.adam).step.__wrapped__, scene.adam)
    return scene.adam.step


@row(HELD)
def pre_hook_of_the_optimizer_changes_weights(scene: Scene) -> Change:
    def hook(optimizer: Any, args: Any, kwargs: Any) -> None:
        scene.weight.data.add_(1)

    scene.adam.register_step_pre_hook(hook)
    return scene.adam.step


@row(HELD)
def accelerated_optimizer(scene: Scene) -> Change:
    accelerator = accelerate.Accelerator(cpu=True)
    scene.net, wrapped = accelerator.prepare(scene.net, scene.adam)
    scene.optimizers["adam"] = wrapped
    return wrapped.step


@row(HELD)
def accelerated_optimizer_with_a_scaler(scene: Scene) -> Change:
    accelerate.Accelerator(cpu=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    wrapped = accelerate.optimizer.AcceleratedOptimizer(scene.adam, scaler=scaler)
    scene.optimizers["adam"] = wrapped

    def scaled() -> None:
        scaler.scale(scene.net()).backward()
        wrapped.step()

    return scaled


@row(HELD)
def grad_scaler(scene: Scene) -> Change:
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scene.further["scaler"] = scaler

    def scaled() -> None:
        scene.adam.zero_grad()
        scaler.scale(scene.net()).backward()
        scaler.step(scene.adam)
        scaler.update()

    return scaled


@row(HELD)
def grad_scaler_and_fused(scene: Scene) -> Change:
    fused = torch.optim.AdamW(scene.net.parameters(), fused=True)
    train(scene.net, fused)
    scene.adam = scene.optimizers["adam"] = fused
    return grad_scaler(scene)


@row(COPIED)
def grad_scaler_that_finds_infinities(scene: Scene) -> Change:
    """The step is left out; only the running statistics of forward changed."""
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)

    def scaled() -> None:
        scaler.scale(scene.net() * float("inf")).backward()
        scaler.step(scene.adam)
        scaler.update()

    return scaled


@row(HELD)
def two_optimizers_that_share_nothing(scene: Scene) -> Change:
    other = second(scene, lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    return lambda: (other.step(), scene.adam.step())


@row(HELD)
def a_second_optimizer_that_never_stepped_before(scene: Scene) -> Change:
    other = second(scene, lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), stepped=False)
    for parameter in scene.models["second"].parameters():
        parameter.grad = torch.ones_like(parameter)
    return other.step


@row(HELD)
def two_optimizers_that_share_weights(scene: Scene) -> Change:
    scene.optimizers["sgd"] = sgd = torch.optim.SGD(scene.net.parameters(), lr=0.1, momentum=0.9)
    train(scene.net, sgd)
    return sgd.step


@row(HELD)
def an_optimizer_that_is_not_saved(scene: Scene) -> Change:
    train(scene.net, sgd := torch.optim.SGD(scene.net.parameters(), lr=0.1))
    return sgd.step


@row(HELD)
def step_in_another_thread(scene: Scene) -> Change:
    def work() -> None:
        thread = threading.Thread(target=scene.adam.step)
        thread.start()
        thread.join(BOUND)
        assert not thread.is_alive()

    return work


@row(HELD)
def step_inside_backward(scene: Scene) -> Change:
    """An optimizer per parameter, called as soon as its gradient is there."""
    steps = {parameter: torch.optim.SGD([parameter], lr=0.1) for parameter in scene.net.parameters()}
    for parameter, optimizer in steps.items():
        optimizer.step()
        parameter.register_post_accumulate_grad_hook(lambda parameter: steps[parameter].step())
    return lambda: scene.net().backward()


@row(HELD)
def compiled_step(scene: Scene) -> Change:
    compiled = torch.compile(scene.adam.step, backend="eager")
    compiled()
    return compiled


@row(HELD)
def step_that_a_scheduler_wrapped(scene: Scene) -> Change:
    scheduler = torch.optim.lr_scheduler.StepLR(scene.adam, 1)
    scene.further["scheduler"] = scheduler
    return lambda: (scene.adam.step(), scheduler.step())


@row(HELD)
def lookahead(scene: Scene) -> Change:
    """A wrapper that moves the weights after the step of what it wraps."""

    def step() -> None:
        scene.adam.step()
        for parameter in scene.net.parameters():
            parameter.data.mul_(0.5)

    return step


@row(HELD)
def gradients_of_several_batches(scene: Scene) -> Change:
    def accumulate() -> None:
        for _ in range(3):
            scene.net().backward()
        torch.nn.utils.clip_grad_norm_(scene.net.parameters(), 1.0)
        scene.adam.step()

    return accumulate


@row(NOTHING)
def zero_grad(scene: Scene) -> Change:
    return lambda: scene.adam.zero_grad(set_to_none=True)


@row(NOTHING)
def zero_grad_in_place(scene: Scene) -> Change:
    return lambda: scene.adam.zero_grad(set_to_none=False)


@row(COPIED)
def backward_alone(scene: Scene) -> Change:
    """Only the running statistics change."""
    return lambda: scene.net().backward()


def run(scene: Scene, change: Change, late: LateCopy, root: Path) -> tuple[str, SimpleNamespace]:
    before = scene.live()
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        handle = scene.save(checkpointer)
        assert late.stopped.wait(BOUND), "something of it is copied late"
        change()
        after = scene.live()
        late.go.set()
        fact = found(scene, handle, before, after, late)
    return fact, SimpleNamespace(before=before, after=after, handle=handle)


@pytest.mark.parametrize("name", TABLE)
def test_what_becomes_of_a_save(root: Path, late: LateCopy, name: str):
    """The change comes before the late copy begins: exactly the fact of the table."""
    fact, prepare = TABLE[name]
    scene = Scene()
    change = prepare(scene)
    seen, run_ = run(scene, change, late, root)
    assert seen == fact
    assert (fact == NOTHING) == same(run_.before, run_.after), "the change shows"
    if fact == CAUGHT:
        assert list(root.glob("checkpoint-*")) == []
    if fact == OUTSIDE:
        assert BOUNDARY in " ".join(inspect.getdoc(AsyncCheckpointer.save).split())


@pytest.mark.parametrize("name", TABLE)
def test_a_change_in_the_middle_of_the_copy(root: Path, late: LateCopy, name: str):
    """Half of every tensor is copied already: still the state at the call, or a StageError; else it is documented."""
    fact, prepare = TABLE[name]
    scene = Scene()
    change = prepare(scene)
    late.midway = True
    seen, _ = run(scene, change, late, root)
    assert seen == fact or (fact == OUTSIDE and seen == KEPT), "an edit of what is copied already does no harm"


@pytest.mark.parametrize("name", [name for name, (fact, _) in TABLE.items() if fact in (CAUGHT, OUTSIDE)])
@pytest.mark.parametrize("how", ["blocking", "staged"])
def test_the_remedies(root: Path, late: LateCopy, name: str, how: str):
    """With staging="blocking", or after `wait_staged()`, the same change comes too late to show."""
    scene = Scene()
    change = TABLE[name][1](scene)
    before = scene.live()
    late.go.set()
    with AsyncCheckpointer(
        root, writer="thread", staging="blocking" if how == "blocking" else "overlap"
    ) as checkpointer:
        handle = scene.save(checkpointer)
        if how == "staged":
            handle.wait_staged(BOUND)
        change()
        assert not same(before, scene.live())
        assert same(scene.stored(handle.result(BOUND).path), before)


FREED = """
import os, sys, threading, torch
from vembed_async_ckpt import AsyncCheckpointer, StageError
from vembed_async_ckpt._memory import staging
from vembed_async_ckpt._memory.barrier import STEP_BARRIER

STEP_BARRIER.install()
model = torch.nn.Linear(2048, 2048)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model(torch.randn(2, 2048)).sum().backward()
optimizer.step()
go, moved = threading.Event(), staging.DeferredCopy.moved
staging.DeferredCopy.moved = lambda late: (go.wait(20), moved(late))[1]
with AsyncCheckpointer(sys.argv[1], writer="thread") as checkpointer:
    handle = checkpointer.save(1, model=model, optimizer=optimizer)
    model.weight.untyped_storage().resize_(0)
    go.set()
    error = handle.exception(20)
assert isinstance(error, StageError), error
assert "weight" in str(error), error
"""


def test_memory_that_is_freed_under_the_copy_fails_the_save_alone(root: Path):
    """`p.untyped_storage().resize_(0)`, as FSDP frees what it gathered: a StageError naming the tensor; the training lives."""
    child = subprocess.run(
        [sys.executable, "-c", FREED, str(root)], capture_output=True, text=True, timeout=120, check=False
    )
    assert child.returncode == 0, child.stderr


PARTS = """
import sys, torch
from vembed_async_ckpt import AsyncCheckpointer, StageError

flat = torch.zeros(3 << 20)
model = torch.nn.Module()
model.large = torch.nn.Parameter(flat[1 << 20 : 2 << 20])
model.small = torch.nn.Parameter(flat[-8:])
model.register_buffer("buffer", flat[4096:8192])
optimizer = torch.optim.SGD([model.large, model.small], lr=0.1)
with AsyncCheckpointer(sys.argv[1], writer="thread") as checkpointer:
    for step in range(3):
        optimizer.step()
        checkpointer.save(step, model=model, optimizer=optimizer).result(20)
    size = flat.untyped_storage().nbytes()
    flat.untyped_storage().resize_(0)
    try:
        checkpointer.save(3, model=model, optimizer=optimizer)
    except StageError as error:
        assert "no memory" in str(error), error
    else:
        raise AssertionError("it was saved")
"""


def test_parts_of_a_memory_that_was_freed_are_refused(root: Path):
    """Their addresses are not zero but their offsets, and reading there would end the training."""
    child = subprocess.run(
        [sys.executable, "-c", PARTS, str(root)], capture_output=True, text=True, timeout=120, check=False
    )
    assert child.returncode == 0, (child.returncode, child.stderr)


def test_memory_that_was_freed_before_the_call_is_refused_by_name(root: Path):
    """Late or not, it is not read; with the memory back, the next save is made."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weight = next(model.parameters())
    with AsyncCheckpointer(root) as checkpointer:
        train(model, optimizer)
        checkpointer.save(1, model=model, optimizer=optimizer).result(60)  # from now on the weight is known, and late
        for freed in (weight, next(model.buffers())):
            size = freed.untyped_storage().nbytes()
            freed.untyped_storage().resize_(0)
            with pytest.raises(StageError, match="no memory"):
                checkpointer.save(2, model=model, optimizer=optimizer)
            freed.untyped_storage().resize_(size)
        checkpointer.save(3, model=model, optimizer=optimizer).result(60)


def _given_up(model: Net, optimizer: torch.optim.Optimizer) -> None:
    """Another parameter took its place in the group: from then on nobody's step would be waited for."""
    group = optimizer.param_groups[0]
    group["params"] = [torch.nn.Parameter(p.clone()) if p is model.last.weight else p for p in group["params"]]


def _strided(model: Net, optimizer: torch.optim.Optimizer) -> None:
    """Its last bytes are elsewhere, perhaps in nobody's memory."""
    weight = model.last.weight
    weight.data = torch.randn(weight.shape[0], 1).expand(weight.shape)


@pytest.mark.parametrize("change", [_given_up, _strided])
def test_a_weight_that_may_not_be_late_any_more_is_copied_at_once(root: Path, late: LateCopy, change: Any):
    """What was settled at an earlier save holds no longer."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer)
    late.go.set()
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        checkpointer.save(1, model=model, optimizer=optimizer).result(BOUND)
        assert "model.safetensors: last.weight" in late.labels
        late.labels.clear()
        change(model, optimizer)
        path = checkpointer.save(2, model=model, optimizer=optimizer).result(BOUND).path
    assert late.labels, "the others are still copied late"
    assert "model.safetensors: last.weight" not in late.labels
    back = Net()
    load(path, model=back)
    assert torch.equal(back.last.weight, model.last.weight)


def test_a_small_weight_that_is_strided_now_is_copied_as_it_is_read(root: Path):
    """`p.data = other` of the same shape and another layout: its bytes in memory are not its values in order."""
    model = torch.nn.Linear(3, 3)
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        checkpointer.save(1, model=model).result(BOUND)
        model.weight.data = torch.randn(3, 3).t()
        path = checkpointer.save(2, model=model).result(BOUND).path
    back = torch.nn.Linear(3, 3)
    load(path, model=back)
    assert torch.equal(back.weight, model.weight)


@pytest.mark.parametrize("view", [torch.conj, torch._neg_view])
def test_a_small_weight_that_says_other_than_its_bytes_is_copied_as_it_is_read(root: Path, view: Any):
    """`p.data = p.data.conj()`: torch only notes that it is conjugate, or negative."""
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.randn(3, dtype=torch.complex64))
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        checkpointer.save(1, model=model).result(BOUND)
        model.weight.data = view(model.weight.data)
        path = checkpointer.save(2, model=model).result(BOUND).path
    back = torch.nn.Module()
    back.weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    load(path, model=back)
    assert torch.equal(back.weight, model.weight)
