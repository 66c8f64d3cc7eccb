"""Directories that commit 0d9e713 wrote load as they did then. What they must give is read from them by torch and safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from vembed_async_ckpt import CheckpointError, load, verify

WRITTEN = Path(__file__).parent / "data" / "written_by_0d9e713"


def dense() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 2))


def conv() -> torch.nn.Module:
    layers = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 3)
    return torch.nn.Sequential(*layers).to(memory_format=torch.channels_last)


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key])
    else:
        assert found == expected


@pytest.mark.parametrize("name", sorted(path.name for path in WRITTEN.iterdir()))
def test_every_one_is_whole(name: str):
    """Its hashes are those of its manifest."""
    assert verify(WRITTEN / name) is not None


def test_a_training_comes_back():
    """Model, optimizer, scheduler, scaler, extra, config and metrics."""
    path = WRITTEN / "plain"
    model = dense()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 9)
    scaler = torch.amp.GradScaler("cpu")
    restored = load(path, model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler, verify="full")
    assert_same(dict(model.state_dict()), load_file(path / "model.safetensors"))
    assert_same(optimizer.state_dict(), torch.load(path / "optimizer.bin"))
    assert_same(scheduler.state_dict(), torch.load(path / "scheduler.bin"))
    assert_same(scaler.state_dict(), torch.load(path / "scaler.pt"))
    assert (restored.step, restored.config, restored.metrics) == (7, {"lr": 0.1}, {"loss": 0.25})
    extra = restored.extra
    assert_same(extra.pop("tensor"), torch.arange(6.0).view(2, 3))
    assert np.array_equal(extra.pop("array"), np.arange(3))
    assert type(extra["scalar"]) is np.float32
    assert extra == {
        "list": [1, 2.5, None, float("inf")],
        "tuple": (b"x", {1: "one"}),
        "scalar": np.float32(0.5),
        "$odd": True,
    }


def test_several_models_and_optimizers_come_back():
    """By their names, with the names that an optimizer knows its parameters by."""
    path = WRITTEN / "two_models"
    models = {"query": dense(), "document": dense()}
    optimizers = {
        "query": torch.optim.SGD(models["query"].parameters(), lr=0.5, momentum=0.9),
        "document": torch.optim.Adam(models["document"].named_parameters(), lr=0.5, amsgrad=True),
    }
    load(path, model=models, optimizer=optimizers)
    for name, file in (("query", "optimizer.bin"), ("document", "optimizer_1.bin")):
        assert_same(dict(models[name].state_dict()), load_file(path / name / "model.safetensors"))
        assert_same(optimizers[name].state_dict(), torch.load(path / file))


def test_what_save_checkpoint_wrote_comes_back():
    """Into what an accelerator has prepared."""
    path = WRITTEN / "save_checkpoint"
    accelerator = Accelerator(cpu=True)
    model = dense()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    prepared = accelerator.prepare(model, optimizer, scheduler)
    load(path, accelerator=accelerator)
    assert_same(dict(prepared[0].state_dict()), load_file(path / "model.safetensors"))
    assert_same(optimizer.state_dict(), torch.load(path / "optimizer.bin"))
    assert_same(scheduler.state_dict(), torch.load(path / "scheduler.bin"))


def test_state_of_a_channels_last_model_comes_back():
    """The values, which were written without their strides, in the memory format of the parameters: a fused step needs it."""
    path = WRITTEN / "channels_last_fused"
    model = conv()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, fused=True)
    load(path, model=model, optimizer=optimizer)
    assert_same(dict(model.state_dict()), load_file(path / "model.safetensors"))
    assert_same(optimizer.state_dict(), torch.load(path / "optimizer.bin"))
    for parameter, entry in optimizer.state.items():
        assert {entry[key].stride() for key in ("exp_avg", "exp_avg_sq")} == {parameter.stride()}


def test_state_goes_by_order_and_is_compared_with_the_parameters():
    """These directories know parameters by number only: other shapes, groups or kinds are refused before anything is changed."""
    path = WRITTEN / "plain"
    model = dense()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    reverse = torch.optim.AdamW(list(model.parameters())[::-1])
    with pytest.raises(CheckpointError, match=r"parameter 0 has shape \(2,\), its saved exp_avg has \(5, 4\)"):
        load(path, model=model, optimizer=reverse)
    grouped = torch.optim.AdamW([{"params": [p for p in model.parameters() if p.dim() == dim]} for dim in (1, 2)])
    with pytest.raises(CheckpointError, match=r"groups of \[4, 2\] parameters, saved were \[6\]"):
        load(path, model=model, optimizer=grouped)
    with pytest.raises(CheckpointError, match=r"cannot go into a torch.optim.sgd.SGD \(only saved: amsgrad, betas"):
        load(path, model=model, optimizer=torch.optim.SGD(model.parameters()))
    scheduler = torch.optim.lr_scheduler.LinearLR(reverse)
    with pytest.raises(CheckpointError, match=r"cannot go into a torch\.optim\.lr_scheduler\.LinearLR"):
        load(path, model=model, scheduler=scheduler)
    assert_same(dict(model.state_dict()), before)


def test_parameters_that_know_their_names_are_matched_by_them():
    """An optimizer made from named_parameters() wrote their names then, too."""
    path = WRITTEN / "two_models"
    models = {"query": dense(), "document": dense()}
    optimizer = torch.optim.Adam(list(models["document"].named_parameters())[::-1], lr=0.5, amsgrad=True)
    load(path, model=models, optimizer={"document": optimizer})
    saved = torch.load(path / "optimizer_1.bin")
    for number, parameter in enumerate(models["document"].parameters()):
        assert_same(optimizer.state[parameter], saved["state"][number])
