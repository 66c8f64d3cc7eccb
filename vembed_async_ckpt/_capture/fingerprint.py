"""Detects whether a module has changed since its plan was made."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, is_
from typing import Any

import torch

from .._tensor_guard import TensorGuard
from .settings import Settings


class Fingerprint:
    """A record of a module's structure, tensors and settings, and a check whether they are still the same.

    The check runs before every save, so its loops run in C.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        watched: Sequence[torch.Tensor],
        empty: Sequence[torch.Tensor],
        left_out: Sequence[torch.Tensor],
        ties: Sequence[tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        """Record the module.

        `watched`: the tensors that are stored.
        `empty`: tensors without elements.
        `left_out`: frozen parameters that are not stored.
        `ties`: pairs of tensors that share memory.
        """
        modules = list(module.modules())
        holders: list[dict[Any, Any]] = [h for m in modules for h in (m._modules, m._parameters, m._buffers)]
        holders += [hooks for m in modules for hooks in (m._state_dict_hooks, m._state_dict_pre_hooks)]
        entries = [(holder, key, value) for holder in holders for key, value in holder.items()]
        entries += [(vars(m), name, vars(m).get(name)) for m in modules for name in _REPLACED]
        self._holders = [holder for holder, _, _ in entries]
        self._keys = [key for _, key, _ in entries]
        self._values = [value for _, _, value in entries]
        sets = [m._non_persistent_buffers_set for m in modules]
        self._vacant = [holder for holder in (*holders, *sets) if not holder]
        self._filled = [holder for holder in holders if holder]
        self._counts = [len(holder) for holder in self._filled]
        self._sets = [names for names in sets if names]
        self._copies = [set(names) for names in self._sets]
        self._watched = list(watched)
        self.looks = TensorGuard(self._watched)
        self._empty = list(empty)
        self._left_out = list(left_out)
        self._one = [one for one, _ in ties]
        self._other = [other for _, other in ties]
        self._settings = _settings_of(module)
        self.stable = not _decides_anew(module) and self._settings.unchanged()

    def matches(self) -> bool:
        """Return whether structure, identity, looks, ties and configuration are still as recorded."""
        return (
            all(map(is_, map(dict.get, self._holders, self._keys), self._values))
            and not any(self._vacant)
            and list(map(len, self._filled)) == self._counts
            and self._sets == self._copies
            and self.looks.holds(self._watched)
            and not any(map(torch.Tensor.numel, self._empty))
            and not any(map(_REQUIRES_GRAD, self._left_out))
            and list(map(torch.Tensor.data_ptr, self._one)) == list(map(torch.Tensor.data_ptr, self._other))
            and self._settings.unchanged()
        )


_REQUIRES_GRAD = attrgetter("requires_grad")


# Attributes that `save_pretrained` of transformers and PEFT reads, besides tensors and structure.
_READ = (
    "config", "generation_config", "peft_config", "hf_quantizer", "hf_device_map", "all_tied_weights_keys",
    "_tied_weights_keys", "_keys_to_ignore_on_save", "_weight_conversions", "_hf_peft_config_loaded", "_auto_class",
)  # fmt: skip
# Methods that decide what a state_dict contains. A program may replace them on one module or in a class.
_REPLACED = ("state_dict", "_save_to_state_dict")
_OF_EVERY_MODULE = frozenset(vars(torch.nn.Module())) | {"training"}
_KNOWN = ("transformers", "peft")
_LOOK_AT_NOTHING_ELSE = ("torch", *_KNOWN)  # packages with methods that depend only on what is recorded here


def _settings_of(module: torch.nn.Module) -> Settings:
    """Record the data that `save_pretrained` of the module, or of a module inside it, writes.

    This data is the configs of models and PEFT's active adapters. A `save_pretrained` of another library may write
    more. In that case record also the attributes of all modules with classes that are not from transformers or PEFT.
    """
    settings = Settings()
    foreign = False
    for part in module.modules():
        saves = getattr(type(part), "save_pretrained", None)
        if part is module or callable(saves):
            for name in _READ:
                settings.follow_attribute(part, name)
            settings.follow_entry(vars(part), "save_pretrained")
        if "_active_adapter" in vars(part):
            settings.follow_entry(vars(part), "_active_adapter")
        foreign = foreign or (callable(saves) and _package(saves) not in _KNOWN)
    for kind in set(map(type, module.modules())):
        for name in (*_REPLACED, "save_pretrained"):
            settings.follow_attribute(kind, name)
    for part in module.modules() if foreign else ():
        if _package(type(part)) not in _KNOWN:
            settings.follow_length(vars(part))
            for name, value in vars(part).items():
                if name not in _OF_EVERY_MODULE and not isinstance(value, torch.Tensor):
                    settings.follow_entry(vars(part), name)
    return settings


def _package(value: Any) -> str:
    return str(getattr(value, "__module__", "")).partition(".")[0]


def _decides_anew(module: torch.nn.Module) -> bool:
    """Return whether a function or method of the program decides at each call what the state_dict contains."""
    for kind in set(map(type, module.modules())):
        if any(_package(getattr(kind, name)) not in _LOOK_AT_NOTHING_ELSE for name in _REPLACED):
            return True
    for part in module.modules():
        if any(name in vars(part) for name in (*_REPLACED, "save_pretrained")):
            return True
        for hooks in (part._state_dict_hooks, part._state_dict_pre_hooks):
            if any(_package(hook) != "torch" for hook in hooks.values()):
                return True
    return False
