"""The points where accelerate calls us: its load and save hooks, and two methods of `Accelerator`.

The two methods wait for pending saves. They are wrapped on the class, because another accelerator of the process may
load what this one saves. An accelerator itself gets only load hooks, which are functions of this module. So it can be
pickled, copied and freed as before.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import torch

from .. import loading as restore
from .._capture.processor import read_files
from .._capture.scratch import in_scratch
from .._capture.sharding import refuse_shares
from .._capture.state_dict import StateDict
from .._capture.tensor_map import has_no_storage
from .._capture.training_state import torch_save
from .._disk import manifests
from .._format import names
from .._restore.accelerated import by_name, is_fsdp, matched
from ..errors import CheckpointError, PlanError
from ..events import logger
from .shared import close_shared, wait_for, wait_for_all

# (accelerator, `strict`) of the load_state() that runs
_LOADING: ContextVar[tuple[Any, bool] | None] = ContextVar("loading", default=None)


# -- the methods


def look_after(accelerator: Any) -> None:
    """Wrap two methods on the accelerator's class.

    `end_training()` first waits for the pending saves and raises their failures. `load_state()` first waits for the
    save that it loads, and for every copy of objects that it changes.
    """
    for owner in type(accelerator).__mro__:
        for name, wrap in (("load_state", _waiting_load_state), ("end_training", _draining_end_training)):
            method = vars(owner).get(name)
            if method is not None and not hasattr(method, "_vembed_async_ckpt"):
                wrapped: Any = wrap(method)
                wrapped._vembed_async_ckpt = True
                setattr(owner, name, wrapped)


def _waiting_load_state(load_state: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load_state)
    def wait_and_load_state(self: Any, input_dir: str | None = None, *args: Any, **kwargs: Any) -> Any:
        if input_dir is not None:
            wait_for(os.path.realpath(os.path.expanduser(input_dir)))
        elif self.project_dir is not None:
            wait_for_all(os.path.realpath(os.path.join(self.project_dir, "checkpoints")))
        restore.wait_for_copies()
        hooks = self._load_model_state_pre_hook
        directory = _directory_to_load(self, input_dir)
        if directory is not None and _only_we_can_load(self, directory):
            if load_models not in hooks.values():
                raise CheckpointError(
                    f"{directory}: accelerate cannot load it with FSDP, or the training that saved it had FSDP: call "
                    "vembed_async_ckpt.integrations.accelerate.attach(accelerator) first"
                )
            restore.load(directory, accelerator=self, strict=bool(kwargs.get("strict", True)))
            return None
        for key in [key for key, hook in hooks.items() if hook is load_models]:
            hooks.move_to_end(key)  # the user's own hooks come first and see all models, whenever they were registered
        token = _LOADING.set((self, bool(kwargs.get("strict", True))))
        try:
            return load_state(self, input_dir, *args, **kwargs)
        finally:
            _LOADING.reset(token)

    return wait_and_load_state


def _directory_to_load(accelerator: Any, input_dir: str | os.PathLike[str] | None) -> str | None:
    """Return the directory that `load_state(input_dir)` loads; None if accelerate reports that there is none."""
    if input_dir is not None:
        return os.path.expanduser(os.fspath(input_dir))
    if accelerator.project_dir is None or not accelerator.project_configuration.automatic_checkpoint_naming:
        return None
    parent = os.path.join(accelerator.project_dir, "checkpoints")
    found = os.listdir(parent) if os.path.isdir(parent) else []
    numbered = [(number, name) for name in found if (number := names.trailing_number(name)) is not None]
    return os.path.join(parent, max(numbered)[1]) if numbered else None


def _only_we_can_load(accelerator: Any, directory: str) -> bool:
    """Return whether a directory is ours and accelerate cannot load it into what the accelerator prepared."""
    if not os.path.lexists(os.path.join(directory, names.MANIFEST)):
        return False
    return is_fsdp(accelerator) or names.divided_optimizer(0) in manifests.read(directory).files


def _draining_end_training(end_training: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(end_training)
    def drain_and_end_training(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            close_shared()
        finally:
            end_training(self, *args, **kwargs)

    return drain_and_end_training


# -- loading


def load_models(models: list[Any], input_dir: str) -> None:
    """Restore the `models` that other hooks left in the list, from a directory of ours.

    This is the load hook of `attach`.

    Empties the list, so that accelerate does not load the models again. Does nothing for a directory that is not ours,
    or that has weights only from a save hook: accelerate loads that.
    """
    if not models or not os.path.lexists(os.path.join(input_dir, names.MANIFEST)):
        return
    saved = manifests.read(os.fspath(input_dir)).names
    accelerator, strict = _LOADING.get() or (None, True)
    try:
        chosen = matched(saved, models, () if accelerator is None else accelerator._models, os.fspath(input_dir))
    except CheckpointError:
        if _stock_can_load(input_dir, len(models)):
            return
        raise
    if chosen:
        with warnings.catch_warnings(record=True) as said:  # accelerate does not warn of what `strict=False` skips
            warnings.simplefilter("always")
            restore.load(input_dir, model=by_name(chosen), strict=strict)
        for warning in said:
            logger.info("%s", warning.message)
        models.clear()


load_models.loads_models_of_ours = True  # type: ignore[attr-defined]


def _stock_can_load(directory: str, count: int) -> bool:
    """Return whether a save hook wrote the missing weights under the names that accelerate reads."""
    return all(
        any(
            os.path.isfile(os.path.join(directory, name(index)))
            for name in (names.plain_weights, names.pickled_weights)
        )
        for index in range(count)
    )


# -- saving


class SaveHooks:
    """What the save hooks of an accelerator leave to be saved.

    `weights`: accelerate's first, second, ... weights. Each is a model, if its state is unchanged, or the `StateDict`
    that a hook has changed or put in its place.
    """

    def __init__(self, accelerator: Any, directory: str) -> None:
        """`directory`: the name of the checkpoint."""
        self._accelerator = accelerator
        self._directory = directory
        self.weights: list[Any] = list(accelerator._models)

    def files(self) -> dict[str, bytes]:
        """Call the hooks. Return the files that they wrote into their directory, which has the checkpoint's name."""
        if not self._accelerator._save_model_state_pre_hook:
            return {}
        if not is_fsdp(self._accelerator):
            refuse_shares(self.weights)
        self.weights, files = in_scratch(self._call)
        return files

    def _call(self, scratch: str) -> tuple[list[Any], dict[str, bytes]]:
        """Return (weights, files) that the hooks leave. May be called again: nothing is kept from the first call."""
        divided = is_fsdp(self._accelerator)  # then accelerate gives the hooks no weights
        models = [] if divided else self.weights
        states = [self._accelerator.get_state_dict(model, unwrap=False) for model in models]
        before = {id(state): (model, _content(state)) for model, state in zip(models, states, strict=True)}
        left = list(states)
        directory = os.path.join(scratch, self._directory)
        os.mkdir(directory)
        for hook in list(self._accelerator._save_model_state_pre_hook.values()):
            hook(self._accelerator._models, left, directory)
        files = {content.name: content.data for content in read_files(directory)}
        if divided:
            if left:
                raise PlanError("a save hook put a state_dict into the list of weights, which is empty with FSDP")
            return self.weights, files
        return [_what_is_left(state, before.get(id(state))) for state in left], files

    def pickled(self) -> dict[str, bytes]:
        """Return the weights as `save_state(safe_serialization=False)` writes them."""
        refuse_shares(self._accelerator._models)
        states = [
            dict(left.tensors) if isinstance(left, StateDict) else self._accelerator.get_state_dict(left, unwrap=False)
            for left in self.weights
        ]
        return {names.pickled_weights(index): torch_save(state) for index, state in enumerate(states)}


def _content(state: Mapping[str, Any]) -> list[tuple[str, Any, object]]:
    """Return the names, the values, and the memory of each value: a hook may give a tensor other memory."""
    return [(name, value, _where(value)) for name, value in state.items()]


def _where(value: Any) -> object:
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided or has_no_storage(value):
        return None
    return value.device, value.data_ptr(), value.dtype, value.shape, value.stride()


def _what_is_left(state: Any, before: tuple[Any, list[tuple[str, Any, object]]] | None) -> Any:
    if not isinstance(state, Mapping):
        raise PlanError(
            f"a save hook put a {type(state).__qualname__} into the list of weights; put a state_dict there"
        )
    if before is not None:
        model, content = before
        now = _content(state)
        if len(now) == len(content) and all(
            name == other and value is same and lies == lay
            for (name, value, lies), (other, same, lay) in zip(now, content, strict=True)
        ):
            return model
    return StateDict(dict(state))
