"""What this process does not hold as plain memory is refused by `save()` itself, with what to do, before anything is touched."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import distribute_tensor

from vembed_async_ckpt import AsyncCheckpointer, CheckpointError, PlanError, load

from .architectures import build
from .checks import BOUND, differing, state


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Pickling(torch.nn.Module):
    """A wrapper whose save_pretrained would write whatever it is given."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def save_pretrained(self, save_directory: str) -> None:
        torch.save(self.inner.state_dict(), os.path.join(save_directory, "inner.pt"))


def fsdp1(model: torch.nn.Module) -> Any:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def fsdp1_flat(model: torch.nn.Module) -> Any:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def fsdp2(model: torch.nn.Module) -> Any:
    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


def one_dtensor(model: torch.nn.Module) -> Any:
    name, parameter = next(iter(model.named_parameters()))
    parent, _, key = name.rpartition(".")
    placed = torch.nn.Parameter(distribute_tensor(parameter.detach(), init_device_mesh("cpu", (1,))))
    setattr(model.get_submodule(parent), key, placed)
    return model


def partitioned(model: torch.nn.Module) -> Any:
    """As DeepSpeed ZeRO-3 leaves parameters: empty, with the share beside them."""
    for parameter in model.parameters():
        parameter.ds_tensor = parameter.data
        parameter.data = torch.empty(0)
    return model


KINDS: dict[str, Callable[[], torch.nn.Module]] = {
    "plain": lambda: torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)),
    "transformers": lambda: build("Bert"),
    "wrapper": lambda: Pickling(torch.nn.Linear(3, 3)),
}


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
@pytest.mark.parametrize("kind", ["plain", "transformers"])
@pytest.mark.parametrize("shard", [fsdp1, fsdp2, one_dtensor], ids=lambda shard: shard.__name__)
def test_a_share_that_says_what_it_is_is_saved(root: Path, alone: None, shard: Any, kind: str):
    """A model that is sharded by FSDP 1 or 2 or as a DTensor becomes the directory of the whole model, also on a single rank."""
    whole, other = KINDS[kind](), KINDS[kind]()
    other.load_state_dict(whole.state_dict())
    sharded = shard(other)
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        path = checkpointer.save(1, model=sharded).result(BOUND).path
        expected = checkpointer.save(2, model=whole).result(BOUND).path
    for file in (path / name for name in ("model.safetensors", "config.json")):
        if file.exists() or (expected / file.name).exists():
            assert file.read_bytes() == (expected / file.name).read_bytes()
    again = shard(KINDS[kind]())
    load(path, model=again)
    values = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in (*again.parameters(), *again.buffers())]
    assert all(map(torch.equal, values, (*whole.parameters(), *whole.buffers())))


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shard", [fsdp1_flat, partitioned], ids=lambda shard: shard.__name__)
def test_a_share_that_does_not_say_what_it_is_is_refused(root: Path, alone: None, shard: Any, kind: str):
    """FSDP 1 without the original parameters, ZeRO-3: a PlanError that says what to do, and nothing can be loaded either."""
    whole = KINDS[kind]()
    sharded = shard(KINDS[kind]())
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        with pytest.raises(
            PlanError, match=r"use_orig_params=True|ZeRO-3.*only a share.*torch\.distributed\.checkpoint"
        ):
            checkpointer.save(1, model=sharded)
        assert checkpointer.statistics()["started"] == 0
        path = checkpointer.save(2, model=whole).result(BOUND).path
    with pytest.raises(
        CheckpointError, match=r"use_orig_params=True|ZeRO-3: load into the whole model, before it is sharded"
    ):
        load(path, model=sharded)


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
@pytest.mark.parametrize("shard", [fsdp1, fsdp2, one_dtensor], ids=lambda shard: shard.__name__)
def test_a_sharded_model_that_writes_its_weights_itself_is_refused(root: Path, alone: None, shard: Any):
    """A save_pretrained that pickles weights has only this rank's. The next save, of the model inside, goes on."""
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        with pytest.raises(PlanError, match=r"Pickling\.save_pretrained writes weights to inner\.pt itself"):
            checkpointer.save(1, model=shard(KINDS["wrapper"]()))
        assert checkpointer.statistics()["started"] == 0


def test_parts_and_computed_values_of_a_divided_model(root: Path, alone: None):
    """Mixtral's experts are saved in parts, which find their places. In shards of files they are computed by the save:
    loading them needs the whole model, so it is refused with what to do."""
    whole, divided = build("Mixtral, parts"), fsdp2(build("Mixtral, parts"))
    for parameter in whole.parameters():
        parameter.data.add_(1)
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        load(checkpointer.save(1, model=whole).result(BOUND).path, model=divided)
    values = [parameter.full_tensor() for parameter in divided.parameters()]
    assert all(map(torch.equal, values, whole.parameters()))
    with AsyncCheckpointer(root, writer="thread", max_shard_size="20KB") as checkpointer:
        path = checkpointer.save(2, model=whole).result(BOUND).path
    with pytest.raises(CheckpointError, match=r"computed; load into the whole model.*save_original_format=False"):
        load(path, model=divided)


def named_class(name: str) -> Any:
    """A layer as another package ships it; `state_dict()` must not be called on it by one rank alone."""

    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("called")

    return type("Of" + name, (type(name, (torch.nn.Linear,), {"state_dict": refuse}),), {})


WRAPPER_NAMES = [
    "FullyShardedDataParallel", "XlaFullyShardedDataParallel", "DeepSpeedEngine", "PipelineModule", "GeminiDDP",
    "DistributedModelParallel",
]  # fmt: skip
LAYER_NAMES = ["ColumnParallelLinear", "RowParallelLinear", "VocabParallelEmbedding", "ParallelEmbedding"]


@pytest.mark.parametrize("name", [*WRAPPER_NAMES, *LAYER_NAMES])
def test_other_packages_ways_to_shard(root: Path, alone: None, monkeypatch: pytest.MonkeyPatch, name: str):
    """Known by the name of a class, also of one derived from it; layers of tensor parallelism are whole where one rank is all."""
    module = torch.nn.Sequential(named_class(name)(3, 3))
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        if name in LAYER_NAMES:
            with pytest.raises(AssertionError, match="called"):
                checkpointer.save(1, model=module)
            monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
        with pytest.raises(PlanError, match=f"0 is sharded by {name}: this process holds only a share"):
            checkpointer.save(1, model=module)


def of_transformers(model: torch.nn.Module) -> None:
    model._tp_size = 2


def of_megatron(model: torch.nn.Module) -> None:
    next(model.parameters()).tensor_model_parallel = True


@pytest.mark.parametrize("mark", [of_transformers, of_megatron], ids=lambda mark: mark.__name__)
def test_tensor_parallelism_in_plain_tensors(root: Path, alone: None, monkeypatch: pytest.MonkeyPatch, mark: Any):
    """Nothing but a mark says that each rank has a part of them; with one rank, it has all."""
    model = torch.nn.Linear(3, 3)
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        checkpointer.save(1, model=model).result(BOUND)
        mark(model)
        monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
        with pytest.raises(PlanError, match=r"divided among .*ranks by tensor parallelism"):
            checkpointer.save(2, model=torch.nn.Sequential(model))


class Scaled(torch.Tensor):
    """A quantized weight as torchao has them: a tensor of two plain ones."""

    @staticmethod
    def __new__(cls, values: torch.Tensor, scale: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)

    def __init__(self, values: torch.Tensor, scale: torch.Tensor) -> None:
        self.values, self.scale = values, scale

    def __tensor_flatten__(self) -> Any:
        return ["values", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].values, args[0].scale)
        raise NotImplementedError(func)


def quantized(*, trained: bool) -> torch.nn.Module:
    module = torch.nn.Linear(3, 3)
    scaled = Scaled(torch.ones(3, 3, dtype=torch.int8), torch.ones(3))
    module.weight = torch.nn.Parameter(scaled, requires_grad=trained)
    return module


@pytest.mark.parametrize(
    "module",
    [lambda: quantized(trained=False), lambda: Pickling(quantized(trained=True))],
    ids=["plain", "wrapper"],
)
def test_a_quantized_weight_without_memory_of_its_own(root: Path, module: Callable[[], Any]):
    """A tensor made of tensors has no bytes to copy: its name, its class, and what to do instead."""
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        with pytest.raises(PlanError, match=r"weight.*Scaled.*no storage of its own.*full, plain value"):
            checkpointer.save(1, model=module())
        assert checkpointer.statistics()["started"] == 0
        checkpointer.save(1, model=torch.nn.Linear(3, 3)).result(BOUND)


class HeadOnly(torch.nn.Module):
    """Leaves its quantized, frozen base out of what it saves."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.head = quantized(trained=False), torch.nn.Linear(3, 2)

    def save_pretrained(self, save_directory: str) -> None:
        torch.save(self.head.state_dict(), os.path.join(save_directory, "head.pt"))


def test_a_quantized_base_that_is_left_out_is_no_obstacle(root: Path):
    """What stays out on purpose need not have memory."""
    module, fresh = HeadOnly(), HeadOnly()
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        for step in (1, 2):
            path = checkpointer.save(step, model=module).result(BOUND).path
    load(path, model=fresh)
    assert differing(state(fresh.head), state(module.head)) == []


class Packed(torch.nn.Parameter):
    """As bitsandbytes has 4-bit weights: plain packed bytes, and their scale in an attribute."""

    scale: torch.Tensor


class FourBit(torch.nn.Module):
    """Its state_dict shows the scale too, under a name that no parameter has."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.weight = Packed(torch.randint(0, 255, (6, 2), dtype=torch.uint8), requires_grad=False)
        self.weight.scale = torch.randn(6)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight.scale"] = self.weight.scale

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.weight.scale = state_dict.pop(prefix + "weight.scale").clone()
        super()._load_from_state_dict(state_dict, prefix, *args)


def test_a_packed_weight_that_is_plain_bytes(root: Path):
    """Saved and loaded with all that its state_dict shows, at each call."""
    module, fresh = FourBit(1), FourBit(2)
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        for step in (1, 2):
            module.weight.scale.add_(1)
            saved = state(module)
            path = checkpointer.save(step, model=module).result(BOUND).path
    module.weight.scale.zero_()
    load(path, model=fresh)
    assert differing(state(fresh), saved) == []


# -- meta tensors and what is not initialized


def on_meta(model: torch.nn.Module) -> torch.nn.Module:
    return model.to("meta")


def in_part(model: torch.nn.Module) -> torch.nn.Module:
    next(module for module in reversed(list(model.modules())) if module._parameters).to("meta")
    return model


@pytest.mark.parametrize("empty", [on_meta, in_part], ids=["all", "part"])
@pytest.mark.parametrize("kind", [*KINDS, "tied"])
def test_weights_on_the_meta_device(root: Path, kind: str, empty: Callable[[Any], Any]):
    """Also after a good save of the same model: there is nothing to copy. Nor is there a place to load into."""
    model, whole = (build("GPT2, tied") if kind == "tied" else KINDS[kind]() for _ in range(2))
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        path = checkpointer.save(1, model=model).result(BOUND).path
        with pytest.raises(PlanError, match=r"on the meta device.*load or initialize the model first"):
            checkpointer.save(2, model=empty(model))
        assert checkpointer.statistics()["started"] == 1
    with pytest.raises(CheckpointError, match="on the meta device and has no memory"):
        load(path, model=model)
    load(path, model=whole)


def test_weights_that_are_not_initialized_yet(root: Path):
    """Lazy modules have no shapes before their first forward pass."""
    module = torch.nn.Sequential(torch.nn.LazyLinear(3))
    with AsyncCheckpointer(root, writer="thread") as checkpointer:
        with pytest.raises(PlanError, match=r"0\.weight is not initialized yet; run a forward pass first"):
            checkpointer.save(1, model=module)
        module(torch.ones(1, 2))
        checkpointer.save(1, model=module).result(BOUND)
