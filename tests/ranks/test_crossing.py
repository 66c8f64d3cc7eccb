"""What N ranks saved, M ranks load, divided in another way (gloo, on the CPU)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vembed_async_ckpt import load, verify

from . import networks
from .launch import run_ranks


def test_any_number_of_ranks_goes_on(tmp_path: Path, one_thread: None):
    """1, 2 and 4 ranks, FSDP of both versions, HSDP and DDP: every tensor is what was saved, and three further losses are equal.

    Every rank draws the random numbers that the rank of its number would have drawn.
    """
    rounds = [
        (2, ["save=fsdp2", "save=fsdp1", "save=ddp"]),
        (4, ["load=fsdp2-2:fsdp1", "load=fsdp1-2:hsdp", "load=ddp-2:fsdp2", "save=fsdp2", "save=fsdp1"]),
        (2, ["load=fsdp2-4:fsdp1", "load=fsdp1-4:ddp", "load=fsdp1-2:fsdp2"]),
    ]
    for world_size, tasks in rounds:
        for report in run_ranks("crossing.py", world_size, str(tmp_path), *tasks):
            assert len(report) == sum(task.startswith("load") for task in tasks)
            for task, found in report.items():
                assert found == {"differing": [], "losses": True, "random": True}, task
    for directory in ("fsdp2-2", "fsdp1-2", "fsdp2-4", "fsdp1-4"):
        path = tmp_path / directory / "checkpoint-7"
        verify(path)
        expected = torch.load(tmp_path / directory / "expected-0.pt", weights_only=True)
        state = {name.replace(": ", "."): tensor for name, tensor in expected["state"].items() if ": " in name}
        stored = load_file(path / "optimizer.safetensors")
        assert stored.keys() == state.keys()
        assert all(torch.equal(stored[name], tensor) for name, tensor in state.items())
        training = networks.Training(3)
        with pytest.warns(UserWarning, match=f"was saved by {directory[-1]} ranks and is loaded by 1"):
            load(path, **training.parts())
        assert networks.differing(training, expected["state"]) == []
        assert training.steps(range(3)) == expected["losses"]
