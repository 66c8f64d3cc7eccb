"""FSDP through accelerate and Trainer, on two ranks (gloo, on the CPU)."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from vembed_async_ckpt.integrations.accelerate import save_state

from . import networks
from .launch import run_ranks


def test_accelerate_resumes_with_fsdp(tmp_path: Path):
    """After `attach`, `load_state` puts what one process saved into FSDP models of either version, and both train on alike.

    Without `attach` it says what to do, and changes nothing.
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
