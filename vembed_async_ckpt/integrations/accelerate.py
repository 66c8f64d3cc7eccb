"""accelerate: what an `Accelerator` has prepared and registered, and its own `load_state` on our directories."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from .. import restore
from .._request.processor import read_files
from .._request.training_state import torch_save
from .._store import manifest as manifests
from .._store import names
from ..errors import CorruptCheckpoint, PlanError


def in_order(values: Sequence[Any]) -> Any:
    """accelerate's prepared objects as `save()` takes them: one, or a mapping of their numbers; None if there are none."""
    if not values:
        return None
    return values[0] if len(values) == 1 else {str(number): value for number, value in enumerate(values)}


def refuse_what_is_sharded(accelerator: Any) -> None:
    """Raise `PlanError` where one process does not hold the whole state."""
    kind = str(getattr(accelerator, "distributed_type", "NO")).rpartition(".")[2]
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP"):
        raise PlanError(f"states sharded by {kind} cannot be saved yet; use accelerator.save_state for them")
    if accelerator.project_configuration.save_on_each_node:
        raise PlanError("save_on_each_node is not supported: the first rank writes for all; use accelerator.save_state")


def registered_files(accelerator: Any) -> dict[str, bytes]:
    """What `accelerator.save_state` writes on this rank besides models, optimizers, schedulers, scaler and random states:
    whatever save hooks put into the directory they are given, and on the main process registered objects, samplers and stateful
    dataloaders."""
    files = _hook_files(accelerator)
    if not accelerator.is_main_process:
        return files
    for number, value in enumerate(accelerator._custom_objects):
        files[names.custom_checkpoint(number)] = torch_save(value.state_dict())
    for number, dataloader in enumerate(accelerator._dataloaders):
        sampler = _seedable_sampler(dataloader)
        if sampler is not None:
            files[names.sampler(number)] = torch_save(sampler)
        if getattr(dataloader, "use_stateful_dataloader", False):
            files[names.dataloader_state(number)] = torch_save(dataloader.state_dict())
    return files


def _hook_files(accelerator: Any) -> dict[str, bytes]:
    hooks = list(accelerator._save_model_state_pre_hook.values())
    if not hooks:
        return {}
    weights = [accelerator.get_state_dict(model, unwrap=False) for model in accelerator._models]
    with tempfile.TemporaryDirectory(prefix="vembed-ckpt-") as directory:
        for hook in hooks:
            hook(accelerator._models, weights, directory)
        return {content.name: content.data for content in read_files(directory)}


def _seedable_sampler(dataloader: Any) -> Any:
    from accelerate.data_loader import IterableDatasetShard, SeedableRandomSampler

    if not isinstance(dataloader.dataset, IterableDatasetShard):
        return None
    sampler = dataloader.get_sampler()
    return sampler if isinstance(sampler, SeedableRandomSampler) else None


def attach(accelerator: Any) -> Any:
    """Let `accelerator.load_state(path)` read every directory of ours: shards, adapters, and models whose files have other
    names than their state_dict. Directories that are not ours load as before.

    Returns the handle of the hook; `handle.remove()` takes it back.
    """

    def load_models(models: list[Any], input_dir: str) -> None:
        if not os.path.lexists(os.path.join(input_dir, names.MANIFEST)):
            return
        saved: Mapping[str, Any] = manifests.read(os.fspath(input_dir)).names
        if len(saved) != len(models):
            raise CorruptCheckpoint(f"{input_dir}: holds {len(saved)} models, the accelerator has {len(models)}")
        restore.load(input_dir, model=models[0] if list(saved) == [""] else dict(zip(saved, models, strict=True)))
        models.clear()  # accelerate loads what is left in the list

    return accelerator.register_load_state_pre_hook(load_models)
