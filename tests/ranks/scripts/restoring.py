"""One of several ranks: loads what one process saved into models that are divided in several ways.

restoring.py DIRECTORY WAY... Prints what happened, by way, as JSON.
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

from vembed_async_ckpt import load

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def differing(training: networks.Training, expected: dict[str, torch.Tensor]) -> list[str]:
    """The tensors that differ from those of the run that was saved, gathered by torch itself."""
    found = networks.whole_state(training)
    same = {key for key in found.keys() & expected.keys() if torch.equal(found[key], expected[key])}
    return sorted((found.keys() | expected.keys()) - same)


def check(way: str, directory: Path) -> dict[str, Any]:
    expected = torch.load(directory / "expected.pt", weights_only=True)
    report: dict[str, Any] = {}
    for objects, seed in (("stepped", 1), ("new", 2)):
        training = networks.Training(seed, networks.WAYS[way])
        if objects == "stepped":
            training.step(99)
            with torch.no_grad():
                training.model(torch.zeros(2, 4, dtype=torch.int64))  # FSDP leaves the root's parameters gathered
        places = [t.data_ptr() for t in state_tensors(training)]
        load(directory / "checkpoint-7", **training.parts())
        report[objects] = {
            "in place": places == [t.data_ptr() for t in state_tensors(training)],
            "draw": float(torch.rand(())),
            "differing": differing(training, expected["state"]),
            "losses": training.steps(range(3)),
            "rates": training.scheduler.get_last_lr(),
        }
    return report


def state_tensors(training: networks.Training) -> list[torch.Tensor]:
    state = [value for entry in training.optimizer.state.values() for value in entry.values()]
    return [t.to_local() if hasattr(t, "to_local") else t for t in state]


def main(directory: Path, ways: list[str]) -> None:
    dist.init_process_group("gloo", init_method=os.environ["RENDEZVOUS"], rank=RANK, world_size=WORLD)
    print(json.dumps({way: check(way, directory) for way in ways}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


main(Path(sys.argv[1]), sys.argv[2:])
