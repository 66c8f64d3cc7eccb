"""FSDP through accelerate and Trainer, on two ranks (gloo, on the CPU)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

from vembed_async_ckpt.integrations.accelerate import save_state

from . import networks, tiny_llama
from .launch import run_ranks


def test_accelerate_saves_and_resumes(tmp_path: Path):
    """`save_state` and `save_checkpoint` with FSDP of either version write one directory, from which either version goes on.

    So does each from what one process saved. `load` and, after `attach`, `load_state` do the same. Without `attach`,
    `load_state` says what to do, and changes nothing.
    """
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    words = torch.randint(0, networks.WORDS, (96, 4))
    training = networks.Training(0)
    training.optimizer = torch.optim.AdamW(training.model.parameters(), lr=0.05)  # in one group
    training.scheduler = torch.optim.lr_scheduler.StepLR(training.optimizer, 2)
    accelerator.prepare(
        training.model, training.optimizer, training.scheduler, DataLoader(TensorDataset(words), batch_size=6)
    )
    training.steps(range(3))
    save_state(accelerator, tmp_path / "whole" / "checkpoint-3").result(60)
    accelerator.end_training()
    for report in run_ranks("accelerated.py", 2, str(tmp_path)):
        assert report["whole"]["1"] == report["whole"]["2"]
        assert "call vembed_async_ckpt.integrations.accelerate.attach(accelerator) first" in report["unattached"]
        assert report["saved"]["1"] == report["saved"]["2"]
        of_save_state, of_save_checkpoint = report["saved"]["1"]["files"]
        assert {"model.safetensors", "optimizer.safetensors", "random_states_1.pkl"} < set(of_save_state)
        assert set(of_save_state) < set(of_save_checkpoint)
        assert list(report["resumed"].values()) == [True] * 4, report["resumed"]


def test_trainer_saves_and_resumes(tmp_path: Path, one_thread: None):
    """Trainer with FSDP of either version resumes what either version or one process saved, and one process resumes that.

    `save_total_limit` deletes the older checkpoint, and `from_pretrained` opens the newer one.
    """
    whole = tiny_llama.trainer(tmp_path / "whole")
    whole.train()
    for report in run_ranks("trained.py", 2, str(tmp_path)):
        (losses,) = {tuple(losses.items()) for losses in report["whole"].values()}
        assert [step for step, _ in losses] == ["3", "4"]
        saved = report["saved"]["1"]
        assert report["saved"]["2"] == saved
        assert list(saved) == ["1", "2", "3", "4"]
        for task, losses in report["resumed"].items():
            assert losses == {step: saved[step] for step in ("3", "4")}, task
    assert [path.name for path in (tmp_path / "resumed").glob("checkpoint-*")] == ["checkpoint-4"]
    opened = tiny_llama.LlamaForCausalLM.from_pretrained(tmp_path / "v2" / "checkpoint-4")
    stored = load_file(tmp_path / "v2" / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(opened.state_dict()[name], tensor) for name, tensor in stored.items())
    resumed = tiny_llama.trainer(tmp_path / "alone")
    with pytest.warns(UserWarning, match="was saved by 2 ranks and is loaded by 1"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "v1" / "checkpoint-2"))
    assert resumed.optimizer.state_dict()["state"][0]["step"] == 4
