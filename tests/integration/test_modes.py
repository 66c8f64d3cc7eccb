"""torch's modes around each call: what is saved and loaded is the same, and is real, in all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from vembed_async_ckpt import AsyncCheckpointer, CheckpointError, PlanError, load

from ..parity.architectures import build
from ..parity.checks import BOUND, differing, state


class Refusing(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} went through the mode")


class RefusingBelow(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} went through the mode")


@contextlib.contextmanager
def setting(set_to: Callable[[Any], None], value: Any, before: Any) -> Iterator[None]:
    set_to(value)
    try:
        yield
    finally:
        set_to(before)


MODES: dict[str, Callable[[], Any]] = {
    "device": lambda: torch.device("meta"),
    "default device": lambda: setting(torch.set_default_device, "meta", None),
    "float64": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "bfloat16": lambda: setting(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": lambda: setting(torch.use_deterministic_algorithms, True, False),
    "anomaly": lambda: torch.autograd.detect_anomaly(check_nan=True),
    "function mode": Refusing,
    "dispatch mode": RefusingBelow,
    "fake tensors": FakeTensorMode,
    "several": lambda: _several(),
}


@contextlib.contextmanager
def _several() -> Iterator[None]:
    with torch.device("meta"), FakeTensorMode(), torch.inference_mode(), Refusing(), RefusingBelow():
        yield


class Net(torch.nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.convolution = torch.nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last)
        self.norm = torch.nn.BatchNorm2d(4)
        self.narrow = torch.nn.Parameter(torch.randn(8).bfloat16())
        self.register_buffer("count", torch.arange(3))

    def forward(self) -> torch.Tensor:
        return self.norm(self.convolution(torch.ones(2, 2, 5, 5))).pow(2).sum() + self.narrow.float().sum()


class Training:
    def __init__(self, seed: int, steps: int) -> None:
        self.model = Net(seed)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2)
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        self.model().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()

    def objects(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}


PHASES = ["construct", "prewarm", "save", "close", "load"]


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("phase", [*PHASES, "all"])
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_around_a_call(root: Path, mode: str, phase: str):
    """The resumed run is the uninterrupted one, bit for bit; nothing restored is an inference tensor; the mode is on afterwards."""
    training, fresh, stepped = Training(1, 3), Training(2, 0), Training(3, 2)

    def in_mode(this: str) -> Any:
        return MODES[mode]() if phase in (this, "all") else contextlib.nullcontext()

    def modes() -> Any:
        stacks = torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()
        return *stacks, torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()

    with in_mode("construct"):
        checkpointer = AsyncCheckpointer(root, writer="thread")
    with in_mode("prewarm"):
        checkpointer.prewarm(model=training.model, optimizer=training.optimizer)
    extra = {"tensor": torch.arange(3.0), "array": np.arange(4)}
    with in_mode("save"):
        before = modes()
        checkpointer.save(1, **training.objects(), extra=extra)
        handle = checkpointer.save(2, **training.objects(), extra=extra)
        assert modes() == before
    path = handle.result(BOUND).path
    with in_mode("close"):
        checkpointer.close()
    expected = state(training.model)
    for other in (fresh, stepped):
        with in_mode("load"):
            restored = load(path, **other.objects())
        assert differing(state(other.model), expected) == []
        assert restored.extra["tensor"].device.type == "cpu"
        assert restored.extra["tensor"].tolist() == [0.0, 1.0, 2.0]
        tensors = [*other.model.parameters(), *other.model.buffers(), restored.extra["tensor"]]
        tensors += [value for entry in other.optimizer.state.values() for value in entry.values()]
        assert not any(tensor.is_inference() or tensor.is_meta for tensor in tensors)
        assert all(parameter.requires_grad for parameter in other.model.parameters())
    for each in (training, fresh, stepped):
        each.step()
    for other in (fresh, stepped):
        assert differing(state(other.model), state(training.model)) == []


@pytest.mark.parametrize(
    "mode", ["device", "default device", "bfloat16", "inference", "autocast", "fake tensors", "several"]
)
@pytest.mark.parametrize("family", ["Llama", "Mixtral, parts"])
def test_models_of_transformers(root: Path, family: str, mode: str):
    """Also of a family whose saving and loading compute."""
    model, fresh = build(family, 1), build(family, 2)
    expected = state(model)
    with MODES[mode](), AsyncCheckpointer(root, writer="thread") as checkpointer:
        path = checkpointer.save(1, model=model).result(BOUND).path
        load(path, model=fresh)
    assert differing(state(fresh), expected) == []
    assert differing(state(hf.AutoModelForCausalLM.from_pretrained(path)), expected) == []
    assert not any(parameter.is_inference() for parameter in fresh.parameters())


def test_a_model_made_in_inference_mode(root: Path):
    """It can be saved, and loaded into, in another dtype too; it stays what it is."""
    with torch.inference_mode():
        model, fresh, half = Net(1), Net(2), Net(3).half()
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        path = checkpointer.save(1, model=model).result(BOUND).path
    load(path, model=fresh)
    assert differing(state(fresh), state(model)) == []
    load(path, model=half)
    assert torch.equal(half.convolution.weight, model.convolution.weight.half())
    assert half.convolution.weight.is_inference()


def test_a_fake_model_is_refused(root: Path):
    """It has no values. The next save works."""
    with FakeTensorMode():
        fake = torch.nn.Linear(2, 2)
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        with pytest.raises(PlanError, match=r"weight.*FakeTensor"):
            checkpointer.save(1, model=fake)
        path = checkpointer.save(1, model=torch.nn.Linear(2, 2)).result(BOUND).path
    with pytest.raises(CheckpointError, match=r"weight is a FakeTensor and has no memory"):
        load(path, model=fake)


def test_inside_a_compiled_region(root: Path):
    """save() and load() are not recorded: they do what they do elsewhere, and the region computes what it says."""
    training, fresh = Training(1, 3), Training(2, 0)
    checkpointer = AsyncCheckpointer(root, writer="thread")

    @torch.compile(backend="eager")
    def saving(values: torch.Tensor, step: int) -> torch.Tensor:
        doubled = values * 2
        checkpointer.save(step, **training.objects())
        return doubled + 1

    @torch.compile(backend="eager")
    def loading(values: torch.Tensor) -> torch.Tensor:
        doubled = values * 2
        load(root / "checkpoint-2", **fresh.objects())
        return doubled + 1

    for step in (1, 2):
        assert saving(torch.ones(3), step).tolist() == [3.0] * 3
    checkpointer.close()
    assert loading(torch.ones(3)).tolist() == [3.0] * 3
    assert differing(state(fresh.model), state(training.model)) == []


def test_warnings_name_the_line_of_the_caller(root: Path):
    """Not one of ours, or of torch's, whatever lies between."""
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        with pytest.warns(UserWarning, match="left out of the saved config") as caught:
            path = checkpointer.save(1, model=torch.nn.Linear(2, 2), config={"live": object()}).result(BOUND).path
        assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="not loaded") as caught:
        load(path, model=torch.nn.Linear(3, 2), strict=False)
    assert caught[0].filename == __file__
