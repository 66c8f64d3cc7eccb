"""Restores the state of an optimizer."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .._capture import memory_format, tree
from .._capture.optimizer import kind_of
from .._capture.optimizer_layout import has_torchs_layout
from .._capture.parameters import groups_of
from .._capture.shares import is_dtensor
from .._capture.tensor_map import has_no_storage
from ..errors import CheckpointError, CorruptCheckpoint
from .divided import local_part, plan_state, refuse_nested
from .kinds import check_optimizer
from .matching import Matched, SavedParameter, match, saved_parameters
from .models import live_tensors
from .targets import Targets
from .tensors import Move, Saved, Tensors


@dataclass(frozen=True)
class PlannedOptimizer:
    """The planned restore of an optimizer.

    `moves`: fill its tensors.
    `step`: run this after the moves.
    `sources`: for each of its parameter groups, the index of the saved group; None if the groups are as they were.
    """

    moves: list[Move]
    step: Callable[[], None]
    sources: list[int | None] | None


def plan_optimizer(
    source: Tensors,
    saved: Mapping[str, Any],
    name: str,
    optimizer: Any,
    rewritable: Container[int],
    names: Mapping[int, Sequence[str]],
    targets: Targets,
) -> PlannedOptimizer:
    """Plan the restore of an optimizer. Raises `CheckpointError` or `CorruptCheckpoint` before anything is changed.

    A saved tensor goes into the tensor that the optimizer has now, if that is `rewritable`, else into new memory. The
    state of a parameter that is divided among ranks is divided like it.
    `names`: the names that the models give to parameters, by id.
    `targets`: says what this rank holds of the parameters.
    """
    file, what = saved["file"], f"optimizer {name}".rstrip()
    used: dict[str, torch.Tensor] = {}

    def get(key: str) -> torch.Tensor:
        if key not in used:
            used[key] = source.read([source.stored(file, key)])[0]
        return used[key]

    state = tree.decode(saved["rest"], get)
    check_optimizer(source.directory, what, saved.get("class"), state, optimizer)
    described = saved.get("parameters")
    direct = [key for key in source.keys(file) if key not in used]
    divided = any(targets.is_divided(p) for group in groups_of(optimizer) or () for p in group["params"])
    if not has_torchs_layout(state):
        if direct:
            raise CorruptCheckpoint(f"{source.directory}: {file}: the state says nowhere what {direct[0]} belongs to")
        if divided:
            raise CheckpointError(
                f"{source.directory}: the {what} has parameters that are divided among the ranks, and the state_dict of a "
                f"{kind_of(optimizer)} cannot be divided like them; load without optimizer="
            )
        if described is not None and groups_of(optimizer) is not None:
            _refuse_other_order(source.directory, what, described, optimizer, names)
        return PlannedOptimizer([], lambda: optimizer.load_state_dict(state), None)
    groups = state["param_groups"]
    if groups_of(optimizer) is None:
        matched = Matched([], list(range(len(groups))), as_saved=True)
    else:
        parameters = saved_parameters(groups, described)
        matched = match(source.directory, what, groups, parameters, optimizer, names, targets.shape)
    of_saved = {each.number: (parameter, each) for parameter, each in matched.pairs}
    device_steps = [group["params"] for group in groups if group.get("fused") or group.get("capturable")]
    stepped_there = set(itertools.chain.from_iterable(device_steps))
    moves: list[Move] = []
    for key in direct:
        number, field = _split(key, state["state"])
        if number is None:
            raise CorruptCheckpoint(f"{source.path(file)}: the state says nowhere what {key} belongs to")
        tensor = wanted = source.stored(file, key)
        place, home, part = None, torch.device("cpu"), None
        if number in of_saved:
            parameter, each = of_saved[number]
            home = _home(optimizer, parameter, field, steps_on_device=number in stepped_there)
            _refuse_misfit(source.directory, what, field, tensor, targets.shape(parameter), each, optimizer)
            place = _entry(optimizer, parameter).get(field)
            place = place if id(place) in rewritable else None
            part = plan_state(
                targets, f"{source.directory}: {key} of the {what}", parameter, field, tensor, place, home
            )
            wanted = replace(tensor, strides=_strides(tensor, parameter, each))
        if part is None:
            place = place if place is not None and _is_as(place, wanted) else wanted.empty(home)
            part = place, [(place, tensor)]
        state["state"][number][field] = part[0]
        moves += part[1]
    if divided:
        _leave_to_other_ranks(source.directory, what, state["state"], of_saved, targets)
    if not matched.as_saved:
        state = _rearranged(source.directory, what, state, matched, optimizer)
    sources = None if matched.sources == list(range(len(groups))) else matched.sources
    return PlannedOptimizer(moves, lambda: _restore_optimizer(optimizer, state), sources)


def _split(key: str, entries: Container[Any]) -> tuple[Any, str]:
    """Return (number or name of a parameter, field of its state) for the key of a tensor; (None, "") if none fits."""
    head, dot, field = key.partition(".")
    if head.isdecimal() and int(head) in entries:
        return int(head), field
    found: tuple[Any, str] = None, ""
    while dot:
        if head in entries:
            found = head, field  # if the names of two parameters fit, the longer one counts
        more, dot, field = field.partition(".")
        head = f"{head}.{more}"
    return found


def _leave_to_other_ranks(
    directory: str,
    what: str,
    entries: dict[Any, Any],
    of_saved: Mapping[Any, tuple[torch.Tensor, SavedParameter]],
    targets: Targets,
) -> None:
    """Remove the state of parameters of which this rank holds nothing. Raises `CheckpointError` for what is not divided."""
    for number, (parameter, _) in of_saved.items():
        if targets.is_divided(parameter) and isinstance(entries.get(number), dict):
            refuse_nested(f"{directory}: the state of {number} in the {what}", entries[number])
            if targets.has_none_of(parameter):
                del entries[number]


def _refuse_other_order(
    directory: str, what: str, described: Any, optimizer: Any, names: Mapping[int, Sequence[str]]
) -> None:
    """Raise `CheckpointError` unless the parameters are the saved ones in the saved order.

    Used for a state with an unknown layout, which cannot be rearranged.
    """
    counter = itertools.count()
    groups = [{"params": [next(counter) for _ in group]} for group in described]
    if not match(directory, what, groups, saved_parameters(groups, described), optimizer, names).as_saved:
        raise CheckpointError(
            f"{directory}: the {what} has its parameters in another order than they were saved in, and the state_dict of a "
            f"{kind_of(optimizer)} cannot be rearranged; give it the parameters in the order in which they were"
        )


def _rearranged(directory: str, what: str, state: dict[str, Any], matched: Matched, optimizer: Any) -> dict[str, Any]:
    """Return the state of the same parameters, in the order and the groups that the optimizer has here."""
    if len(state) > 2 or any(kind.__name__ == "LBFGS" for kind in type(optimizer).__mro__):
        raise CheckpointError(
            f"{directory}: the {what} has its parameters in another order than they were saved in, and what a "
            f"{kind_of(optimizer)} keeps of all of them together cannot be rearranged; give it the parameters in the order in "
            "which they were"
        )
    numbers = {saved.number: number for number, (_, saved) in enumerate(matched.pairs)}
    entries = {numbers.get(key, key): entry for key, entry in state["state"].items()}
    groups, start = [], 0
    for group, origin in zip(groups_of(optimizer) or (), matched.sources, strict=True):
        options = dict(group if origin is None else state["param_groups"][origin])
        options["params"] = list(range(start, start + len(group["params"])))
        options.pop("param_names", None)
        if "param_names" in group:
            options["param_names"] = group["param_names"]
        start += len(group["params"])
        groups.append(options)
    order = dict(sorted(entries.items(), key=lambda item: item[0] if type(item[0]) is int else start))
    return {"state": order, "param_groups": groups}


def _refuse_misfit(
    directory: str,
    what: str,
    field: str,
    tensor: Saved,
    shape: tuple[int, ...],
    saved: SavedParameter,
    optimizer: Any,
) -> None:
    """Raise `CheckpointError` for a state tensor that cannot belong to the parameter.

    This is a check for parameters with unknown saved shape. In torch's own optimizers the tensor has the shape of its
    parameter, or is a number.
    """
    if saved.shape is not None or not tensor.shape or field in ("row_var", "col_var"):
        return
    kind = type(optimizer)
    if kind.__module__.startswith("torch.optim.") and kind is not torch.optim.LBFGS and tensor.shape != shape:
        raise CheckpointError(
            f"{directory}: does not fit the {what}: parameter {saved.number} has shape {shape}, its saved "
            f"{field} has {tensor.shape}"
        )


def _strides(tensor: Saved, parameter: torch.Tensor, saved: SavedParameter) -> tuple[int, ...] | None:
    """Return the strides for a state tensor.

    If it had the strides of its parameter when it was saved, it gets those of the parameter here, because fused steps
    need that. In checkpoints that do not record the strides of parameters, it had them.
    """
    had = memory_format.contiguous(tensor.shape) if tensor.strides is None else tensor.strides
    if tensor.shape != tuple(parameter.shape) or parameter.layout is not torch.strided:
        return tensor.strides
    return memory_format.kept(parameter) if saved.strides is None or saved.strides == had else tensor.strides


def _home(optimizer: Any, parameter: torch.Tensor, field: str, *, steps_on_device: bool) -> torch.device:
    """Return the device on which torch's `load_state_dict` keeps this state.

    Reading directly to this device avoids one more copy.
    """
    if type(optimizer).load_state_dict is not torch.optim.Optimizer.load_state_dict or parameter.is_meta:
        return torch.device("cpu")
    return torch.device("cpu") if field == "step" and not steps_on_device else parameter.device


def _entry(optimizer: Any, parameter: torch.Tensor) -> Mapping[str, Any]:
    """Return the state that the optimizer has for the parameter now."""
    state = getattr(optimizer, "state", None)
    entry = state.get(parameter) if isinstance(state, Mapping) else None
    return entry if isinstance(entry, Mapping) else {}


def _is_as(place: torch.Tensor, tensor: Saved) -> bool:
    strides = memory_format.contiguous(tensor.shape) if tensor.strides is None else tensor.strides
    return (place.dtype, place.shape, place.stride()) == (tensor.dtype, tensor.shape, strides)


def _restore_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        optimizer.load_state_dict(state)
        return
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    entries = state["state"]
    # torch's load_state_dict changes strings, deques and nested tensors of another dtype. They are set afterwards.
    aside = {number: entries[number] for number in numbers if _is_more_than_tensors(entries.get(number))}
    if type(optimizer).load_state_dict is torch.optim.Optimizer.load_state_dict:
        given = {
            key: {name: value for name, value in entry.items() if isinstance(value, _PLAIN)} if key in aside else entry
            for key, entry in entries.items()
        }
    else:  # its own load_state_dict may need them; a value that it converts to another type stays converted
        given = entries
    optimizer.load_state_dict({**state, "state": given})
    for number, parameter in zip(numbers, _parameters(optimizer), strict=True):
        held, saved = _entry(optimizer, parameter), entries.get(number)
        result = {}
        for key, value in saved.items() if isinstance(saved, dict) else ():
            now = held.get(key)
            if isinstance(value, torch.Tensor):
                # torch casts floating point state to the dtype of its parameter. Restore the dtype that was saved.
                if isinstance(now, torch.Tensor) and now.dtype is not value.dtype:
                    result[key] = value.to(now.device)
            elif not isinstance(value, _PLAIN) and (key not in held or type(now) is type(value)):
                result[key] = tree.moved(value, parameter.device)
        if result:
            order = dict.fromkeys([*saved, *held])
            optimizer.state[parameter] = {
                key: result.get(key, held.get(key)) for key in order if key in result or key in held
            }


_WHOLE = (torch.Tensor, torch.nn.Parameter)
_PLAIN = (torch.Tensor, bool, int, float, complex, type(None))


def _is_more_than_tensors(entry: Any) -> bool:
    return type(entry) is dict and not all(isinstance(value, _PLAIN) for value in entry.values())


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def rewritable_state(models: Iterable[torch.nn.Module], optimizers: Iterable[Any]) -> set[int]:
    """Return the ids of the state tensors that may be overwritten in place.

    Such a tensor must own all of its memory, and no other tensor here may use it. Its optimizer must have torch's own
    `load_state_dict`, which keeps the tensors it is given. No state_dict taken earlier may hold the tensor, because the
    caller may want to go back to that state.
    """
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
            if type(optimizer).load_state_dict is torch.optim.Optimizer.load_state_dict and not vars(optimizer).get(
                "_optimizer_load_state_dict_pre_hooks", True
            ):
                kept += state
    return {
        id(tensor)
        for tensor in kept
        if id(tensor) in alone
        and (type(tensor) is torch.Tensor or is_dtensor(tensor))
        and users[_storage(tensor)] == 1
        and local_part(tensor).untyped_storage().nbytes() == local_part(tensor).nbytes
    }


def _held_by_the_state_alone(optimizer: Any) -> list[torch.Tensor]:
    """Return the state tensors that no state_dict shares, whether it was taken from this optimizer or loaded into it."""
    counted = _references(getattr(optimizer, "state", {}))
    (least,) = _references({0: {"": torch.empty(0, device="cpu")}}).values()
    return [value for value, count in counted.values() if count <= least[1]]


def _references(state: Any) -> dict[int, tuple[torch.Tensor, int]]:
    """Return {id: (tensor, number of references to it and to its dict)}."""
    found = {}
    for entry in state.values() if isinstance(state, dict) else ():
        if isinstance(entry, dict):
            of_entry = sys.getrefcount(entry)
            for value in entry.values():
                if isinstance(value, torch.Tensor):
                    found[id(value)] = value, of_entry + sys.getrefcount(value)
    return found


def _storage(tensor: torch.Tensor) -> int:
    if type(tensor) not in _WHOLE:
        tensor = local_part(tensor)
    return 0 if has_no_storage(tensor) else tensor.untyped_storage().data_ptr()
