"""One of two ranks: accelerate with FSDP, both versions: saves, and resumes what either version or one process saved.

accelerated.py DIRECTORY. Prints what happened as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

import cpu_fsdp
import networks
from torch.utils.data import DataLoader, TensorDataset

from vembed_async_ckpt import CheckpointError, load
from vembed_async_ckpt.integrations.accelerate import attach
from vembed_async_ckpt.integrations.accelerate_hooks import look_after

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


class Run:
    """A training whose batches are shuffled and differ between the ranks."""

    def __init__(self, version: int, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.accelerator = cpu_fsdp.accelerator(version, "Block")
        words = torch.randint(0, networks.WORDS, (96, 4), generator=torch.Generator().manual_seed(1))
        loader = DataLoader(TensorDataset(words), batch_size=6, shuffle=True)
        net = networks.Net()
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        self.model, self.optimizer, self.scheduler, self.loader = self.accelerator.prepare(
            net, optimizer, scheduler, loader
        )

    def steps(self, count: int) -> list[float]:
        losses = []
        for (words,), _ in zip(self.loader, range(count), strict=False):
            loss = torch.nn.functional.cross_entropy(self.model(words) + torch.rand(()), words[:, 0])
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses


def resumed(version: int, path: Path, way: str) -> list[float]:
    run = Run(version, seed=5)
    if way == "load":
        load(path, accelerator=run.accelerator)
    else:
        attach(run.accelerator)
        run.accelerator.load_state(str(path))
    return run.steps(3)


def unattached(version: int, path: Path) -> str:
    run = Run(version)
    look_after(run.accelerator)
    try:
        run.accelerator.load_state(str(path))
    except CheckpointError as error:
        return str(error)
    return "nothing"


def main(root: Path) -> None:
    cpu_fsdp.allow()
    cpu_fsdp.join(RANK, WORLD)
    report: dict[str, Any] = {"whole": {v: resumed(v, root / "whole" / "checkpoint-3", "attach") for v in (1, 2)}}
    report["unattached"] = unattached(2, root / "whole" / "checkpoint-3")
    print(json.dumps(report), flush=True)
    dist.barrier()
    dist.destroy_process_group()


main(Path(sys.argv[1]))
