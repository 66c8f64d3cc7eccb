"""One rank of `tests/ranks/test_dcp.py`: saves and loads with torch.distributed.checkpoint through us, and reports as JSON.

Argument: a directory.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from vembed_async_ckpt import latest, verify
from vembed_async_ckpt.integrations.dcp import StorageReader, StorageWriter, _Places

ROOT, RANK, RANKS = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


class Net(torch.nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self[2](self[1](self[0](x).to(torch.bfloat16)).float())


def make(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Net(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3, dtype=torch.bfloat16), torch.nn.BatchNorm1d(3))
    mesh = init_device_mesh("cpu", (RANKS,))
    fully_shard(model[1], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> float:
    torch.manual_seed(seed)  # the same batch on every rank
    loss = model(torch.randn(4, 7)).square().sum()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "step": step, "words": {"note": "grün"}}


def attempt(call: Any) -> str:
    try:
        call()
    except BaseException as error:  # torch.distributed.checkpoint raises BaseExceptions
        return str(error)
    return ""


def main() -> None:
    dist.init_process_group("gloo", init_method=os.environ["RENDEZVOUS"], rank=RANK, world_size=RANKS)
    report: dict[str, Any] = {}
    model, optimizer = make(0)
    train(model, optimizer, 1)
    path = ROOT / "run" / "checkpoint-5"
    files = {"config.json": b"{}"}
    dcp.save(state_of(model, optimizer, 5), storage_writer=StorageWriter(path, prefix="model.", files=files))
    report["step"] = verify(path).step
    full = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in model.state_dict().items()
    }
    if RANK == 0:
        from safetensors.torch import save_file

        save_file(full, ROOT / "full.safetensors", metadata={"format": "pt"})
        report["same_bytes"] = (ROOT / "full.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()
    later = dcp.async_save(
        state_of(model, optimizer, 6),
        checkpoint_id=ROOT / "run" / "checkpoint-6",
        storage_writer=StorageWriter(prefix="model."),
    )
    later.result(60)
    dist.barrier()
    report["latest"] = str(latest(ROOT / "run"))
    goes_on = [train(model, optimizer, seed) for seed in (2, 3, 4)]

    other, moments = make(9)
    loaded = state_of(other, moments, 0)
    dcp.load(loaded, storage_reader=StorageReader(path, verify="full"))
    set_state_dict(other, moments, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    report["loaded"] = [loaded["step"], loaded["words"]]
    report["resumed"] = [train(other, moments, seed) for seed in (2, 3, 4)] == goes_on

    # the same name again, with what somebody else put there
    if RANK == 0:
        (path / "notes.txt").write_text("mine")
    dist.barrier()
    dcp.save(state_of(model, optimizer, 7), storage_writer=StorageWriter(path, prefix="model."))
    report["kept"] = (path / "notes.txt").read_text()

    class Failing(StorageWriter):
        def write_data(self, plan: Any, planner: Any) -> Any:
            if RANK == RANKS - 1:
                raise OSError(28, "No space left on device")
            return super().write_data(plan, planner)

    report["failed"] = attempt(
        lambda: dcp.save(state_of(model, optimizer, 8), storage_writer=Failing(ROOT / "run" / "checkpoint-8"))
    )
    dist.barrier()
    gc.collect()  # the writer of the save that failed is freed
    dist.barrier()
    report["left"] = sorted(os.listdir(ROOT / "run"))
    strided = distribute_tensor(
        torch.arange(16.0).reshape(8, 2), init_device_mesh("cpu", (RANKS,)), [_StridedShard(0, split_factor=2)]
    )
    chunk = ChunkStorageMetadata(torch.Size([2 * RANK, 0]), torch.Size([4, 2]))  # what torch's own helper says of it
    data = TensorWriteData(chunk, TensorProperties(torch.float32), torch.Size([8, 2]))
    item = WriteItem(MetadataIndex("x"), WriteItemType.SHARD, tensor_data=data)
    planner = DefaultSavePlanner()
    planner.set_up_planner({"x": strided})
    (ROOT / f"file-{RANK}").touch()
    plan = SavePlan([item], storage_data=_Places(str(ROOT), {"x": (f"file-{RANK}", 0, (8, 2))}))
    report["strided"] = attempt(lambda: StorageWriter().write_data(plan, planner))
    report["remote"] = attempt(lambda: dcp.save({"a": torch.zeros(2)}, storage_writer=StorageWriter()))
    dist.barrier()
    print(json.dumps(report), flush=True)
    dist.destroy_process_group()


main()
