"""One of 2 or 4 ranks: saves a training that is divided among them, in every way, and goes on. Prints what was seen as JSON.

Arguments: a directory, and ways to divide. Rank 0 compares what is in the directory with what torch gathers, and with what
one process saves of the same state.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(__file__)))

import torch
import torch.distributed as dist
from networks import WAYS, Training, whole_state
from safetensors import safe_open
from safetensors.torch import save_file

from vembed_async_ckpt import AsyncCheckpointer, PlanError, SaveState, verify

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
DIRECTORY = Path(sys.argv[1])


class Unsavable:
    """A data loader's place that cannot be saved."""

    def state_dict(self) -> dict[str, Any]:
        return {"value": object()}


def read(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def differing(path: Path, expected: dict[str, torch.Tensor]) -> list[str]:
    """The names of what is not, bit for bit, as torch gathered it; names that are in neither or only one of the two."""
    verify(path)
    found = read(path / "model.safetensors")
    found |= {": ".join(name.rsplit(".", 1)): tensor for name, tensor in read(path / "optimizer.safetensors").items()}
    tied = {"head.weight", "embed.weight"} - found.keys()
    wrong = sorted((found.keys() ^ expected.keys()) - tied)
    for name in found.keys() & expected.keys():
        one, other = found[name], expected[name].contiguous()
        if one.shape != other.shape or one.dtype != other.dtype or not torch.equal(one, other):
            wrong.append(name)
    return wrong


def rewritten(path: Path) -> bool:
    """Whether the files are, byte for byte, what `save_file` writes of the tensors in them."""
    same = True
    for name in ("model.safetensors", "optimizer.safetensors"):
        copy = DIRECTORY / f"copy-{name}"
        save_file(read(path / name), copy, metadata={"format": "pt"})
        same &= copy.read_bytes() == (path / name).read_bytes()
        copy.unlink()
    return same


def saves(way: str) -> dict[str, Any]:
    """Three saves of one training: before its first evaluation, right after one, and between forward and backward."""
    report: dict[str, Any] = {}
    training, quiet = (Training(0, WAYS[way]) for _ in range(2))
    root = DIRECTORY / way
    training.steps(range(2))
    quiet.steps(range(2))
    losses: list[float] = []
    with AsyncCheckpointer(root) as checkpointer:
        for step in (1, 2, 3):
            expected = {name: tensor.clone() for name, tensor in whole_state(training).items()}
            if step == 2:
                with torch.no_grad():
                    training.model.eval()
                    training.model(torch.zeros(2, 4, dtype=torch.long))
                    training.model.train()
            if step == 3:  # what FSDP has gathered for the forward pass stays gathered until the backward pass
                loss = training.model(torch.zeros(6, 4, dtype=torch.long)).square().mean()
                expected |= buffers(training)
            handle = checkpointer.save(step, **training.parts(), extra={"rank": 0})
            if step == 3:
                loss.backward()
                training.optimizer.zero_grad()
            losses.append(training.step(step))
            handle.wait_staged(60)
            info = handle.result(60)
            report.setdefault("files", sorted(info.files))
            if RANK == 0:
                report.setdefault("differing", []).append(differing(info.path, expected))
                report["rewritten"] = rewritten(info.path)
        report["overlap"] = checkpointer.statistics()["overlap"]
        report.update(refusals(checkpointer, training))
        losses.append(training.step(4))
    report["steps"] = sorted(path.name for path in root.glob("checkpoint-*"))
    quiet_losses = []
    for step in (1, 2, 3, 4):
        if step == 2:
            with torch.no_grad():
                quiet.model.eval()
                quiet.model(torch.zeros(2, 4, dtype=torch.long))
                quiet.model.train()
        if step == 3:
            quiet.model(torch.zeros(6, 4, dtype=torch.long)).square().mean().backward()
            quiet.optimizer.zero_grad()
        quiet_losses.append(quiet.step(step))
    report["losses equal"] = losses == quiet_losses
    return report


def buffers(training: Training) -> dict[str, torch.Tensor]:
    """As they are on rank 0, whose buffers are saved."""
    return {name: value.clone() for name, value in training.net.named_buffers() if name != "scratch"}


def refusals(checkpointer: AsyncCheckpointer, training: Training) -> dict[str, Any]:
    """What one rank cannot save is refused on all, at once."""
    begun = time.monotonic()
    found = []
    for rank in (WORLD - 1, 0):
        place = Unsavable() if rank == RANK else None
        try:
            handle = checkpointer.save(7, **training.parts(), dataloader=place)
        except PlanError as error:
            found.append(f"raised {error}")
        else:
            error = handle.exception(60)
            assert handle.state is SaveState.FAILED
            found.append(f"{type(error).__mro__[1].__name__} {error}")
    return {"refused": found, "refused in": time.monotonic() - begun}


def main() -> None:
    faulthandler.dump_traceback_later(150, exit=True)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=os.environ["RENDEZVOUS"], rank=RANK, world_size=WORLD)
    report = {way: saves(way) for way in sys.argv[2:]}
    dist.destroy_process_group()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
