"""The parameters that an optimizer steps: their names in the models, their shapes and strides.

An optimizer's state knows parameters by number only. So the names are saved beside it, and `load` finds the state of
each parameter by its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from operator import is_
from typing import Any

import torch

from .._tensor_guard import TensorGuard
from . import memory_format
from .model import ModelState
from .tensor_map import live_tensors, shown
from .tree import to_json
from .wrappers import spellings, unwrapped_inside

Parameter = list[Any]  # in JSON: [name or None, shape], and the strides if it is not contiguous


class Names:
    """The names of the parameters in the models of a save. They are looked up again only after a model has changed."""

    def __init__(self) -> None:
        self._models: Sequence[tuple[str, torch.nn.Module]] = ()
        self._tokens: list[Any] = []
        self._names: dict[int, str] | None = {}
        self._watched: frozenset[int] = frozenset()
        self.version = 0

    def update(self, models: Sequence[tuple[str, torch.nn.Module]], states: Sequence[ModelState]) -> None:
        """Set the models of this save, by name, and their states.

        Afterwards `version` is another one if structure or looks of a model are.
        """
        tokens: list[Any] = [token for state in states for token in (state.names, state.looks)]
        if len(tokens) != len(self._tokens) or not all(map(is_, tokens, self._tokens)):
            self._tokens = tokens
            self._names = None
            self._watched = frozenset(id(owner) for state in states for owner in state.owners)
            self.version += 1
        self._models = models

    def forget_models(self) -> None:
        """Release the modules."""
        self._models = ()

    def of(self, parameter: torch.Tensor) -> str | None:
        if self._names is None:
            self._names = {}
            for name, found in names_of(self._models).items():
                self._names.setdefault(id(found), name)
        return self._names.get(id(parameter))

    def watches(self, parameter: torch.Tensor) -> bool:
        """Return whether `version` also tells that this parameter looks the same."""
        return id(parameter) in self._watched


def names_of(models: Sequence[tuple[str, torch.nn.Module]]) -> dict[str, torch.nn.Parameter]:
    """Return every parameter of these models by name. A parameter with several names appears under each.

    Names that the state_dict shows come first, if hooks rename it. A model that has a name puts it before those of its
    parameters.
    """
    return {
        f"{model}/{name}" if model else name: parameter
        for model, module in models
        for name, parameter in _names_in(module).items()
    }


def _names_in(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    live = {item.name: item.tensor for item in live_tensors(module) if isinstance(item.tensor, torch.nn.Parameter)}
    if not any(part._state_dict_hooks for part in module.modules()):
        return live
    with unwrapped_inside(module):
        renamed = {key: live[name] for key, (name, part) in shown(module).items() if part is None and name in live}
    return renamed | live


def given_names(group: Mapping[str, Any]) -> list[str | None]:
    """Return the names that the optimizer itself was given for the parameters of a group.

    The parts that wrappers add are removed. Returns None for each parameter if it was given no names.
    """
    names = group.get("param_names")
    if names is None:
        return [None] * len(group["params"])
    return [list(spellings(name))[-1] for name in names]


def groups_of(optimizer: Any) -> list[Mapping[str, Any]] | None:
    """Return the parameter groups of an optimizer or a similar object; None if it has none."""
    groups = getattr(optimizer, "param_groups", None)
    if not isinstance(groups, list) or not all(isinstance(group, Mapping) and "params" in group for group in groups):
        return None
    return groups


@dataclass(frozen=True)
class Parameters:
    """The parameters of one optimizer, group by group."""

    groups: list[list[Parameter]]

    @cached_property
    def json(self) -> str:
        return to_json(self.groups)


class Described:
    """Describes the parameters of one optimizer for every save.

    The result is the same object until something changes.
    """

    def __init__(self) -> None:
        self._key: Any = None
        self._unwatched: list[int] = []  # indices of the parameters whose looks `names.version` does not tell
        self._looks = TensorGuard([])
        self._parameters = Parameters([])

    def read(self, optimizer: Any, names: Names) -> Parameters | None:
        """Return the description of the parameters; None if there are no groups."""
        groups = groups_of(optimizer)
        if groups is None:
            return None
        key = (names.version, [list(map(id, group["params"])) for group in groups])
        if key != self._key or not self._looks.holds(self._those_unwatched(groups)):
            described = [[_describe(names.of(each), each) for each in group["params"]] for group in groups]
            if described != self._parameters.groups:
                self._parameters = Parameters(described)
            parameters = chain.from_iterable(group["params"] for group in groups)
            self._unwatched = [index for index, each in enumerate(parameters) if not names.watches(each)]
            self._key, self._looks = key, TensorGuard(self._those_unwatched(groups))
        return self._parameters

    def _those_unwatched(self, groups: Sequence[Mapping[str, Any]]) -> list[torch.Tensor]:
        if not self._unwatched:
            return []
        parameters = list(chain.from_iterable(group["params"] for group in groups))
        return [parameters[index] for index in self._unwatched]


def _describe(name: str | None, parameter: torch.Tensor) -> Parameter:
    strides = memory_format.kept(parameter) if parameter.layout is torch.strided else None
    return [name, list(parameter.shape), *([] if strides is None else [list(strides)])]
