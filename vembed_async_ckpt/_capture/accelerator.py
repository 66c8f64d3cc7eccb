"""Captures the counter of accumulated micro-batches and the dataloader positions of an `accelerate.Accelerator`.

Its models, optimizers, schedulers, scaler and registered objects are captured elsewhere. `accelerator.load_state`
restores the counter, and the positions of stateful dataloaders only. How the other dataloaders continue follows from
their epoch, the seed of their sampler, and the state of its generator.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import warn


def state(accelerator: Any) -> dict[str, Any]:
    """Return all of it as nested data."""
    return {
        "step": accelerator.step,
        "dataloaders": [_position(dataloader) for dataloader in accelerator._dataloaders],
    }


def restore(accelerator: Any, saved: dict[str, Any]) -> None:
    """Restore what `state` returned.

    Dataloaders are matched by their order. Warns, and leaves them as they are, if their number differs.
    """
    accelerator.step = saved["step"]
    if len(saved["dataloaders"]) != len(accelerator._dataloaders):
        warn(
            f"the accelerator has {len(accelerator._dataloaders)} dataloaders, saved were {len(saved['dataloaders'])}: "
            "they stay where they are"
        )
        return
    for dataloader, position in zip(accelerator._dataloaders, saved["dataloaders"], strict=True):
        _set_position(dataloader, position)


def _position(dataloader: Any) -> dict[str, Any]:
    position: dict[str, Any] = {}
    epoch = getattr(dataloader, "iteration", None)
    if epoch is not None:
        # While the last batch of an epoch is processed, the next batch belongs to the next epoch.
        position["epoch"] = epoch + (dataloader.end_of_dataloader and _is_iterated(dataloader))
    sampler = _sampler(dataloader)
    if hasattr(sampler, "initial_seed"):
        position["seed"] = sampler.initial_seed
    else:
        generator = _generator(dataloader, sampler)
        if generator is not None:
            position["generator"] = generator.get_state()
    if getattr(dataloader, "use_stateful_dataloader", False):
        position["state"] = dataloader.state_dict()
    return position


def _set_position(dataloader: Any, position: dict[str, Any]) -> None:
    sampler = _sampler(dataloader)
    if "seed" in position and hasattr(sampler, "initial_seed"):
        sampler.initial_seed = position["seed"]
    if "epoch" in position and hasattr(dataloader, "set_epoch"):
        dataloader.set_epoch(position["epoch"])
    generator = _generator(dataloader, sampler)
    if "generator" in position and generator is not None:
        generator.set_state(position["generator"])
    if "state" in position and getattr(dataloader, "use_stateful_dataloader", False):
        dataloader.load_state_dict(position["state"])


def _is_iterated(dataloader: Any) -> bool:
    return any(active is dataloader for active in dataloader.gradient_state.dataloader_references)


def _sampler(dataloader: Any) -> Any:
    """Return the sampler of single items, below the samplers that form batches and divide them among ranks."""
    from torch.utils.data import BatchSampler

    sampler: Any = getattr(dataloader, "sampler", None)
    if not isinstance(sampler, BatchSampler):
        sampler = getattr(dataloader, "batch_sampler", None)
    while hasattr(sampler, "batch_sampler"):
        sampler = sampler.batch_sampler
    return getattr(sampler, "sampler", None)


def _generator(dataloader: Any, sampler: Any) -> torch.Generator | None:
    generator = getattr(sampler, "generator", None)
    return getattr(dataloader, "synchronized_generator", None) if generator is None else generator
