"""One of two ranks: Trainer with FSDP, both versions: saves, and resumes what either version or one process saved.

trained.py DIRECTORY. Prints what happened as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

import cpu_fsdp
import tiny_llama
from transformers import TrainerCallback

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.seen: dict[int, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.seen[state.global_step] = logs["loss"]


def train(version: int, directory: Path, resume: Path | None = None) -> dict[int, float]:
    """The losses of the steps, by number."""
    cpu_fsdp.forget()
    losses = Losses()
    trainer = tiny_llama.trainer(directory, version, callbacks=[losses])
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return losses.seen


def main(root: Path) -> None:
    cpu_fsdp.allow()
    cpu_fsdp.join(RANK, WORLD)
    whole = root / "whole" / "checkpoint-2"
    report: dict[str, Any] = {"whole": {version: train(version, root / "resumed", whole) for version in (1, 2)}}
    report["saved"] = {version: train(version, root / f"v{version}") for version in (1, 2)}
    report["resumed"] = {
        f"version {version} from v{saved}": train(version, root / "resumed", root / f"v{saved}" / "checkpoint-2")
        for version, saved in ((1, 1), (2, 1), (2, 2))
    }
    print(json.dumps(report), flush=True)
    dist.barrier()
    dist.destroy_process_group()


main(Path(sys.argv[1]))
