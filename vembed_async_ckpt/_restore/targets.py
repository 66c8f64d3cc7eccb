"""The tensors into which a checkpoint is loaded: which of them are divided among ranks, and who loads together."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from .._capture.shares import Sharding, Share, is_dtensor, reshard


class Targets:
    """The parameters and buffers of models, and the state of their optimizers."""

    def __init__(self, models: Sequence[torch.nn.Module]) -> None:
        """`models`: with all their wrappers. Gathered parameters of FSDP units are freed, on this rank alone.

        Raises `PlanError` if an FSDP unit does not say what this rank holds of its parameters.
        """
        reshard(models)
        for part in _parts(models):
            if part._modules.get("_fsdp_wrapped_module") is not None:
                _free_gathered(part)
        self._sharding = Sharding(*models)

    def is_divided(self, tensor: torch.Tensor) -> bool:
        """Return whether a parameter or buffer may be divided among ranks."""
        return self._sharding.is_divided(tensor)

    def share(self, name: str, tensor: torch.Tensor) -> Share | None:
        """Return what this rank holds of a parameter or buffer; None if it is a plain tensor, whole on every rank.

        Raises `PlanError` naming the tensor and the rank if that is not certain.
        """
        if self.is_divided(tensor):
            return self._sharding.share(name, tensor)
        if getattr(tensor, "_fsdp_flattened", False):
            self._sharding.share(name, tensor)  # raises if its FSDP unit is not in the models
        return None

    def state_share(self, name: str, tensor: torch.Tensor, parameter: torch.Tensor) -> Share:
        """Return what this rank holds of a tensor in the state of a parameter. Raises as `share` does."""
        return self._sharding.share_of_state(name, tensor, parameter)

    def shape(self, tensor: torch.Tensor) -> tuple[int, ...]:
        """Return the shape of a parameter as one process has it. Raises `PlanError` if that is not certain."""
        piece = self._sharding.flat.get(id(tensor))
        if piece is not None:
            return piece.shape
        if not is_dtensor(tensor):
            self.share("a parameter of the optimizer", tensor)
        return tuple(tensor.shape)

    def has_none_of(self, tensor: torch.Tensor) -> bool:
        """Return whether this rank holds nothing of a parameter inside a unit of FSDP version 1.

        An optimizer does not step it here and has no state of it.
        """
        piece = self._sharding.flat.get(id(tensor))
        return piece is not None and not piece.run.count


def _free_gathered(unit: Any) -> None:
    """Free what a unit of FSDP version 1 has gathered: it would be used although the shards have changed."""
    from torch.distributed.fsdp._runtime_utils import _reshard

    handle = unit._handle
    gathered = getattr(handle, "flat_param", None) is not None and hasattr(handle.flat_param, "_full_param_padded")
    if gathered and handle.uses_sharded_strategy and not handle.needs_unshard():
        _reshard(unit, handle, True)


def ranks_that_share(models: Iterable[torch.nn.Module], optimizers: Iterable[Any]) -> list[int]:
    """Return the ranks of the job that must load together with this one.

    These are all ranks if a tensor is divided, the ranks of the replicas if a model is inside DistributedDataParallel,
    and none otherwise.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return []
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    divided = () if fsdp is None else (fsdp.FullyShardedDataParallel, getattr(fsdp, "FSDPModule", type(None)))
    replicas: set[int] = set()
    for part in _parts(models):
        if isinstance(part, divided) or any(p is not None and is_dtensor(p) for p in part._parameters.values()):
            return list(range(torch.distributed.get_world_size()))
        if isinstance(part, torch.nn.parallel.DistributedDataParallel):
            replicas |= set(torch.distributed.get_process_group_ranks(part.process_group))
    for optimizer in optimizers:
        for group in getattr(optimizer, "param_groups", None) or ():
            if any(map(is_dtensor, group["params"])):
                return list(range(torch.distributed.get_world_size()))
    return sorted(replicas)


def _parts(models: Iterable[torch.nn.Module]) -> Iterator[torch.nn.Module]:
    for model in models:
        yield from model.modules()
