"""Checks that a saved state belongs to the object into which it is loaded: by class if that is known, else by the keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .._capture.optimizer import kind_of
from .._capture.parameters import groups_of
from ..errors import CheckpointError

# Keys of a parameter group that are no hyper-parameters of the optimizer: torch or schedulers add them.
_OTHERS = {"params", "param_names", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"}


def check_optimizer(directory: str, what: str, saved_class: str | None, state: Any, optimizer: Any) -> None:
    """Raise `CheckpointError` if `state` comes from another kind of optimizer.

    Two classes with the same hyper-parameters may take each other's state: Adam and AdamW, or one class under two
    names.
    """
    if saved_class == kind_of(optimizer):
        return
    saved = _hyper_parameters(state.get("param_groups") if isinstance(state, Mapping) else None)
    here = _hyper_parameters(groups_of(optimizer))
    if _fits(saved_class, kind_of(optimizer), saved, here):
        return
    raise CheckpointError(
        f"{directory}: the {what} was saved from {_a(saved_class, 'another kind of optimizer')} and cannot go into a "
        f"{kind_of(optimizer)}{_difference(saved, here)}; load it into what was saved, or load without optimizer="
    )


def check_scheduler(directory: str, what: str, saved_class: str | None, state: Any, scheduler: Any) -> None:
    """Raise `CheckpointError` if `state` does not fit the scheduler.

    It must come from the same class and have the same number of parameter groups.
    """
    here = scheduler.state_dict()
    if not isinstance(state, Mapping) or not isinstance(here, Mapping):
        return
    same = saved_class in [f"{kind.__module__}.{kind.__qualname__}" for kind in type(scheduler).__mro__]
    if not same and (
        (saved_class is not None and not _same_name(saved_class, kind_of(scheduler)))
        or _contradict(set(state), set(here))
    ):
        raise CheckpointError(
            f"{directory}: the {what} was saved from {_a(saved_class, 'another kind of scheduler')} and cannot go into a "
            f"{kind_of(scheduler)}{_difference(set(state), set(here))}; load it into what was saved, or load without scheduler="
        )
    _check_nested(directory, what, state, here)


def _check_nested(directory: str, what: str, state: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Compare the number of parameter groups, and check the schedulers inside a `SequentialLR` or `ChainedScheduler`."""
    for key in ("base_lrs", "_schedulers"):
        saved, live = state.get(key), here.get(key)
        if isinstance(saved, list) and isinstance(live, list) and len(saved) != len(live):
            parts = "parameter groups" if key == "base_lrs" else "schedulers in it"
            raise CheckpointError(
                f"{directory}: the {what} was saved with {len(saved)} {parts}, here it has {len(live)}; "
                "make it as it was, or load without scheduler="
            )
    pairs = zip(state.get("_schedulers") or (), here.get("_schedulers") or (), strict=False)
    for number, (saved, live) in enumerate(pairs):
        if isinstance(saved, Mapping) and isinstance(live, Mapping):
            inner = f"scheduler {number} in the {what}"
            if _contradict(set(saved), set(live)):
                raise CheckpointError(
                    f"{directory}: {inner} was saved from another kind of scheduler{_difference(set(saved), set(live))}; "
                    "make it as it was, or load without scheduler="
                )
            _check_nested(directory, inner, saved, live)


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


def _fits(saved_class: str | None, here_class: str, saved: set[str] | None, here: set[str] | None) -> bool:
    if saved_class is not None and not _same_name(saved_class, here_class):
        return saved is not None and saved == here
    if saved is None or here is None:
        return saved_class is not None or saved is here
    return not _contradict(saved, here)


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
