"""One call in place of loops over the tensors: it notices what they notice, and where it cannot be had the loops look."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vembed_async_ckpt import AsyncCheckpointer, load
from vembed_async_ckpt import _tensor_guard as guards
from vembed_async_ckpt._tensor_guard import TensorGuard

CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "dtype": lambda t: t.to(torch.complex128),
    "shape": lambda t: t[:3],
    "strides": lambda t: torch.empty(4, 4, dtype=t.dtype).t().copy_(t),
    "conjugate": torch.conj,
    "negative": torch._neg_view,
    "device": lambda t: t.to("meta"),
    "class": torch.nn.Parameter,
}


@pytest.fixture(params=["guards of torch", "loops"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With torch's private guards, and as with a version of torch that has none."""
    if request.param == "loops":
        monkeypatch.setattr(guards, "_GUARDS", None)
    else:
        assert guards._GUARDS is not None, "this torch has no working TensorGuards: every save takes the loops"
    return str(request.param)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("place", [0, 7, 15])
def test_a_tensor_that_looks_otherwise_is_noticed(way: str, change: str, place: int) -> None:
    """Whichever it is. Other values are no difference, nor is whether gradients are required."""
    tensors = [torch.ones(4, 4, dtype=torch.complex64) for _ in range(16)]
    guard = TensorGuard(tensors)
    assert guard.holds([tensor.clone() for tensor in tensors])
    tensors[place] = CHANGES[change](tensors[place])
    assert not guard.holds(tensors)
    assert not guard.holds(tensors[:-1])
    assert not guard.holds([])


def test_what_is_no_part_of_a_look(way: str) -> None:
    """Whether gradients are required, and modes in which torch's guard says no to anything."""
    tensors = [torch.ones(4) for _ in range(3)]
    guard = TensorGuard(tensors)
    tensors[1].requires_grad_()
    for _ in range(2):
        assert guard.holds(tensors)
    with torch.autocast("cpu"):
        assert guard.holds(tensors)
    assert guard.holds(tensors)
    assert not guard.holds([*tensors[:2], torch.ones(5)])


def test_tensors_without_strides(way: str) -> None:
    dense, sparse = torch.eye(3), torch.eye(3).to_sparse()
    guard = TensorGuard([dense, sparse])
    assert guard.holds([dense, sparse])
    assert not guard.holds([sparse, dense])


def test_an_inference_tensor_is_noticed(way: str) -> None:
    """It has no version: nothing would tell that it was changed."""
    guard = TensorGuard([torch.ones(3)])
    with torch.inference_mode():
        other = torch.ones(3)
    assert not guard.holds([other])


def test_a_guard_holds_no_tensor(way: str) -> None:
    import weakref

    tensor = torch.ones(3)
    gone = weakref.ref(tensor)
    guard = TensorGuard([tensor])
    del tensor
    assert gone() is None
    assert guard.holds([torch.zeros(3)])


@pytest.mark.parametrize("mode", [torch.no_grad, lambda: torch.autocast("cpu"), torch.inference_mode], ids=str)
def test_saves_between_changes_of_everything(root: Path, way: str, mode: Callable[[], Any]) -> None:
    """Dtypes, shapes, strides and whether gradients are required change between saves; each is saved as it is, whichever mode
    `save()` is called in."""
    model = torch.nn.Sequential(torch.nn.Linear(40, 40), torch.nn.Linear(40, 40))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def step() -> None:
        model(torch.ones(2, 40, dtype=model[0].weight.dtype)).float().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def state() -> dict[str, torch.Tensor]:
        found = {name: value.clone() for name, value in model.state_dict().items()}
        for number, entry in optimizer.state_dict()["state"].items():
            found |= {f"{number}.{key}": value.clone() for key, value in entry.items()}
        return found

    def transpose() -> None:
        for entry in optimizer.state.values():
            for key, value in entry.items():
                if value.dim() == 2:
                    entry[key] = value.t().contiguous().t()

    def widen() -> None:
        for parameter in model.parameters():
            for key, value in optimizer.state[parameter].items():
                if value.numel() > 1:
                    optimizer.state[parameter][key] = value.double()

    changes = [
        lambda: None,
        transpose,
        widen,
        lambda: model[0].bias.requires_grad_(False),
        lambda: model.to(torch.float64),
    ]
    with AsyncCheckpointer(root) as checkpointer:
        for _ in range(2):
            step()
        for number, change in enumerate(changes):
            change()
            for turn in range(2):
                expected = state()
                with mode():
                    path = checkpointer.save(2 * number + turn, model=model, optimizer=optimizer).result(60).path
                load(path, model=model, optimizer=optimizer)
                restored = state()
                for name, value in expected.items():
                    assert torch.equal(value, restored[name]), (number, name)
                    assert (value.dtype, value.stride()) == (restored[name].dtype, restored[name].stride()), name
