"""Checks that a saved state belongs to the object into which it is loaded: by class if that is known, else by the keys."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .._capture.optimizer import kind_of
from .._capture.parameters import groups_of
from ..errors import CheckpointError

# The name of a scheduler's class, None if it is not known, and the same of each scheduler inside it.
SchedulerKind = tuple[str | None, Sequence[Any]]

# Keys of a parameter group that are no hyper-parameters of the optimizer: torch or schedulers add them.
_OTHERS = {"params", "param_names", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"}


def check_optimizer(directory: str, what: str, saved_class: str | None, state: Any, optimizer: Any) -> None:
    """Raise `CheckpointError` if `state` comes from another kind of optimizer.

    A class and a subclass of it may take each other's state, and so may two classes with the same name, if their
    hyper-parameters fit.
    """
    if saved_class == kind_of(optimizer):
        return
    saved = _hyper_parameters(state.get("param_groups") if isinstance(state, Mapping) else None)
    here = _hyper_parameters(groups_of(optimizer))
    if _fits(saved_class, optimizer, saved, here):
        return
    renamed = ""
    if saved_class is not None and saved == here and _class_of(saved_class) is None:
        module, _, name = saved_class.rpartition(".")
        renamed = f". If the class was renamed, let {module} have its old name too: {name} = {type(optimizer).__name__}"
    raise CheckpointError(
        f"{directory}: the {what} was saved from {_a(saved_class, 'another kind of optimizer')} and cannot go into a "
        f"{kind_of(optimizer)}{_difference(saved, here)}; load it into what was saved, or load without optimizer= or with "
        f'exclude="optimizer"{renamed}'
    )


def check_scheduler(directory: str, what: str, saved: SchedulerKind, state: Any, scheduler: Any) -> None:
    """Raise `CheckpointError` if `state` does not fit the scheduler. `saved` is the kind that it comes from.

    That must be the same class, with the same number of parameter groups. In a `SequentialLR` or `ChainedScheduler`, this
    is true of each scheduler inside it too.
    """
    here = scheduler.state_dict()
    if not isinstance(state, Mapping) or not isinstance(here, Mapping):
        return
    saved_class, saved_inside = saved
    same = saved_class in _names_of_classes(scheduler)
    if not same and (
        (saved_class is not None and not _same_name(saved_class, kind_of(scheduler)))
        or _contradict(set(state), set(here))
    ):
        raise CheckpointError(
            f"{directory}: the {what} was saved from {_a(saved_class, 'another kind of scheduler')} and cannot go into a "
            f"{kind_of(scheduler)}{_difference(set(state), set(here))}; load it into what was saved, or load without scheduler="
        )
    for key in ("base_lrs", "_schedulers"):
        had, has = state.get(key), here.get(key)
        if isinstance(had, list) and isinstance(has, list) and len(had) != len(has):
            parts = "parameter groups" if key == "base_lrs" else "schedulers in it"
            raise CheckpointError(
                f"{directory}: the {what} was saved with {len(had)} {parts}, here it has {len(has)}; "
                "make it as it was, or load without scheduler="
            )
    inside = getattr(scheduler, "_schedulers", None)
    if isinstance(inside, list | tuple) and isinstance(state.get("_schedulers"), list):
        kinds: Iterable[SchedulerKind] = saved_inside or itertools.repeat((None, ()))
        for number, (live, inner, kind) in enumerate(zip(inside, state["_schedulers"], kinds, strict=False)):
            check_scheduler(directory, f"scheduler {number} in the {what}", kind, inner, live)


def check_scaler(directory: str, state: Any, scaler: Any) -> None:
    """Raise `CheckpointError` if `state` does not come from this kind of gradient scaler."""
    here = scaler.state_dict()
    if not isinstance(state, Mapping) or not isinstance(here, Mapping) or not here:
        return
    if not state:
        raise CheckpointError(
            f"{directory}: the scaler was disabled when it was saved and has no state; load without scaler="
        )
    if _contradict(set(state), set(here)):
        raise CheckpointError(
            f"{directory}: the scaler was saved from another kind of scaler than a "
            f"{kind_of(scaler)}{_difference(set(state), set(here))}; load without scaler="
        )


def _hyper_parameters(groups: Any) -> set[str] | None:
    if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
        return None
    return {key for group in groups for key in group} - _OTHERS


def _fits(saved_class: str | None, optimizer: Any, saved: set[str] | None, here: set[str] | None) -> bool:
    if saved_class is not None and not _same_name(saved_class, kind_of(optimizer)):
        return saved is not None and saved == here and _is_related(saved_class, optimizer)
    if saved is None or here is None:
        return saved_class is not None or saved is here
    return not _contradict(saved, here)


def _is_related(saved_class: str, optimizer: Any) -> bool:
    """Return whether the saved class is a base of the class here or, if its module is loaded, a subclass of it."""
    there = _class_of(saved_class)
    is_subclass = there is not None and issubclass(there, type(optimizer))
    return is_subclass or saved_class in _names_of_classes(optimizer)


def _class_of(saved_class: str) -> type | None:
    """Return the class of that name at the top of its module; None if there is none, or if the module is not loaded."""
    module, _, name = saved_class.rpartition(".")
    there = vars(sys.modules[module]).get(name) if module in sys.modules else None
    return there if isinstance(there, type) else None


def _names_of_classes(value: Any) -> list[str]:
    return [f"{kind.__module__}.{kind.__qualname__}" for kind in type(value).__mro__]


def _contradict(saved: set[str], here: set[str]) -> bool:
    """Return whether each side has keys that the other lacks. A newer version of the same class only adds keys."""
    return bool(saved - here) and bool(here - saved)


def _same_name(one: str, other: str) -> bool:
    """Return whether two classes have the same name, in whatever modules. The classes of a script are in `__main__`."""
    return one.rpartition(".")[2] == other.rpartition(".")[2]


def _a(saved_class: str | None, unknown: str) -> str:
    return unknown if saved_class is None else f"a {saved_class}"


def _difference(saved: set[str] | None, here: set[str] | None) -> str:
    if saved is None or here is None or saved == here:
        return ""
    parts = [
        f"{side}: {', '.join(sorted(map(str, keys)))}"
        for side, keys in (("only saved", saved - here), ("only here", here - saved))
        if keys
    ]
    return f" ({'; '.join(parts)})"
