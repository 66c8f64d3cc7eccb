"""The parameters that an optimizer steps: their names in the models, their shapes and strides.

An optimizer's state knows parameters by number only. So the names are saved beside it, and `load` finds the state of
each parameter by its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any

import torch

from . import memory_format
from .tensor_map import live_tensors, shown
from .wrappers import spellings, unwrapped_inside

Parameter = list[Any]  # in JSON: [name or None, shape], and the strides if it is not contiguous


class Names:
    """The names of the parameters in the models of a save. They are looked up again only after a model has changed."""

    def __init__(self) -> None:
        self._models: list[tuple[str, torch.nn.Module]] = []
        self._tokens: list[Any] = []
        self._names: dict[int, str] | None = {}
        self.version = 0

    def update(self, models: Sequence[tuple[str, torch.nn.Module]], tokens: Sequence[Any]) -> None:
        """Set the models of this save, by name.

        `tokens`: one object per model. It must be the same object as long as the structure of the model is the same.
        """
        if len(tokens) != len(self._tokens) or not all(map(is_, tokens, self._tokens)):
            self._tokens = list(tokens)
            self._names = None
            self.version += 1
        self._models = list(models)

    def forget_models(self) -> None:
        """Release the modules."""
        self._models = []

    def of(self, parameter: torch.Tensor) -> str | None:
        if self._names is None:
            self._names = {}
            for name, found in names_of(self._models).items():
                self._names.setdefault(id(found), name)
        return self._names.get(id(parameter))


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


class Described:
    """Describes the parameters of one optimizer for every save.

    The result is the same object until something changes.
    """

    def __init__(self) -> None:
        self._key: Any = None
        self._groups: list[list[Parameter]] = []

    def read(self, optimizer: Any, names: Names) -> list[list[Parameter]] | None:
        """Return the description of each parameter, group by group, in their order; None if there are no groups."""
        groups = groups_of(optimizer)
        if groups is None:
            return None
        parameters = [parameter for group in groups for parameter in group["params"]]
        sizes = [len(group["params"]) for group in groups]
        shapes, strides = list(map(torch.Tensor.size, parameters)), list(map(torch.Tensor.stride, parameters))
        key = (names.version, sizes, list(map(id, parameters)), shapes, strides)
        if key != self._key:
            described = iter([_describe(names.of(parameter), parameter) for parameter in parameters])
            self._groups = [[next(described) for _ in range(size)] for size in sizes]
            self._key = key
        return self._groups


def _describe(name: str | None, parameter: torch.Tensor) -> Parameter:
    strides = memory_format.kept(parameter) if parameter.layout is torch.strided else None
    return [name, list(parameter.shape), *([] if strides is None else [list(strides)])]
