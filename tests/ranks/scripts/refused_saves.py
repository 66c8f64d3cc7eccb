"""One of two ranks: tries to save what cannot be saved. Prints what each attempt raised, and what came after it, as JSON.

refused_saves.py DIRECTORY. Some of the models are wrong on the second rank only.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.sharding_spec import ChunkShardingSpec
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from transformers import MixtralConfig, MixtralForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

import networks

from vembed_async_ckpt import AsyncCheckpointer, PlanError, verify

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


class Odd(Shard):
    """A placement that nobody knows."""


def holding(tensor: torch.Tensor) -> torch.nn.Module:
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(tensor)
    return model


def line() -> Any:
    return init_device_mesh("cpu", (WORLD,))


def wrong_shape() -> torch.nn.Module:
    """Right on the first rank, too small on the second one."""
    rows = 5 if RANK == 0 else 3
    return holding(DTensor.from_local(torch.ones(rows), line(), [Shard(0)], run_check=False, shape=(10,), stride=(1,)))


def odd() -> torch.nn.Module:
    model = holding(distribute_tensor(torch.ones(6), line(), [Shard(0)]))
    model.weight._spec = type(model.weight._spec)(line(), (Odd(0),), model.weight._spec.tensor_meta)  # type: ignore[union-attr]
    return model


def old_shards() -> torch.nn.Module:
    placements = [f"rank:{rank}/cpu" for rank in range(WORLD)]
    model = torch.nn.Linear(2, 2)
    del model.bias
    model.bias = sharded_tensor.ones(ChunkShardingSpec(dim=0, placements=placements), 4)
    model._parameters["bias"] = vars(model).pop("bias")  # as its own modules hold it
    return model


def zero3() -> torch.nn.Module:
    model = torch.nn.Linear(2, 2)
    for parameter in model.parameters():
        parameter.ds_tensor = parameter.data
        parameter.data = torch.empty(0)
    return model


def fsdp1(use_orig_params: bool = True) -> Any:
    return FullyShardedDataParallel(
        torch.nn.Linear(3, 5), use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )


def does_not_add_up() -> torch.nn.Module:
    model = fsdp1()
    record = model._handle.flat_param
    if RANK == 1:
        record._shard_param_infos = tuple(
            info._replace(numel_in_shard=99) if info.in_shard else info for info in record._shard_param_infos
        )
    return model


def inside_fsdp1() -> Any:
    return fsdp1().module


def mixtral() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(vocab_size=31, num_hidden_layers=1, num_local_experts=4, **sizes))
    return fully_shard(model, mesh=line())


def stage() -> torch.nn.Module:
    """Another part of the model on each rank, as in a pipeline."""
    own = init_device_mesh("cpu", (WORLD, 1), mesh_dim_names=("stages", "shards"))["shards"]
    model = torch.nn.Module()
    model.add_module(f"stage{RANK}", holding(distribute_tensor(torch.ones(4), own, [Shard(0)])))
    return model


def stranger() -> dict[str, Any]:
    """An optimizer that steps a parameter of no model in the save."""
    model = networks.Training(0, networks.fsdp2).model
    more = torch.nn.Parameter(torch.ones(3))
    return {"model": model, "optimizer": torch.optim.SGD([*model.parameters(), more], lr=0.1)}


def nested() -> dict[str, Any]:
    """An optimizer with tensors in lists."""
    model = networks.Training(0, networks.fsdp2).model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = next(iter(model.parameters()))
    optimizer.state[first]["history"] = [torch.zeros_like(first)]
    return {"model": model, "optimizer": optimizer}


def not_like_the_parameter() -> dict[str, Any]:
    """An optimizer that keeps a plain tensor for a divided parameter."""
    model = networks.Training(0, networks.fsdp2).model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[next(iter(model.parameters()))]["rows"] = torch.ones(7)
    return {"model": model, "optimizer": optimizer}


CASES: dict[str, Callable[[], Any]] = {
    "Partial": lambda: holding(DTensor.from_local(torch.ones(4), line(), [Partial()])),
    "an unknown placement": odd,
    "another shape on rank 1": wrong_shape,
    "an uneven _StridedShard": lambda: holding(
        distribute_tensor(torch.ones(5), line(), [_StridedShard(0, split_factor=2)], src_data_rank=None)
    ),
    "ShardedTensor": old_shards,
    "ZeRO 3": zero3,
    "use_orig_params=False": lambda: fsdp1(use_orig_params=False),
    "flat parameters on rank 1": does_not_add_up,
    "the module inside FSDP": inside_fsdp1,
    "computed weights": mixtral,
    "pipeline stages": stage,
    "a parameter of no model": stranger,
    "nested state": nested,
    "state unlike the parameter": not_like_the_parameter,
}


def visible(directory: Path) -> list[str]:
    return sorted(name for name in os.listdir(directory) if not name.startswith("_"))


def main() -> None:
    dist.init_process_group("gloo", init_method=os.environ["RENDEZVOUS"], rank=RANK, world_size=WORLD)
    directory = Path(sys.argv[1])
    report: dict[str, Any] = {}
    training, undisturbed = (networks.Training(1, networks.fsdp2) for _ in range(2))
    with AsyncCheckpointer(directory) as checkpointer:
        for number, (name, make) in enumerate(CASES.items()):
            objects = make()
            given = objects if isinstance(objects, dict) else {"model": objects}
            before = visible(directory)
            try:
                checkpointer.save(number, **given)
                raised = "nothing"
            except PlanError as error:
                raised = str(error)
            same = training.step(number) == undisturbed.step(number)  # with collectives: no rank waits for another
            report[name] = {"raised": raised, "goes on": same, "untouched": visible(directory) == before}
        path = checkpointer.save(100, **training.parts()).result(60.0).path
    with AsyncCheckpointer(directory / "as they are", save_original_format=False) as checkpointer:
        as_it_is = checkpointer.save(1, model=mixtral()).result(60.0).path
    report["saved afterwards"] = [sorted(verify(each).files)[:3] for each in (path, as_it_is)]
    print(json.dumps(report))
    dist.destroy_process_group()


main()
