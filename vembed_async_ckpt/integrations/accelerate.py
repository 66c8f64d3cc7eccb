"""accelerate: `save_state` in the background, what an `Accelerator` has prepared and registered, and its own `load_state` on our
directories."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from .. import restore
from .._engine.checkpointer import AsyncCheckpointer
from .._engine.handle import SaveHandle
from .._request.dialect import Accelerate
from .._request.processor import read_files
from .._request.request import Objects
from .._request.sharding import refuse_shares
from .._request.training_state import torch_save
from .._store import manifest as manifests
from .._store import names
from .._store.retention import KeepLast
from ..errors import CorruptCheckpoint, PlanError
from .shared import close_shared, shared, wait_for, wait_for_all


def save_state(
    accelerator: Any,
    output_dir: str | os.PathLike[str] | None = None,
    safe_serialization: bool = True,
    *,
    step: int | None = None,
    checkpointer: AsyncCheckpointer | None = None,
) -> SaveHandle:
    """`accelerator.save_state(output_dir)` without stopping the training: the same files under the same names, so that stock
    `accelerator.load_state` resumes from them (and so does our `load(path, accelerator=...)`). Every rank calls it.

    With `ProjectConfiguration(automatic_checkpoint_naming=True)` it goes to `{project_dir}/checkpoints/checkpoint_{iteration}`,
    and once it is durable the oldest of ours beyond `total_limit` go. What is under way lies beside `checkpoints/`, never in it.
    Otherwise an existing `output_dir` is replaced at once. `step` None means the last integer in the directory's name, if any.
    Save hooks are called at once, in a directory of their own; models whose weights they take out of the list are not saved.

    The saves of one parent directory share a checkpointer, drained by `accelerator.end_training()` and at interpreter exit;
    `checkpointer` names another one, whose root must be that parent. Raises what `AsyncCheckpointer.save` raises.
    """
    refuse_what_is_sharded(accelerator)
    if not safe_serialization:
        raise PlanError(
            "safe_serialization=False: weights are saved as safetensors only, which load_state reads as well"
        )
    project = accelerator.project_configuration
    if project.automatic_checkpoint_naming:
        output_dir = _next_in_line(accelerator)
    elif output_dir is None:
        raise PlanError("output_dir is None; name the directory, or let ProjectConfiguration name them")
    root, directory = os.path.split(os.path.realpath(os.fspath(output_dir)))
    if not directory or directory.startswith(names.WORK):
        raise PlanError(f"output_dir is {os.fspath(output_dir)!r}, which cannot be the directory of a checkpoint")
    if checkpointer is None:
        checkpointer = shared(root, _options(accelerator, root) if project.automatic_checkpoint_naming else None)
    elif str(checkpointer.root) != root:
        raise PlanError(f"{output_dir} does not lie directly in the root of the checkpointer, {checkpointer.root}")
    look_after(accelerator)
    hooks = _Hooks(accelerator)
    objects = Objects(
        state_dicts=lambda: in_order(hooks.models),
        optimizer=in_order(accelerator._optimizers),
        scheduler=in_order(accelerator._schedulers),
        scaler=accelerator.scaler,
        files=lambda: further_files(accelerator, hooks),
        accelerator=accelerator,
        dialect=Accelerate(accelerator.step),
    )
    try:
        return checkpointer.save_as(directory, names.trailing_number(directory) if step is None else step, objects)
    except BaseException:
        if accelerator.num_processes == 1:
            project.iteration -= (
                project.automatic_checkpoint_naming
            )  # the same name again; other ranks may not have raised
        raise
    finally:
        project.iteration += project.automatic_checkpoint_naming


def _next_in_line(accelerator: Any) -> str:
    if accelerator.project_dir is None:
        raise PlanError("automatic_checkpoint_naming needs a project_dir: ProjectConfiguration(project_dir=...)")
    path = os.path.join(accelerator.project_dir, "checkpoints", f"checkpoint_{accelerator.save_iteration}")
    if os.path.lexists(path):  # on every rank alike: it cannot come before all of them have called
        raise PlanError(
            f"{path}: already exists; resume with accelerator.load_state() and set "
            "accelerator.project_configuration.iteration to the number to go on with"
        )
    return path


def _options(accelerator: Any, root: str) -> dict[str, Any]:
    if accelerator.is_main_process:
        # accelerate reads a number out of the name of everything in its automatic folder: no work directory in there.
        os.makedirs(names.work_directory_beside(root), exist_ok=True)
    limit = accelerator.project_configuration.total_limit
    return {} if limit is None else {"retention": KeepLast(limit)}


def look_after(accelerator: Any) -> None:
    """Once per accelerator: `end_training()` first waits for the pending saves, and raises what failed; `load_state()` waits for
    the one it is to load, and changes nothing that is still being copied."""
    if getattr(accelerator, "_vembed_async_ckpt_looks_after", False):
        return
    end_training, load_state = accelerator.end_training, accelerator.load_state

    def drain_and_end_training() -> None:
        try:
            close_shared()
        finally:
            end_training()

    def wait_and_load_state(input_dir: str | None = None, *args: Any, **kwargs: Any) -> Any:
        if input_dir is not None:
            wait_for(os.path.realpath(os.path.expanduser(input_dir)))
        elif accelerator.project_dir is not None:
            wait_for_all(os.path.realpath(os.path.join(accelerator.project_dir, "checkpoints")))
        return load_state(input_dir, *args, **kwargs)

    accelerator.end_training = drain_and_end_training
    accelerator.load_state = wait_and_load_state
    accelerator.register_load_state_pre_hook(lambda models, input_dir: restore.wait_for_copies())
    accelerator._vembed_async_ckpt_looks_after = True


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


class _Hooks:
    """The save hooks of an accelerator: the files they write, and the `models` whose weights they leave to be saved."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self.models = list(accelerator._models)

    def files(self) -> dict[str, bytes]:
        """Call them."""
        accelerator = self._accelerator
        hooks = list(accelerator._save_model_state_pre_hook.values())
        if not hooks:
            return {}
        refuse_shares(self.models)
        weights = [accelerator.get_state_dict(model, unwrap=False) for model in self.models]
        known = {id(state): (state, model) for state, model in zip(weights, self.models, strict=True)}
        with tempfile.TemporaryDirectory(prefix="vembed-ckpt-") as directory:
            for hook in hooks:
                hook(accelerator._models, weights, directory)
            if any(id(state) not in known for state in weights):
                raise PlanError(
                    "a save hook put weights of no model into the list; let it write them to a file instead"
                )
            self.models = [known[id(state)][1] for state in weights]
            return {content.name: content.data for content in read_files(directory)}


def further_files(accelerator: Any, hooks: _Hooks | None = None) -> dict[str, bytes]:
    """What `accelerator.save_state` writes on this rank besides models, optimizers, schedulers, scaler, registered objects and
    random states: whatever save hooks put into the directory they are given, and on the main process samplers and stateful
    dataloaders."""
    files = (hooks or _Hooks(accelerator)).files()
    if not accelerator.is_main_process:
        return files
    for number, dataloader in enumerate(accelerator._dataloaders):
        sampler = _seedable_sampler(dataloader)
        if sampler is not None:
            files[names.sampler(number)] = torch_save(sampler)
        if getattr(dataloader, "use_stateful_dataloader", False):
            files[names.dataloader_state(number)] = torch_save(dataloader.state_dict())
    return files


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
        if not saved:
            return  # a save hook took the models out; a load hook brings them back
        if len(saved) != len(models):
            raise CorruptCheckpoint(f"{input_dir}: holds {len(saved)} models, the accelerator has {len(models)}")
        restore.load(input_dir, model=models[0] if list(saved) == [""] else dict(zip(saved, models, strict=True)))
        models.clear()  # accelerate loads what is left in the list

    return accelerator.register_load_state_pre_hook(load_models)
