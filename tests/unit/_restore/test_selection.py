"""`load(strict=, exclude=)` and loads of less than everything."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from vembed_async_ckpt import AsyncCheckpointer, CheckpointError, CorruptCheckpoint, load
from vembed_async_ckpt._format import names

BOUND = 30


class Net(torch.nn.Module):
    def __init__(self, seed: int, classes: int = 3) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
        self.head = torch.nn.Linear(4, classes)


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def training(seed: int, **options: Any) -> dict[str, Any]:
    model = Net(seed, **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1 * seed)
    step(model, optimizer)
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, step_size=seed),
    }


@pytest.fixture
def saved(root: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    objects = training(1)
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        path = checkpointer.save(1, **objects, extra={"note": 1}).result(BOUND).path
    return path, {name: tensor.clone() for name, tensor in objects["model"].state_dict().items()}


def equal(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if torch.equal(tensor, state[name])}


HEAD = {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ("head", HEAD),
        (["head.weight", "head.bias"], HEAD),
        (("head.*",), HEAD),
        (["head.weight"], {"head.weight"}),
        (["*.bias"], {"head.bias", "body.0.bias", "body.1.bias"}),
        (["body.1.running_mean"], {"body.1.running_mean"}),
        (["h[a-e]ad.b*"], {"head.bias"}),
    ],
    ids=str,
)
def test_what_is_excluded_stays_as_it_is(saved: Any, exclude: Any, left: set[str]):
    """All else is loaded. With another shape, it is no misfit."""
    path, state = saved
    model = Net(2)
    for parameter in model.body[1].parameters():
        parameter.data.fill_(7.0)
    model.body[1].running_mean.fill_(7.0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    load(path, model=model, exclude=exclude)
    assert left <= equal(model, before)
    assert equal(model, state) >= set(state) - left
    if left == HEAD:
        other = Net(2, classes=5)
        load(path, model=other, exclude=exclude)
        assert set(state) - left == {
            name for name in set(state) - left if torch.equal(other.state_dict()[name], state[name])
        }


def test_a_part_that_the_model_has_not(saved: Any):
    """Excluded, it is no misfit either; by the name of a model in a mapping too."""
    path, state = saved
    model = Net(2)
    del model.head
    with pytest.raises(CheckpointError, match=r"head.weight is not in the model.*strict=False"):
        load(path, model=model)
    load(path, model=model, exclude="head")
    assert torch.equal(model.body[0].weight, state["body.0.weight"])


def test_names_of_models_in_a_mapping(root: Path):
    """The same name in two models: with the model's name in front it means one of them."""
    models = {"one": Net(1), "two": Net(2)}
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        path = checkpointer.save(1, model=models).result(BOUND).path
    fresh = {"one": Net(3), "two": Net(3)}
    load(path, model=fresh, exclude="one.head")
    assert torch.equal(fresh["one"].head.weight, Net(3).head.weight)
    assert torch.equal(fresh["two"].head.weight, models["two"].head.weight)
    assert torch.equal(fresh["one"].body[0].weight, models["one"].body[0].weight)


def test_a_name_that_nothing_has_is_an_error(saved: Any):
    """Before anything is changed: it may be misspelt."""
    path, _ = saved
    model = Net(2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="exclude: nothing is named 'haed'"):
        load(path, model=model, exclude=["haed", "body"])
    assert equal(model, before) == set(before)
    with pytest.raises(TypeError, match="exclude: 3"):
        load(path, model=model, exclude=[3])  # type: ignore[list-item]


@pytest.mark.parametrize("what", ["optimizer", "scheduler", "rng"])
def test_objects_can_be_excluded(saved: Any, what: str):
    """They stay as they were; the others are loaded."""
    path, state = saved
    objects = training(2)
    before = {name: objects[name].state_dict() for name in ("optimizer", "scheduler")}
    rates = {"optimizer": before["optimizer"]["param_groups"][0]["lr"], "scheduler": before["scheduler"]["step_size"]}
    torch.manual_seed(99)
    random = torch.get_rng_state()
    load(path, **objects, exclude=what)
    assert equal(objects["model"], state) == set(state)
    now = {
        "optimizer": objects["optimizer"].param_groups[0]["lr"] == rates["optimizer"],
        "scheduler": objects["scheduler"].step_size == rates["scheduler"],
        "rng": torch.equal(torch.get_rng_state(), random),
    }
    assert now == {"optimizer": False, "scheduler": False, "rng": False} | {what: True}


def test_what_fits_is_loaded(saved: Any):
    """strict=False: other shapes, missing and further parameters are named in one warning and stay as they are, and so does the
    optimizer whose groups are others."""
    path, state = saved
    objects = training(2, classes=5)
    objects["model"].more = torch.nn.Linear(2, 2)
    objects["optimizer"].add_param_group({"params": list(objects["model"].more.parameters())})
    del objects["model"].body[1]
    before = {name: tensor.clone() for name, tensor in objects["model"].state_dict().items()}
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load(path, **objects)
    assert equal(objects["model"], before) == set(before)
    with pytest.warns(
        UserWarning, match=r"not loaded: .*body.1.weight is not in the model.*head.weight has shape.*more.*optimizer"
    ):
        load(path, **objects, strict=False)
    after = objects["model"].state_dict()
    assert torch.equal(after["body.0.weight"], state["body.0.weight"])
    assert torch.equal(after["head.weight"], before["head.weight"])
    assert torch.equal(after["more.weight"], before["more.weight"])
    assert objects["optimizer"].param_groups[0]["lr"] == 0.2
    assert objects["scheduler"].step_size == 1


def test_damage_is_no_misfit(saved: Any):
    """strict=False loads what fits, not what is broken."""
    path, _ = saved
    with open(path / "optimizer.bin", "r+b") as file:
        file.truncate(100)
    with pytest.raises(CorruptCheckpoint, match=r"optimizer\.bin"):
        load(path, **training(2), strict=False)


@pytest.mark.parametrize("verify", ["size", "full", "none"])
def test_weights_alone_need_their_files_alone(saved: Any, verify: Any):
    """All other large files may be gone: the directory of somebody who keeps weights only."""
    path, state = saved
    kept = {"model.safetensors", names.MANIFEST, names.TRAINING_STATE, names.TRAINING_TENSORS}
    for file in path.iterdir():
        if file.name not in kept:
            os.unlink(file)
    model = Net(2)
    assert load(path, model=model, verify=verify).extra == {"note": 1}
    assert equal(model, state) == set(state)
    with pytest.raises(CorruptCheckpoint, match=r"optimizer\.bin"):
        load(path, **training(2), verify=verify)


def test_an_optimizer_alone_needs_no_weights(saved: Any):
    """Nor does a scheduler need the optimizer's file."""
    path, _ = saved
    os.unlink(path / "model.safetensors")
    objects = training(2)
    load(path, optimizer=objects["optimizer"])
    assert objects["optimizer"].param_groups[0]["lr"] == 0.1
    os.unlink(path / "optimizer.bin")
    load(path, scheduler=objects["scheduler"])
    assert objects["scheduler"].step_size == 1
    with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors.*missing"):
        load(path, model=objects["model"])


@pytest.fixture(autouse=True)
def root(tmp_path: Path) -> Path:
    """Not looked at afterwards: these directories lose files."""
    return tmp_path / "checkpoints"
