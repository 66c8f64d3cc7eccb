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
from vembed_async_ckpt.integrations.accelerate import attach, save_state
from vembed_async_ckpt.integrations.accelerate_hooks import look_after
from vembed_async_ckpt.integrations.vembed import close_shared, save_checkpoint

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
            loss = torch.nn.functional.cross_entropy(self.model(words) * torch.rand(()), words[:, 0])
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


def saving(version: int, root: Path) -> dict[str, Any]:
    """Save in both ways. Returns the files that appear, and the losses of three further steps."""
    run = Run(version)
    run.steps(3)
    inner = run.accelerator.unwrap_model(run.model)
    handles = [
        save_state(run.accelerator, root / f"v{version}" / "checkpoint-1"),
        save_checkpoint(root / f"v{version}" / "checkpoint-2", inner, run.accelerator, config={"encoder_mode": "bert"}),
    ]
    expected = run.steps(3)
    files = [sorted(handle.result(60).files) for handle in handles]
    close_shared()  # end_training() would also leave the job
    return {"files": files, "expected": expected}


def main(root: Path) -> None:
    cpu_fsdp.allow()
    cpu_fsdp.join(RANK, WORLD)
    whole = root / "whole" / "checkpoint-3"
    report: dict[str, Any] = {"whole": {version: resumed(version, whole, "attach") for version in (1, 2)}}
    report["unattached"] = unattached(2, whole)
    report["saved"] = {version: saving(version, root) for version in (1, 2)}
    report["resumed"] = {
        f"{way} into version {version} from v{saved}/checkpoint-{number}": resumed(
            version, root / f"v{saved}" / f"checkpoint-{number}", way
        )
        == report["saved"][saved]["expected"]
        for way, version, saved, number in (
            ("attach", 1, 1, 1), ("attach", 1, 2, 1), ("attach", 2, 1, 2), ("load", 2, 2, 2)
        )
    }  # fmt: skip
    print(json.dumps(report), flush=True)
    dist.barrier()
    dist.destroy_process_group()


main(Path(sys.argv[1]))
