"""Finds the saved parameter for each parameter of an optimizer: by name if both sides know names, else by order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .._capture import memory_format
from .._capture.parameters import given_names, groups_of
from ..errors import CheckpointError

Shape = tuple[int, ...]
_SHOWN = 8


@dataclass(frozen=True)
class SavedParameter:
    """A parameter as it was saved.

    `number`: its number in the saved state.
    `group`: index of its saved parameter group.
    `name`: its name, or None.
    `shape`, `strides`: None if the checkpoint does not record them.
    """

    number: Any
    group: int
    name: str | None
    shape: Shape | None
    strides: Shape | None


@dataclass(frozen=True)
class Matched:
    """How the parameters of an optimizer relate to the saved ones.

    `pairs`: each parameter of the optimizer, in its order, with its saved parameter.
    `sources`: for each parameter group of the optimizer, the index of its saved group. None for a group that has no
        parameters and no saved group.
    `as_saved`: whether both sides have the same parameters in the same order and groups.
    """

    pairs: list[tuple[torch.Tensor, SavedParameter]]
    sources: list[int | None]
    as_saved: bool


def saved_parameters(groups: Sequence[Mapping[str, Any]], described: Any) -> list[SavedParameter]:
    """Return the parameters of the saved groups. `described` is what the checkpoint says about them (None: nothing)."""
    result = []
    for index, group in enumerate(groups):
        details = [[None, None]] * len(group["params"]) if described is None else described[index]
        for number, (name, shape, *strides) in zip(group["params"], details, strict=True):
            shape = None if shape is None else tuple(shape)
            kept = None if shape is None else tuple(strides[0]) if strides else memory_format.contiguous(shape)
            result.append(SavedParameter(number, index, name, shape, kept))
    return result


def match(
    directory: str,
    what: str,
    groups: Sequence[Mapping[str, Any]],
    saved: Sequence[SavedParameter],
    optimizer: Any,
    names: Mapping[int, Sequence[str]],
    shape_of: Callable[[torch.Tensor], Shape] = lambda parameter: tuple(parameter.shape),
) -> Matched:
    """Find the saved parameter for each parameter of the `optimizer`.

    `groups`: the parameter groups as saved.
    `names`: the names that the models here give to parameters, by id.
    `shape_of`: returns the shape of a parameter as one process has it.

    Raises `CheckpointError`, naming both sides, if a parameter has no counterpart or another shape. Also raises it if a
    group here contains parameters that were saved with different hyper-parameters.
    """
    live_groups = groups_of(optimizer) or []
    live = [parameter for group in live_groups for parameter in group["params"]]
    found = _by_name(directory, what, groups, saved, live_groups, live, names)
    if found is None:
        found = _by_order(directory, what, groups, saved, live_groups)
    _check_shapes(directory, what, live, found, names, shape_of)
    sources = _sources(directory, what, groups, live_groups, found)
    order = [each.number for each in found] == [each.number for each in saved]
    sizes = [len(group["params"]) for group in live_groups] == [len(group["params"]) for group in groups]
    return Matched(list(zip(live, found, strict=True)), sources, order and sizes)


def _by_name(
    directory: str,
    what: str,
    groups: Sequence[Mapping[str, Any]],
    saved: Sequence[SavedParameter],
    live_groups: Sequence[Mapping[str, Any]],
    live: Sequence[torch.Tensor],
    names: Mapping[int, Sequence[str]],
) -> list[SavedParameter] | None:
    """Match by name. Returns None if one of the two sides does not know names."""
    of_models = _unique([each.name for each in saved])
    of_groups = _unique([name for group in groups for name in given_names(group)])
    here_models = _complete([names.get(id(parameter), ()) for parameter in live])
    here_groups = _complete([[name] for group in live_groups for name in given_names(group)])
    for of_one_kind, there, wanted in (
        (True, of_models, here_models),
        (True, of_groups, here_groups),
        (False, of_models, here_groups),
        (False, of_groups, here_models),
    ):
        if there is None or wanted is None:
            continue
        by_name = dict(zip(there, saved, strict=True))
        found = [next((by_name[name] for name in each if name in by_name), None) for each in wanted]
        known = [each for each in found if each is not None]
        if not known and not of_one_kind:
            continue  # two kinds of names with nothing in common: they prove nothing
        missing = [each[0] for each, one in zip(wanted, found, strict=True) if one is None]
        taken = {one.number for one in known}
        unused = [name for name, one in by_name.items() if one.number not in taken]
        if missing or unused:
            parts = [f"saved, but not here: {_list(unused)}"] if unused else []
            parts += [f"here, but not saved: {_list(missing)}"] if missing else []
            raise CheckpointError(
                f"{directory}: the {what} has other parameters than were saved ({'; '.join(parts)}); "
                "give it the same ones, or load without optimizer="
            )
        return known
    return None


def _complete(names: Sequence[Sequence[str | None]]) -> list[list[str]] | None:
    """Return the names of each parameter, or None if a parameter has no name."""
    known = [[name for name in each if name is not None] for each in names]
    return known if known and all(known) else None


def _unique(names: Sequence[str | None]) -> list[str] | None:
    known = [name for name in names if name is not None]
    return known if len(known) == len(names) == len(set(known)) and known else None


def _by_order(
    directory: str,
    what: str,
    groups: Sequence[Mapping[str, Any]],
    saved: Sequence[SavedParameter],
    live_groups: Sequence[Mapping[str, Any]],
) -> list[SavedParameter]:
    had, has = ([len(group["params"]) for group in each] for each in (groups, live_groups))
    if had != has:
        raise CheckpointError(
            f"{directory}: the {what} has parameter groups of {has} parameters, saved were {had}; make it as it was, "
            "or pass the model too, so that parameters can be matched by their names"
        )
    return list(saved)


def _check_shapes(
    directory: str,
    what: str,
    live: Sequence[torch.Tensor],
    found: Sequence[SavedParameter],
    names: Mapping[int, Sequence[str]],
    shape_of: Callable[[torch.Tensor], Shape],
) -> None:
    wrong = []
    for place, (parameter, saved) in enumerate(zip(live, found, strict=True)):
        shape = shape_of(parameter)
        if saved.shape is not None and shape != saved.shape:
            here = next(iter(names.get(id(parameter), ())), f"parameter {place}")
            there = saved.name or f"parameter {saved.number}"
            wrong.append(f"{here} has shape {shape}, saved was {there} of {saved.shape}")
    if wrong:
        raise CheckpointError(f"{directory}: does not fit the {what}: {_list(wrong, '; ')}")


def _sources(
    directory: str,
    what: str,
    groups: Sequence[Mapping[str, Any]],
    live_groups: Sequence[Mapping[str, Any]],
    found: Sequence[SavedParameter],
) -> list[int | None]:
    """Return the index of the saved group for each group here.

    Parameters keep the hyper-parameters with which they were saved.
    """
    sources: list[int | None] = []
    rest = iter(found)
    for index, group in enumerate(live_groups):
        origins = sorted({next(rest).group for _ in group["params"]})
        if not origins:
            is_there = len(groups) == len(live_groups) and not groups[index]["params"]
            sources.append(index if is_there else None)
            continue
        first, *others = (_options(groups[origin]) for origin in origins)
        different = sorted(
            {key for other in others for key in first.keys() | other.keys() if _differs(first, other, key)}
        )
        if different:
            shown = ", ".join(f"{key} ({', '.join(str(groups[o].get(key)) for o in origins)})" for key in different)
            raise CheckpointError(
                f"{directory}: group {index} of the {what} has parameters of the saved groups {', '.join(map(str, origins))}, "
                f"which differ in {shown}; make the groups as they were"
            )
        sources.append(origins[0])
    return sources


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _differs(one: Mapping[str, Any], other: Mapping[str, Any], key: str) -> bool:
    missing = object()
    a, b = one.get(key, missing), other.get(key, missing)
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return not torch.equal(a, b)
    return type(a) is not type(b) or bool(a != b)


def _list(values: Sequence[str], between: str = ", ") -> str:
    more = f"{between}and {len(values) - _SHOWN} more" if len(values) > _SHOWN else ""
    return between.join(values[:_SHOWN]) + more
