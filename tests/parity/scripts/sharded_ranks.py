"""One of two ranks: train an FSDP2 model, evaluate it, try to save it, and train on. Prints what happened as JSON.

Arguments: how the model is sharded and saved, a directory, the rank. After a forward pass without gradients the parameters of the
root are whole and plain, so nothing but the model's class says that it is sharded.
"""

from __future__ import annotations

import datetime
import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from vembed_async_ckpt import AsyncCheckpointer, CheckpointError, PlanError
from vembed_async_ckpt.integrations.accelerate import save_state


def sharded(how: str) -> Any:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))
    mesh = init_device_mesh("cpu", (2,))
    if how == "blocks":
        fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def step(model: Any, optimizer: Any) -> float:
    loss = model(torch.ones(4, 8)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss)


def trained(how: str) -> tuple[Any, Any]:
    model = sharded(how)
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    with torch.no_grad():
        model(torch.ones(4, 8))
    return model, optimizer


def save(how: str, directory: str, model: Any, optimizer: Any) -> str:
    """What the attempt to save raised."""
    try:
        if how == "accelerate":
            accelerator = Accelerator(cpu=True)
            accelerator.register_save_state_pre_hook(lambda models, weights, output_dir: None)
            accelerator._models.append(model)
            save_state(accelerator, f"{directory}/checkpoint-1")
        else:
            with AsyncCheckpointer(directory) as checkpointer:
                checkpointer.save(1, model=model, optimizer=optimizer)
    except PlanError as error:
        return str(error)
    except CheckpointError as error:
        return f"not a PlanError, but {error!r}"
    return "nothing"


def main(how: str, directory: str, rank: int) -> None:
    store = dist.FileStore(f"{directory}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=30))
    undisturbed = trained(how)
    expected = [step(*undisturbed) for _ in range(3)]
    model, optimizer = trained(how)
    before = [type(parameter).__name__ for parameter in model.parameters()]
    raised = save(how, f"{directory}/checkpoints", model, optimizer)
    after = [type(parameter).__name__ for parameter in model.parameters()]
    losses = [step(model, optimizer) for _ in range(3)]
    print(json.dumps({"raised": raised, "before": before, "after": after, "goes on": losses == expected}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
