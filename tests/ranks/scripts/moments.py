"""One of two ranks: saves FSDP models at awkward moments, and changes them while they are copied.

moments.py DIRECTORY. Prints what happened as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import networks

from vembed_async_ckpt import AsyncCheckpointer, StageError
from vembed_async_ckpt._memory import host_copy, staging

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
HALF = torch.bfloat16


def fsdp2(net: Any, **options: Any) -> Any:
    mesh = init_device_mesh("cpu", (WORLD,))
    for block in net.blocks:
        fully_shard(block, mesh=mesh, **options)
    options.pop("mp_policy", None)  # a BatchNorm computes in float32
    return fully_shard(net, mesh=mesh, **options)


def fsdp1(net: Any, **options: Any) -> Any:
    policy = ModuleWrapPolicy({networks.Block})
    return FullyShardedDataParallel(
        net, device_id=torch.device("cpu"), use_orig_params=True, auto_wrap_policy=policy, **options
    )


WAYS: dict[str, Callable[[Any], Any]] = {
    "fsdp2": fsdp2,
    "fsdp2 gathered": partial(fsdp2, reshard_after_forward=False),
    "fsdp2 mixed": partial(
        fsdp2, mp_policy=MixedPrecisionPolicy(param_dtype=HALF, reduce_dtype=torch.float32, output_dtype=torch.float32)
    ),
    "fsdp1": fsdp1,
    "fsdp1 gathered": partial(fsdp1, sharding_strategy=ShardingStrategy.SHARD_GRAD_OP),
    "fsdp1 mixed": partial(fsdp1, mixed_precision=MixedPrecision(param_dtype=HALF, reduce_dtype=torch.float32)),
}


def words(number: int) -> torch.Tensor:
    return torch.randint(0, networks.WORDS, (6, 4), generator=torch.Generator().manual_seed(number))


def whole_weights(model: Any) -> dict[str, torch.Tensor]:
    """What torch gathers, under the names of one process; tied weights once."""
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        found = {
            networks.clean(name): (v.full_tensor() if isinstance(v, DTensor) else v).detach().clone()
            for name, v in (*model.named_parameters(), *model.named_buffers())
        }
    return {name: value for name, value in found.items() if name not in ("scratch", "head.weight")}


def equal(directory: Path, expected: dict[str, torch.Tensor]) -> bool:
    found = load_file(directory / "model.safetensors")
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def at_awkward_moments(way: str, directory: Path) -> dict[str, Any]:
    """After an evaluation, and between forward and backward. The losses are those of a training without saves."""
    undisturbed, training = (networks.Training(1, WAYS[way]) for _ in range(2))
    losses: list[list[float]] = [[], []]
    report: dict[str, Any] = {}
    with AsyncCheckpointer(directory) as checkpointer:
        for number in range(3):
            for which, each in enumerate((undisturbed, training)):
                saving = each is training
                each.model.eval()
                with torch.no_grad():
                    each.model(words(50 + number))
                each.model.train()
                if saving:
                    path = checkpointer.save(2 * number, **each.parts()).result(60.0).path
                    report[f"evaluated {number}"] = equal(path, whole_weights(each.model))
                loss = torch.nn.functional.cross_entropy(each.model(words(number)).float(), words(number)[:, 0])
                if saving:
                    handle = checkpointer.save(2 * number + 1, **each.parts())
                loss.backward()
                if saving:
                    report[f"forward {number}"] = equal(handle.result(60.0).path, whole_weights(each.model))
                each.optimizer.step()
                each.optimizer.zero_grad()
                losses[which].append(float(loss.detach()))
    return report | {"same losses": losses[0] == losses[1]}


@contextmanager
def slow_copies() -> Iterator[threading.Event]:
    """Late copies wait for the event."""
    go_on = threading.Event()
    kept = staging.copy_group, staging.copy_alone

    def waiting(copy: Callable[[Any, Any], None], to: Any, of: Any) -> None:
        assert go_on.wait(60.0)
        copy(to, of)

    staging.copy_group, staging.copy_alone = partial(waiting, kept[0]), partial(waiting, kept[1])
    try:
        yield go_on
    finally:
        staging.copy_group, staging.copy_alone = kept
        go_on.set()


def add_to_parameter(training: networks.Training) -> None:
    with torch.no_grad():
        training.net.blocks[0].up.weight.add_(1.0)


def add_to_local(training: networks.Training) -> None:
    with torch.no_grad():
        training.net.blocks[0].up.weight.to_local().add_(1.0)  # type: ignore[operator]


def changed_while_copied(way: str, directory: Path) -> dict[str, Any]:
    """A change past the optimizer fails the save; a step of any implementation waits for the copy."""
    report: dict[str, Any] = {}
    for name, change in (("parameter", add_to_parameter), ("local", add_to_local)):
        if way.startswith("fsdp1") and change is add_to_local:
            continue
        training = networks.Training(1, WAYS[way])
        with AsyncCheckpointer(directory / name, on_error="warn") as checkpointer:
            training.step(0)
            checkpointer.save(0, **training.parts()).result(60.0)
            with slow_copies() as go_on:
                handle = checkpointer.save(1, **training.parts())
                change(training)
                dist.barrier()
                go_on.set()
            error = handle.exception(60.0)
            report[name] = isinstance(error, StageError) and "changed while it was being copied" in str(error)
            report[f"after {name}"] = equal(
                checkpointer.save(2, **training.parts()).result(60.0).path, whole_weights(training.model)
            )
    for options in ({"foreach": False}, {"foreach": True}, {"fused": True}):
        training = networks.Training(1, WAYS[way], **options)
        name = next(key for key in options)
        with AsyncCheckpointer(directory / f"{options}", on_error="warn") as checkpointer:
            training.step(0)
            checkpointer.save(0, **training.parts()).result(60.0)
            expected = whole_weights(training.model)
            loss = torch.nn.functional.cross_entropy(training.model(words(7)).float(), words(7)[:, 0])
            with slow_copies() as go_on:
                handle = checkpointer.save(1, **training.parts())
                loss.backward()
                threading.Timer(0.3, go_on.set).start()
                training.optimizer.step()
                held = go_on.is_set()
            report[f"{name} {options[name]}"] = held and equal(
                handle.result(60.0).path, {**expected, **buffers(training)}
            )
    return report


def buffers(training: networks.Training) -> dict[str, torch.Tensor]:
    """Forward has changed the statistics before the save."""
    return {name: value for name, value in training.net.named_buffers() if name != "scratch"}


def main() -> None:
    dist.init_process_group("gloo", init_method=os.environ["RENDEZVOUS"], rank=RANK, world_size=WORLD)
    host_copy.SMALL_BYTES = 7  # tensors of a few bytes are copied late, as large ones are
    directory = Path(sys.argv[1])
    report: dict[str, Any] = {}
    for way in WAYS:
        report[way] = at_awkward_moments(way, directory / way)
    for way in ("fsdp2", "fsdp1"):
        report[f"changed: {way}"] = changed_while_copied(way, directory / f"changed {way}")
    print(json.dumps(report))
    dist.destroy_process_group()


main()
