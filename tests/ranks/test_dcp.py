"""`dcp.save`, `dcp.async_save` and `dcp.load` through us: FSDP2 with AdamW on two ranks, and one process afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from vembed_async_ckpt import AsyncCheckpointer, CheckpointerBusy, PlanError, checkpoints, load, verify
from vembed_async_ckpt.integrations.dcp import StorageReader, StorageWriter

from .launch import run_ranks

# torch warns whenever it saves or loads without a process group, which is what these tests want.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def test_two_ranks_save_and_load(tmp_path: Path) -> None:
    """The weights file is the one that one process would write; the next three losses after a load are bit-equal; a rank
    that fails fails the save on all, and nothing of it is left or visible."""
    first, second = run_ranks("dcp_ranks.py", 2, str(tmp_path))
    assert first.pop("same_bytes")
    for report in (first, second):
        assert report["step"] == 5
        assert report["latest"] == str(tmp_path / "run" / "checkpoint-6")
        assert report["loaded"] == [5, {"note": "grün"}]
        assert report["resumed"]
        assert report["kept"] == "mine"
        assert "No space left on device" in report["failed"]
        assert report["left"] == ["checkpoint-5", "checkpoint-6"]
        assert "several parts of it" in report["strided"]
        assert "no path is given" in report["remote"]
    root = tmp_path / "run"
    assert [entry.complete for entry in checkpoints(root)] == [True, True]
    assert [entry.step for entry in checkpoints(root)] == [5, 6], "the one that was saved last comes first"
    model = torch.nn.Sequential(
        torch.nn.Linear(7, 5), torch.nn.Linear(5, 3, dtype=torch.bfloat16), torch.nn.BatchNorm1d(3)
    )
    assert load(root / "checkpoint-5", model=model).step == 5
    assert (root / "checkpoint-5" / "config.json").exists() is False, "it belonged to the checkpoint that was replaced"


def test_one_process_without_ranks(tmp_path: Path) -> None:
    """Every dtype, strides, empty and 0-dim tensors come back bit for bit; so does what is no tensor."""
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = {
        "a": base.t(),
        "b": base[::2, 1::2],
        "empty": torch.empty(0, 3),
        "zero": torch.tensor(-0.0),
        "nan": torch.tensor([float("nan"), 1.0]).view(torch.int32).view(torch.float32),
        "half": base.bfloat16(),
        "flag": torch.tensor([True, False]),
        "c64": torch.randn(3, dtype=torch.complex64).conj(),
        "nested": {"list": [1, "two", {"three": torch.ones(2, dtype=torch.int64)}]},
    }
    path = tmp_path / "checkpoint-1"
    dcp.save(state, storage_writer=StorageWriter(path), no_dist=True)
    assert verify(path).step == 1
    target: dict[str, Any] = {
        key: torch.full_like(value, 0).contiguous() if isinstance(value, torch.Tensor) else value
        for key, value in state.items()
    }
    target["b"] = torch.zeros(6, 4).t()[::2, 1::2].t()[:3, :2].t()  # a place that is not contiguous
    target["nested"] = {"list": [0, "", {"three": torch.zeros(2, dtype=torch.int64)}]}
    dcp.load(target, storage_reader=StorageReader(path), no_dist=True)
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            assert target[key].resolve_conj().contiguous().reshape(-1).view(torch.uint8).tolist() == (
                value.resolve_conj().contiguous().reshape(-1).view(torch.uint8).tolist()
            ), key
    assert target["nested"]["list"][:2] == [1, "two"]
    assert torch.equal(target["nested"]["list"][2]["three"], torch.ones(2, dtype=torch.int64))


def test_the_weights_of_an_ordinary_checkpoint(tmp_path: Path) -> None:
    """Code on torch.distributed.checkpoint reads what `AsyncCheckpointer` wrote."""
    model = torch.nn.Linear(3, 2)
    with AsyncCheckpointer(tmp_path) as checkpointer:
        path = checkpointer.save(1, model=model).result(60).path
    state = {"model": torch.nn.Linear(3, 2).state_dict()}
    dcp.load(state, storage_reader=StorageReader(path, prefix="model."), no_dist=True)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state["model"].items())


def test_what_is_refused_touches_nothing(tmp_path: Path) -> None:
    """Names that leave the directory, a dtype that safetensors does not have, and a root that somebody else holds."""
    for name in ("../x", "model.safetensors", "vembed_manifest.json", "vembed_dcp_objects/0.bin"):
        with pytest.raises(PlanError, match="name of a further file"):
            StorageWriter(tmp_path / "a", files={name: b""})
    with pytest.raises(CheckpointException, match="complex128"):
        dcp.save(
            {"x": torch.zeros(2, dtype=torch.complex128)}, storage_writer=StorageWriter(tmp_path / "a"), no_dist=True
        )
    assert list(tmp_path.iterdir()) == []
    with AsyncCheckpointer(tmp_path), pytest.raises(CheckpointException) as failed:
        dcp.save({"x": torch.zeros(2)}, storage_writer=StorageWriter(tmp_path / "a"), no_dist=True)
    assert isinstance(failed.value.failures[0][0], CheckpointerBusy)
    assert list(tmp_path.iterdir()) == []


def test_a_corrupt_byte_is_found(tmp_path: Path) -> None:
    """With `verify="full"` before anything is loaded."""
    path = tmp_path / "checkpoint-1"
    dcp.save({"x": torch.zeros(64)}, storage_writer=StorageWriter(path), no_dist=True)
    with (path / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\1")
    target = {"x": torch.full((64,), 7.0)}
    with pytest.raises(CheckpointException, match="content differs"):
        dcp.load(target, storage_reader=StorageReader(path, verify="full"), no_dist=True)
    assert torch.equal(target["x"], torch.full((64,), 7.0))
