"""Decides which models of an accelerator `load` restores and which its load hooks restore."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import CheckpointError


def load_hooks(accelerator: Any) -> list[Callable[[list[Any], str], None]]:
    """Return the load hooks of the accelerator, except the one that our `attach` registered."""
    hooks = getattr(accelerator, "_load_model_state_pre_hook", {}).values()
    return [hook for hook in hooks if not getattr(hook, "loads_models_of_ours", False)]


def is_fsdp(accelerator: Any) -> bool:
    """Return whether the accelerator divides models by FSDP, of either version."""
    return str(getattr(accelerator, "distributed_type", "NO")).rpartition(".")[2] == "FSDP"


def models_to_load(accelerator: Any, saved: Mapping[str, Any], directory: str) -> dict[str, Any]:
    """Call the load hooks as `accelerator.load_state` does.

    Return the models that the hooks leave, by their names in `saved`. With FSDP, accelerate gives the hooks no models, and
    all are left.

    Raises `CheckpointError` for a model with no weights in the checkpoint that no hook takes.
    """
    if is_fsdp(accelerator):
        for hook in load_hooks(accelerator):
            hook([], directory)
        return matched(saved, accelerator._models, accelerator._models, directory)
    models = list(accelerator._models)
    for hook in load_hooks(accelerator):
        hook(models, directory)
    return matched(saved, models, accelerator._models, directory)


def by_name(models: Mapping[str, Any]) -> Any:
    """Convert the result of `matched` to the form that `load` takes.

    A single model saved without a name is given without a mapping.
    """
    return models[""] if list(models) == [""] else models


def matched(saved: Mapping[str, Any], models: Sequence[Any], prepared: Sequence[Any], directory: str) -> dict[str, Any]:
    """Return the `models` by the names under which they were saved.

    An accelerator's models have no names, so their order decides. Hooks may have restored some of the `prepared`
    models. Raises `CheckpointError` if the numbers do not fit.
    """
    if len(models) == len(saved):
        return dict(zip(saved, models, strict=True))
    if not models:
        return {}
    if len(prepared) == len(saved):
        left = {id(model) for model in models}
        return {name: model for name, model in zip(saved, prepared, strict=True) if id(model) in left}
    raise CheckpointError(
        f"{directory}: holds the weights of {len(saved)} models, but {len(models)} models of the accelerator are to be "
        "restored. If a save hook wrote the weights, register the load hook that takes its models out of the list; if they "
        "were saved with safe_serialization=False, use accelerator.load_state; to leave the models as they are, pass model={}"
    )
