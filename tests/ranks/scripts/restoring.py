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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from vembed_async_ckpt import CheckpointError, load

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def check(way: str, directory: Path) -> dict[str, Any]:
    expected = torch.load(directory / "expected.pt", weights_only=True)
    report: dict[str, Any] = {}
    for objects, seed in (("stepped", 1), ("new", 2))[: 1 if WORLD > 2 else 2]:
        training = networks.Training(seed, networks.WAYS[way])
        if objects == "stepped":
            training.step(99)
            with torch.no_grad():
                training.model(torch.zeros(2, 4, dtype=torch.int64))  # FSDP leaves the root's parameters gathered
        places = places_of_state(training)
        load(directory / "checkpoint-7", **training.parts())
        report[objects] = {
            "in place": places == places_of_state(training),
            "draw": float(torch.rand(())),
            "differing": networks.differing(training, expected["state"]),
            "losses": training.steps(range(3)),
            "rates": training.scheduler.get_last_lr(),
        }
    return report


def measure(way: str, directory: Path) -> dict[str, int]:
    """How many bytes this rank reads and how much memory it takes, to load the large network, and the size of its state."""
    net = networks.Large()
    model = networks.WAYS[way](net)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters())
    Path("/proc/self/clear_refs").write_text("5")  # the peak of the resident memory starts anew
    before, read = memory("VmHWM"), bytes_read()
    load(directory / "large" / "checkpoint-1", model=model, optimizer=optimizer)
    after, read = memory("VmHWM"), bytes_read() - read
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    weights, state = (sum(t.nbytes for t in map(local, tensors)) for tensors in (model.parameters(), state))
    return {"read": read, "grown": after - before, "weights": weights, "state": state}


def state_of_other_shapes(directory: Path) -> dict[str, Any]:
    """State with a number for each row of a weight: whole on every rank with DTensors, refused with FSDP version 1."""
    model, optimizer = networks.rows(lambda net: fully_shard(net, mesh=init_device_mesh("cpu", (WORLD,))))
    load(directory / "rows" / "checkpoint-1", model=model, optimizer=optimizer)
    losses = networks.row_steps(model, optimizer, 2)
    model, optimizer = networks.rows(
        lambda net: FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=True)
    )
    try:
        load(directory / "rows" / "checkpoint-1", model=model, optimizer=optimizer)
    except CheckpointError as error:
        return {"losses": losses, "refused": str(error)}
    return {"losses": losses, "refused": ""}


def memory(key: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) << 10


def bytes_read() -> int:
    (line,) = (line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar"))
    return int(line.split()[1])


def local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def places_of_state(training: networks.Training) -> list[dict[str, int]]:
    stepped = [parameter for group in training.optimizer.param_groups for parameter in group["params"]]
    entries = [training.optimizer.state.get(parameter, {}) for parameter in stepped]
    return [{key: local(value).data_ptr() for key, value in entry.items()} for entry in entries]


def main(directory: Path, ways: list[str]) -> None:
    dist.init_process_group("gloo", init_method=os.environ["RENDEZVOUS"], rank=RANK, world_size=WORLD)
    measured = {way: measure(way, directory) for way in ways[:2] if WORLD == 2}
    report = {way: check(way, directory) for way in ways}
    of_rows = state_of_other_shapes(directory) if WORLD == 2 else {}
    print(json.dumps({"measured": measured, "ways": report, "rows": of_rows}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


main(Path(sys.argv[1]), sys.argv[2:])
