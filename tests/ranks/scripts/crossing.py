"""One of several ranks: saves divided models, and loads what other numbers of ranks saved.

crossing.py ROOT load=DIRECTORY:WAY... save=WAY... Saves to ROOT/WAY-WORLD. Prints what happened as JSON.
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

import networks

from vembed_async_ckpt import AsyncCheckpointer, load

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def save(way: str, directory: Path) -> None:
    """Save a training after three steps. Note what it held, and how it goes on."""
    training = networks.Training(0, networks.WAYS[way])
    training.steps(range(10, 13))
    with AsyncCheckpointer(directory) as checkpointer:
        handle = checkpointer.save(7, **training.parts())
        draws = float(torch.rand(()))
        handle.result(60)
    noted = {"draw": draws, "state": networks.whole_state(training), "losses": training.steps(range(3))}
    torch.save(noted, directory / f"expected-{RANK}.pt")


def resume(directory: Path, way: str) -> dict[str, Any]:
    training = networks.Training(3, networks.WAYS[way])
    load(directory / "checkpoint-7", **training.parts())
    draw = float(torch.rand(()))
    expected = torch.load(directory / "expected-0.pt", weights_only=True)
    noted = directory / f"expected-{RANK}.pt"
    drew = torch.load(noted, weights_only=True)["draw"] if noted.exists() else None
    return {
        "differing": networks.differing(training, expected["state"]),
        "losses": training.steps(range(3)) == expected["losses"],
        "random": drew is None or draw == drew,
    }


def main(root: Path, tasks: list[str]) -> None:
    dist.init_process_group("gloo", init_method=os.environ["RENDEZVOUS"], rank=RANK, world_size=WORLD)
    report: dict[str, Any] = {}
    for task, _, what in (task.partition("=") for task in tasks):
        directory, _, way = what.partition(":")
        if task == "save":
            save(what, root / f"{what}-{WORLD}")
        else:
            report[what] = resume(root / directory, way)
    print(json.dumps(report), flush=True)
    dist.barrier()
    dist.destroy_process_group()


main(Path(sys.argv[1]), sys.argv[2:])
