"""Detects models of which this process holds only a share.

They are recognised by the classes of their modules and tensors, before any method is called on them. Under FSDP2,
`state_dict()` on one rank alone changes what that rank holds, and then the next step hangs on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ..errors import PlanError

# Wrappers and engines of torch, torch_xla, fairscale, DeepSpeed, Megatron, ColossalAI, SageMaker and torchrec.
_WRAPPERS = frozenset(
    {
        "FSDPModule",
        "FullyShardedDataParallel",
        "XlaFullyShardedDataParallel",
        "SpmdFullyShardedDataParallel",
        "DeepSpeedEngine",
        "PipelineModule",
        "GeminiDDP",
        "HybridParallelModule",
        "DistributedModelParallel",
    }
)
# Layers of Megatron and fairscale. With several ranks, each rank holds a part of them as plain tensors.
_LAYERS = frozenset({"ColumnParallelLinear", "RowParallelLinear", "VocabParallelEmbedding", "ParallelEmbedding"})
_TENSORS = frozenset({"DTensor", "ShardedTensor", "FlatParameter", "LocalShardsWrapper"})
# Those of which `shares.Sharding` says what this rank holds.
KNOWN_SHARES = frozenset({"FSDPModule", "FullyShardedDataParallel", "DTensor"})


def is_sharded(module: torch.nn.Module) -> bool:
    """Return whether the module, or a part of it, is divided among ranks in a way that `shares.Sharding` knows.

    This runs before every save of a distributed training, so it looks at classes only.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    if isinstance(module, torch.nn.parallel.DistributedDataParallel):
        return False  # it takes no tensors that are divided
    kinds: set[type] = set()
    for part in module.modules():
        kinds.add(type(part))
        kinds.update(map(type, part._parameters.values()), map(type, part._buffers.values()))
    return any(_is_known(kind, KNOWN_SHARES) for kind in kinds)


def share_of(module: torch.nn.Module, known_shares: frozenset[str] = frozenset()) -> str | None:
    """Return which part of a module this process holds only a share of, and why; None if it holds the whole module.

    `known_shares`: names of classes that do not count: the caller knows what this process holds of them.
    """
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    several = several and torch.distributed.get_world_size() > 1
    holders = _WRAPPERS | _LAYERS if several else _WRAPPERS
    known: dict[type, str | None] = {}
    for path, part in module.named_modules():
        if type(part) not in known:
            known[type(part)] = _first_of(type(part), holders)
        kind = known[type(part)]
        if kind is not None and not _is_known(type(part), known_shares):
            return f"{path or 'the model'} is sharded by {kind}"
        # With tensor parallelism, transformers keeps plain tensors in plain layers.
        size = vars(part).get("_tp_size")
        if isinstance(size, int) and size > 1 and not _says_its_shares(part, known_shares):
            return f"{path or 'the model'} is divided among {size} ranks by tensor parallelism"
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if type(tensor) not in known:
            known[type(tensor)] = _first_of(type(tensor), _TENSORS)
        kind = known[type(tensor)]
        if kind is not None and not _is_known(type(tensor), known_shares):
            return f"{name} is a {kind}"
        if several and not known_shares and getattr(tensor, "_fsdp_flattened", False):
            return f"{name} belongs to a FullyShardedDataParallel unit that is not in the model that was passed"
        if hasattr(tensor, "ds_tensor"):
            return f"{name} is partitioned by DeepSpeed ZeRO-3"
        if several and getattr(tensor, "tensor_model_parallel", False) is True:
            return f"{name} is divided among the ranks by tensor parallelism"
    return None


def _says_its_shares(part: torch.nn.Module, known_shares: frozenset[str]) -> bool:
    """Return whether some of its parameters have a class that says what this rank holds."""
    return any(_is_known(type(parameter), known_shares) for parameter in part.parameters())


def refuse_share(module: torch.nn.Module) -> None:
    """Raise `PlanError` if this process holds only a share of the module."""
    share = share_of(module)
    if share is not None:
        raise PlanError(
            f"model: {share}: this process holds only a share of it. Gather the whole model first, "
            "or save it with accelerator.save_state or torch.distributed.checkpoint"
        )


def refuse_shares(models: Iterable[Any]) -> None:
    """Call `refuse_share` for those of the objects that are modules."""
    for model in models:
        if isinstance(model, torch.nn.Module):
            refuse_share(model)


def _is_known(kind: type, known_shares: frozenset[str]) -> bool:
    """Return whether a class is one of these, from torch itself. Other packages have classes of the same names."""
    return any(base.__name__ in known_shares and base.__module__.startswith("torch.") for base in kind.__mro__)


def _first_of(kind: type, names: frozenset[str]) -> str | None:
    return next((base.__name__ for base in kind.__mro__ if base.__name__ in names), None)
