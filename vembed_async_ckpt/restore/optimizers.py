"""State back into an optimizer."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any

import torch

from .._request import memory_format, tree
from .._request.places import has_no_storage
from ..errors import CheckpointError
from .models import live_tensors
from .tensors import Move, Saved, Tensors


def plan_optimizer(
    source: Tensors, saved: Mapping[str, Any], name: str, optimizer: Any, rewritable: Container[int]
) -> tuple[list[Move], Callable[[], None]]:
    """What will restore `optimizer`: where its tensors come, and the step after that. Raises before anything is changed.

    They come where it has them, if those tensors are `rewritable`, and else into new memory.
    """
    file = saved["file"]
    used: set[str] = set()

    def get(key: str) -> torch.Tensor:
        used.add(key)
        return source.listed_copy(file, key)

    state = tree.decode(saved["rest"], get)
    live: Mapping[int, Any] = {}
    if isinstance(optimizer, torch.optim.Optimizer):
        had = [len(group["params"]) for group in state["param_groups"]]
        has = [len(group["params"]) for group in optimizer.param_groups]
        if had != has:
            raise CheckpointError(
                f"{source.directory}: the optimizer{' ' + name if name else ''} has parameter groups of {has} parameters, "
                f"saved were {had}"
            )
        entries = ((index, optimizer.state.get(parameter)) for index, parameter in _numbered(optimizer, state))
        live = {index: entry for index, entry in entries if isinstance(entry, dict)}
    moves: list[Move] = []
    for key in source.manifest.tensors.get(file, {}):
        if key not in used:
            index, _, field = key.partition(".")
            tensor = source.listed(file, key)
            place = live.get(int(index), {}).get(field)
            if id(place) not in rewritable or not _is_as(place, tensor):
                place = tensor.empty()
            state["state"][int(index)][field] = place
            moves.append((place, tensor))
    return moves, lambda: _restore_optimizer(optimizer, state)


def _is_as(place: torch.Tensor, tensor: Saved) -> bool:
    strides = memory_format.contiguous(tensor.shape) if tensor.strides is None else tensor.strides
    return (place.dtype, place.shape, place.stride()) == (tensor.dtype, tensor.shape, strides)


def _restore_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    optimizer.load_state_dict(state)
    if not isinstance(optimizer, torch.optim.Optimizer):
        return
    # torch casts floating point state to its parameter's dtype; what was saved in another one comes back as it was.
    for index, parameter in _numbered(optimizer, state):
        for key, value in state["state"].get(index, {}).items():
            held = optimizer.state[parameter].get(key)
            if isinstance(value, torch.Tensor) and isinstance(held, torch.Tensor) and held.dtype is not value.dtype:
                optimizer.state[parameter][key] = value.to(held.device)


def _numbered(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> Iterator[tuple[int, torch.Tensor]]:
    """The numbers that `state` gives the optimizer's parameters."""
    numbers = (number for group in state["param_groups"] for number in group["params"])
    return zip(numbers, _parameters(optimizer), strict=True)


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def rewritable_state(models: Iterable[torch.nn.Module], optimizers: Iterable[Any]) -> set[int]:
    """Ids of the state tensors that may be overwritten instead of replaced: all of a memory that nothing else here has, in
    optimizers with torch's own `load_state_dict`, which keeps what it is given. Nor what a state_dict holds that was taken before:
    somebody may want to go back to it."""
    alone = {id(value) for optimizer in optimizers for value in _held_by_the_state_alone(optimizer)}
    kept: list[torch.Tensor] = []
    users = Counter(_storage(tensor) for module in models for _, tensor in live_tensors(module))
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.Optimizer):
            state = [
                value
                for entry in optimizer.state.values()
                if isinstance(entry, dict)
                for value in entry.values()
                if isinstance(value, torch.Tensor)
            ]
            users.update(map(_storage, state))
            users.update(
                _storage(tensor) for p in _parameters(optimizer) for tensor in (p, p.grad) if tensor is not None
            )
            if (
                type(optimizer).load_state_dict is torch.optim.Optimizer.load_state_dict
                and not optimizer._optimizer_load_state_dict_pre_hooks
            ):
                kept += state
    return {
        id(tensor)
        for tensor in kept
        if id(tensor) in alone
        and type(tensor) is torch.Tensor
        and users[_storage(tensor)] == 1
        and tensor.untyped_storage().nbytes() == tensor.nbytes
    }


def _held_by_the_state_alone(optimizer: Any) -> list[torch.Tensor]:
    """Those state tensors that no state_dict shares, whether taken from this optimizer or loaded into it."""
    counted = _references(getattr(optimizer, "state", {}))
    (least,) = _references({0: {"": torch.empty(0)}}).values()
    return [value for value, count in counted.values() if count <= least[1]]


def _references(state: Any) -> dict[int, tuple[torch.Tensor, int]]:
    """{id: (tensor, references to it and to the dict that it is in)}."""
    found = {}
    for entry in state.values() if isinstance(state, dict) else ():
        if isinstance(entry, dict):
            of_entry = sys.getrefcount(entry)
            for value in entry.values():
                if isinstance(value, torch.Tensor):
                    found[id(value)] = value, of_entry + sys.getrefcount(value)
    return found


def _storage(tensor: torch.Tensor) -> int:
    return 0 if has_no_storage(tensor) else tensor.untyped_storage().data_ptr()
