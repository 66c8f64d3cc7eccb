"""Restores the states of schedulers and gradient scalers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .._capture import tree
from .._capture.optimizer import unwrap as unwrap_optimizer
from .._capture.training_state import unwrap_scheduler
from .kinds import check_scaler, check_scheduler
from .tensors import Tensors

# Attributes of torch's schedulers with one value per parameter group.
_PER_GROUP = ("base_lrs", "_last_lr", "min_lrs", "max_lrs", "base_momentums", "max_momentums", "lr_lambdas")

Sources = Sequence[int | None]  # for each parameter group, the index of the saved one


def plan_scheduler(
    source: Tensors,
    training: Mapping[str, Any],
    name: str,
    saved: Any,
    scheduler: Any,
    regrouped: Mapping[int, Sources],
) -> Callable[[], None]:
    """Return the step that will restore a scheduler. Raises `CheckpointError` before anything is changed.

    `training`: the saved training state.
    `regrouped`: the sources of each optimizer whose parameter groups changed, by its id.
    """
    state = tree.decode(saved, source.training_tensor)
    inner = unwrap_scheduler(scheduler)
    sources = regrouped.get(id(unwrap_optimizer(getattr(inner, "optimizer", None))))
    if sources is not None:
        state = _regrouped(state, sources)
    classes = training.get("classes", {})
    kinds = classes.get("schedulers", {}).get(name), classes.get("in_schedulers", {}).get(name, ())
    check_scheduler(source.directory, f"scheduler {name}".rstrip(), kinds, state, inner)
    return lambda: scheduler.load_state_dict(state)


def _regrouped(state: Any, sources: Sources) -> Any:
    """Return the state with the values of each group moved to the index that the group has now."""
    if not isinstance(state, dict):
        return state
    count = 1 + max((origin for origin in sources if origin is not None), default=-1)
    result = dict(state)
    for key, value in state.items():
        if key in _PER_GROUP and isinstance(value, list) and len(value) >= count and None not in sources:
            result[key] = [value[origin] for origin in sources if origin is not None]
        elif key == "_schedulers" and isinstance(value, list):
            result[key] = [_regrouped(inner, sources) for inner in value]
    return result


def plan_scaler(source: Tensors, state: Any, scaler: Any) -> Callable[[], None]:
    """Return the step that will restore a gradient scaler. Raises `CheckpointError` before anything is changed."""
    check_scaler(source.directory, state, scaler)
    return lambda: scaler.load_state_dict(state)
