"""`save_checkpoint` with the arguments of the one in the vembed training loop, but in the background."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .. import _signals
from .._capture import config as configs
from .._capture.arguments import step_number
from .._capture.dialect import Accelerate
from .._capture.request import Objects
from .._disk.filesystem import walk_files
from .._format import names
from .._format.urls import is_url
from .._frozen import FrozenDict
from ..checkpointer import AsyncCheckpointer
from ..errors import PlanError
from ..handle import CheckpointInfo, SaveHandle, SaveState, Timings
from . import accelerate as accelerates
from .accelerate_hooks import SaveHooks, look_after
from .shared import close_shared, shared

# The keys that vembed's inference reads at the top level of vembed_config.json, with the values it expects for missing
# keys.
CONFIG_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "pooling_method": None,
        "projection_dim": None,
        "topk_tokens": 0,
        "retrieval_mode": "t2i",
        "loss_type": "infonce",
        "use_mrl": False,
        "mrl_dims": None,
        "encoder_mode": "auto",
        "text_model_name": None,
        "image_model_name": None,
    }
)

__all__ = ["save_checkpoint", "close_shared", "CONFIG_DEFAULTS"]


@_signals.held()
def save_checkpoint(
    path: str | os.PathLike[str],
    model: Any,
    accelerator: Any,
    processor: Any = None,
    config: Mapping[str, Any] | None = None,
    prefix: str = "",
    *,
    step: int | None = None,
    training_state: bool | Mapping[str, Any] | None = True,
    checkpointer: AsyncCheckpointer | None = None,
    base_model: bool = False,
) -> SaveHandle:
    """Save model, processor, config and training state to the directory `path`, without stopping the training.

    After the commit the directory holds what `save_pretrained` of model and processor write, and `vembed_config.json`.
    With `training_state` it also holds optimizers, schedulers, samplers, scaler, registered objects and random states
    of `accelerator`. So `accelerator.load_state(path)` and `vembed_async_ckpt.load(path, ...)` resume from it. The
    weights file has a second name, `{prefix or "model"}_state_dict.safetensors`. If `step` is None, it is the last
    integer in the name of `path`, if any. `training_state` may be a mapping, as newer versions of vembed pass it; it is
    also saved, as `training_state.json`.

    Of an adapter only its own weights are saved. With `base_model` the whole state_dict is saved too, as
    `model.safetensors`. It is for `accelerator.load_state` if nobody calls
    `integrations.accelerate.attach(accelerator)`. Do not use it for a model that writes a file of that name itself.

    Under DDP every rank calls it. The first rank writes, and the directory has the random states of all ranks. If only
    the first rank calls it, the checkpoint is saved without the random states of the others, after one warning. With
    FSDP every rank must call it; the files are those of one process, but for `optimizer.safetensors`.

    An existing directory is replaced atomically by the new one; files in it that are not ours are kept. The saves of
    one parent directory share one checkpointer. It is drained by `accelerator.end_training()` and at interpreter exit.
    `checkpointer` selects another one, whose root must be that parent.

    If `accelerator` is not one of accelerate's (a stand-in in a test), the calls of the original function are made at
    once, and the returned handle is done. Raises what `AsyncCheckpointer.save` raises.
    """
    if is_url(path):
        raise PlanError(f"path is {os.fspath(path)!r}, a URL; save to a directory on this machine")
    root, directory = os.path.split(os.path.realpath(os.fspath(path)))
    if not directory or directory.startswith(names.WORK):
        raise PlanError(f"path is {os.fspath(path)!r}, which cannot be the directory of a checkpoint; name another one")
    step = names.trailing_number(directory) if step is None else step_number(step)
    if not _is_accelerator(accelerator):
        return _save_at_once(os.fspath(path), model, accelerator, processor, config, training_state, step)
    accelerates.refuse_what_is_sharded(accelerator)
    if checkpointer is None:
        checkpointer = shared(root)
    elif checkpointer.root != Path(root):
        raise PlanError(
            f"{os.fspath(path)!r} does not lie directly in the root of the checkpointer, {checkpointer.root}"
        )
    look_after(accelerator)
    resumable = training_state is not False
    progress = {names.PROGRESS: _render(training_state)} if isinstance(training_state, Mapping) else {}
    hooks = SaveHooks(accelerator, directory)
    objects = Objects(
        model=accelerates.prepared(accelerator, model),
        optimizer=accelerates.in_order(accelerator._optimizers) if resumable else None,
        scheduler=accelerates.in_order(accelerator._schedulers) if resumable else None,
        scaler=accelerator.scaler if resumable else None,
        state_dicts=accelerates.in_order(accelerator._models) if base_model else None,
        clean_names=True,
        processor=processor or None,
        config=_complete(config) if config else None,
        files=(lambda: accelerates.further_files(accelerator, hooks) | progress) if resumable else {},
        accelerator=accelerator if resumable else None,
        weights_name=names.state_dict(prefix),
        older_readers=True,
        dialect=Accelerate(accelerator.step),
        of_every_rank=resumable,
    )
    return checkpointer.save_as(directory, step, objects)


def _is_accelerator(accelerator: Any) -> bool:
    from accelerate import Accelerator

    return isinstance(accelerator, Accelerator)


def _complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the whole config, with the keys that readers expect at the top level."""
    complete = {**CONFIG_DEFAULTS, **config}
    complete["topk_tokens"] = int(complete["topk_tokens"] or 0)
    return complete


def _render(training_state: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(dict(training_state), indent=2).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise PlanError(f"training_state: {error}; use strings, numbers, lists and dicts") from error


def _save_at_once(
    path: str,
    model: Any,
    accelerator: Any,
    processor: Any,
    config: Mapping[str, Any] | None,
    training_state: bool | Mapping[str, Any] | None,
    step: int | None,
) -> SaveHandle:
    """Save as the original function does, for an object that only looks like an accelerator."""
    begun = time.perf_counter()
    handle = SaveHandle(step, Path(path), lambda callback: callback())
    main = getattr(accelerator, "is_main_process", None)
    if accelerator.is_local_main_process if main is None else main:
        accelerator.save_state(path)
        accelerator.unwrap_model(model).save_pretrained(path)
        if processor:
            processor.save_pretrained(path)
        rendered = {names.CONFIG: configs.render(_complete(config))} if config else {}
        if isinstance(training_state, Mapping):
            rendered[names.PROGRESS] = _render(training_state)
        for name, data in rendered.items():
            os.makedirs(path, exist_ok=True)
            with open(os.path.join(path, name), "wb") as file:
                file.write(data)
    took = time.perf_counter() - begun
    found = walk_files(path) if os.path.isdir(path) else ()
    files = {name: entry.stat(follow_symlinks=False).st_size for name, entry in found}
    timings = Timings(stall=took, staging=0.0, queued=0.0, write=took, commit=0.0, durable=took)
    info = CheckpointInfo(Path(path), step, sum(files.values()), FrozenDict(files), timings)
    handle._move(SaveState.COMMITTED, info)
    return handle
