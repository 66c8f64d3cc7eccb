"""One of 2 or 4 ranks: compares what `Share` says a rank holds with what torch really put there. Prints counts as JSON.

Every value of a tensor is its own position in the whole, or random bytes, so an element in the wrong place is noticed.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from vembed_async_ckpt import PlanError
from vembed_async_ckpt._capture.shares import Sharding, written
from vembed_async_ckpt._format.ranges import Box, fault_of

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
DTYPES = [
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int8, torch.uint8),
    *(torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64),
]
COUNTS: Counter[str] = Counter()


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)


def check(what: str, shares: list[Any], wholes: list[torch.Tensor]) -> None:
    """Every piece has the bytes of its region of the whole, and all ranks together write every element once."""
    writes = written(shares)
    for share, whole in zip(shares, wholes, strict=True):
        assert share.shape == tuple(whole.shape), (what, share)
        seen = 0
        for region, view in share.pieces():
            if isinstance(region, Box):
                slices = tuple(slice(a, a + n) for a, n in zip(region.start, region.size, strict=True))
                expected = whole[slices]
            else:
                expected = whole.reshape(-1)[region.start : region.start + region.count]
            assert tuple(view.shape) == tuple(expected.shape), (what, share.name)
            assert torch.equal(as_bytes(view), as_bytes(expected)), (what, share.name, region)
            seen += region.count
        assert seen == share.local.numel(), (what, share.name)
        COUNTS["shares"] += 1
        COUNTS["regions"] += len(share.regions)
        COUNTS["empty"] += not share.regions
    mine = [share.regions if writes_it else () for share, writes_it in zip(shares, writes, strict=True)]
    everyone: list[Any] = [None] * WORLD
    dist.all_gather_object(everyone, mine)
    for index, share in enumerate(shares):
        fault = fault_of(share.shape, [region for regions in everyone for region in regions[index]])
        assert fault is None, (what, share.name, fault)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    count = math.prod(shape) * dtype.itemsize
    data = torch.randint(0, 2 if dtype is torch.bool else 256, (count,), generator=generator, dtype=torch.uint8)
    return data.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


def random_cases(cases: int) -> None:
    """Random meshes, shapes, dtypes and placements, laid out by `distribute_tensor`."""
    meshes = {shape: init_device_mesh("cpu", shape) for shape in {(WORLD,), (2, WORLD // 2), (1, WORLD), (WORLD, 1)}}
    nowhere = torch.nn.Module()
    for case in range(cases):
        choose, generator = random.Random(case), torch.Generator().manual_seed(case)
        mesh_shape = choose.choice(sorted(meshes))
        wholes, shares = [], []
        for number in range(choose.randint(1, 6)):
            shape = tuple(
                choose.choice([1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 16, 24, 31, 48]) for _ in range(choose.randint(0, 4))
            )
            if shape and choose.random() < 0.05:
                shape = (0, *shape[1:])
            placements: list[Any] = []
            for _ in mesh_shape:
                kind = choose.random()
                if not shape or kind < 0.25:
                    placements.append(Replicate())
                elif kind < 0.75:
                    placements.append(Shard(choose.randrange(len(shape))))
                else:
                    factor = choose.choice([2, 2, 3, 4])
                    placements.append(_StridedShard(choose.randrange(len(shape)), split_factor=factor))
            whole = random_tensor(shape, choose.choice(DTYPES), generator)
            try:
                divided = distribute_tensor(whole, meshes[mesh_shape], placements, src_data_rank=None)
            except Exception:
                COUNTS["refused by torch"] += 1
                continue
            COUNTS["strided"] += any(isinstance(placement, _StridedShard) for placement in placements)
            try:
                share = Sharding(nowhere).share(f"case {case}: {number}", divided)
            except PlanError as error:
                refusal = str(error)
            else:
                shares.append(share)
                wholes.append(whole)
                continue
            assert "not divided evenly" in refusal
            assert any(isinstance(placement, _StridedShard) for placement in placements)
            COUNTS["uneven"] += 1
        check(f"case {case}", shares, wholes)
        COUNTS["cases"] += 1


class Block(torch.nn.Module):
    def __init__(self, ins: int, hidden: int, outs: int) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(ins, hidden), torch.nn.Linear(hidden, outs)
        self.norm = torch.nn.BatchNorm1d(outs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.down(self.up(x).relu()))


def counted(model: torch.nn.Module) -> torch.nn.Module:
    """The model with values that say where they are."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.arange(parameter.numel(), dtype=parameter.dtype).view(parameter.shape))
    return model


def wholes_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in (*model.named_parameters(), *model.named_buffers())}


def check_model(what: str, model: torch.nn.Module, wholes: dict[str, torch.Tensor]) -> None:
    sharding = Sharding(model)
    live = {
        name.replace("_fsdp_wrapped_module.", ""): value
        for name, value in (*model.named_parameters(), *model.named_buffers())
    }
    assert live.keys() == wholes.keys()
    check(what, [sharding.share(name, value) for name, value in live.items()], [wholes[name] for name in live])
    COUNTS["models"] += 1


def by_fully_shard() -> None:
    """FSDP2, HSDP and FSDP2 over tensor parallelism, with sizes that do not divide."""
    line = init_device_mesh("cpu", (WORLD,))
    table = init_device_mesh("cpu", (2, WORLD // 2), mesh_dim_names=("outer", "inner"))
    for sizes in [(8, 16, 8), (6, 10, 7), (5, 9, 3), (3, 5, 1)]:
        model = counted(Block(*sizes))
        wholes = wholes_of(model)
        fully_shard(model, mesh=line)
        check_model(f"FSDP2 {sizes}", model, wholes)
        model = counted(Block(*sizes))
        fully_shard(model, mesh=table)
        check_model(f"HSDP {sizes}", model, wholes)
        model = counted(Block(*sizes))
        parallelize_module(model, table["inner"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(model, mesh=table["outer"])
        check_model(f"FSDP2 over TP {sizes}", model, wholes)
    model = counted(Block(8, 16, 8))
    wholes = wholes_of(model)
    fully_shard(model, mesh=line, shard_placement_fn=lambda parameter: Shard(parameter.dim() - 1))
    check_model("FSDP2 by columns", model, wholes)


def by_fsdp1() -> None:
    """FSDP version 1: every strategy, before and after steps, and between forward and backward; and AdamW's state."""
    strategies = [ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP, ShardingStrategy.NO_SHARD]
    mesh = None
    if WORLD == 4:
        strategies.append(ShardingStrategy.HYBRID_SHARD)
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    for strategy in strategies:
        model = counted(torch.nn.Sequential(Block(5, 7, 3), Block(3, 9, 5)))
        model[1].up.weight.requires_grad_(False)
        wholes, reference = wholes_of(model), copy.deepcopy(model)
        sharded = FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy({Block}),
            sharding_strategy=strategy,
            device_mesh=mesh if strategy is ShardingStrategy.HYBRID_SHARD else None,
            use_orig_params=True,
            device_id=torch.device("cpu"),
        )
        check_model(f"FSDP1 {strategy}", sharded, wholes)
        between = {id(p.parameter): p.share("p").local.clone() for p in held_between(sharded)}
        optimizer = stepped(sharded)
        for piece in Sharding(sharded).flat.values():
            assert torch.equal(piece.share("after").local, between[id(piece.parameter)])
        if strategy is not ShardingStrategy.NO_SHARD:
            assert between
            check_state(f"FSDP1 {strategy}", sharded, optimizer, reference)


def held_between(sharded: torch.nn.Module) -> Iterator[Any]:
    """The pieces between forward and backward, where some strategies show whole parameters."""
    loss = sharded(torch.randn(4, 5)).sum()
    yield from Sharding(sharded).flat.values()
    loss.backward()
    sharded.zero_grad()


def stepped(model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer after one step with a learning rate of 0. Every rank has the same batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)
    torch.manual_seed(0)
    model(torch.randn(4, 5)).sum().backward()
    optimizer.step()
    return optimizer


def check_state(what: str, sharded: Any, optimizer: Any, reference: torch.nn.Module) -> None:
    """AdamW's state lies in the whole where its parameter does: compared with the moments of one process."""
    sharding, expected = Sharding(sharded), stepped(reference)
    wholes = {name: expected.state[p] for name, p in reference.named_parameters() if p in expected.state}
    for name, parameter in sharded.named_parameters():
        clean = name.replace("_fsdp_wrapped_module.", "")
        for key, state in optimizer.state.get(parameter, {}).items():
            share, whole = sharding.share_of_state(f"{clean}.{key}", state, parameter), wholes[clean][key]
            assert share.shape == tuple(whole.shape)
            for region, view in share.pieces():
                first = region.start if whole.dim() else 0
                assert torch.equal(view.reshape(-1), whole.reshape(-1)[first : first + region.count]), (
                    what,
                    clean,
                    key,
                )
            COUNTS["states"] += 1


def refusals() -> None:
    """What cannot be certain is refused, with the name, the rank and what to do."""
    mesh, nowhere = init_device_mesh("cpu", (WORLD,)), Sharding(torch.nn.Module())
    wrong = DTensor.from_local(
        torch.ones(3), mesh, [Shard(0)], run_check=False, shape=torch.Size([9 * WORLD]), stride=(1,)
    )
    cases = {
        "Partial": DTensor.from_local(torch.ones(4), mesh, [Partial()]),
        "say": wrong,
        "cannot tell": distribute_tensor(
            torch.ones(2 * WORLD + 1), mesh, [_StridedShard(0, split_factor=2)], src_data_rank=None
        ),
    }
    for word, tensor in cases.items():
        refused(word, lambda tensor=tensor: nowhere.share("the.weight", tensor), "the.weight", f"rank {RANK}")
    flat = FullyShardedDataParallel(torch.nn.Linear(3, 5), use_orig_params=False, device_id=torch.device("cpu"))
    refused("use_orig_params=True", lambda: Sharding(flat))
    broken = FullyShardedDataParallel(torch.nn.Linear(3, 5), use_orig_params=True, device_id=torch.device("cpu"))
    record = broken._handle.flat_param
    infos = record._shard_param_infos
    record._shard_param_infos = tuple(i._replace(numel_in_shard=99) if i.in_shard else i for i in infos)
    refused("does not add up", lambda: Sharding(broken))
    del record._shard_param_infos
    refused("this version of torch", lambda: Sharding(broken))


def refused(word: str, ask: Callable[[], Any], *words: str) -> None:
    try:
        ask()
    except PlanError as error:
        said = str(error)
    assert all(each in said for each in (word, *words)), said
    COUNTS["refused"] += 1


def main() -> None:
    dist.init_process_group("gloo", init_method=os.environ["RENDEZVOUS"], rank=RANK, world_size=WORLD)
    random_cases(200)
    by_fully_shard()
    by_fsdp1()
    refusals()
    print(json.dumps(COUNTS))
    dist.destroy_process_group()


main()
