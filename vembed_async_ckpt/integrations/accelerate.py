"""Integration of accelerate: `save_state` in the background, and stock `load_state` for our directories.

It saves everything that an `Accelerator` has prepared and registered.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from .. import _signals
from .._capture.dialect import Accelerate
from .._capture.model import unwrap
from .._capture.request import Objects
from .._capture.training_state import torch_save
from .._format import names
from .._format.urls import is_url
from .._restore.accelerated import is_fsdp
from ..checkpointer import AsyncCheckpointer
from ..errors import PlanError
from ..handle import SaveHandle
from ..retention import KeepLast
from .accelerate_hooks import SaveHooks, load_models, look_after
from .shared import shared


@_signals.held()
def save_state(
    accelerator: Any,
    output_dir: str | os.PathLike[str] | None = None,
    safe_serialization: bool = True,
    *,
    step: int | None = None,
    checkpointer: AsyncCheckpointer | None = None,
) -> SaveHandle:
    """Do what `accelerator.save_state(output_dir)` does, without stopping the training. Every rank calls it.

    The files and their names are the same. So stock `accelerator.load_state` resumes from them, and so does our
    `load(path, accelerator=...)`. With FSDP, the weights are in `model.safetensors` and the optimizers in
    `optimizer.safetensors`, whole; any number of ranks resumes from them, after `attach(accelerator)`.

    With `ProjectConfiguration(automatic_checkpoint_naming=True)` the directory is
    `{project_dir}/checkpoints/checkpoint_{iteration}`. When it is durable, the oldest of our checkpoints beyond
    `total_limit` are deleted. Unfinished saves are stored beside `checkpoints/`, never inside. Without automatic
    naming, an existing `output_dir` is replaced atomically. If `step` is None, it is the last integer in the
    directory's name, if any.

    Save hooks are called during the call. They get a temporary directory with the checkpoint's name. What they leave in
    the list of weights is saved. `safe_serialization=False` pickles the weights during the call; only
    `accelerator.load_state` reads them.

    The saves of one parent directory share a checkpointer. It is drained by `accelerator.end_training()` and at
    interpreter exit. `checkpointer` selects another one, whose root must be that parent. Raises what
    `AsyncCheckpointer.save` raises.
    """
    refuse_what_is_sharded(accelerator)
    project = accelerator.project_configuration
    if project.automatic_checkpoint_naming:
        output_dir = _next_in_line(accelerator)
    elif output_dir is None:
        raise PlanError("output_dir is None; name the directory, or let ProjectConfiguration name them")
    if is_url(output_dir):
        raise PlanError(f"output_dir is {os.fspath(output_dir)!r}, a URL; save to a directory on this machine")
    root, directory = os.path.split(os.path.realpath(os.fspath(output_dir)))
    if not directory or directory.startswith(names.WORK):
        raise PlanError(f"output_dir is {os.fspath(output_dir)!r}, which cannot be the directory of a checkpoint")
    if checkpointer is None:
        checkpointer = shared(root, _options(accelerator, root) if project.automatic_checkpoint_naming else None)
    elif str(checkpointer.root) != root:
        raise PlanError(f"{output_dir} does not lie directly in the root of the checkpointer, {checkpointer.root}")
    look_after(accelerator)
    hooks = SaveHooks(accelerator, directory)
    objects = Objects(
        state_dicts=lambda: in_order(hooks.weights if safe_serialization else []),
        optimizer=in_order(accelerator._optimizers),
        scheduler=in_order(accelerator._schedulers),
        scaler=accelerator.scaler,
        files=lambda: further_files(accelerator, hooks, safe_serialization),
        accelerator=accelerator,
        dialect=Accelerate(accelerator.step),
    )
    try:
        return checkpointer.save_as(directory, names.trailing_number(directory) if step is None else step, objects)
    except BaseException:
        if accelerator.num_processes == 1:
            project.iteration -= (
                project.automatic_checkpoint_naming
            )  # the next call uses the same name again; other ranks may not have raised
        raise
    finally:
        project.iteration += project.automatic_checkpoint_naming


def _next_in_line(accelerator: Any) -> str:
    if accelerator.project_dir is None:
        raise PlanError("automatic_checkpoint_naming needs a project_dir: ProjectConfiguration(project_dir=...)")
    path = os.path.join(accelerator.project_dir, "checkpoints", f"checkpoint_{accelerator.save_iteration}")
    if os.path.lexists(path):  # every rank sees the same: the directory cannot appear before all ranks have called
        raise PlanError(
            f"{path}: already exists; resume with accelerator.load_state() and set "
            "accelerator.project_configuration.iteration to the number to go on with"
        )
    return path


def _options(accelerator: Any, root: str) -> dict[str, Any]:
    if accelerator.is_main_process:
        # accelerate parses a number from every name in its automatic folder, so our work directory must be outside.
        os.makedirs(names.work_directory_beside(root), exist_ok=True)
    limit = accelerator.project_configuration.total_limit
    return {} if limit is None else {"retention": KeepLast(limit)}


def in_order(values: Sequence[Any]) -> Any:
    """Return accelerate's prepared objects in the form that `save()` takes.

    That is one object, or a mapping of numbers to objects, or None if there are none.
    """
    if not values:
        return None
    return values[0] if len(values) == 1 else {str(number): value for number, value in enumerate(values)}


def refuse_what_is_sharded(accelerator: Any) -> None:
    """Raise `PlanError` for states of which nothing says what this process holds."""
    kind = str(getattr(accelerator, "distributed_type", "NO")).rpartition(".")[2]
    if kind == "DEEPSPEED":
        raise PlanError(
            "states sharded by DEEPSPEED are kept by its own engine; save them with accelerator.save_state, or train with "
            "DDP or FSDP"
        )
    if kind in ("MEGATRON_LM", "TP"):
        raise PlanError(f"states sharded by {kind} cannot be saved here; use accelerator.save_state for them")
    if accelerator.project_configuration.save_on_each_node:
        raise PlanError("save_on_each_node is not supported: the first rank writes for all; use accelerator.save_state")


def prepared(accelerator: Any, model: Any) -> Any:
    """Return the model with the wrapper that FSDP version 1 gave it when it was prepared, or the model as it is.

    The wrapper says what this rank holds.
    """
    if not is_fsdp(accelerator) or not isinstance(model, torch.nn.Module):
        return model
    inner = unwrap(model)
    return next((wrapped for wrapped in accelerator._models if unwrap(wrapped) is inner), model)


def further_files(accelerator: Any, hooks: SaveHooks, safe_serialization: bool = True) -> dict[str, bytes]:
    """Return the other files that `accelerator.save_state` writes on this rank.

    These are the files that save hooks wrote, and on the main process the samplers and stateful dataloaders. Without
    `safe_serialization` they include the weights. Models, optimizers, schedulers, scaler, registered objects and random
    states are saved elsewhere.
    """
    files = hooks.files()
    for name in _overwritten(accelerator, len(hooks.weights), safe_serialization):
        files.pop(name, None)
    if not accelerator.is_main_process:
        return files
    if not safe_serialization:
        files |= hooks.pickled()
    for number, dataloader in enumerate(accelerator._dataloaders):
        sampler = _seedable_sampler(dataloader)
        if sampler is not None:
            files[names.sampler(number)] = torch_save(sampler)
        if getattr(dataloader, "use_stateful_dataloader", False):
            files[names.dataloader_state(number)] = torch_save(dataloader.state_dict())
    return files


def _overwritten(accelerator: Any, weights: int, safe_serialization: bool) -> list[str]:
    """Return the files that accelerate writes after its save hooks.

    They replace those of a hook, which may call `save_pretrained`.
    """
    weights_name = names.plain_weights if safe_serialization else names.pickled_weights
    return [
        *map(weights_name, range(weights)),
        *map(names.optimizer, range(len(accelerator._optimizers))),
        *map(names.scheduler, range(len(accelerator._schedulers))),
        *map(names.custom_checkpoint, range(len(accelerator._custom_objects))),
        *([] if accelerator.scaler is None else [names.SCALER]),
        names.random_states(accelerator.process_index),
    ]


def _seedable_sampler(dataloader: Any) -> Any:
    from accelerate.data_loader import IterableDatasetShard, SeedableRandomSampler

    if not isinstance(dataloader.dataset, IterableDatasetShard):
        return None
    sampler = dataloader.get_sampler()
    return sampler if isinstance(sampler, SeedableRandomSampler) else None


def attach(accelerator: Any) -> Any:
    """Make `accelerator.load_state(path)` read every directory of ours.

    That includes shards, adapters, models whose files use other names than their state_dict, and everything that a
    training with FSDP saved or loads. Directories that are not ours load as before. Your own load hooks are called first
    and see all models, whenever they were registered. The models that they leave in the list are restored. Returns the
    handle of the hook; `handle.remove()` undoes this.

    With FSDP, or for a checkpoint of a training with FSDP, `load(path, accelerator=accelerator)` takes the place of
    `load_state`, because accelerate does not call a hook before it loads FSDP models.
    """
    look_after(accelerator)
    return accelerator.register_load_state_pre_hook(load_models)
