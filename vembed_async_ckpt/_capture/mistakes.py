"""Objects handed to `save()` under the wrong name, and optimizers of other models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import is_
from typing import Any

import torch

from ..errors import PlanError, warn
from .optimizer import OptimizerState, kind_of
from .parameters import Parameter

_KINDS: tuple[tuple[str, type], ...] = (
    ("model", torch.nn.Module),
    ("optimizer", torch.optim.Optimizer),
    ("scheduler", torch.optim.lr_scheduler.LRScheduler),
    ("scaler", torch.amp.GradScaler),
)


def refuse_wrong_kinds(given: Mapping[str, Any]) -> None:
    """Raise `PlanError` for what is certainly not what its argument is for: a state_dict, a list, or an object of torch that
    belongs under another name. `given`: what each argument of `save()` got."""
    for argument, value in given.items():
        if value is None:
            continue
        if isinstance(value, list | tuple):
            raise PlanError(f"{argument}: a {type(value).__name__} is given; use a mapping of names to objects")
        if not isinstance(value, Mapping) or isinstance(value, torch.nn.Module):
            _refuse(argument, value)
            continue
        if _is_state_dict(value):
            raise PlanError(f"{argument}: a state_dict is given; pass the object itself, not its state_dict()")
        for item in value.values():
            if isinstance(item, Mapping) and not isinstance(item, torch.nn.Module) and _is_state_dict(item):
                raise PlanError(f"{argument}: a state_dict is given; pass the object itself, not its state_dict()")
            _refuse(argument, item)


def _refuse(argument: str, value: Any) -> None:
    for name, kind in _KINDS:
        if isinstance(value, kind) and name != argument:
            if name == "model" and callable(getattr(value, "step", None)):
                continue  # an optimizer or scheduler that is a module
            raise PlanError(f"{argument}: got the {name} {kind_of(value)}; pass it as {name}=")


def _is_state_dict(value: Mapping[Any, Any]) -> bool:
    return (
        any(isinstance(item, torch.Tensor) for item in value.values())
        or {"state", "param_groups"} <= value.keys()
        or "last_epoch" in value
    )


class StrangeOptimizers:
    """Looks for optimizers that step nothing of the models that are saved with them."""

    def __init__(self) -> None:
        self._last: tuple[Any, ...] = ()

    def check(
        self, models: Iterable[torch.nn.Module], optimizers: Mapping[str, OptimizerState], *, alone: bool
    ) -> None:
        """Warn once of each optimizer none of whose parameters belongs to the `models`: copies of weights, as mixed precision and
        averages have them, or a model that is left out on purpose.

        Raises `PlanError` if that holds for all of them, one steps a matrix of a shape that no model has, and nothing else is
        saved with them (`alone`): then nothing that was trained would be in the checkpoint.
        """
        known = tuple(state.parameters for state in optimizers.values())  # the same objects as long as nothing changes
        if len(known) == len(self._last) and all(map(is_, known, self._last)):
            return
        strange = {name: state for name, state in optimizers.items() if _is_strange(state)}
        if strange:
            shapes = {parameter.shape for model in models for parameter in model.parameters()}
            other = [name for name, state in strange.items() if not _matrices(state) <= shapes]
            if alone and other and len(strange) == len(optimizers):
                raise PlanError(
                    f"{_which(other[0])}: its parameters belong to another model than the one that is saved; pass that model, "
                    "or the optimizer of this one"
                )
            for name in strange:
                warn(
                    f"{_which(name)}: none of its parameters belongs to a model that is saved; load() will give its state back in "
                    "the order of the parameters"
                )
        self._last = known


def _is_strange(state: OptimizerState) -> bool:
    parameters = [parameter for group in _groups(state) for parameter in group]
    return bool(parameters) and all(name is None for name, *_ in parameters)


def _groups(state: OptimizerState) -> list[list[Parameter]]:
    return [] if state.parameters is None else state.parameters.groups


def _matrices(state: OptimizerState) -> set[Any]:
    shapes = (torch.Size(parameter[1]) for group in _groups(state) for parameter in group)
    return {shape for shape in shapes if len(shape) > 1}  # those of one dimension may be many parameters laid flat


def _which(name: str) -> str:
    return f"optimizer {name!r}" if name else "optimizer"
